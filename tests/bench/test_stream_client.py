"""The client of load tests. Oracle: a server that writes given bytes (RFC 9112 chunks, SSE)."""

import asyncio
import contextlib

import pytest

from oxillama_torch.bench.stream_client import post_stream
from oxillama_torch.errors import EngineError

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b': ping\n\ndata: {"n": 1}\n\nevent: x\ndata: {"n": 2}\n\ndata: [DONE]\n\n'


def chunks(body, size):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def events(*writes):
    """What the client makes of an answer that is written in these parts."""
    got = []

    async def run():
        served = asyncio.Event()

        async def serve(reader, writer):
            with contextlib.suppress(ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
                for data in writes:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0.005)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            served.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}/v1/x"
            try:
                await post_stream(url, {"a": 1}, {}, lambda event, now: got.append(event["n"]))
            finally:
                await served.wait()

    asyncio.run(run())
    return got


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("cut", [1, 50, 80])
def test_however_it_is_cut(size, cut):
    answer = HEAD + chunks(BODY, size) + b"0\r\n\r\n"
    assert events(answer[:cut], answer[cut : 2 * cut], answer[2 * cut :]) == [1, 2]


def test_a_body_may_end_with_the_connection():
    assert events(b"HTTP/1.0 200 OK\r\n\r\n" + BODY) == [1, 2]


def test_a_cut_answer_and_a_refusal_are_errors():
    with pytest.raises(EngineError, match="cut"):
        events(HEAD + chunks(BODY, 20))
    with pytest.raises(EngineError, match="429: slow down"):
        events(b"HTTP/1.1 429 Too Many\r\nContent-Length: 9\r\n\r\nslow down")
