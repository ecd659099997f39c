"""Damaged GGUF files, and those of types that are not read: an error of ours, soon, in little memory."""

import os
import struct
import time
import tracemalloc

import pytest
from gguf_files import GOLDEN, PUT_IN, SPLIT, WHOLE, assert_same, rewritten
from hypothesis import HealthCheck, given, settings, strategies

from qkernels import io
from qkernels.errors import CheckpointError, QKernelsError, UnsupportedError
from qkernels.io import gguf_source

# -- types that are not read --------------------------------------------------------------------------------------------------------


def string(text):
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


def info(name="t", shape=(32,), type=0, offset=0, axes=None):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if axes is None else axes, *shape, type, offset)


def u32(key, value):
    return string(key) + struct.pack("<II", 4, value)


def file(*tensors, pairs=(), version=3, data=4096, counts=None, magic=b"GGUF"):
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join((*pairs, *tensors))
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


@pytest.mark.parametrize(
    ("type", "named"),
    [
        (4, "Q4_2"),
        (31, "Q4_0_4_4"),
        (36, "IQ4_NL_4_4"),
        (15, "Q8_K"),
        (94, "unknown"),
        (137, "IQ2_K"),
        (212, "ik_llama.cpp"),
        (2**32 - 1, ""),
    ],
)
def test_unknown_types_do_not_hide_the_others(type, named, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(file(info("a"), info("odd", (256, 2), type, 128), info("more", (256, 2), type, 160), info("z", offset=1024)))
    found = io.detect(path)
    read = io.read(found)
    assert [next(read)[0], next(read)[0]] == ["a", "z"]
    with pytest.raises(UnsupportedError, match=rf"(?s)a\.gguf.*type {type} \(.*{named}.*odd and 1 more"):
        next(read)


def test_blocks_with_four_axes(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file(info(shape=(32, 2, 2, 2), type=8)))
    with pytest.raises(UnsupportedError, match=r"q8_0 with 4 axes.*: t"):
        list(io.read(tmp_path / "a.gguf"))


def test_big_endian_types_nobody_converts(tmp_path):
    little = file(info(shape=(32,), type=6))
    swapped = struct.pack(">IQQ", 3, 1, 0) + struct.pack(">Q", 1) + b"t" + struct.pack(">IQIQ", 1, 32, 6, 0)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + swapped + little[4 + len(swapped) :])
    with pytest.raises(UnsupportedError, match=r"big-endian q5_0.*: t"):
        list(io.read(tmp_path / "a.gguf"))


# -- hostile files ------------------------------------------------------------------------------------------------------------------

