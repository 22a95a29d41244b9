"""The training loop of the demo model: Muon and AdamW under a schedule that follows a budget of
time or steps.

Several processes share one batch: all build the same rows from the same seed, each computes its
part, and the gradients are summed. On a busy machine single-threaded processes that meet once per
step lose far less time than the threads of one process, which meet in every operation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_batches import IGNORED, BatchSource
from demo_export import model_config
from demo_measure import held_out_loss
from transformers import LlamaConfig, LlamaForCausalLM

MUON_LR, ADAM_LR = 6e-3, 4e-3
SECONDS_BETWEEN_CHECKPOINTS = 180
_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps`` if given, else ``minutes`` of computing time."""

    minutes: float
    steps: int | None


@dataclass
class Progress:
    """How far the training is: steps taken, tokens seen and seconds computed, over all its runs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def share(self, budget: Budget) -> float:
        """The used share of the budget, 0 to 1."""
        used = self.step / budget.steps if budget.steps else self.seconds / (60 * budget.minutes)
        return min(used, 1.0)


def learning_rate(share: float) -> float:
    """The factor on the learning rates: up over 1 % of the budget, constant to 45 %, then linear to
    0."""
    return min(share / 0.01 + 0.01, 1.0, (1.0 - share) / 0.55)


def chat_share(share: float) -> float:
    """The share of conversations among short rows: mostly questions first, then more code."""
    return 0.7 if share < 0.5 else 0.5


def make_model(config: LlamaConfig | None = None) -> LlamaForCausalLM:
    """A freshly initialized model, by default one of the demo model's size; the projections back
    into the residual stream start at zero."""
    model = LlamaForCausalLM(config or model_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed_tokens" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for group in muon.param_groups + adam.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adam]


def lower_precision() -> torch.autocast:
    """bfloat16 where the CPU computes with it; elsewhere it would be six times slower than
    float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_FAST_BFLOAT16)


def hidden_states(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The last layer's normalized output [rows, width, hidden]."""
    with lower_precision():
        return model.model(input_ids=input_ids, use_cache=False).last_hidden_state


def summed_loss(
    model: LlamaForCausalLM, hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The cross entropy in nats, summed over the labels [rows, width] that are not ``IGNORED``.

    Only their positions go through the output matrix: half of a conversation has no label.
    """
    kept = labels != IGNORED
    with lower_precision():
        logits = model.lm_head(hidden[kept])
    return F.cross_entropy(logits.float(), labels[kept], reduction="sum")


def sum_over_processes(model: LlamaForCausalLM, extra: torch.Tensor) -> torch.Tensor:
    """Sum the gradients, and the vector ``extra``, over all processes; a single process keeps its
    own."""
    if not dist.is_initialized():
        return extra
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([extra, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    position = len(extra)
    for gradient in gradients:
        gradient.copy_(flat[position : position + gradient.numel()].view_as(gradient))
        position += gradient.numel()
    return flat[: len(extra)]


class Trainer:
    """One process's part of a training run; ``rank`` 0 writes the log and the checkpoints.

    A ``model`` that is given is trained in place of a fresh one.
    """

    def __init__(
        self,
        batches: BatchSource,
        budget: Budget,
        rank: int,
        processes: int,
        model: LlamaForCausalLM | None = None,
    ) -> None:
        self.batches, self.budget = batches, budget
        self.rank, self.processes = rank, processes
        self.model = make_model() if model is None else model
        self.optimizers = make_optimizers(self.model)
        self.progress = Progress()
        self.run_layers = hidden_states
        self._recent: list[float] = []

    def load(self, checkpoint: Path) -> None:
        stored = torch.load(checkpoint)
        self.model.load_state_dict(stored["model"])
        for optimizer, state in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**stored["progress"])

    def save(self, checkpoint: Path) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        content = {"model": self.model.state_dict(), "optimizers": states}
        torch.save(content | {"progress": vars(self.progress)}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    def train(self, checkpoint: Path) -> None:
        """Train until the budget is used up, with a checkpoint every few minutes."""
        last_save = self.progress.seconds
        while self.progress.share(self.budget) < 1:
            self._step()
            if self.rank == 0 and self.progress.step % 20 == 0:
                self._report()
            if self.rank == 0 and self.progress.seconds - last_save > SECONDS_BETWEEN_CHECKPOINTS:
                self.save(checkpoint)
                last_save = self.progress.seconds
        if self.rank == 0:
            self.save(checkpoint)

    def loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is to become small, summed over the labels [rows, width]."""
        return summed_loss(self.model, self.run_layers(self.model, input_ids), labels)

    def _step(self) -> None:
        began, share = time.perf_counter(), self.progress.share(self.budget)
        input_ids, labels = self.batches.batch(self.progress.step, chat_share(share))
        count = int((labels != IGNORED).sum())
        own = slice(self.rank, None, self.processes)
        loss = self.loss(input_ids[own], labels[own]) / count
        loss.backward()
        total_loss = sum_over_processes(self.model, loss.detach().view(1))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate(share)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._recent.append(total_loss.item())
        self.progress.step += 1
        self.progress.tokens += input_ids.numel()
        self.progress.seconds += self._agreed(time.perf_counter() - began)

    def _agreed(self, seconds: float) -> float:
        """Rank 0's measurement, so that all processes stand at the same point of the schedule."""
        if not dist.is_initialized():
            return seconds
        shared = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def _report(self) -> None:
        """One line of the log: the mean loss since the last one and, now and then, the held-out
        loss."""
        progress, turns = self.progress, self.batches.turns
        line = f"{progress.share(self.budget):6.1%} step {progress.step} {progress.seconds:.0f} s"
        line += f" {progress.tokens / 1e6:.2f} M tokens"
        line += f" loss {sum(self._recent) / len(self._recent):.3f}"
        line += f" exposures {turns.meanings / len(turns.facts):.1f}"
        if progress.step % 200 == 0:
            line += f" held-out {held_out_loss(self.model, self.batches.tokenizer):.3f}"
        print(line, flush=True)
        self._recent.clear()
