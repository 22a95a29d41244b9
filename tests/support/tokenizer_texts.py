"""Texts that tokenizers get wrong, and metadata of vocabularies made in tests."""

from __future__ import annotations

from typing import Any

__all__ = ["CONTROL", "NASTY", "QWEN2", "TRAINING", "gguf_metadata"]

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\r\n\r\n  \r\n",
    "\t\t tab\tbed \t",
    "Hello, world!",
    "  two leading spaces",
    "trailing spaces   ",
    "a  b   c    d     e",
    "don't DON'T we'll I'VE they're it'd 'tis O'Neill's",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ½ ² Ⅷ ١٢٣",
    "def f(x):\n    return x ** 2  # square\n\n\nif __name__ == '__main__':\n\tf(3)\n",
    "if (a<b && c>=d) { x[i++] |= ~mask; } /* ... */ // <-->",
    "https://example.org/a/b?q=1&r=%20#frag user@example.org",
    "Ünïcödé Straße naïve Ελληνικά Русский עברית العربية हिन्दी ไทย 한국어 日本語 中文字符",
    "e\u0301 n\u0303 combining, A\u030aB, zero\u200bwidth\u200djoiner, nb\u00a0space, \u3000 wide",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "\u0000\u0001\u001f\u007f\u0085\u2028\ufeff\ufffd\U0010ffff",
    "ſ K \u212a İ ı ǅ ﬁ",
    "====----****____    ....!!!!????",
    "<|im_start|> <s> </s> <0x0A> [INST] ▁ ▁▁word Ġ Ċ",
    "CamelCaseHTTPServer snake_case kebab-case",
]
TRAINING = [
    *NASTY,
    "The quick brown fox jumps over the lazy dog. " * 3,
    "the then there these they're 12 123 1234 2024 def class return import for in range(10):\n    ",
    "数据 模型 中文 日本語 한국어 Straße naïve déjà vu " * 2,
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def gguf_metadata(
    tokens: list[str], types: list[int], merges: list[tuple[str, str]], pre: str, **extra: Any
) -> dict[str, Any]:
    """Metadata of a ``gpt2`` vocabulary."""
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in merges],
        "eos_token_id": len(tokens) - 1,
        "add_bos_token": False,
        **extra,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
