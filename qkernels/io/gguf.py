"""GGUF, the files of llama.cpp: tensors of ggml's block types, whose bytes stay as they lie in the file.

Names are the file's own ("blk.0.attn_q.weight"). What NVFP4 has besides, "<name>.scale" and "<name>.input_scale", are tensors of their own.
A model may be split into name-00001-of-0000N.gguf, …; it is written as one file.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.ggml import TYPES, type_id
from qkernels.io import gguf_blocks, gguf_file
from qkernels.io.detect import CheckpointInfo
from qkernels.io.directory import typed
from qkernels.io.gguf_file import LONGEST_NAME, PLAIN, Header, KeyValues, TensorInfo
from qkernels.io.weights import Value

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
WINDOW = 1 << 30  # bytes of a file that are mapped at once, unless a tensor is larger
_PART = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.gguf")
# Ids without a format here: what was there and is gone, what only activations have, and what a fork of llama.cpp uses for its own.
_OTHER_TYPES = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
    **{133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K"},
    **{144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT"},
    **{156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
}
# Where in a block numbers of 16 bits lie, whose bytes big-endian files have in the other order. Of types that are not here ggml reads
# bytes as wider words, or no program makes big-endian files.
_HALVES = {2: [0], 3: [0, 2], 8: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208], 20: [0], 23: [0, 2], 39: [], 40: []}


def detect(path: Path) -> CheckpointInfo:
    """Read the headers of a file, and of all parts if it is one of a split model; the key-values, without split.*, are the settings.

    Raises CheckpointError naming the file that is damaged, missing, or no part of this model.
    """
    parts = _parts(path)
    settings = KeyValues(parts[0].settings)
    for key in SPLIT_KEYS if len(parts) > 1 else ():
        settings.pop(key, None)
    return CheckpointInfo(path, "gguf", tuple(part.path for part in parts), settings)


def _parts(path: Path) -> list[Header]:
    header = gguf_file.parse(path)
    name = _PART.fullmatch(path.name)
    count, stated_count = int(name[3]) if name else 1, header.settings.get("split.count", 1)
    if stated_count != count:
        raise CheckpointError(f"{path} says split.count = {stated_count!r}, unlike its name; a part is called name-00001-of-0000N.gguf")
    if name is None or count == 1:
        return [header]
    parts, owners = list[Header](), dict[str, Path]()
    for i in range(count):
        part = gguf_file.parse(path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf"))
        stated, expected = ([h.settings.get(key) for key in SPLIT_KEYS] for h in (part, header))
        if stated != [i, *expected[1:]]:
            raise CheckpointError(f"{part.path} says {', '.join(SPLIT_KEYS)} = {stated}, not {[i, *expected[1:]]} as {path} has it")
        for t in part.tensors:
            if t.name in owners:
                raise CheckpointError(f"the tensor {t.name!r} lies in two files: {owners[t.name]} and {part.path}")
            owners[t.name] = part.path
        parts.append(part)
    if header.settings.get(SPLIT_KEYS[2]) != len(owners):
        raise CheckpointError(f"{path} says {SPLIT_KEYS[2]} = {header.settings.get(SPLIT_KEYS[2])!r}; its parts have {len(owners)}")
    return parts


def read(info: CheckpointInfo) -> Iterator[tuple[str, Value]]:
    """Yield every tensor that can be read: blocks as they lie in the file, which is mapped; what is written to them does not reach it.

    Raises UnsupportedError at the end, naming the tensors that could not be read, and why.
    """
    unread: dict[str, list[str]] = {}
    for path in info.files:
        header, data = gguf_file.parse(path), _Map(path)
        for t in header.tensors:
            if reason := _why_not(t, header.big_endian):
                unread.setdefault(reason, []).append(t.name)
            else:
                yield t.name, _value(t, data, header.big_endian)
    if unread:
        reasons = {reason: f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for reason, names in unread.items()}
        raise UnsupportedError(f"{info.path}: not every tensor could be read", reasons)


def some(info: CheckpointInfo, names: Container[str]) -> dict[str, Value]:
    """Read those of these tensors that are there and can be read, and no other."""
    found = dict[str, Value]()
    for path in info.files:
        header, data = gguf_file.parse(path), _Map(path)
        wanted = (t for t in header.tensors if t.name in names and not _why_not(t, header.big_endian))
        found |= {t.name: _value(t, data, header.big_endian) for t in wanted}
    return found


def _why_not(t: TensorInfo, big_endian: bool) -> str | None:
    if t.type in PLAIN:
        return None
    if t.type not in TYPES:
        name = _OTHER_TYPES.get(t.type, "of ik_llama.cpp, or unknown" if t.type > 95 else "unknown")
        return f"type {t.type} ({name}) is not read"
    if big_endian and t.type not in _HALVES:
        return f"big-endian {TYPES[t.type].name} is not read"
    return f"{TYPES[t.type].name} with {len(t.shape)} axes is not read; up to 3 are" if len(t.shape) > 3 else None


def _value(t: TensorInfo, data: _Map, big_endian: bool) -> Value:
    assert t.nbytes is not None  # _why_not has seen to it
    raw = data.bytes(t.offset, t.nbytes)
    if t.type in PLAIN:
        dtype = PLAIN[t.type]
        if big_endian:
            raw = raw.view(-1, dtype.itemsize).flip(1).flatten()
        elif t.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(t.shape)
    format = TYPES[t.type]
    if big_endian:
        raw = _swapped(raw, t.type)
    if len(t.shape) == 3:
        return QuantStack(format, t.shape, {"codes": raw.view(*t.shape[:2], -1)})
    n, k = t.shape if len(t.shape) == 2 else (1, *t.shape)
    return QuantTensor(format, (n, k), raw.view(n, -1), origin={} if len(t.shape) == 2 else {"axes": 1})


def _swapped(raw: Tensor, type: int) -> Tensor:
    """Turn the halves in big-endian blocks round."""
    block = TYPES[type].block
    assert block is not None  # as of all of ggml's types
    blocks = raw.view(-1, block.nbytes).clone()
    for at in _HALVES[type]:
        blocks[:, at : at + 2] = blocks[:, at : at + 2].flip(1)
    return blocks.flatten()


class _Map:
    """A file as tensors that are views of it, copied on write.

    It is mapped window by window: one leaves together with the last tensor in it, so that of a file that is gone through, however large, a
    window is held; one a tensor would be too many open files.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, 0
        self.map: mmap.mmap | None = None

    def bytes(self, offset: int, count: int) -> Tensor:
        if self.map is None or not self.start <= offset <= offset + count <= self.start + len(self.map):
            with typed(f"cannot map {self.path}"), self.path.open("rb") as file:
                self.start = offset - offset % mmap.ALLOCATIONGRANULARITY
                left = os.fstat(file.fileno()).st_size - self.start
                if left < (needed := offset + count - self.start):
                    raise CheckpointError(f"{self.path} has become shorter than its header says")
                size = min(max(needed, WINDOW), left)
                self.map = mmap.mmap(file.fileno(), size, offset=self.start, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self.map, dtype=torch.uint8, count=count, offset=offset - self.start)


