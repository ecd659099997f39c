"""Regular expressions from outside, which name modules in the settings of several layouts."""

from __future__ import annotations

import re
from typing import Any

from qkernels.errors import CheckpointError, UnsupportedError

MOST_CHARACTERS = 1000
MOST_REPEATS = 6  # on one way through: those of real files have three or four
_TOKEN = re.compile(
    r"""(?P<other>\\. | \[\^?\]?(?:\\.|[^\]\\])*\])   # an escape, a class of characters
    | (?P<open>\((?:\?(?:[imsxau-]*:|P<\w+>|<?[=!]|>))?) | (?P<close>\))
    | (?P<either>\|) | (?P<repeat>[*+]|\{\d*,?\d*\}) | (?P<option>\?)""",
    re.VERBOSE | re.DOTALL,
)
_SELDOM = re.compile(r"\(\?(?:#|\(|[a-zA-Z-]*x)")  # what _TOKEN does not tell apart: (?#…), (?(1)…), (?x)


def compiled(pattern: Any, where: str) -> re.Pattern[str]:
    """Compile an expression of a checkpoint, if matching it with a name surely ends.

    With nested repeats, as in "(a+)+", the time grows exponentially with the length of the name, and otherwise as a power of it, of at
    most MOST_REPEATS. Raises CheckpointError (no expression, or a long one), UnsupportedError (nested or many repeats, comments).
    """
    if not isinstance(pattern, str):
        raise CheckpointError(f"{where}: {pattern!r:.80} is no regular expression")
    if len(pattern) > MOST_CHARACTERS:
        raise CheckpointError(f"{where}: a pattern of {len(pattern)} characters; {MOST_CHARACTERS} at most are read: {pattern:.40}…")
    try:
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from error
    hindrance = "has comments or conditions" if _SELDOM.search(pattern) else _endless(pattern)
    if hindrance:
        raise UnsupportedError(f"{where}: {pattern!r:.80} {hindrance}; simpler expressions are matched")
    return found


def _endless(pattern: str) -> str | None:
    """What makes matching an expression take too long; None where nothing does."""
    ways = [[0]]  # of the groups that are open: repeats of their alternatives
    several = [False]  # whether these match in more than one way
    inner, end = False, -1  # whether the item that ends there matches in more than one way
    for token in _TOKEN.finditer(pattern):
        follows = inner and token.start() == end
        inner, end = False, token.end()
        if token["open"]:
            ways.append([0])
            several.append(False)
        elif token["close"]:
            ways[-2][-1] += max(ways.pop())
            inner = several.pop()
            several[-1] |= inner
        elif token["either"]:
            ways[-1].append(0)
            several[-1] = True
        elif token["option"]:
            several[-1] = True
        elif token["repeat"]:
            if follows:
                return "repeats what is repeated or has alternatives within"
            ways[-1][-1] += 1
            several[-1] = True
    repeats = max(ways[0])
    return f"has {repeats} repeats, one after the other" if repeats > MOST_REPEATS else None