HUGE = 2**63
pair = string("k")
HOSTILE = {
    "empty": b"",
    "magic alone": b"GGUF",
    "magic": file(magic=b"GGML"),
    "version 0": file(version=0),
    "version 1": file(version=1),
    "version 4": file(version=4),
    "big-endian version 1": file(version=1 << 24),
    "big-endian version 4": file(version=4 << 24),
    "2^63 tensors": file(counts=(HUGE, 0)),
    "2^64 - 1 tensors": file(counts=(2**64 - 1, 0)),
    "more tensors than bytes": file(counts=(200, 0)),
    "2^63 key-values": file(counts=(0, HUGE)),
    "more key-values than bytes": file(counts=(0, 400)),
    "key beyond the file": file(pairs=[struct.pack("<Q", HUGE) + b"k"]),
    "key of 2^64 - 1": file(pairs=[struct.pack("<Q", 2**64 - 1) + b"k"]),
    "string beyond the file": file(pairs=[pair + struct.pack("<IQ", 8, 2**40)]),
    "key no UTF-8": file(pairs=[string(b"\xff") + struct.pack("<II", 4, 1)]),
    "key twice": file(pairs=[u32("k", 1), u32("k", 1)]),
    "unknown type of value": file(pairs=[pair + struct.pack("<II", 13, 1)]),
    "array of 2^63": file(pairs=[pair + struct.pack("<IIQ", 9, 0, HUGE)]),
    "array of 2^61 u64, which overflows": file(pairs=[pair + struct.pack("<IIQ", 9, 10, 2**61)]),
    "array of 2^63 strings": file(pairs=[pair + struct.pack("<IIQ", 9, 8, HUGE)]),
    "array of arrays": file(pairs=[pair + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQI", 4, 1, 1)]),
    "array of unknown type": file(pairs=[pair + struct.pack("<IIQ", 9, 99, 1)]),
    "tensor name no UTF-8": file(info(b"\xc3\x28")),
    "tensor name beyond the file": file(struct.pack("<Q", 2**40) + bytes(60)),
    "tensor twice": file(info("t"), info("t", offset=128)),
    "no axes": file(info(shape=())),
    "five axes": file(info(shape=(32, 1, 1, 1, 1))),
    "2^32 - 1 axes": file(info(axes=2**32 - 1)),
    "an axis of 0": file(info(shape=(32, 0))),
    "product overflows": file(info(shape=(2**32, 2**32))),
    "product overflows to little": file(info(shape=(2**62, 4, 2))),
    "K no multiple of the block": file(info(shape=(33, 2), type=8)),
    "K no multiple of the block of 256": file(info(shape=(128, 2), type=12)),
    "offset not aligned": file(info(offset=4)),
    "a gap": file(info("a"), info("b", offset=160)),
    "overlap": file(info("a"), info("b", offset=96)),
    "the same place": file(info("a"), info("b")),
    "out of order": file(info("a", offset=128), info("b")),
    "offset out of the data": file(info("a", type=99), info("b", offset=1 << 20)),
    "offset of 2^64 - 32": file(info("a", type=99), info("b", offset=2**64 - 32)),
    "unknown type out of the data": file(info(type=99, offset=1 << 20)),
    "ends beyond the data": file(info(shape=(2048,))),
    "alignment 0": file(info(), pairs=[u32("general.alignment", 0)]),
    "alignment 24": file(info(), pairs=[u32("general.alignment", 24)]),
    "alignment 2^31": file(info(), pairs=[u32("general.alignment", 2**31)]),
    "alignment 64, data of 32": file(info("a"), info("b", (8,), offset=96), pairs=[u32("general.alignment", 64)]),
    "alignment as u64": file(info(), pairs=[string("general.alignment") + struct.pack("<IQ", 10, 32)]),
    "alignment as string": file(info(), pairs=[string("general.alignment") + struct.pack("<I", 8) + string("32")]),
    "split.count of a list": file(info(), pairs=[string("split.count") + struct.pack("<IIQI", 9, 4, 1, 1)]),
    "split.count 0": file(info(), pairs=[u32("split.count", 0)]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile(data, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        list(io.read(path))
    assert time.perf_counter() - start < 1 and tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_least_that_is_not_hostile(tmp_path):
    """What the cases above are made from is sound."""
    (tmp_path / "a.gguf").write_bytes(file(info("a"), info("b", offset=128), pairs=[u32("general.alignment", 64), u32("k", 1)]))
    assert [name for name, _ in io.read(tmp_path / "a.gguf")] == ["a", "b"]
    (tmp_path / "b.gguf").write_bytes(file(info("a"), version=2))
    assert [name for name, _ in io.read(tmp_path / "b.gguf")] == ["a"]


def test_a_header_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_source, "MOST_HEADER", 4096)
    (tmp_path / "a.gguf").write_bytes(file(pairs=[pair + struct.pack("<I", 8) + string("x" * 8000)]))
    with pytest.raises(CheckpointError, match="4096 at most"):
        io.detect(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", [*WHOLE, "gguf_big_endian.gguf"])
def test_truncated_anywhere(name, tmp_path):
    data, path = (GOLDEN / name).read_bytes(), tmp_path / "a.gguf"
    last = len(list(PUT_IN[name].values())[-1][2]) // 2
    end = len(data) - -last % (64 if "aligned" in name else 32)  # what follows is padding, which may be missing
    path.write_bytes(data[:end])
    assert_same(io.read(path), io.read(GOLDEN / name))
    for size in reversed(range(end)):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            io.detect(path)


SOURCES = [(GOLDEN / name).read_bytes() for name in (*WHOLE, "gguf_big_endian.gguf", SPLIT.format(2))]
changes = strategies.lists(strategies.tuples(strategies.integers(0, 1500), strategies.binary(min_size=1, max_size=8)), max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=strategies.sampled_from(SOURCES), changes=changes, cut=strategies.integers(0, 100), tail=strategies.binary(max_size=64))
def test_mutations(source, changes, cut, tail, tmp_path):
    """A file that was tampered with is read, or refused by an error of ours; what is read can be written."""
    data = bytearray(source)
    for at, new in changes:
        data[at : at + len(new)] = new
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    path.write_bytes(data[: len(data) - cut] + tail)
    again.unlink(missing_ok=True)
    try:
        rewritten(path, again)
    except QKernelsError:
        assert not again.exists()
