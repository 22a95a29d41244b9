"""The vocabulary of a GGUF file: read from its metadata, checked, and classified.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from oxillama_torch.errors import GGUFError

__all__ = ["TokenType", "Vocab", "read_vocab"]

PREFIX = "tokenizer.ggml."


class TokenType(IntEnum):
    """What a token is, as ``tokenizer.ggml.token_type`` numbers it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Tokens that end a turn or a text by their spelling. Files name one end-of-sequence token at most,
# yet chat models stop on several, and converters do not always type them as control tokens.
END_NAMES = _names("""
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
""")
# Fill-in-the-middle padding, repository and file separators end a text too.
FIM_END_NAMES = _names("""
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO>
    <reponame> <|file_sep|>
""")
FIM_NAMES = _names("""
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
""")
TURN_NAMES = _names("<start_of_turn> [INST] [/INST] <|turn>")
CONTROL_NAMES = END_NAMES | FIM_END_NAMES | FIM_NAMES | TURN_NAMES
# Role markers and placeholders that some converters type "user defined", which would let anyone
# write them in a message.
CONTROL_SPELLING = re.compile(r"<[|｜][^\s<>]*[|｜]>|\[PAD\d+\]")

# What a file without the keys means: SentencePiece's ids, and a begin token before every text.
SPM_DEFAULT_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ID_KEYS = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Vocab:
    """Checked tokenizer metadata.

    Args:
        model: ``gpt2``, ``llama`` or ``gemma4``.
        pre: name of the pre-tokenizer, or None.
        tokens: spelling of each id.
        types: TokenType of each id, as int.
        scores: merge priority of each id (empty when the file has none).
        merges: pairs in order of priority (empty for ``llama``).
        ids: single special ids by key stem: ``bos``, ``eos``, ``eot``, ``eom``, ``unknown``, ...
        special: ids that text must never turn into.
        literal: ids matched by their spelling before anything else, in any text.
        end: ids that end a generation.
        suppressed: ids the model must never sample.
        add_bos, add_eos, add_space_prefix: None where the file does not say.
        trims_right: a special token swallows the white space after it.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(repr=False)
    merges: list[tuple[str, str]] = field(repr=False)
    ids: dict[str, int]
    special: frozenset[int] = field(repr=False)
    literal: frozenset[int] = field(repr=False)
    end: frozenset[int]
    suppressed: frozenset[int] = field(repr=False)
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    trims_right: bool


def read_vocab(metadata: Mapping[str, Any]) -> Vocab:
    """Read and check the ``tokenizer.ggml.*`` keys.

    Args:
        metadata: as ``GGUFFile.metadata``: scalars, strings, lists, numpy arrays.

    Raises:
        GGUFError: a key is missing, of the wrong type or length, or names an id out of range.
    """
    model = _string(metadata, "model", required=True)
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    merges = _merges(metadata)
    ids = _single_ids(metadata, model, len(tokens))
    special, literal, end = _classify(tokens, types, merges, ids)
    name = str(metadata.get("general.name", "")).lower()
    return Vocab(
        model=model,
        pre=_string(metadata, "pre"),
        tokens=tokens,
        types=types,
        scores=_scores(metadata, len(tokens)),
        merges=merges,
        ids=ids,
        special=special,
        literal=literal,
        end=end,
        suppressed=frozenset(_id_list(metadata, "suppress_tokens", len(tokens))),
        add_bos=_flag(metadata, "add_bos_token"),
        add_eos=_flag(metadata, "add_eos_token"),
        add_space_prefix=_flag(metadata, "add_space_prefix"),
        # Phi-3's files do not carry this property of its tokens; llama.cpp goes by the name too.
        trims_right="phi-3" in name or "phi3" in name,
    )


def _classify(
    tokens: list[str], types: list[int], merges: list[tuple[str, str]], ids: dict[str, int]
) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Sort ids into (special, literal, end of generation)."""
    id_of = {token: i for i, token in enumerate(tokens)}
    merged = {a + b for a, b in merges} if merges else frozenset()

    def is_text(i: int) -> bool:
        """Whether merges build this token out of text: then an untyped "</s>" is just text."""
        return types[i] == TokenType.NORMAL and tokens[i] in merged

    def known(names: Iterable[str]) -> set[int]:
        return {id_of[name] for name in names if name in id_of and not is_text(id_of[name])}

    end = known(END_NAMES | FIM_END_NAMES)
    end |= {
        ids[key] for key in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if key in ids
    }
    spelled = {tokens[i] for i in end}
    # Where a turn ends with <|return|> or a call, <|end|> only closes a part of it.
    calls = {"<|call|>", "<|calls|>"} & spelled
    if calls and ({"<|return|>", "<|flush|>"} & spelled) and ids.get("eos") != id_of.get("<|end|>"):
        end.discard(id_of.get("<|end|>", -1))

    special = known(CONTROL_NAMES) | {i for i in (*end, *ids.values()) if not is_text(i)}
    literal = set()
    for i, kind in enumerate(types):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.add(i)
        elif kind == TokenType.USER_DEFINED and i not in special:
            (special if CONTROL_SPELLING.fullmatch(tokens[i]) else literal).add(i)
    return frozenset(special), frozenset(literal), frozenset(end)


def _single_ids(metadata: Mapping[str, Any], model: str, size: int) -> dict[str, int]:
    ids = {}
    for stem in ID_KEYS:
        key = f"{stem}_token_id"
        value = metadata.get(PREFIX + key)
        if value is None and model == "llama" and SPM_DEFAULT_IDS.get(key, size) < size:
            value = SPM_DEFAULT_IDS[key]
        if value is not None:
            ids[stem] = _token_id(value, key, size)
    return ids


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _list(metadata, "tokens")
    if not tokens:
        raise _error("tokens", "the file has no vocabulary", "a non-empty array of strings")
    if not all(isinstance(token, str) for token in tokens):
        raise _error("tokens", "the vocabulary holds something that is not a string", "strings")
    # An empty spelling would match everywhere; llama.cpp renames such a token alike.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))
        raise _error("tokens", f"the vocabulary holds {twice[:40]!r} twice", "distinct tokens")
    return tokens


def _types(metadata: Mapping[str, Any], size: int) -> list[int]:
    if PREFIX + "token_type" not in metadata:
        return [int(TokenType.NORMAL)] * size
    types = _list(metadata, "token_type", size)
    known = {int(kind) for kind in TokenType}
    for i, kind in enumerate(types):
        if isinstance(kind, bool) or kind not in known:
            raise _error("token_type", f"token {i} has type {kind!r}", "types 0 to 6")
    return [int(kind) for kind in types]


def _scores(metadata: Mapping[str, Any], size: int) -> list[float]:
    if PREFIX + "scores" not in metadata:
        return []
    scores = _list(metadata, "scores", size)
    if any(isinstance(s, (bool, str)) or s != s for s in scores):
        raise _error("scores", "a score is not a number", "numbers")
    return [float(s) for s in scores]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    if PREFIX + "merges" not in metadata:
        return []
    pairs = []
    for i, merge in enumerate(_list(metadata, "merges")):
        # The first space may be part of the left token, so the search starts behind it.
        space = merge.find(" ", 1) if isinstance(merge, str) else -1
        if space < 0 or space == len(merge) - 1:
            raise _error("merges", f"merge {i} is {str(merge)[:40]!r}", "'left right'")
        pairs.append((merge[:space], merge[space + 1 :]))
    return pairs


def _id_list(metadata: Mapping[str, Any], key: str, size: int) -> list[int]:
    if PREFIX + key not in metadata:
        return []
    return [_token_id(value, key, size) for value in _list(metadata, key)]


def _token_id(value: Any, key: str, size: int) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        index = -1
    if isinstance(value, bool) or not 0 <= index < size:
        raise _error(key, f"token id {value!r} is not in the vocabulary", f"0 to {size - 1}")
    return index


def _list(metadata: Mapping[str, Any], key: str, size: int | None = None) -> list[Any]:
    value = metadata.get(PREFIX + key)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise _error(key, "missing or not an array", "an array")
    if size is not None and len(value) != size:
        raise _error(key, f"{len(value)} entries for {size} tokens", f"{size} entries")
    return list(value)


def _string(metadata: Mapping[str, Any], key: str, required: bool = False) -> str | None:
    value = metadata.get(PREFIX + key)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value:
        raise _error(key, "missing or not a string", "a string")
    return value


def _flag(metadata: Mapping[str, Any], key: str) -> bool | None:
    value = metadata.get(PREFIX + key)
    if value is None or value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_"):  # numpy's bool, without importing numpy
        return bool(value)
    raise _error(key, f"{value!r} is not a boolean", "true or false")


def _error(key: str, message: str, expected: str) -> GGUFError:
    return GGUFError(f"tokenizer: {message}", tensor=PREFIX + key, expected=expected)
