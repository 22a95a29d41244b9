"""Templates render as in transformers, with and without marks.

Oracle: ``transformers.utils.chat_template_utils``. Set LLAMA_CPP_SOURCE to a llama.cpp source tree
to compare on the templates of published models too.
"""

from __future__ import annotations

import datetime
import functools
import html
import json

import jinja2
import pytest
from transformers.utils import chat_template_utils

from oxillama_torch.tokenizer.template_marks import Marks
from oxillama_torch.tokenizer.template_sandbox import RaisedByTemplate, TemplateEnvironment
from tests.support.chat_templates import CONVERSATIONS, TEMPLATES, TOOLS, published_templates

ALL = {**TEMPLATES, **published_templates()}
MARKED = {"\U0001d000": "<", "\U0001d001": "[", "\U0001d002": "|"}
TODAY = datetime.datetime(2026, 1, 31, 12)


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def theirs(source, messages, **variables) -> str | None:
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None
    return rendered[0]


@functools.cache
def compiled(source: str) -> jinja2.Template:
    return TemplateEnvironment().from_string(source)


def ours(source, messages, marks=None, **variables) -> str | None:
    environment = compiled(source).environment
    environment.now = TODAY
    environment.marks = Marks(marks or {})
    given = json.dumps({"messages": messages, **variables})
    context = json.loads(given)
    if marks:
        context = _translate(context, {ord(c): mark for mark, c in marks.items()})
    try:
        text = compiled(source).render(context)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None
    return environment.marks.plain(text)


def _translate(value, table):
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translate(k, table): _translate(v, table) for k, v in value.items()}
    return [_translate(v, table) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("marks", [None, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("name", ALL)
def test_renders_as_transformers_does(name, marks):
    rendered = 0
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for generate in (True, False):
                variables = {
                    "tools": tools,
                    "add_generation_prompt": generate,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                }
                expected = theirs(ALL[name], messages, documents=None, **variables)
                found = ours(ALL[name], messages, marks, documents=None, **variables)
                if marks and "|safe" in ALL[name]:
                    # What is added to a "safe" string is HTML-escaped, and marks are not.
                    found, expected = map(html.unescape, (found, expected))
                assert found == expected
                rendered += expected is not None
    if not rendered:
        pytest.skip("transformers cannot render it either")


def render(source: str, marks=None, **context) -> str:
    environment = TemplateEnvironment()
    environment.marks = Marks(marks or {})
    return environment.from_string(source).render(context)


def test_strftime_now_tells_the_time_of_the_request():
    environment = TemplateEnvironment()
    environment.now = TODAY
    assert environment.from_string("{{ strftime_now('%d %b %Y') }}").render() == "31 Jan 2026"


def test_tojson_escapes_no_html_and_keeps_unicode():
    assert render("{{ x | tojson }}", x={"a<": "é&'"}) == '{"a<": "é&\'"}'
    assert render("{{ x | tojson(indent=2, sort_keys=true) }}", x={"b": 1, "a": 2}) == (
        '{\n  "a": 2,\n  "b": 1\n}'
    )


def test_marks_survive_json_written_in_ascii():
    mark = "\U0001d000"
    assert render("{{ x | tojson(ensure_ascii=true) }}", {mark: "<"}, x=f"é{mark}") == (
        f'"\\u00e9{mark}"'
    )


def test_raise_exception_carries_its_message():
    with pytest.raises(RaisedByTemplate, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_html_escapes_see_marked_characters():
    mark = "\U0001d000"
    assert render("{{ x | e }}", {mark: "<"}, x=f"a{mark}b & <") == "a&lt;b &amp; &lt;"


@pytest.mark.parametrize(
    "source",
    [
        "{{ x is eq('<a') }}",
        "{{ x is in(['<a']) }}",
        "{{ [x] | select('equalto', '<a') | list | length == 1 }}",
        "{{ x | replace('<', '') == 'a' }}",
        "{{ (x | trim('<')) == 'a' }}",
        "{{ x[0] == '<' and x | length == 2 }}",
        "{% set tag = '<' %}{{ tag in x and x.startswith(tag) }}",
        "{{ x.find('<') == 0 and x.split('<') == ['', 'a'] }}",
        "{{ '<' in {x[0]: 1} }}",
        "{{ x in ['<a', 'b'] and x != 'a' and 'b' not in x }}",
    ],
)
def test_templates_see_through_marks(source):
    mark = "\U0001d000"
    assert render(source, {mark: "<"}, x=f"{mark}a") == "True"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ (''|attr('__class__')).__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__ }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': namespace()}) }}",
    "{{ '%s'.__mod__.__self__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ namespace(_x=1) }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ caller.__globals__ }}{{ varargs.__class__ }}",
    "{{ [].__class__.__base__ }}{{ ().__reduce_ex__(2) }}",
    "{{ ('a'|map('upper')).gi_frame.f_globals }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ environment.compare.__func__.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_known_ways_out_are_closed(source):
    try:
        text = render(source, messages=[{"role": "user", "content": "x"}])
    except (jinja2.TemplateError, TypeError, ValueError):
        return
    assert not any(word in text for word in ("class", "function", "module", "root", "built-in"))
