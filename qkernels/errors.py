"""The errors that qkernels raises on purpose.

QKernelsError
├── FormatError          a format, tensor or argument does not make sense: the message names the value, the limit and what would work
├── UnsupportedError     sound, but no kernel here can run it: carries every kernel's reason
├── BackendUnavailable   a backend was asked for by name and is not there: the message says why
└── CheckpointError      a file or directory is missing, truncated, or not what it says it is
"""

from __future__ import annotations

from collections.abc import Mapping


class QKernelsError(Exception):
    """Base of every error that qkernels raises on purpose."""


class FormatError(QKernelsError, ValueError):
    """A format, tensor or argument that does not make sense."""


class UnsupportedError(QKernelsError):
    """No kernel can run the problem, or no layout hold the weights; `reasons` maps each one's name to why not.

    The message says every reason once, with the first of those that it holds for.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        names: dict[str, list[str]] = {}
        for name, reason in sorted(self.reasons.items()):
            names.setdefault(reason.removeprefix(name).lstrip(": "), []).append(name)
        lines = [f"  {', '.join(held[:3])}{f', … ({len(held)} in all)' if held[3:] else ''}: {reason}" for reason, held in names.items()]
        super().__init__("\n".join([message, *lines]))


class BackendUnavailable(QKernelsError):
    """A backend that was asked for by name is not available on this machine."""


class CheckpointError(QKernelsError):
    """A checkpoint that is missing, truncated, edited, or not what it says it is."""
