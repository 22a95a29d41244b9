"""The output thread over socket pairs. Oracle: what was put in comes out, in order, once.

The engine is scripted: it hands out the events that a test gives it.
"""

import itertools
import json
import socket
import threading
import time

import pytest
from scripted_engine import ScriptedEngine

from oxillama_torch.config import ServerConfig
from oxillama_torch.engine.request import (
    ErrorEvent,
    FinishEvent,
    PromptEvent,
    TokenEvent,
    TokenLogprobs,
)
from oxillama_torch.errors import EngineError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.event_stream import EventStream
from oxillama_torch.server.openai.chat import ChatForm
from oxillama_torch.server.output import Generation
from oxillama_torch.server.output_thread import OutputThread
from oxillama_torch.server.service import Service


class Client:
    """A stream whose client end is in the test's hands."""

    def __init__(self, output, llm, *, chunked=False, buffer_bytes=None):
        self.engine = ScriptedEngine()
        service = Service("m", self.engine, llm.tokenizer, None, ServerConfig(), "b0")
        generation = Generation(service, [[1]], SamplingParams())
        self.send = next(iter(self.engine.senders.values()))
        form = ChatForm(service, 1, False, False)
        self.ours, self.sock = socket.socketpair()
        if buffer_bytes:
            self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        self.sock.settimeout(10)
        events = EventStream(generation, form, "id")
        self.thread = threading.Thread(
            target=output.write, args=(events, self.ours), kwargs={"chunked": chunked}
        )
        self.thread.start()

    def finish(self, tokens=()):
        self.send(PromptEvent(1, 0))
        for token_id in tokens:
            self.send(TokenEvent(token_id))
        self.send(FinishEvent("length", len(tokens)))

    def read(self):
        """Everything up to the end of the stream."""
        received = b""
        while not received.endswith(b"data: [DONE]\n\n"):
            received += self.sock.recv(65536)
        return received

    def text(self):
        frames = [f for f in self.read().decode().split("\n\n") if f.startswith("data: {")]
        deltas = [json.loads(frame[6:])["choices"][0]["delta"] for frame in frames]
        return "".join(delta.get("content", "") for delta in deltas)

    def close(self):
        self.sock.close()
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()
        self.ours.close()


@pytest.fixture
def output():
    output = OutputThread(ping_interval_s=0.2, send_timeout_s=0.5)
    yield output
    output.close()


def test_every_stream_gets_its_own_tokens_in_order(output, llm):
    ids = llm.tokenize("def f(x):\n    return x + 1\n" * 10)
    clients = [Client(output, llm) for _ in range(20)]
    shifted = [ids[i:] + ids[:i] for i in range(len(clients))]
    for client in clients:
        client.send(PromptEvent(1, 0))
    for step in range(len(ids)):
        for client, tokens in zip(clients, shifted):
            client.send(TokenEvent(tokens[step]))
    for client, tokens in zip(clients, shifted):
        client.send(FinishEvent("length", len(tokens)))
        assert client.text() == llm.detokenize(tokens)
        client.close()


def test_tokens_that_came_together_leave_in_one_chunk(output, llm):
    """Who lags gets several texts in one chunk: none is lost, split or out of order."""
    ids = llm.tokenize("naïve 🙂 = 'é' + 1\n" * 10)
    service = Service("m", engine := ScriptedEngine(), llm.tokenizer, None, ServerConfig(), "b0")
    generation = Generation(service, [[1]], SamplingParams())
    send = next(iter(engine.senders.values()))
    for event in (PromptEvent(1, 0), *map(TokenEvent, ids), FinishEvent("length", len(ids))):
        send(event)
    events = EventStream(generation, ChatForm(service, 1, False, True), "id")
    frames = events.ready().decode().split("\n\n")[:-1]
    assert events.ended and frames.pop() == "data: [DONE]"
    first, text, last, usage = (json.loads(frame[6:]) for frame in frames)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text["choices"][0]["delta"] == {"content": llm.detokenize(ids)}
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == generation.meter.completion_tokens == len(ids)


def test_logprobs_keep_a_chunk_per_token(llm):
    ids = llm.tokenize("import os")
    service = Service("m", engine := ScriptedEngine(), llm.tokenizer, None, ServerConfig(), "b0")
    generation = Generation(service, [[1]], SamplingParams(logprobs=0))
    send = next(iter(engine.senders.values()))
    for token_id in ids:
        send(TokenEvent(token_id, TokenLogprobs(token_id, -0.5, 1)))
    frames = EventStream(generation, ChatForm(service, 1, True, False), "id").ready()
    entries = [
        json.loads(f[6:])["choices"][0]["logprobs"] for f in frames.decode().split("\n\n")[:-1]
    ]
    assert [len(entry["content"]) for entry in entries] == [1] * len(ids)


def test_chunks_are_framed(output, llm):
    client = Client(output, llm, chunked=True)
    client.finish(llm.tokenize("import os"))
    received = b""
    while b"[DONE]\n\n\r\n" not in received:
        received += client.sock.recv(65536)
    rest, body = received, b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    assert body.endswith(b"data: [DONE]\n\n")
    client.close()


def test_error_is_an_event_and_the_end(output, llm):
    client = Client(output, llm)
    client.send(ErrorEvent(EngineError("out of luck")))
    assert b'"message":"out of luck"' in client.read()
    client.close()


def test_silence_is_filled_with_pings(output, llm):
    client = Client(output, llm)
    client.send(PromptEvent(1, 0))
    received = b""
    while received.count(b": ping\n\n") < 3:
        received += client.sock.recv(4096)
    client.finish()
    client.close()


def test_reader_that_stays_behind_loses_its_stream_alone(output, llm):
    """With the socket full, nothing waits: the other stream goes on, this one is cancelled."""
    token = llm.tokenize("import os")[0]
    slow, quick = Client(output, llm, buffer_bytes=4096), Client(output, llm)
    stop = time.monotonic() + 10
    for count in itertools.count(1):
        slow.send(TokenEvent(token))
        if slow.engine.cancelled:
            break
        assert time.monotonic() < stop
        if count % 100 == 0:
            time.sleep(0.01)
    quick.finish([token])
    assert quick.text() == llm.detokenize([token])
    slow.close()
    quick.close()


def test_client_that_leaves_is_cancelled(output, llm):
    client = Client(output, llm)
    client.sock.close()
    stop = time.monotonic() + 5
    while not client.engine.cancelled:
        client.send(TokenEvent(5))
        assert time.monotonic() < stop
        time.sleep(0.01)
    client.close()


def test_closing_ends_streams(llm):
    output = OutputThread(ping_interval_s=5, send_timeout_s=5)
    client = Client(output, llm)
    client.send(PromptEvent(1, 0))
    client.sock.recv(10)
    output.close()
    client.close()
    assert client.engine.cancelled
