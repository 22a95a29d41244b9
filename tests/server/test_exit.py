"""How a server ends that is told to end at once (SIGINT)."""

import http.client
import json
import urllib.parse

from server_process import running_server
from waiting import PATIENCE_S


def test_a_stream_in_progress_is_told_of_the_end():
    body = {"model": "m", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
    body |= {"max_tokens": 100_000, "ignore_eos": True, "temperature": 1}
    headers = {"Content-Type": "application/json"}
    with running_server("--alias", "m") as url:
        client = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=PATIENCE_S)
        client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = client.getresponse()
        while b'"content"' not in answer.readline():
            pass
    rest = answer.read()
    client.close()
    assert b"the server is shutting down" in rest
    assert rest.endswith(b"data: [DONE]\n\n")
