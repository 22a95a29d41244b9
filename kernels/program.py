"""Functions of tensors that Inductor compiles once for a CPU, called without Dynamo.

``torch.compile`` makes sure at every call that what it compiled still fits, and switches Inductor's
options back and forth: 70 us, twice what the product of one row with a small weight takes (2 vCPU,
torch 2.13), and it compiles anew, for seconds, where it does not fit. A Program is told beforehand
which sizes differ from call to call. It is compiled with tensors of its own that have such sizes,
and calls what the compiler returned, which checks shapes and strides.
"""

from __future__ import annotations

import functools
import shutil
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

__all__ = ["Program", "compiler", "named"]

# Stand for sizes that vary: large enough that loops are shared among threads, and all different,
# since equal ones would be taken for the same.
_SIZES = (1021, 13, 11, 17, 19)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """Compiled code, and how it wants its arguments.

    Args:
        run: takes a list of tensors and sizes, which it empties; returns a sequence of tensors.
        arguments: of ``run``, from the tensors of a call.
        results: of the function: None, one tensor (1) or a tuple of so many.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    arguments: Callable[[Sequence[Tensor]], list[Any]]
    results: int | None

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        outputs = self.run(self.arguments(tensors))
        if self.results == 1:
            return outputs[0]
        return None if self.results is None else tuple(outputs)


class Program:
    """A function of contiguous tensors on the CPU, compiled at its first call or by ``compile``.

    Args:
        function: returns a tensor, a tuple of tensors or None; reads tensors from nowhere but its
            arguments, and may write to them.
        name: of the function, in Inductor's logs.
        shapes: per argument its sizes; a letter stands for one that varies, the same letter for
            the same size everywhere.
        dtypes: per argument; None: all float32.
        options: of Inductor.

    Raises:
        RuntimeError: (at compilation) from Dynamo, Inductor or the C++ compiler.
        AssertionError: (at a call) a tensor of another dtype, size or stride.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        shapes: Sequence[tuple[int | str, ...]],
        *,
        dtypes: Sequence[torch.dtype] | None = None,
        options: Mapping[str, object],
    ) -> None:
        self._function = named(function, name)
        self._shapes = tuple(shapes)
        self._dtypes = list(dtypes or [torch.float32] * len(self._shapes))
        self._options = dict(options)
        letters = sorted({size for shape in shapes for size in shape if isinstance(size, str)})
        self._sizes = dict(zip(letters, _SIZES, strict=False))
        assert len(self._sizes) == len(letters), f"{name}: at most {len(_SIZES)} sizes can vary"
        # Inductor writes the number of threads into the code.
        self._by_threads: dict[int, _Compiled] = {}
        self._compiling = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Any:
        dtypes = [tensor.dtype for tensor in tensors]  # all that compiled code takes as told
        assert dtypes == self._dtypes, f"got {dtypes}, wanted {self._dtypes}"
        compiled = self._by_threads.get(torch.get_num_threads())
        return (compiled or self.compile())(tensors)

    def compile(self) -> _Compiled:
        """Compile for the number of threads in force, if that has not been done."""
        with self._compiling:
            threads = torch.get_num_threads()
            if threads not in self._by_threads:
                self._by_threads[threads] = self._compile()
            return self._by_threads[threads]

    def _compile(self) -> _Compiled:
        samples = [self._sample(*kind) for kind in zip(self._shapes, self._dtypes)]
        code = _Code()
        # A graph from AOTAutograd's cache would come wrapped, without passing through ``code``.
        with torch.inference_mode(), functorch_config.patch(enable_autograd_cache=False):
            compiled = torch.compile(
                self._function,
                backend=functools.partial(code.compile, options=self._options),
                fullgraph=True,
                dynamic=False,
            )
            result = compiled(*samples)
        results = () if result is None else (result,) if isinstance(result, Tensor) else result
        same = [got.data_ptr() == output.data_ptr() for got, output in zip(results, code.outputs)]
        assert len(results) == len(code.outputs) and all(same), "compiled code returns other things"
        places = [self._place(argument, samples) for argument in code.arguments]
        return _Compiled(code.run, _collector(places), None if result is None else len(results))

    def _sample(self, shape: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
        sample = torch.zeros([self._sizes.get(size, size) for size in shape], dtype=dtype)
        for dim, size in enumerate(shape):
            if isinstance(size, str):
                torch._dynamo.mark_dynamic(sample, dim)
        return sample

    def _place(self, argument: Any, samples: Sequence[Tensor]) -> tuple[int, int | None]:
        """Which tensor of the call an argument of the compiled code is, or which size of it."""
        if isinstance(argument, Tensor):
            return next(i for i, sample in enumerate(samples) if sample is argument), None
        letter = next(letter for letter, size in self._sizes.items() if size == argument)
        places = (
            (i, shape.index(letter)) for i, shape in enumerate(self._shapes) if letter in shape
        )
        return next(places)


def _collector(places: Sequence[tuple[int, int | None]]) -> Callable[[Sequence[Tensor]], list[Any]]:
    """What makes a list of tensors of a call, and of their sizes where a dimension is given.

    Written as source once, instead of a loop over the places at every call.
    """
    items = [
        f"tensors[{index}]" if dim is None else f"tensors[{index}].shape[{dim}]"
        for index, dim in places
    ]
    return eval(f"lambda tensors: [{', '.join(items)}]")


class _Code:
    """Catches what Inductor makes of a graph, and what the first call hands to it."""

    run: Callable[[list[Any]], Sequence[Tensor]]
    arguments: list[Any]
    outputs: Sequence[Tensor]

    def compile(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, object]
    ) -> Callable:
        """A backend for torch.compile."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._inner, config_patches=options)

    def _inner(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable:
        from torch._inductor.compile_fx import compile_fx_inner

        self.run = compile_fx_inner(graph, inputs, **options).current_callable

        def once(arguments: list[Any]) -> Sequence[Tensor]:
            self.arguments = list(arguments)
            self.outputs = self.run(arguments)
            return self.outputs

        once._boxed_call = True  # arguments come as one list, which is emptied
        return once


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler that Inductor would call, or None."""
    from torch._inductor import config

    return next(filter(None, (shutil.which(name) for name in config.cpp.cxx if name)), None)


def named(function: Callable, name: str) -> Callable:
    """A copy of a function: Dynamo counts recompilations per code object, Inductor logs names."""
    return types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        name,
        None,
        function.__closure__,
    )
