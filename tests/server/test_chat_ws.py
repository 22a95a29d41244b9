"""Chat over WebSockets, at a real server. Oracles: two client libraries, the library for texts."""

import contextlib
import json
import socket
import struct
import urllib.request

import pytest
import websocket
from server_process import running_server
from waiting import PATIENCE_S, until
from websockets.sync.client import connect

from oxillama_torch.sampling.params import SamplingParams

QUESTION = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
GREEDY = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
LONG = {"messages": QUESTION, "max_tokens": 800, "ignore_eos": True}


KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server():
    options = ("--max-streams", "12", "--cors-origin", "https://ok.example", "--api-key", KEY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OXILLAMA_PING_INTERVAL_S", "1")
        with running_server(*options) as url:
            yield url.removeprefix("http://")


@pytest.fixture
def ws(server):
    with opened(server) as ws:
        yield ws


def opened(server):
    return connect(f"ws://{server}/v1/chat/ws", additional_headers=HEADERS)


@contextlib.contextmanager
def raw_client(server):
    ws = websocket.create_connection(
        f"ws://{server}/v1/chat/ws", timeout=PATIENCE_S, header=HEADERS
    )
    try:
        yield ws
    finally:
        # close() leaves the socket open once the other side has closed.
        ws.close()
        ws.shutdown()


def ask(ws, **fields):
    ws.send(json.dumps(fields))


def answers(ws, *last, timeout=PATIENCE_S):
    """Messages up to the first whose type is among ``last``."""
    got = [json.loads(ws.recv(timeout=timeout))]
    while got[-1]["type"] not in last:
        got.append(json.loads(ws.recv(timeout=timeout)))
    return got


def stats(server, name):
    request = urllib.request.Request(f"http://{server}/stats", headers=HEADERS)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)[name]


def active(server):
    with urllib.request.urlopen(f"http://{server}/admin/stats", timeout=PATIENCE_S) as response:
        return json.load(response)["active_requests"]


def test_oxillamas_frames_carry_real_tokens(ws, llm):
    expected = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=24))
    for _ in range(2):  # several requests on one connection
        ask(ws, **GREEDY)
        *tokens, done = answers(ws, "done", "error")
        assert {t["type"] for t in tokens} == {"token"}
        assert "".join(t["delta"] for t in tokens) == expected.text
        assert done["finish_reason"] == expected.finish_reason
        assert done["usage"]["completion_tokens"] == len(expected.token_ids)
        assert done["usage"]["prompt_tokens"] == len(llm.chat_ids(QUESTION))
        assert "id" not in done


def test_websocket_client_understands_it_too(server, llm):
    expected = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=24)).text
    with raw_client(server) as ws:
        ws.ping("hello")
        ws.send(json.dumps(GREEDY))
        opcode, frame = ws.recv_data_frame(control_frame=True)
        assert (opcode, frame.data) == (websocket.ABNF.OPCODE_PONG, b"hello")
        text = ""
        while (message := json.loads(ws.recv()))["type"] == "token":
            text += message["delta"]
        assert (message["type"], text) == ("done", expected)


def test_requests_at_once_are_told_apart(ws):
    alone = {}
    for seed in range(4):
        ask(ws, **{**GREEDY, "temperature": 1, "seed": seed})
        alone[seed] = "".join(m.get("delta", "") for m in answers(ws, "done"))
    for seed in range(4):
        ask(ws, **{**GREEDY, "temperature": 1, "seed": seed, "id": f"r{seed}"})
    texts, done = {}, set()
    while len(done) < 4:
        [message] = answers(ws, "token", "done")
        texts[message["id"]] = texts.get(message["id"], "") + message.get("delta", "")
        if message["type"] == "done":
            done.add(message["id"])
    assert texts == {f"r{seed}": text for seed, text in alone.items()}


def test_cancel_ends_one_request_and_frees_it(server, ws):
    ask(ws, **LONG, id=1)
    ask(ws, **LONG, id="two")
    answers(ws, "token")
    ask(ws, type="cancel", id=1)
    *_, done = answers(ws, "done")
    assert (done["id"], done["finish_reason"]) == (1, "cancelled")
    until(lambda: stats(server, "running") == 1)
    ask(ws, type="cancel", id=1)
    *_, error = answers(ws, "error")
    assert (error["code"], error["id"]) == ("not_found", 1)
    ask(ws, type="cancel", id="two")
    assert answers(ws, "done")[-1]["id"] == "two"
    ask(ws, type="ping", id=5)
    assert answers(ws, "pong")[-1] == {"type": "pong", "id": 5}


@pytest.mark.parametrize("how", ["closes", "vanishes"])
def test_a_client_that_leaves_frees_its_requests(server, how):
    with raw_client(server) as ws:
        ws.send(json.dumps(LONG))
        while not ws.recv():
            pass
        assert stats(server, "running") == 1
        if how == "vanishes":
            option = struct.pack("ii", 1, 0)
            ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            ws.shutdown()
    until(lambda: stats(server, "running") == 0 and active(server) == 0)


HI = '{"messages": [{"role": "user", "content": "x"}], '


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("[]", "invalid_type", None),
        ('{"a":1,"a":2}', "invalid_json", None),
        ("[" * 5000, "invalid_json", None),
        ("{}", "missing_required_parameter", "messages"),
        ('{"messages": []}', "invalid_value", "messages"),
        (HI + '"model": "nope"}', "model_not_found", "model"),
        (HI + '"n": 2}', "unsupported_parameter", "n"),
        (HI + '"store": true}', "unsupported_parameter", "store"),
        (HI + '"temperature": "x"}', "invalid_type", "temperature"),
        ('{"type": "nope"}', "invalid_value", "type"),
        ('{"id": [1]}', "invalid_type", "id"),
        ('{"type": "cancel"}', "not_found", "id"),
    ],
)
def test_bad_messages_are_answered_and_the_connection_stays(ws, text, code, param):
    ws.send(text)
    [error] = answers(ws, "error")
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    ask(ws, type="ping")
    assert answers(ws, "pong") == [{"type": "pong"}]


