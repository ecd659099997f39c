"""Progress bars while something takes its time: on a terminal or in a notebook, gone afterwards; a pipe gets nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def track(items: Collection[T], show: bool, text: str) -> Iterable[T]:
    """Go through `items` beneath a bar."""
    from rich import markup, progress

    return progress.track(items, markup.escape(text), transient=True, disable=not show or _nobody_sees())


@contextmanager
def pulse(show: bool, text: str) -> Iterator[None]:
    """A bar for work that cannot say how much there is of it."""
    from rich import markup, progress

    with progress.Progress(transient=True, disable=not show or _nobody_sees()) as bar:
        bar.add_task(markup.escape(text), total=None)
        yield


def _nobody_sees() -> bool:
    from rich import get_console

    return not (get_console().is_terminal or get_console().is_jupyter)
