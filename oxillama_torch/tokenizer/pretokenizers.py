"""How a byte-level BPE vocabulary cuts text into words, by the name in ``tokenizer.ggml.pre``.

Merges never cross a word's border, so one wrong expression here changes ids without any error.
Each entry lists regular expressions that are applied one after another: every match becomes a
piece of its own, and so does the text between two matches. Where a model's ``tokenizer.json`` is
known to differ from llama.cpp's rewriting of it, the model's own expression stands here.
Names and expressions: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oxillama_torch.errors import UnsupportedError

__all__ = ["KNOWN", "PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Args:
        patterns: regular expressions in Oniguruma's syntax, applied in order.
        ignore_merges: a word that is itself a token is taken whole, whatever the merges say.
        add_bos: a begin token stands before a text unless the file says otherwise.
        byte_level: bytes are written as GPT-2's 256 letters; else as ``<0x0A>`` with spaces as ▁.
        left_strip: spellings that swallow the white space before them.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    left_strip: tuple[str, ...] = ()


# Parts shared by several models.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
)


def _cased(suffix: str = "", limit: str = "") -> str:
    """Words cut where lower case turns to upper case; ``limit`` narrows the letters."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{limit}]*[{_LOWER}{limit}]+{suffix}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{limit}]+[{_LOWER}{limit}]*{suffix}"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_GPT4O = rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_TEKKEN = rf"{_cased()}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_CJK_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
# Numbers in groups of three counted from the right. The obvious look-ahead, \d{1,3}(?=(\d{3})*$),
# reads the rest of the number once per group; this takes time linear in its length.
_GROUPS_FROM_RIGHT = (r"\p{N}+", r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)", r"\p{N}{3}")

# deepseek-llm lists its letters one by one: those of scripts with upper and lower case.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_AFMOE_SCRIPTS = (
    "[一-\u9fff㐀-\u4dbf豈-\ufaff\u3040-ゟ゠-ヿ\uff65-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ff"
    "က-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
)
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"


def _bpe(*patterns: str, **options: object) -> PreTokenizer:
    return PreTokenizer(patterns, **options)


_DEEPSEEK3 = _bpe(r"\p{N}{1,3}", _CJK_KANA, rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}")
_DIGITS_GPT2 = _bpe(r"\p{N}", _GPT2)
_BAILING = _bpe(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# One entry per way of cutting: the names that mean it, and what it is.
_TABLE: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "default",
        _bpe(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        _bpe(_LLAMA3, ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", _bpe(_LLAMA3)),
    ("glm4 glm5", _bpe(_LLAMA3, ignore_merges=True)),
    (
        "jais-2",
        _bpe(
            rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
            + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s{1}"
        ),
    ),
    (
        "minicpm5",
        _bpe(
            r"\p{N}{1,3}",
            rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACE}",
            ignore_merges=True,
        ),
    ),
    (
        "deepseek-llm",
        _bpe(
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        ),
    ),
    ("deepseek-coder", _bpe(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
    (
        "spark2_5",
        _bpe(
            r"\p{N}{1,3}",
            _CJK_KANA,
            rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        ),
    ),
    (
        "youtu",
        _bpe(
            _YOUTU_SCRIPTS,
            rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
            ignore_merges=True,
        ),
    ),
    ("falcon", _bpe(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGITS_GPT2),
    (
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4 "
        "jina-v1-en roberta-bpe",
        _bpe(_GPT2),
    ),
    ("jina-es jina-de jina-v2-es jina-v2-de jina-v2-code", _bpe(_GPT2, left_strip=("<mask>",))),
    ("modern-bert", _bpe(_GPT2, left_strip=("[MASK]",))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
        _bpe(_QWEN2),
    ),
    ("qwen35", _bpe(_QWEN35)),
    ("ufakzeka", _bpe(rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACE}")),
    ("laguna", _bpe(r"[^\n]+|[\n]+", _QWEN2)),
    ("seed-coder", _bpe(_QWEN2.replace(_SYMBOLS, r" ?[^\s\p{L}\p{N}\r\n]+"))),
    ("poro-chat bloom gpt3-finnish", _bpe(_BLOOM)),
    ("viking", _bpe(_BLOOM, r"\p{N}")),
    ("tekken", _bpe(_TEKKEN, ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _bpe(_GPT4O)),
    ("granite-embed-multi-97m", _bpe(_GPT4O, ignore_merges=True)),
    # A number that letters follow directly stays for the second expression.
    (
        "tiny_aya cohere2moe",
        _bpe(r"(?<!\d)\d++(?!\w)", r"\A\d{1,2}(?=(?:\d{3})+\z)", _GPT4O),
    ),
    (
        "kimi-k2",
        _bpe(
            r"[\p{Han}]+|"
            + _cased(_CONTRACTIONS + "?", limit=r"&&[^\p{Han}]")
            + rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
        ),
    ),
    (
        "chameleon",
        _bpe(
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
            add_bos=True,
        ),
    ),
    # Words are not cut at all: SuperBPE's tokens span them.
    ("superbpe", _bpe(*_GROUPS_FROM_RIGHT)),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING),
    (
        "afmoe",
        _bpe(
            *_GROUPS_FROM_RIGHT,
            _AFMOE_SCRIPTS,
            rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
        ),
    ),
    (
        "exaone-moe",
        _bpe(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
    ),
    (
        "gemma4 granite-embed-multi-311m",
        _bpe(r"[^\n]+|[\n]+", add_bos=True, byte_level=False),
    ),
    ("sarvam-moe", _bpe(r"[^\n]+|[\n]+", byte_level=False)),
)


def _entries() -> Iterator[tuple[str, PreTokenizer]]:
    for names, entry in _TABLE:
        for name in names.split():
            yield name, entry


KNOWN: dict[str, PreTokenizer] = dict(_entries())


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """Return the entry for a ``tokenizer.ggml.pre`` name.

    Raises:
        UnsupportedError: no name, or one that is not in the table: any other guess would give
            wrong ids silently.
    """
    if name is None:
        raise UnsupportedError(
            "a BPE vocabulary without tokenizer.ggml.pre (files made before May 2024)",
            sorted(KNOWN),
        )
    if name not in KNOWN:
        raise UnsupportedError(f"pre-tokenizer {name!r} (tokenizer.ggml.pre)", sorted(KNOWN))
    return KNOWN[name]
