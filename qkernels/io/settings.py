"""Settings that a checkpoint states about itself: every key is taken, or known to change no number, or an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from qkernels.errors import CheckpointError
from qkernels.io import checked

_REQUIRED: Any = object()


class Settings:
    """A JSON object that is read key by key; `done` raises for what is left, so that nothing is silently taken for a default.

    where   what to call it in messages: "config.json: quantization_config"
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is {_shown(values)}, no JSON object")
        self.where, self._left, self._known = where, dict(values), set[str]()

    def take(self, *names: str, of: type | tuple[type, ...], default: Any = _REQUIRED, choices: Sequence[Any] | None = None) -> Any:
        """The value of the first of `names` that is there (they mean the same; two that differ are an error), else `default`.

        of        its type or types; a bool is no int, an int is a float, and null counts as not there
        choices   what it may be
        """
        self._known.update(names)
        found = {name: value for name in names if (value := self._left.pop(name, None)) is not None}
        if not found:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.where} lacks {' or '.join(names)}")
            return default
        name, value = next(iter(found.items()))
        if any(other != value for other in found.values()):
            raise CheckpointError(f"{self.where} contradicts itself: {found}")
        kinds = of if isinstance(of, tuple) else (of,)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}, not {' or '.join(kind.__name__ for kind in kinds)}")
        if choices is not None and value not in choices:
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}; {', '.join(map(repr, choices))} are read")
        return value

    def inner(self, *names: str) -> Settings | None:
        """An object within, to be read likewise; None where it is not there."""
        value = self.take(*names, of=dict, default=None)
        return None if value is None else Settings(value, f"{self.where}: {names[0]}")

    def names(self, *names: str) -> list[str]:
        """A list of strings; empty where it is not there."""
        return checked.names(self.take(*names, of=list, default=[]), f"{self.where}: {names[0]}")

    def ignore(self, *names: str) -> None:
        """Leave out keys that change no number: how a checkpoint was made, or how some other program runs it."""
        self._known.update(names)
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Raise CheckpointError for a key that nobody took."""
        for name, value in self._left.items():
            if value is None:
                continue
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CheckpointError(f"{self.where} has {name} = {_shown(value)}, which is unknown: it may change what the numbers mean{hint}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