def write(
    items: Iterable[tuple[str, Value]], path: Path, settings: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Write one file, which appears whole or not at all; what `read` gave, with the settings of `detect`, becomes the same bytes.

    items      names and tensors; weights that are no blocks become such where a type of ggml holds the same numbers
    settings   the key-values, best as KeyValues, which know their types; None: {"general.quantization_version": 2}
    config     is not stored: a GGUF file says in key-values what a model is
    Raises     UnsupportedError naming a weight that no type of ggml holds, FormatError (a key-value), CheckpointError (the file)
    """
    stated = KeyValues({"general.quantization_version": 2} if settings is None else settings)
    alignment, pairs = gguf_file.alignment(stated), gguf_file.pack(stated)
    target = Path(os.path.realpath(path))
    with typed(f"cannot write {path}"):
        if target.exists():
            raise CheckpointError(f"{path} exists: name a new file")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The infos come before the data, but all of them are known only after them.
        with tempfile.TemporaryFile(dir=target.parent) as data:
            infos = _write_data(items, data, alignment)
            data.seek(0)
            _write_whole(target, gguf_file.header(pairs, infos, alignment), data)


def _write_data(items: Iterable[tuple[str, Value]], data: IO[bytes], alignment: int) -> list[TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for name, value in (part for item in items for part in gguf_blocks.apart(*item)):
        if name in infos:
            raise FormatError(f"the tensor {name!r} is there twice")
        type, shape, raw = stored(name, value)
        infos[name] = TensorInfo(name, type, shape, data.tell(), raw.numel())
        data.write(raw.numpy())  # type: ignore[call-overload]  # an array is a buffer
        data.write(bytes(gguf_file.padded(data.tell(), alignment) - data.tell()))
    return list(infos.values())


def stored(name: str, value: Value) -> tuple[int, tuple[int, ...], Tensor]:
    """Type, shape and bytes of what is to be stored; UnsupportedError for what cannot be."""
    if len(name.encode()) > LONGEST_NAME:
        raise UnsupportedError(f"the tensor's name {name!r} is too long for ggml, which holds {LONGEST_NAME} bytes")
    shape = tuple(value.shape)
    if isinstance(value, Tensor):
        type = next((id for id, dtype in PLAIN.items() if dtype == value.dtype), None)
        if type is None or 0 in shape or not 1 <= len(shape) <= 4:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PLAIN.values())
            raise UnsupportedError(f"{name} is {list(shape)} {value.dtype}; 1 to 4 axes, none of them empty, of {known} can be written")
        return type, shape, _bytes(value)
    if (value.tensors if isinstance(value, QuantStack) else value.tensors()).get("perm") is not None:
        raise UnsupportedError(f"{name} has a permutation of its columns, which GGUF cannot say")
    value = gguf_blocks.of(name, value)
    if isinstance(value, QuantTensor) and value.origin.get("axes") == 1 and shape[0] == 1:
        shape = shape[1:]
    return type_id(value.format), shape, _bytes(value.tensors["codes"] if isinstance(value, QuantStack) else value.codes)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8)


def _write_whole(target: Path, header: bytes, data: IO[bytes]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            file.write(header)
            shutil.copyfileobj(data, file, 1 << 24)
        os.chmod(temporary, 0o644)  # mkstemp makes it the owner's alone
        os.rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
