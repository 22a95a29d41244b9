"""Thousands of damaged files: each opens or raises GGUFError, soon and without much memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf import Metadata, read_gguf
from tests.support.gguf_bytes import every_type

FILES = [every_type(version).build() for version in (1, 2, 3)]
# Numbers that mean something somewhere: value and tensor types, lengths, the ends of ranges.
NUMBERS = [*range(14), 24, 31, 32, 39, 40, 64, 128, 255, 1 << 16, 2_000_000]
NUMBERS += [(1 << bits) + delta for bits in (31, 32, 40, 63) for delta in (-1, 0, 1)]
NUMBERS += [(1 << 64) - delta for delta in (1, 4, 32)]

position = st.integers(0, len(FILES[2]) - 1)
number = st.sampled_from(NUMBERS) | st.integers(0, (1 << 64) - 1)
damage = st.one_of(
    st.tuples(st.just("write"), position, st.sampled_from([1, 2, 4, 8]), number),
    st.tuples(st.just("flip"), position, st.integers(0, 7), st.none()),
    st.tuples(st.just("delete"), position, st.integers(1, 40), st.none()),
    st.tuples(st.just("repeat"), position, st.integers(1, 80), st.none()),
    st.tuples(st.just("cut"), position, st.none(), st.none()),
)


def apply(data: bytearray, kind: str, at: int, size: int, value: int) -> None:
    at = min(at, len(data) - 1)
    if kind == "write":
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    elif kind == "flip":
        data[at] ^= 1 << size
    elif kind == "delete":
        del data[at : at + size]
    elif kind == "repeat":
        data[at:at] = data[at : at + size]
    else:
        del data[at + 1 :]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations") / "m.gguf"


@settings(
    max_examples=2000, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(file=st.sampled_from(FILES), damages=st.lists(damage, min_size=1, max_size=4))
def test_damaged_files(path: Path, file: bytes, damages: list[tuple]) -> None:
    data = bytearray(file)
    for one in damages:
        if data:
            apply(data, *one)
    path.write_bytes(data)
    tracemalloc.start()
    start = time.process_time()
    try:
        read_everything(path)
    except GGUFError as error:
        assert str(path) in str(error)
    finally:
        spent, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Seconds of CPU, not of the clock: a busy machine is no fault of the reader.
    assert spent < 1.0
    assert peak < 1 << 20


def read_everything(path: Path) -> None:
    with read_gguf(path) as model:
        for name, info in model.tensors.items():
            assert model.data(name).sum() >= 0
            assert model.data(name).shape == (info.nbytes,)
        metadata = Metadata(model.metadata, str(path))
        assert metadata.unread() == [] or metadata.architecture
