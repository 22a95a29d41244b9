"""Uploading: every byte arrives, buffers are not written while they are read, the host runs ahead.

Oracle: the bytes themselves. ``LateLane`` stands in for a stream that is slow: a copy happens when
somebody waits for it.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.models.upload import CudaLane, Uploader, uploader


class LateLane:
    """Copies as late as the rules allow.

    Attributes:
        pending: copies begun, not done;  most: the largest number of them there ever was.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.most = self.buffers = 0
        self.joined: list[torch.Tensor] = []
        self.closed = False

    def staging(self, size):
        self.buffers += 1
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def empty(self, size):
        return torch.full((size,), 0xDD, dtype=torch.uint8)

    def copy(self, to, source):
        entry = (to, source)
        self.pending.append(entry)
        self.most = max(self.most, len(self.pending))

        def wait():
            while any(entry is other for other in self.pending):
                target, held = self.pending.pop(0)  # a stream: in order
                target.copy_(held)

        return wait

    def join(self, tensor):
        self.joined.append(tensor)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("sizes", [[1], [100], [64, 64, 1], [1000, 3, 0, 130, 65]])
def test_every_byte_arrives_and_buffers_are_waited_for(sizes):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    lane = LateLane()
    upload = Uploader(lane, chunk_bytes=64)
    found = [upload(values) for values in data]
    assert [out is joined for out, joined in zip(found, lane.joined)] == [True] * len(sizes)
    chunks = sum(-(-n // 64) for n in sizes)
    assert lane.most == lane.buffers == min(chunks, 2), "the host is one buffer ahead, no more"
    upload.close()
    assert lane.closed and not lane.pending
    for values, out in zip(data, found):
        assert torch.equal(values, out)


def test_nothing_is_copied_where_the_model_stays_on_the_host():
    assert uploader(torch.device("cpu")) is None


@pytest.mark.gpu
def test_on_a_gpu_what_comes_behind_finds_the_bytes():
    device = torch.device("cuda", torch.cuda.current_device())
    upload = Uploader(CudaLane(device), chunk_bytes=1 << 20)
    data = torch.randint(0, 256, (16, 5 << 20), dtype=torch.uint8)
    sums = [upload(row).long().sum() for row in data]
    upload.close()
    assert [int(total) for total in sums] == data.long().sum(1).tolist()
