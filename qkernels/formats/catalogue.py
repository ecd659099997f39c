"""The catalogue of formats: register one, get one by name, list all."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from qkernels.errors import FormatError
from qkernels.formats.format import Codebook, QuantFormat, parse

_FORMATS: dict[str, QuantFormat] = {}
_ALIASES: dict[str, str] = {}
_GROUPED_ALIAS = re.compile(r"(?P<alias>.+)_g(?P<k>-1|\d+)")


def register(format: QuantFormat, *aliases: str) -> QuantFormat:
    """Add a format and its short names to the catalogue; a name that is taken raises FormatError."""
    for name in (format.name, *aliases):
        if name in _FORMATS or name in _ALIASES:
            raise FormatError(f"the format name {name!r} is taken")
    _FORMATS[format.name] = format
    _ALIASES.update(dict.fromkeys(aliases, format.name))
    return format


def all_formats() -> list[QuantFormat]:
    """Every registered format, in order of registration."""
    return list(_FORMATS.values())


def aliases() -> dict[str, str]:
    """Short name -> format name."""
    return dict(_ALIASES)


def alias_of(format: QuantFormat) -> str | None:
    """The first short name of a format, if it has one."""
    return next((alias for alias, name in _ALIASES.items() if name == format.name), None)


def get(name: str | QuantFormat) -> QuantFormat:
    """Return the format called `name`.

    name: a short name ("int4"), a short name with another group ("int4_g32"; -1 is the whole row), or any name of the grammar
    ("u4_g96_zi_sbf16"), registered or not. Raises FormatError with the nearest names otherwise.
    """
    if isinstance(name, QuantFormat):
        return name
    if not isinstance(name, str):
        raise FormatError(f"a format is a name or a QuantFormat, not {type(name).__name__}")
    found = _FORMATS.get(_ALIASES.get(name, name)) or _regrouped(name) or parse(name, _codebooks())
    if found is None:
        near = difflib.get_close_matches(name, [*_ALIASES, *_FORMATS], n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise FormatError(f"unknown format {name!r}{hint}. Short names: {', '.join(_ALIASES)}; add _g<k> for another group")
    return found


def is_known(format: QuantFormat) -> bool:
    """Whether its name finds this very format again, as saved files and ops by name need."""
    try:
        return get(format.name) == format
    except FormatError:
        return False


def _regrouped(name: str) -> QuantFormat | None:
    m = _GROUPED_ALIAS.fullmatch(name)
    if m is None or m["alias"] not in _ALIASES:
        return None
    base = _FORMATS[_ALIASES[m["alias"]]]
    return replace(base, group=(base.group[0], int(m["k"])), name="")


def _codebooks() -> tuple[Codebook, ...]:
    codes = {f.code.name: f.code for f in _FORMATS.values() if isinstance(f.code, Codebook)}
    return tuple(codes.values())
