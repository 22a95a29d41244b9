"""A decoder with adapters, run request by request over pages of its own."""

from __future__ import annotations

from dataclasses import replace

from paged_runner import PagedRunner
from tiny_models import write_tiny

from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.attach import adapter_batch, factor_table
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.loader import load_model

__all__ = ["AdapterRunner", "assert_close", "open_tiny", "table_of"]


class AdapterRunner(PagedRunner):
    """A runner whose requests have adapters: name of the request -> ((table, scale), ...)."""

    def __init__(self, decoder, targets, uses):
        super().__init__(decoder)
        self.targets, self.uses = targets, uses

    def batch(self, chunks):
        counts = [len(ids) for ids in chunks.values()]
        uses = [self.uses.get(name, ()) for name in chunks]
        self.adapters = adapter_batch(self.targets.numbers, uses, counts, self.targets.device)
        return replace(super().batch(chunks), adapters=self.adapters)

    def step(self, chunks):
        hidden = self.decoder(self.batch(chunks), self.kv)
        logits = self.decoder.logits(hidden, self.adapters)
        return dict(zip(chunks, logits.split([len(ids) for ids in chunks.values()])))


def open_tiny(arch, folder, **options):
    """(transformers model, our decoder, its targets)."""
    oracle = write_tiny(arch, folder / "tiny.gguf", **options)
    with read_gguf(folder / "tiny.gguf") as file:
        decoder = load_model(file)
    return oracle, decoder, Targets(decoder)


def table_of(folder, targets, name="a"):
    return factor_table(read_adapter(name, folder, targets), targets)


def assert_close(got, wanted, tolerance=1e-4):
    error = (got - wanted).abs().max() / wanted.std()
    assert error < tolerance, f"logits differ by {error:.1e} standard deviations"
