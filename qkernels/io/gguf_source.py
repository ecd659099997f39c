"""The bytes of a GGUF header, piece by piece."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qkernels.errors import CheckpointError

MOST_HEADER = 64 << 20  # bytes before the data: vocabularies of 260 000 tokens with their merges take 20 MB
LETTERS = dict(u8="B", i8="b", u16="H", i16="h", u32="I", i32="i", f32="f", bool="?", u64="Q", i64="q", f64="d")  # of struct


class Source:
    """What the file says, piece by piece; never more of it than there is."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.order = data, path, 0, "<"

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged at byte {self.at}: {message}")

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > (left := len(self.data) - self.at):
            raise self.error(f"{what} takes {nbytes} bytes, and {left} are left (a header has {MOST_HEADER} at most)")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def numbers(self, type: str, count: int, what: str) -> tuple[Any, ...]:
        letter = LETTERS[type]
        return struct.unpack(f"{self.order}{count}{letter}", self.take(count * struct.calcsize(f"<{letter}"), what))

    def number(self, type: str, what: str) -> Any:
        return self.numbers(type, 1, what)[0]

    def count(self, least: int, what: str) -> int:
        """A number of things that take `least` bytes each, or more."""
        count = self.number("u64", f"the number of {what}")
        if count * least > (left := len(self.data) - self.at):
            raise self.error(f"{count} {what} take {count * least} bytes at least, and {left} are left")
        return count

    def string(self, what: str) -> bytes:
        return self.take(self.number("u64", what), what)

    def strings(self, count: int, what: str) -> Iterator[bytes]:
        """As `string` again and again, in half the time: vocabularies have half a million of them."""
        length, end = struct.Struct(f"{self.order}Q").unpack_from, len(self.data)
        for _ in range(count):
            nbytes = length(self.data, self.at)[0] if self.at + 8 <= end else end
            if self.at + 8 + nbytes > end:
                raise self.error(f"a string of {what} takes {nbytes} bytes, and {end - self.at} are left")
            self.at += 8 + nbytes
            yield self.data[self.at - nbytes : self.at]

    def name(self, what: str) -> str:
        try:
            return self.string(what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is no UTF-8: {error}") from error
