"""LLM: the offline front door. Same engine, same thread, same handles as the server.

    >>> from oxillama_torch import LLM, SamplingParams
    >>> with LLM() as llm:                      # the demo model; LLM("some.gguf") for another
    ...     llm.generate("def fibonacci(n):", SamplingParams(max_tokens=32))[0].text

N texts, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from oxillama_torch import search as likelier
from oxillama_torch.adapting import AdapterChoice, Adapting
from oxillama_torch.chat.prompt import prepare_all
from oxillama_torch.chat.tool import Tool, tools_from
from oxillama_torch.completion import Collector, Completion, Piece, Score, requests_for
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.loading import load_engine, open_model, resolve
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.lora.merge import MergeReport
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler
from oxillama_torch.sampling.custom import register_processor
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.row import Processor
from oxillama_torch.sampling.words import Words
from oxillama_torch.scoring import Scoring
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model, ready to be asked from Python.

    Prompts are texts or lists of token ids. Texts are encoded as the model wants them (begin token
    where it asks for one); what looks like a special token in them stays plain text.

    Args:
        model: GGUF file, or the first of a split set; None: the demo model.
        device, numerics, dtype, kernels, max_batch_size, max_context: see EngineConfig.
        options: any other field of EngineConfig.

    Attributes:
        config: the configuration.
        engine: the batching thread; it also takes GenerationRequests.
        merging: which adapters are part of the weights.
        tokenizer: the model's tokenizer.
        chat_template: None when the file has none.
        name: ``general.name`` of the file, blanks as hyphens, or the file's own name.
        fingerprint: equal outputs are promised for equal ones, see ``engine.loading``.

    Raises:
        GGUFError: the file cannot be read or is not a sound GGUF file.
        UnsupportedError: it needs something that this build does not do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        numerics: str = "auto",
        dtype: str = "auto",
        kernels: str | None = None,
        max_batch_size: int | None = None,
        max_context: int | None = None,
        **options: Any,
    ) -> None:
        options |= {"device": device, "numerics": numerics, "dtype": dtype, "kernels": kernels}
        options |= {"max_batch_size": max_batch_size, "max_context": max_context}
        self._open(EngineConfig(model=None if model is None else Path(model), **options))

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        recording: Callable[[int, int], None] | None = None,
    ) -> LLM:
        """Open what a configuration names.

        Args:
            progress: called with (bytes loaded, bytes in all).
            recording: called with (CUDA graphs made, graphs in all), where there are any.
        """
        llm = cls.__new__(cls)
        llm._open(config, progress, recording)
        return llm

    def _open(
        self,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        recording: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        with open_model(config) as gguf:
            self.tokenizer = Tokenizer.from_gguf(gguf.metadata)
            constraints = ConstraintCompiler(self.tokenizer)
            engine = load_engine(
                config,
                gguf,
                eos_ids=self.tokenizer.eos_ids,
                banned_ids=self.tokenizer.suppressed_ids,
                constraints=constraints,
                words=Words(self.tokenizer),
                progress=progress,
                recording=recording,
            )
            name = gguf.metadata.get("general.name")
            self.name = "-".join(str(name).split()) if name else config.model_path.stem
            self._architecture = gguf.architecture
            self.chat_template = _chat_template(gguf.metadata, self.tokenizer)
        self._fingerprint = engine.fingerprint
        self.engine = EngineThread(engine, inbox_size=config.inbox_size)
        self.engine.start()
        self._adapting = Adapting(self.engine)
        self.merging = self._adapting.merging
        self._scoring = Scoring(self.engine, self.tokenizer)
        closing = contextlib.ExitStack()
        if self.chat_template is not None:
            closing.callback(self.chat_template.close)
        closing.callback(constraints.close)
        closing.callback(self.engine.stop)
        # Also runs when the interpreter ends: a thread inside torch must not outlive it.
        self._finalizer = weakref.finalize(self, closing.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the batching thread; what is running ends as ``cancelled``. Idempotent."""
        self._finalizer()

    def describe(self) -> str:
        """Architecture, device, dtype and numerics in a few words."""
        device, dtype, numerics = resolve(self.config)
        return (
            f"{self._architecture} on {device}, {str(dtype).removeprefix('torch.')}, "
            f"{numerics} numerics, context {self.engine.max_context}"
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        adapters: AdapterChoice = None,
        best_of: int | None = None,
    ) -> list[Completion]:
        """Continue prompts, all of them in one batch as far as there is room.

        Args:
            prompts: one prompt or several.
            params: for all of them; ``n`` completions each, one after the other in the result.
            best_of: make so many per prompt and return the ``n`` with the highest mean
                log-probability, the best first.
            adapters: a loaded adapter, or several with scales: ``[("sql", 1.0), ("terse", 0.5)]``.

        Raises:
            RequestError: a prompt cannot be served.
            EngineError: the engine failed.
        """
        params = params or SamplingParams()
        ids, pairs = self._prompts(prompts), self._pairs(adapters)
        if best_of is not None:
            return likelier.best_of(self._collector(), ids, params, pairs, best_of)
        requests = [request for prompt in ids for request in requests_for(prompt, params, pairs)]
        return self._collector().completions(requests)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        width: int = 4,
        max_tokens: int = 64,
        adapters: AdapterChoice = None,
        **options: Any,
    ) -> list[list[likelier.Beam]]:
        """The likeliest continuations, by beam search.

        Args:
            prompts: one prompt or several.
            width, max_tokens: beams and their most tokens.
            adapters: as for ``generate``.
            options: ``length_penalty`` and ``early_stopping``, see ``search.BeamSearch``.

        Returns: ``width`` beams per prompt, the best first.
        """
        options |= {"width": width, "max_tokens": max_tokens, "adapters": self._pairs(adapters)}
        engine, tokenizer = self.engine, self.tokenizer
        found = [likelier.begin(p, engine, tokenizer, **options) for p in self._prompts(prompts)]
        return likelier.search(found, engine, tokenizer)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any] | Tool] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        reasoning_budget: int | None = None,
        adapters: AdapterChoice = None,
        **template_variables: Any,
    ) -> Completion | list[Completion]:
        """Answer a conversation, or several.

        Args:
            messages: ``{"role": ..., "content": ...}`` mappings, or a list of such lists.
            params, adapters: as for ``generate``.
            tools, tool_choice, parallel_tool_calls, response_format: as in the HTTP API.
            reasoning_budget: most tokens of reasoning; None: no limit.
            template_variables: further variables for the template.

        Returns: a Completion for one conversation with ``n=1``, else a list.

        Raises:
            UnsupportedError: the file has no chat template.
            RequestError: the template refuses the messages; tools or a format cannot be served.
        """
        several = not messages or not isinstance(messages[0], Mapping)
        fields = {
            "params": params or SamplingParams(),
            "tools": tools_from(tools),
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
            "template_kwargs": template_variables,
            "reasoning_budget": reasoning_budget,
        }
        conversations = messages if several else [messages]
        turns = prepare_all(conversations, self._template(), self.tokenizer, **fields)
        done = self._collector().turns(turns, self._pairs(adapters))
        return done if several or len(done) != 1 else done[0]

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The prompt that the chat template makes of a conversation."""
        return self._template().render_ids(messages, tools=tools, **template_variables)

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UnsupportedError("chat with a model whose file has no chat template")
        return self.chat_template

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapters: AdapterChoice = None,
    ) -> Iterator[Piece]:
        """Continue one prompt piece by piece; closing the iterator ends the request.

        Args:
            prompt: text or token ids.
            params, adapters: as for ``generate``, with ``n=1``.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("a stream has one completion", param="n")
        [request] = requests_for(self._ids(prompt), params, self._pairs(adapters))
        return self._collector().pieces(request)

    def logits(self, token_ids: Sequence[int], *, adapters: AdapterChoice = None) -> torch.Tensor:
        """Logits after each token.

        Returns: float32 [T, V] on the CPU.
        """
        return self._scoring.logits(self._ids(token_ids), self._pairs(adapters))

    def score(self, text: Prompt) -> Score:
        """Log-probability of each token of a text given those before it."""
        return self._scoring.score(self._ids(text))

    def embed(
        self, texts: Prompt | Sequence[Prompt], pooling: str = "last", *, normalize: bool = True
    ) -> torch.Tensor:
        """Embeddings from the hidden states after the final norm.

        Args:
            texts: one text or several.
            pooling: ``last``, ``first``, ``mean`` or ``max`` over a text's tokens.
            normalize: scale each embedding to length 1.

        Returns: float32 [N, D] on the CPU.
        """
        return self._scoring.embed(self._prompts(texts), pooling, normalize)

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Text to token ids, as ``Tokenizer.encode``."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Token ids to text, as ``Tokenizer.decode``."""
        return self.tokenizer.decode(token_ids, skip_special=skip_special)

    @property
    def fingerprint(self) -> str:
        """Names what shapes an output, merged adapters included."""
        return self._fingerprint + self.merging.mark

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return self._adapting.names()

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load a peft folder or an adapter GGUF; a loaded one of that name is replaced.

        Requests that name it are served beside all others; see ``AdapterRegistry.load``.
        """
        self._adapting.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it are served to their end."""
        self._adapting.unload(name)

    def add_weighted_adapter(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        new_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Make a new adapter out of loaded ones, as peft does; options as ``lora.combine``."""
        options["combination_type"] = combination_type
        self._adapting.combine(names, weights, new_name, **options)

    def merge_adapter(
        self, name: str, scale: float = 1.0, *, merge_dtype: str = "f16"
    ) -> MergeReport:
        """Add an adapter to the weights: it then costs nothing, and every request has it.

        Sums are kept as ``merge_dtype``, see MERGE_DTYPES. Returns: what that costs in accuracy.
        """
        return self.merging.merge(name, scale, merge_dtype)

    def unmerge_adapter(self, name: str) -> None:
        """Take a merged adapter out again: the weights have their old bytes back."""
        self.merging.unmerge(name)

    def merge_and_unload(
        self, adapters: AdapterChoice = None, *, merge_dtype: str = "f16"
    ) -> MergeReport:
        """Merge adapters for good, with those merged already, and forget every loaded one."""
        return self.merging.merge_and_unload(self._pairs(adapters), merge_dtype)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """For the duration of a block, the model is the bare one, merged adapters included."""
        return self._adapting.disabled()

    @staticmethod
    def register_processor(name: str, function: Processor) -> None:
        """Let ``SamplingParams(processors=[name])`` change logits by a function of one's own.

        Args:
            name: new in this process.
            function: (token ids so far, float32 [V]) -> float [V], see ``sampling.custom``.
        """
        register_processor(name, function)

    def _collector(self) -> Collector:
        return Collector(self.engine, self.tokenizer)

    def _pairs(self, adapters: AdapterChoice) -> tuple[tuple[str, float], ...]:
        return self._adapting.pairs(adapters)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """One prompt or several, as lists of ids."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        return [self._ids(prompt) for prompt in ([prompts] if single else prompts)]


def _chat_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    try:
        return ChatTemplate.from_gguf(metadata, tokenizer)
    except UnsupportedError:
        return None
