"""The whole way: a real server process, real sockets, the openai SDK.

Oracle: the SDK's own parsing, and ``LLM.chat`` for the text.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from waiting import PATIENCE_S, until

from oxillama_torch.sampling.params import SamplingParams

QUESTION = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    port = _free_port()
    command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", str(port)]
    command += ["--device", "cpu", "--max-streams", "40"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            _wait_until_ready(process, url)
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
        output = process.stdout.read()
    assert f"on {url}" in output
    assert "curl" in output
    assert "Traceback" not in output


def _wait_until_ready(process, url):
    deadline = time.monotonic() + 2 * PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
                assert json.load(response)["status"] == "ok"
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not become ready")


@pytest.fixture
def sdk(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def _stats(server, name):
    with urllib.request.urlopen(f"{server}/stats", timeout=PATIENCE_S) as response:
        return json.load(response)[name]


def test_sdk_chats(sdk, llm):
    model = sdk.models.list().data[0].id
    answer = sdk.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=30
    )
    expected = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=30))
    assert answer.choices[0].message.content == expected.text


def test_sdk_streams(sdk, llm):
    model = sdk.models.list().data[0].id
    stream = sdk.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=30, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    expected = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=30))
    assert text == expected.text


def test_sdk_sees_typed_errors(sdk):
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="nope", messages=QUESTION)
    model = sdk.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as error:
        sdk.completions.create(model=model, prompt="x " * 5000)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_client_that_leaves_frees_its_pages(server, sdk, stream):
    model = sdk.models.list().data[0].id
    body = json.dumps(
        {"model": model, "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": stream}
    ).encode()
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        until(lambda: _stats(server, "running") == 1)
    until(lambda: _stats(server, "running") == 0)


def test_truncated_body_is_400(server):
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{}")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100).startswith(b"HTTP/1.1 400")


def _raw(server, head, chunks):
    """The status line and body of the answer to a request written by hand."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head)
        with contextlib.suppress(ConnectionError):
            for chunk in chunks:
                sock.sendall(chunk)
        data = b""
        with contextlib.suppress(ConnectionError):
            while received := sock.recv(65536):
                data += received
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_chunked_body_beyond_the_limit_is_413_and_not_cut(server):
    # Cut at the limit it would be valid JSON: blanks, and the document before them.
    document = b'{"model": "x", "prompt": "y"}'
    chunks = [b"%X\r\n%b\r\n" % (len(document), document)]
    chunks += [b"10000\r\n" + b" " * 65536 + b"\r\n"] * 80 + [b"0\r\n\r\n"]
    status, error = _raw(server, b"Transfer-Encoding: chunked\r\n\r\n", chunks)
    assert (status, error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("chunk", [b"0x5\r\nabcde\r\n0\r\n\r\n", b"5;a\nb\r\nabcde\r\n0\r\n\r\n"])
def test_malformed_chunks_are_400(server, chunk):
    assert _raw(server, b"Transfer-Encoding: chunked\r\n\r\n", [chunk])[0] == 400


@pytest.mark.parametrize(
    "head",
    [b"Content-Type: text/plain", b"Content-Type: application/json; charset=latin1",
     b"Content-Type: application/json\r\nContent-Encoding: gzip"],
)  # fmt: skip
def test_bodies_of_another_kind_are_415(server, head):
    status, error = _raw(server, head + b"\r\nContent-Length: 2\r\n\r\n", [b"{}"])
    assert (status, error["code"]) == (415, "unsupported_media_type")


def test_second_server_on_the_port_says_so(server):
    port = server.rsplit(":", 1)[1]
    result = subprocess.run(
        [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", port],
        capture_output=True, text=True, timeout=2 * PATIENCE_S,
    )  # fmt: skip
    assert result.returncode == 5
    assert result.stderr.count("\n") == 1
    assert port in result.stderr


def test_a_failed_start_says_why_in_one_line(tmp_path):
    (tmp_path / "keys").write_text("key limit=4\n")
    result = subprocess.run(
        [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", "0", "--device", "cpu",
         "--api-key-file", str(tmp_path / "keys")],
        capture_output=True, text=True, timeout=2 * PATIENCE_S, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1, result.stderr
    assert "keys, line 1" in result.stderr


@pytest.mark.parametrize(
    ("content", "code"), [(None, 2), (b"", 6), (b"GGUF", 6), (b"not a model" * 10, 6)]
)
def test_bad_file_ends_with_one_line(tmp_path, content, code):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-m", "oxillama_torch.cli", "serve", "--model", str(path)],
        capture_output=True, text=True, timeout=2 * PATIENCE_S, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
