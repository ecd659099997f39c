"""Triton's interpreter at less than half its time: without what it does again and again, or for nothing. Imported for that alone."""

import dataclasses

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

# Every sum and product of integers is done again in int64 for an assertion, which is then left out, as `debug` is off.
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

_SEEN, _CALL = set(), InterpretedFunction.__call__


def _call(self, *args, **kwargs):
    """Call a device function. All of the language is looked through for what to put in its place; once for every module is enough:
    what a kernel's launch replaces stays until its end, and what a function of Triton's own does, for ever."""
    if (where := id(self.fn.__globals__)) in _SEEN:
        return self.rewrite()(*args, **kwargs)
    _SEEN.add(where)
    return _CALL(self, *args, **kwargs)


InterpretedFunction.__call__ = _call
