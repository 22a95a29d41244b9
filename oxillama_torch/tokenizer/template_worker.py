"""The process that renders chat templates: ``python -m oxillama_torch.tokenizer.template_worker``.

A template comes from a file somebody published. Jinja's sandbox keeps it away from Python, not
from spending: one expression can take minutes, gigabytes, or the interpreter's lock. So it runs
here, under limits the kernel enforces. One JSON object per line comes in and one goes out:

    {"sources": {name: source}, "seconds": 1.0, "memory": bytes, "output": characters}   first
    {"name": "default", "context": {...}, "marks": {mark: char}, "now": "2026-01-31T12:00:00"}
    {"text": "..."}  or  {"error": "raised" | "syntax" | "failed" | "memory" | "output", ...}

A rendering that takes too much processor time ends the process by SIGPROF, whether or not anyone
watches it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, TemplateSyntaxError

from oxillama_torch.tokenizer.template_marks import Marks
from oxillama_torch.tokenizer.template_sandbox import RaisedByTemplate, TemplateEnvironment
from oxillama_torch.workers import confine

__all__ = ["serve"]

# Jinja and codecs load modules on first use, when no file can be opened any more: use them before.
_WARM_UP = r"{{ 'a\n\u00e9' | tojson }}{{ strftime_now('%d %b %Y') }}{{ missing.attribute }}"


class _OutputLimitError(Exception):
    pass


class _Renderer:
    """Holds the templates and renders one request at a time."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._environment = TemplateEnvironment()
        self._compiled: dict[str, Template] = {}
        with contextlib.suppress(TemplateError):
            self._environment.from_string(_WARM_UP).render()

    def answer(self, line: bytes) -> dict[str, Any]:
        """Render; every failure but running out of time becomes an answer."""
        signal.setitimer(signal.ITIMER_PROF, self._setup["seconds"])
        try:
            return {"text": self._render(json.loads(line))}
        except RaisedByTemplate as error:
            message = self._environment.marks.plain(str(error.message)[:1000])
            return {"error": "raised", "message": message}
        except TemplateSyntaxError as error:
            return {"error": "syntax", "line": error.lineno}
        except MemoryError:
            return {"error": "memory"}
        except _OutputLimitError:
            return {"error": "output"}
        except Exception as error:  # whatever a template can provoke
            return {"error": "failed", "line": _template_line(error)}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _render(self, request: dict[str, Any]) -> str:
        environment, name = self._environment, request["name"]
        environment.marks = Marks(request["marks"])
        environment.now = datetime.fromisoformat(request["now"])
        if name not in self._compiled:
            self._compiled[name] = environment.from_string(self._setup["sources"][name])
        parts, size = [], 0
        for part in self._compiled[name].generate(request["context"]):
            size += len(part)
            if size > self._setup["output"]:
                raise _OutputLimitError
            parts.append(part)
        return "".join(parts)


def _template_line(error: BaseException) -> int | None:
    """The line of the template where an error arose."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    setup = json.loads(requests.readline())
    renderer = _Renderer(setup)
    confine(setup["memory"])
    for line in requests:
        answer = renderer.answer(line)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer.get("error") == "memory":
            return  # what is left of the memory may not do for the next one


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
