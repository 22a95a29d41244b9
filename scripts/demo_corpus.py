"""The text the demo model is trained on: what every Python carries with it.

Two things are read from the running interpreter and nothing else:

* ``facts()``: public names of well-known standard-library modules, each with the first paragraph of
  its docstring and its call signature.
* ``sources()``: the library's own ``.py`` files, for plain code completion.

Both are sorted, so the same Python version gives the same corpus, byte for byte. Files named in
``HELD_OUT`` are never trained on; ``demo_heldout.txt`` is made from them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def words(text: str) -> tuple[str, ...]:
    """A list written as prose, which reads better than a column of quoted words."""
    return tuple(text.split())


MAX_ANSWER = 220  # characters of a docstring's first paragraph that an answer may have

MODULES = words(
    """
    argparse bisect builtins collections contextlib copy csv dataclasses datetime decimal fnmatch
    fractions functools getpass glob gzip heapq itertools json logging math os os.path pathlib
    pickle pprint queue random re secrets shlex shutil statistics string struct subprocess sys
    tempfile textwrap threading time timeit urllib.parse uuid zipfile zlib
    """
)

# Classes whose public methods are asked about too; every other class is one entry.
CLASSES_WITH_METHODS = words(
    """
    builtins.str builtins.list builtins.dict builtins.set builtins.int builtins.float builtins.tuple
    pathlib.Path collections.Counter collections.deque collections.OrderedDict datetime.datetime
    datetime.timedelta re.Pattern re.Match threading.Thread threading.Event queue.Queue
    argparse.ArgumentParser textwrap.TextWrapper
    """
)

HELD_OUT = ("cmd.py", "netrc.py", "rlcompleter.py", "sched.py", "shelve.py", "zipapp.py")

SKIPPED_FOLDERS = words(
    """
    __pycache__ config ctypes distutils encodings ensurepip idle_test idlelib lib2to3
    lib-dynload msilib pydoc_data site-packages test tests tkinter turtledemo
    """
)
SKIPPED_FILES = words("_osx_support.py _pydecimal.py antigravity.py this.py turtle.py")

# Functions that only some platforms have, or that installed packages are known to replace.
_UNASKED = re.compile(
    "|".join(
        words(
            r"""
            sys\.(excepthook|get_asyn) os\.W[A-Z]
            os\.(sched_|posix_|set|get(?!env|cwd|pid|login|size)|fork|login|mem|event|spl|open?pty)
            os\.(f?p?(read|write)v?|[fl]?ch(own|flags|root)|[a-z]*xattr|spawn|lockf|ctermid|ttyname)
            os\.(tc|init|mk(nod|fifo)|copy_file|pidfd|grantpt|unlockpt|ptsname|wait|major|minor)
            os\.(makedev|unshare|nice|plock|pathconf|f\w*conf)
            """
        )
    )
)

_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$", re.DOTALL)
_LEADING_SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)\s*(->\s*[\w .\[\],]+?)?\s*(--|:|\.)\s+")


@dataclass(frozen=True, order=True)
class Fact:
    """One documented public name, as a user writes it; ``signature`` is "" where unknown."""

    name: str
    kind: str  # "function", "class", "method" or "module"
    summary: str
    signature: str = ""


def first_paragraph(docstring: object) -> str:
    """The docstring's first paragraph in one line of at most ``MAX_ANSWER`` characters, or "" if it
    says nothing.

    A paragraph that only repeats the signature is skipped. A long one ends after its last whole
    sentence that fits, else at a word with " ...".
    """
    if not isinstance(docstring, str):  # a few classes of ``types`` have a descriptor there
        return ""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)]
    paragraphs = [part for part in paragraphs if part and not _SIGNATURE_LINE.match(part)]
    if not paragraphs:
        return ""
    text = _LEADING_SIGNATURE.sub("", paragraphs[0])
    if len(text) <= MAX_ANSWER:
        return text
    sentence_end = max(text.rfind(end, 0, MAX_ANSWER) for end in (". ", "? ", "! "))
    if sentence_end > 40:
        return text[: sentence_end + 1]
    return text[: text.rfind(" ", 0, MAX_ANSWER - 4)].rstrip(" ,;:") + " ..."


def signature_of(name: str, value: object) -> str:
    """``name(arguments)`` as one would call it, or "" where Python does not know or the text is not
    stable."""
    try:
        parameters = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    text = str(parameters.replace(return_annotation=inspect.Signature.empty))
    text = re.sub(r"^\((self|cls)(, /)?(, |(?=\)))", "(", text)
    unstable = " at 0x" in text or "<" in text or "/lib/" in text
    return "" if unstable or len(text) > 160 else name + text


def _public_names(module: object) -> list[str]:
    names = getattr(module, "__all__", None) or [
        name for name in vars(module) if not name.startswith("_")
    ]
    return sorted(name for name in set(names) if not name.startswith("_"))


def _from_library(value: object) -> bool:
    """False for what an installed package has patched into the library (some add methods to
    Logger)."""
    owner = getattr(value, "__module__", None)
    return not isinstance(owner, str) or owner.partition(".")[0] in sys.stdlib_module_names


def _is_ours(module_name: str, module: object, value: object) -> bool:
    """Whether ``value`` belongs to the module rather than being something it imported."""
    if not (inspect.isclass(value) or inspect.isroutine(value)) or not _from_library(value):
        return False
    return hasattr(module, "__all__") or getattr(value, "__module__", None) in (
        module_name,
        None,
        "_" + module_name,
    )


def _method_facts(prefix: str, cls: type) -> Iterator[Fact]:
    for name in sorted(vars(cls)):
        value = getattr(cls, name, None)
        if name.startswith("_") or not (
            inspect.isroutine(value) or isinstance(vars(cls)[name], property)
        ):
            continue
        summary = first_paragraph(inspect.getdoc(value))
        if summary and _from_library(value):
            yield Fact(
                f"{prefix}.{name}", "method", summary, signature_of(f"{prefix}.{name}", value)
            )


def _module_facts(module_name: str) -> Iterator[Fact]:
    module = importlib.import_module(module_name)
    summary = first_paragraph(module.__doc__)
    if summary and module_name != "builtins":
        yield Fact(module_name, "module", summary)
    for name in _public_names(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # merely looking at a deprecated name warns
            value = getattr(module, name, None)
        if not _is_ours(module_name, module, value):
            continue
        full_name = name if module_name == "builtins" else f"{module_name}.{name}"
        kind = "class" if inspect.isclass(value) else "function"
        summary = first_paragraph(value.__doc__ if kind == "class" else inspect.getdoc(value))
        if summary and not (kind == "class" and issubclass(value, BaseException)):
            yield Fact(full_name, kind, summary, signature_of(full_name, value))
        if f"{module_name}.{name}" in CLASSES_WITH_METHODS:
            yield from _method_facts(full_name, value)


def facts() -> list[Fact]:
    """Every documented public name of ``MODULES``, sorted by name; the first of equal names
    wins."""
    found: dict[str, Fact] = {}
    for module_name in MODULES:
        for fact in _module_facts(module_name):
            found.setdefault(fact.name, fact)
    return [
        found[name]
        for name in sorted(found)
        if not _UNASKED.match(name) and len(found[name].summary) >= 12
    ]


def _library_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = {
            part
            for part in relative.parts[:-1]
            if part in SKIPPED_FOLDERS or part.startswith("config-")
        }
        if not folders and path.name not in SKIPPED_FILES:
            yield relative.as_posix(), path


def sources() -> list[tuple[str, str]]:
    """``(relative path, text)`` of the library files that may be trained on, sorted by path."""
    texts = (
        (name, path.read_text(encoding="utf-8", errors="replace"))
        for name, path in _library_files()
    )
    return [(name, text) for name, text in texts if name not in HELD_OUT and len(text) > 200]


def held_out_text() -> str:
    """The held-out files one after the other, each under a comment with its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = (f"# {name}\n" + (root / name).read_text(encoding="utf-8") for name in HELD_OUT)
    return "\n".join(parts)
