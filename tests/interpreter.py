"""Triton's interpreter at less than half its time: without what it does again and again, or for nothing. Imported for that alone."""

import dataclasses
import functools
import inspect

from triton.language import core
from triton.runtime import interpreter

# Every sum and product of integers is done again in int64 for an assertion, which is then left out, as `debug` is off.
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


@functools.cache
def _builtins(where):
    return [name for name, member in inspect.getmembers(where) if core.is_builtin(member)]


def _patch_builtin(where, *rest):
    """What the interpreter's own does, for every call of a device function anew; but the names stay, and are looked for once."""
    for name in _builtins(where):
        if core.is_builtin(member := getattr(where, name)):
            interpreter._patch_attr(where, name, member, *rest)


interpreter._patch_builtin = _patch_builtin
