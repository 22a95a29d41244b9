"""Compile Triton kernels for GPUs that are not there, and count what the hardware would execute.

A kernel's variants come from a function that stands beside it and returns ``Variant`` objects,
named as ``"package.module:function"``. Each is compiled down to SASS with the tools of Triton's
wheel, and its registers, local and shared memory and instructions are read off.

Interpreted kernels (``TRITON_INTERPRET=1``) cannot be compiled, so :func:`cross_compile` does its
work in a process without that variable. From a shell::

    S=oxillama_torch.kernels.quant_matmul.variants:variants
    python -m oxillama_torch.bench.cross_compile $S --targets 90 --match q4_k
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxillama_torch.kernels.triton_support import INTERPRET, Variant

__all__ = ["TARGETS", "Report", "compile_variant", "cross_compile", "table"]

# Ampere, Hopper, datacenter Blackwell, workstation Blackwell.
TARGETS = (80, 90, 100, 120)
_THREADS_PER_WARP = 32
# griddepcontrol.wait and griddepcontrol.launch_dependents.
_WAIT, _LET_IN = "ACQBULK", "PREEXIT"


@dataclass(frozen=True)
class Report:
    """What one variant became on one GPU generation.

    Args:
        name: of the variant.
        capability: 90 for sm_90.
        registers: per thread.
        local_bytes: stack and local memory per thread; anything above 0 is slow memory.
        spills: instructions that load from or store to local memory.
        shared_bytes: shared memory per program.
        instructions: in the whole kernel, as they stand.
        loop_instructions: in the hot loop: the longest that has no other inside; 0: no loop.
        per_weight: instructions a thread issues in the hot loop for each weight it decodes; None
            when the variant decodes none.
        opcodes: opcode -> count in the hot loop (in the whole kernel where there is no loop).
        before_wait: opcodes that stand before the wait of a dependent launch; None: no wait.
        lets_in: instructions that let a dependent kernel in.
    """

    name: str
    capability: int
    registers: int
    local_bytes: int
    spills: int
    shared_bytes: int
    instructions: int
    loop_instructions: int
    per_weight: float | None
    opcodes: dict[str, int]
    before_wait: list[str] | None
    lets_in: int


def cross_compile(
    source: str,
    targets: Sequence[int] = TARGETS,
    *,
    match: str = "",
    pdl: bool = False,
    timeout_s: float = 600,
) -> list[Report]:
    """Compile the variants of ``source`` in a process of their own; nothing is cached.

    Args:
        source: ``"package.module:function"``; the function takes nothing and returns variants.
        targets: GPU generations, such as 90 for sm_90.
        match: regular expression that a variant's name must contain.
        pdl: with programmatic dependent launch, which needs sm_90 or later.

    Raises:
        RuntimeError: the process failed; its error output is the message.
    """
    command = [sys.executable, "-m", __name__, source, "--json", f"--match={match}"]
    command += ["--targets", ",".join(map(str, targets)), *(["--pdl"] if pdl else [])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [Report(**report) for report in json.loads(done.stdout)]


def compile_variant(variant: Variant, capability: int, pdl: bool = False) -> Report:
    """Compile one variant for one GPU generation; not in an interpreting process.

    Args:
        pdl: with programmatic dependent launch, in kernels that have the switch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert not INTERPRET, "an interpreted kernel cannot be compiled: unset TRITON_INTERPRET"
    names = variant.kernel.arg_names
    constants = variant.constants | ({"USE_PDL": pdl} if "USE_PDL" in names else {})
    unknown = {*variant.arguments, *constants} ^ set(names)
    assert not unknown, f"{variant.name}: arguments {sorted(unknown)} are missing or too many"
    source = ASTSource(
        variant.kernel,
        {name: variant.arguments.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= {"launch_pdl": True} if constants.get("USE_PDL") else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _report(variant, capability, compiled)


def _report(variant: Variant, capability: int, compiled: Any) -> Report:
    sass, usage = _disassemble(compiled.asm["cubin"])
    instructions = _instructions(sass)
    loop = _hot_loop(instructions)
    counted = Counter(_opcode(text) for text in loop or [text for _, text in instructions])
    threads = variant.num_warps * _THREADS_PER_WARP
    opcodes = [_opcode(text) for _, text in instructions]
    return Report(
        name=variant.name,
        capability=capability,
        registers=_usage(usage, "REG"),
        local_bytes=_usage(usage, "STACK") + _usage(usage, "LOCAL"),
        spills=sum(opcode in ("LDL", "STL") for opcode in opcodes),
        shared_bytes=compiled.metadata.shared,
        instructions=len(instructions),
        loop_instructions=len(loop),
        per_weight=round(len(loop) * threads / variant.weights, 2) if variant.weights else None,
        opcodes=dict(counted.most_common()),
        before_wait=opcodes[: opcodes.index(_WAIT)] if _WAIT in opcodes else None,
        lets_in=opcodes.count(_LET_IN),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage of a cubin, as cuobjdump prints them."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = [
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        ]
    return outputs[0], outputs[1]


def _usage(text: str, key: str) -> int:
    return int(re.search(rf"\b{key}:(\d+)", text)[1])


def _instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)
    return [(int(address, 16), text) for address, text in found]


def _opcode(text: str) -> str:
    """``"@!P0 LDG.E.128 R4, ..."`` -> ``"LDG"``."""
    return re.sub(r"^@!?\w+\s+", "", text).split()[0].partition(".")[0]


def _hot_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """Instructions of the longest innermost loop: a backward branch and all it jumps over."""
    spans = []
    for address, text in instructions:
        target = re.search(r"0x([0-9a-f]+)$", text)
        # A branch to itself is the trap after the end of a kernel.
        if _opcode(text) == "BRA" and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    innermost = [
        span
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]
    loops = [[text for at, text in instructions if a <= at <= b] for a, b in innermost]
    return max(loops, key=len, default=[])


def table(reports: Iterable[Report]) -> str:
    """Reports as text, one line each."""
    head = (
        f"{'variant':44} {'sm':>4} {'regs':>5} {'local':>6} {'spills':>6} {'shared':>7} "
        f"{'instr':>6} {'loop':>5} {'/weight':>8}  opcodes of the loop"
    )
    lines = [head]
    for r in reports:
        share = "" if r.per_weight is None else f"{r.per_weight:.2f}"
        top = " ".join(f"{op}:{count}" for op, count in list(r.opcodes.items())[:8])
        lines.append(
            f"{r.name:44} {r.capability:>4} {r.registers:>5} {r.local_bytes:>6} {r.spills:>6} "
            f"{r.shared_bytes:>7} {r.instructions:>6} {r.loop_instructions:>5} {share:>8}  {top}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: compile the variants of a source and print a table or JSON."""
    parser = argparse.ArgumentParser(description="Cross-compile Triton kernels and count SASS.")
    parser.add_argument("source", help="package.module:function that returns variants")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="such as 80,90")
    parser.add_argument("--match", default="", help="regular expression for variant names")
    parser.add_argument("--pdl", action="store_true", help="with programmatic dependent launch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    import triton

    module, _, function = options.source.partition(":")
    variants = getattr(importlib.import_module(module), function)()
    chosen = [variant for variant in variants if re.search(options.match, variant.name)]
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        reports = [
            compile_variant(variant, int(target), options.pdl)
            for target in options.targets.split(",")
            for variant in chosen
        ]
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports]))
    else:
        print(table(reports))


if __name__ == "__main__":
    main()
