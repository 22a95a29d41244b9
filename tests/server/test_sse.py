"""Frames of streams. Oracle: the same event serialised as a whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxillama_torch.config import ServerConfig
from oxillama_torch.server import sse
from oxillama_torch.server.openai.chat import ChatForm
from oxillama_torch.server.openai.completions import CompletionForm
from oxillama_torch.server.output import Finished, Piece, Started
from oxillama_torch.server.schemas.completions import CompletionBody
from oxillama_torch.server.service import Service

OUTPUTS = [
    Started(0, 2, 0, None),
    Started(1, 2, 0, None),
    Piece(0, "a", 5, None),
    Piece(1, "", 6, None),
    Piece(1, 'é"\n\u2028\0text\0', 7, None),
    Piece(0, "z", 8, None),
    Piece(0, "held back", None, None),
    Finished(0, "stop", 3),
    Finished(1, "length", 2),
]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_frame_with_any_text(text):
    def payload(text):
        return {"model": 'a "text":"" b', "choices": [{"text": text, "n": None}]}

    assert sse.TextFrame(payload(sse.TextFrame.HOLE))(text) == sse.frame(payload(text))


def chat(service, usage):
    return ChatForm(service, 2, False, usage)


def completion(service, usage):
    body = {"model": "m", "prompt": [1, 2], "stream": True, "n": 2}
    body |= {"stream_options": {"include_usage": True}} if usage else {}
    return CompletionForm(service, CompletionBody.model_validate(body), [[1, 2]], 2)


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("usage", [False, True])
def test_frames_are_the_chunks(make, usage, llm):
    service = Service('m"', None, llm.tokenizer, None, ServerConfig(), "fp")
    quick, plain = make(service, usage), make(service, usage)
    plain._head = quick._head
    for output in OUTPUTS:
        frames = quick.frames(output)
        assert frames == b"".join(map(sse.frame, plain.chunks(output)))
        for frame in frames.decode().split("\n\n")[:-1]:
            assert json.loads(frame.removeprefix("data: "))["choices"][0]["index"] == output.index
    assert quick.last_chunk() == plain.last_chunk()
