"""Token counts of one HTTP request."""

from __future__ import annotations

from dataclasses import dataclass, field

from oxillama_torch.server.output import Finished, Started

__all__ = ["Usage"]


@dataclass(slots=True)
class Usage:
    """Adds up what the choices report. A prompt shared by n choices counts once, as OpenAI's does.

    Args:
        choices_per_prompt: ``n``.
    """

    choices_per_prompt: int
    _prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, output: object) -> None:
        """Take note of a Started or Finished; anything else is ignored."""
        if isinstance(output, Started):
            prompt = output.index // self.choices_per_prompt
            self._prompts.setdefault(prompt, (output.prompt_tokens, output.cached_tokens))
        elif isinstance(output, Finished):
            self.completion_tokens += output.completion_tokens
            self.reasoning_tokens += output.reasoning_tokens

    def as_dict(self) -> dict:
        """The ``usage`` object."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        cached_tokens = sum(cached for _, cached in self._prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }
