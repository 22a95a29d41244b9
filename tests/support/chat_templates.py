"""Chat templates in the manner of real ones, written for tests, and conversations for them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CONVERSATIONS", "TEMPLATES", "TOOLS", "published_templates"]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
        " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}"
        "{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}"
        "{% endif %}{{ message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' ~ message['content'] | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": """{{- bos_token }}
    {%- set ns = namespace(count=0) %}
    {%- for message in messages %}
        {%- if message.role not in ['user', 'assistant', 'system', 'tool'] %}
            {{- raise_exception('Unknown role') }}
        {%- endif %}
        {%- set ns.count = ns.count + 1 %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endfor %}
    {%- if tools is not none %}{{- tools | tojson(indent=4) }}{% endif %}
    {%- if add_generation_prompt %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {%- endif %}""",
    "thinking": """{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if content.startswith('<note>') and content[-7:] == '</note>' %}
            {%- set content = content[6:-7] | replace('<br>', '\\n') %}
        {%- endif %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + (reasoning | length | string) + content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- elif message.role != 'tool' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if loop.index0 > 3 %}{% break %}{% endif %}
            {{- '<tool_call>' ~ call.function.name ~ call.function.arguments | tojson }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>' }}
    {%- endif %}
{%- endif %}""",
    "parts": (
        "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' }}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    ),
    "role": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    ),
}

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is <b>x < y</b> & 'z'?  \n"},
        {"role": "assistant", "content": "<think>\nhm, 1 < 2\n</think>\n\nA comparison."},
        {"role": "user", "content": "And ünïcödé 中文 🙂? if a[0]<b: |x|"},
    ],
    [
        {"role": "user", "content": "<note>a<br>b</note>"},
        {"role": "assistant", "content": "<note>one<br>two</note>"},
        {"role": "user", "content": "thanks</think>"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a <city> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def published_templates() -> dict[str, str]:
    """Templates of published models, from a llama.cpp source tree named by LLAMA_CPP_SOURCE."""
    folder = Path(os.environ.get("LLAMA_CPP_SOURCE", "/nowhere")) / "models" / "templates"
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.jinja"))}