def test_a_binary_frame_is_answered_and_ends_the_connection(server):
    with opened(server) as ws:
        ws.send(b"\x00\x01")
        [error] = answers(ws, "error")
        assert error["code"] == "invalid_type"
        with pytest.raises(Exception, match="1003"):
            ws.recv(timeout=PATIENCE_S)


def test_a_message_in_fragments_is_one(ws):
    text = json.dumps(GREEDY)
    ws.send([text[:10], text[10:11], text[11:]])
    assert answers(ws, "done", "error")[-1]["type"] == "done"


def test_long_messages_end_the_connection(server):
    size = 5 * 1024 * 1024
    for fragments in (1, 50):
        with opened(server) as ws:
            with contextlib.suppress(Exception):
                ws.send(["x" * (size // fragments)] * fragments if fragments > 1 else "x" * size)
            with pytest.raises(Exception, match=r"1009|reset|close frame"):
                ws.recv(timeout=PATIENCE_S)


def test_protocol_errors_end_the_connection(server):
    with raw_client(server) as ws:
        ws.sock.sendall(b"\xff\xff\xff\xff\xff\xff\xff")
        opcode, data = ws.recv_data()
        assert (opcode, struct.unpack("!H", data[:2])[0]) == (websocket.ABNF.OPCODE_CLOSE, 1002)


def test_too_many_requests_on_one_connection(ws):
    for index in range(17):
        ask(ws, **LONG, id=index)
    *_, error = answers(ws, "error")
    assert (error["code"], error["id"]) == ("overloaded", 16)


START = b"GET /v1/chat/ws HTTP/1.1\r\nHost: x\r\nX-Api-Key: %b\r\n" % KEY.encode()
HANDSHAKE = START + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
SOCKET_KEY = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
KEY_AND_VERSION = SOCKET_KEY + VERSION


def handshake(server, request):
    """The answer to an opening written by hand."""
    host, port = server.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        sock.sendall(request)
        answer = sock.recv(4096)
        while b"HTTP/1.1 101" not in answer and b'"error"' not in answer:
            answer += sock.recv(4096)
    return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (START + b"\r\n", 400),
        (b"GET /v1/chat/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", 401),
        (HANDSHAKE + SOCKET_KEY + b"\r\n", 400),
        (HANDSHAKE + VERSION + b"\r\n", 400),
        (HANDSHAKE + KEY_AND_VERSION + b"Origin: https://evil.example\r\n\r\n", 403),
        (HANDSHAKE + KEY_AND_VERSION + b"Origin: https://ok.example\r\n\r\n", 101),
        (HANDSHAKE + KEY_AND_VERSION + b"Origin: http://x\r\n\r\n", 101),
        (HANDSHAKE + KEY_AND_VERSION + b"\r\n", 101),
    ],
)
def test_what_is_no_handshake_is_refused(server, request_, status):
    assert handshake(server, request_).startswith(b"HTTP/1.1 %d" % status)


def test_connections_count_and_are_all_given_back(server):
    until(lambda: active(server) == 0)
    with contextlib.ExitStack() as held:
        for _ in range(12):
            held.enter_context(opened(server))
        assert handshake(server, HANDSHAKE + KEY_AND_VERSION + b"\r\n").startswith(b"HTTP/1.1 503")
        with urllib.request.urlopen(f"http://{server}/health", timeout=PATIENCE_S) as response:
            assert response.status == 200

    until(lambda: active(server) == 0)


def test_a_reader_that_stays_behind_loses_its_own_connection_only(server, llm):
    slow = socket.create_connection(tuple(server.split(":")), timeout=PATIENCE_S)
    with contextlib.closing(slow):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client = websocket.WebSocket()
        client.connect(f"ws://{server}/v1/chat/ws", socket=slow, header=HEADERS)
        for index in range(8):
            client.send(json.dumps({**LONG, "id": index, "logprobs": True, "top_logprobs": 20}))
        with opened(server) as ws:
            ask(ws, **GREEDY)
            assert answers(ws, "done")[-1]["type"] == "done"
    until(lambda: stats(server, "running") == 0)


def test_draining_lets_requests_end_and_closes_idle_connections(server):
    admin = urllib.request.Request(f"http://{server}/admin/drain", method="POST")
    resume = urllib.request.Request(f"http://{server}/admin/drain", method="DELETE")
    with opened(server) as idle, opened(server) as busy:
        ask(busy, **{**LONG, "max_tokens": 200})
        answers(busy, "token")
        urllib.request.urlopen(admin, timeout=PATIENCE_S).close()
        try:
            with pytest.raises(Exception, match="1001"):
                idle.recv(timeout=PATIENCE_S)
            assert answers(busy, "done", "error")[-1]["finish_reason"] == "length"
            with pytest.raises(Exception, match="1001"):
                busy.recv(timeout=PATIENCE_S)
        finally:
            urllib.request.urlopen(resume, timeout=PATIENCE_S).close()


def test_idle_connections_are_kept_with_pings(server):
    with raw_client(server) as ws:
        opcode, _ = ws.recv_data_frame(control_frame=True)
        assert opcode == websocket.ABNF.OPCODE_PING
        ws.send(json.dumps(GREEDY))
        assert json.loads(ws.recv())["type"] == "token"
