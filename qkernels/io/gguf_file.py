"""The GGUF file: its key-values, and where which tensor lies. What the tensors are is told in gguf.py.

    "GGUF", version, number of tensors, number of key-values
    key-values      key, type, value
    tensor infos    name, number of axes, their extents (the fastest first), type, offset in the data
    data            the tensors in the order of their infos; it and each of them begin at multiples of general.alignment

Little-endian; of a big-endian file the version says so. Source: docs/gguf.md of ggml, and what its gguf.cpp takes and refuses.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qkernels.errors import CheckpointError, FormatError
from qkernels.formats.ggml import TYPES

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MOST_ALIGNMENT = 1 << 20  # bytes, as a small file could ask for gigabytes of padding
MOST_HEADER = 64 << 20  # bytes before the data: vocabularies of 260 000 tokens with their merges take 20 MB
LONGEST_NAME = 63  # bytes of a tensor's name that ggml holds
# ggml's ids of types that are no blocks
PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_VALUE_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")  # by id
_LETTERS = dict(u8="B", i8="b", u16="H", i16="h", u32="I", i32="i", f32="f", bool="?", u64="Q", i64="q", f64="d")
_NATURAL = {bool: ("bool",), str: ("string",), int: ("u32", "i32", "u64", "i64"), float: ("f32", "f64")}


class KeyValues(dict[str, Any]):
    """Key-values in file order, as plain numbers, strings and lists; `types` says how each is stored: "u32", "string", "[f32]", ….

    A key without a type gets the natural one: bool, string, f32, [...] of lists, and the first of u32, i32, u64 and i64 that fits.
    Bytes of a string that are no UTF-8 (tokens of some vocabularies) become lone surrogates, as file names do in Python.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, types: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.types = dict(getattr(values, "types", {}) if types is None else types)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in torch's order, where it begins in the file, and how many bytes it has (None: of an unknown type)."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


@dataclass(frozen=True)
class Header:
    """All of a file but its data; checked: every tensor lies within the file, and none in another."""

    path: Path
    big_endian: bool
    settings: KeyValues
    tensors: tuple[TensorInfo, ...]


def parse(path: Path) -> Header:
    """Read and check the header of a file, which is not trusted: no more memory is taken than some ten times what the header has."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path} has {size} bytes; a GGUF file has 24 at least")
        with path.open("rb") as file, mmap.mmap(file.fileno(), min(size, MOST_HEADER), access=mmap.ACCESS_READ) as data:
            return _header(_Bytes(data, path), size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


class _Bytes:
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
        letter = _LETTERS[type]
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


def _header(source: _Bytes, size: int) -> Header:
    if (magic := source.take(4, "the magic")) != MAGIC:
        raise source.error(f"it begins with {magic!r}, not {MAGIC!r}")
    version = source.number("u32", "the version")
    if version and version & 0xFFFF == 0:
        source.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, VERSION):
        raise source.error(f"version {version}; 2 and {VERSION} are read")
    tensors = source.number("u64", "the number of tensors")
    pairs = source.count(13, "key-values")
    if tensors * 32 > len(source.data):
        raise source.error(f"{tensors} tensors take {tensors * 32} bytes at least, and the file has {size}")
    settings = _key_values(source, pairs)
    infos = [_info(source) for _ in range(tensors)]
    return Header(source.path, source.order == ">", settings, tuple(_placed(source, infos, alignment(settings, source), size)))


def _key_values(source: _Bytes, pairs: int) -> KeyValues:
    found = KeyValues()
    for _ in range(pairs):
        key = source.name("a key")
        if key in found:
            raise source.error(f"the key {key!r} is there twice")
        type = _value_type(source, key)
        if type == "array":
            element = _value_type(source, key)
            if element == "array":
                raise source.error(f"{key!r} is an array of arrays, which ggml does not have either")
            found[key], found.types[key] = _values(source, element, key), f"[{element}]"
        else:
            value = source.string(key) if type == "string" else source.number(type, key)
            found[key], found.types[key] = _text(value) if isinstance(value, bytes) else value, type
    return found


def _value_type(source: _Bytes, key: str) -> str:
    id = source.number("u32", f"the type of {key!r}")
    if id >= len(_VALUE_TYPES):
        raise source.error(f"{key!r} is of type {id}; 0…{len(_VALUE_TYPES) - 1} are known")
    return _VALUE_TYPES[id]


def _values(source: _Bytes, type: str, key: str) -> list[Any]:
    if type == "string":
        return list(map(_text, source.strings(source.count(8, f"strings of {key!r}"), key)))
    count = source.count(struct.calcsize(f"<{_LETTERS[type]}"), f"elements of {key!r}")
    return list(source.numbers(type, count, key))


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _info(source: _Bytes) -> TensorInfo:
    name = source.name("a tensor's name")
    axes = source.number("u32", f"the number of axes of {name!r}")
    if not 1 <= axes <= 4:
        raise source.error(f"{name!r} has {axes} axes; 1 to 4 are possible")
    shape = source.numbers("u64", axes, f"the shape of {name!r}")[::-1]
    type = source.number("u32", f"the type of {name!r}")
    offset = source.number("u64", f"the offset of {name!r}")
    if 0 in shape:
        raise source.error(f"{name!r} has the shape {list(shape)}")
    try:
        return TensorInfo(name, type, shape, offset, nbytes(type, shape))
    except FormatError as error:
        raise source.error(f"{name!r}: {error}") from error


def nbytes(type: int, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None of an unknown type; FormatError where its rows are no whole number of blocks."""
    if type in PLAIN:
        return math.prod(shape) * PLAIN[type].itemsize
    if type not in TYPES:
        return None
    *rows, k = shape
    return math.prod(rows) * TYPES[type].codes_shape(1, k)[1]


