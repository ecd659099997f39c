"""How text becomes tokens in tokenizer.json and in llama.cpp: what both do alike, what the one calls it and what the other.

Source: llama-vocab.cpp of llama.cpp, and the tokenizer.json that the tokenizers library writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from qkernels.io.settings import Settings

Steps = tuple[tuple[str, Any], ...]  # of a normalizer or a pre-tokenizer: the kind of each, and what it does
Merges = list[tuple[str, str]]
Warn = Callable[[str], None]
_SPACE = "▁"  # which stands for a space in a SentencePiece vocabulary

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHERS, _OTHERS_OR_PATHS = (rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|\s*[\r\n]+|\s+(?!\S)|\s+" for slash in ("", "/"))
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_OTHERS_OR_PATHS}"
_GPT4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}{_OTHERS_OR_PATHS}"
# steps of the pre-tokenizer -> whether merges are ignored for a word that is a token -> llama.cpp's name
PRE_TOKENIZERS: dict[Steps, dict[bool, str]] = {
    (("ByteLevel", True),): {False: "gpt-2"},
    (("Digits", True), ("ByteLevel", True)): {False: "smollm"},
    (("Split", rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{{1,3}}{_OTHERS}"), ("ByteLevel", False)): {True: "llama-bpe", False: "smaug-bpe"},
    (("Split", rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{_OTHERS}"), ("ByteLevel", False)): {False: "qwen2"},
    (("Split", _TEKKEN), ("ByteLevel", False)): {True: "tekken"},
    (("Split", _GPT4O), ("ByteLevel", False)): {False: "gpt-4o"},
}
# steps of the normalizer, and of the pre-tokenizer -> whether text gets a space in front
_SPACE_PREFIX: dict[tuple[Any, Any], bool] = {
    ((("Prepend", _SPACE), ("Replace", (" ", _SPACE))), ()): True,
    ((("Replace", (" ", _SPACE)),), ()): False,
    **{((), (("Metaspace", scheme),)): scheme != "never" for scheme in ("always", "first", "never")},
}


def step(step: Settings) -> tuple[str, Any]:
    """A step of a normalizer or pre-tokenizer: its kind, and what it does, as the tables have it."""
    kind = step.take("type", of=str)
    if kind == "Split":
        # what lies between matches is cut off as a piece of its own; the expressions that are known leave nothing between
        isolated = (step.take("behavior", of=str), step.take("invert", of=bool, default=False)) in (("Isolated", False), ("Removed", True))
        return kind, _pattern(step, "Regex") if isolated else None
    if kind == "Digits":
        return kind, step.take("individual_digits", of=bool, default=False)
    if kind == "ByteLevel":
        prefix = step.take("add_prefix_space", of=bool, default=True)
        return kind, "with add_prefix_space" if prefix else step.take("use_regex", of=bool, default=True)
    if kind == "Metaspace":
        whole = not step.take("split", of=bool, default=True) and step.take("replacement", of=str) == _SPACE
        return kind, step.take("prepend_scheme", of=str, default="always") if whole else None
    if kind == "Replace":
        return kind, (_pattern(step, "String"), step.take("content", of=str))
    return kind, step.take("prepend", of=str, default=None) if kind == "Prepend" else None


def _pattern(step: Settings, kind: str) -> str | None:
    """What a step looks for, if that is of this kind."""
    found: str | None = Settings(step.take("pattern", of=dict), step.where).take(kind, of=str, default=None)
    return found


def pre_tokenizer(warn: Warn, ignored: bool, normalized: Steps, cut: Steps) -> str:
    """llama.cpp's name of the way text is cut into words; "default" where it has none."""
    if unknown := [kind for kind, _ in normalized if kind != "NFC"]:
        warn(f"llama.cpp does not apply the normalizer {', '.join(unknown)}")
    names = PRE_TOKENIZERS.get(cut)
    if names is None:
        warn(f"llama.cpp has no pre-tokenizer known to be this one: {_said(cut)}. 'default' is written, which cuts some text otherwise")
        return "default"
    if ignored not in names:
        warn(f"ignore_merges is {ignored}, and {not ignored} in llama.cpp's {names[not ignored]!r}: some words may become other tokens")
    return names.get(ignored, next(iter(names.values())))


def space_prefix(warn: Warn, normalized: Steps, cut: Steps) -> bool:
    """Whether text gets a space in front."""
    if (normalized, cut) not in _SPACE_PREFIX:
        said = _said(normalized + cut)
        warn(f"llama.cpp makes spaces {_SPACE} and cuts nothing, where the tokenizer has: {said}. Some text becomes other tokens")
    return _SPACE_PREFIX.get((normalized, cut), True)


def _said(steps: Steps) -> str:
    return ", ".join(f"{kind} {what}" for kind, what in steps)[:500]


def scores(warn: Warn, tokens: Sequence[str], merges: Merges, others: Set[str]) -> list[float]:
    """What llama.cpp merges by: of two neighbours that make any token, those first whose token has the highest score.

    Minus the rank of the first merge that makes the token says the same as the merges, if all merges that make a token follow each
    other, and each pair that makes one is among them: so it is where the vocabulary is SentencePiece's.

    others   tokens that no merge makes
    """
    rank: dict[str, int] = {}
    ordered = True
    for left, right in merges:
        ordered &= rank.setdefault(left + right, len(rank)) == len(rank) - 1
    pairs = set(merges)
    splits = ((token[:i], token[i:]) for token in tokens if token not in others for i in range(1, len(token)))
    strange = next((p for p in splits if p not in pairs and all(len(part) == 1 or part in rank for part in p)), None)
    if strange or not ordered:
        why = f"{strange[0]!r} and {strange[1]!r} make a token and are no merge" if strange else "merges of a token lie apart"
        warn(f"llama.cpp merges in the order of scores, which is not that of the tokenizer's merges: {why}; some words become other tokens")
    return [-float(rank.get(token, len(rank))) for token in tokens]