def alignment(settings: KeyValues, source: _Bytes | None = None) -> int:
    """What settings say of the alignment, checked. Raises CheckpointError of a file, FormatError of settings from elsewhere."""
    value = settings.get(ALIGNMENT_KEY, ALIGNMENT)
    whole = settings.types.get(ALIGNMENT_KEY, "u32") == "u32" and type(value) is int
    if whole and 1 <= value <= MOST_ALIGNMENT and MOST_ALIGNMENT % value == 0:
        return value
    message = f"{ALIGNMENT_KEY} is {value!r}; a u32, a power of two up to {MOST_ALIGNMENT} is possible"
    raise source.error(message) if source else FormatError(message)


def _placed(source: _Bytes, infos: Iterable[TensorInfo], alignment: int, size: int) -> Iterable[TensorInfo]:
    """Turn offsets in the data into such in the file, and check that the tensors follow each other, as ggml demands."""
    start, names = padded(source.at, alignment), set[str]()
    least, exactly = 0, True  # where the next tensor begins, or where at least, after one of unknown size
    for info in infos:
        if info.name in names:
            raise source.error(f"the tensor {info.name!r} is there twice")
        names.add(info.name)
        if info.offset % alignment or info.offset < least or (exactly and info.offset > least):
            where = "" if exactly else " at least"
            raise source.error(f"{info.name!r} begins at byte {info.offset} of the data, not at {least}{where}, a multiple of {alignment}")
        if start + info.offset + (info.nbytes or 0) > size:
            raise source.error(f"{info.name!r} {list(info.shape)} ends beyond the {size} bytes of the file")
        least, exactly = padded(info.offset + (info.nbytes or 0), alignment), info.nbytes is not None
        yield TensorInfo(info.name, info.type, info.shape, start + info.offset, info.nbytes)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# -- writing --------------------------------------------------------------------------------------------------------------------


def header(pairs: Sequence[bytes], infos: Sequence[TensorInfo], alignment: int) -> bytes:
    """All that lies before the data, padding included; `offset` of the infos counts from the beginning of the data."""
    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(pairs)), *pairs]
    for t in infos:
        extents = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        pieces += [_string(t.name), extents, struct.pack("<IQ", t.type, t.offset)]
    packed = b"".join(pieces)
    return packed.ljust(padded(len(packed), alignment), b"\0")


def pack(settings: KeyValues) -> list[bytes]:
    """Key-values as they are stored. Raises FormatError naming one that cannot be."""
    return [_pair(key, value, settings.types.get(key)) for key, value in settings.items()]


def _pair(key: str, value: Any, type: str | None) -> bytes:
    """Key, type and value, of the type if there is one, else of the natural one."""
    for candidate in _natural(value) if type is None else (type,):
        try:
            return _string(key) + _value(value, candidate)
        except (struct.error, OverflowError, TypeError, AttributeError, KeyError, ValueError):
            continue  # it does not fit
    raise FormatError(f"the key {key!r} = {value!r:.80} cannot be stored as {type or 'a number, string or list of one type'}")


def _natural(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    types = next((types for kind, types in _NATURAL.items() if values and all(isinstance(v, kind) for v in values)), ())
    return [f"[{t}]" if values is value else t for t in types]


def _value(value: Any, type: str) -> bytes:
    if not type.startswith("["):
        return struct.pack("<I", _VALUE_TYPES.index(type)) + _plain([value], type)
    element = type[1:-1]
    return struct.pack("<IIQ", _VALUE_TYPES.index("array"), _VALUE_TYPES.index(element), len(value)) + _plain(value, element)


def _plain(values: Iterable[Any], type: str) -> bytes:
    values = list(values)
    return b"".join(map(_string, values)) if type == "string" else struct.pack(f"<{len(values)}{_LETTERS[type]}", *values)


def _string(text: str) -> bytes:
    encoded = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded
