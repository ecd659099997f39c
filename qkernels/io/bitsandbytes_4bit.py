"""bitsandbytes' 4-bit weights: NF4 and FP4 in blocks of the flattened weight, whose scales may be quantised themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Codebook, QuantFormat, QuantTensor
from qkernels.formats.codebook import FP4, NF4
from qkernels.formats.packing import pack, swap_nibbles, unpack
from qkernels.formats.tensor import same_bits
from qkernels.io import checked
from qkernels.io.groups import of_flat_blocks, to_flat_blocks
from qkernels.io.modules import Module
from qkernels.io.settings import Settings
from qkernels.io.weights import Add, assemble, kept

LAYOUT = "bitsandbytes"
BOOKS = {"nf4": NF4, "fp4": FP4}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "quant_state.bitsandbytes__"
SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in BOOKS))
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


class _State(NamedTuple):
    """What the JSON of a 4-bit weight says; `nested` is (blocksize, offset) of the quantised scales."""

    book: Codebook
    n: int
    k: int
    block: int
    nested: tuple[int, float] | None


def read_weight(name: str, tensors: Mapping[str, Tensor]) -> QuantTensor:
    """Read a weight; what its numbers do not tell (nested scales, the JSON, how the bytes were seen) goes into its origin."""
    held = Module(tensors, name, SIDES).held()
    sides = Module.of(name, held)
    state = _state(sides)
    weight = checked.tensor(tensors, name, _STORAGES)
    count = state.n * state.k
    raw = weight.reshape(-1).view(torch.uint8)
    if raw.numel() != -(-count // 2):
        raise CheckpointError(f"{name} has {raw.numel()} bytes; its quant_state says {state.n} x {state.k}, {-(-count // 2)} bytes")
    scales, group = _scales(sides, state)
    codes, pad = _codes(swap_nibbles(raw), state.n, state.k)
    origin = {"layout": LAYOUT, "sides": held, "dtype": weight.dtype, "shape": tuple(weight.shape), "pad": pad}
    return assemble(name, state.book, (state.n, state.k), (1, group), codes, scales, origin=origin)


def kind(name: str, state: Tensor) -> str:
    """ "nf4" or "fp4": what the JSON of a weight says, where the name of its tensor does not."""
    said = Settings(checked.json_object(checked.text(name, checked.fitting(name, state, (torch.uint8,)), checked.MOST_JSON), name), name)
    found: str = said.take("quant_type", of=str, choices=tuple(BOOKS))
    return found


def _codes(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes that follow each other as rows, and the last nibble where their number is odd."""
    if k % 2 == 0:
        return packed.view(n, k // 2), packed[:0]
    codes = unpack(packed, 4, 2 * packed.numel())
    return pack(codes[: n * k].view(n, k), 4), codes[n * k :]


def _state(sides: Module) -> _State:
    stated = [side for side in sides.leaves if side.startswith(STATE)]
    if len(stated) != 1:
        raise CheckpointError(f"{sides.name} has {' and '.join(stated) or 'no ' + STATE + 'nf4 or fp4'} beside it; exactly one is needed")
    where = sides.full(stated[0])
    blob = checked.text(where, sides.take(stated[0], torch.uint8), checked.MOST_JSON)
    said = Settings(checked.json_object(blob, where), where)
    kind = said.take("quant_type", of=str, choices=(stated[0].removeprefix(STATE),))
    block = said.take("blocksize", of=int, choices=_BLOCKS)
    said.take("dtype", of=str, choices=("float16", "bfloat16", "float32"))  # into which bitsandbytes decodes
    shape = said.take("shape", of=list)
    if len(shape) != 2:
        raise UnsupportedError(f"{where}: shape is {shape!r:.80}; weights of two dimensions are read")
    n, k = checked.extents(shape, 2, f"{where}: shape")
    nested = None
    if "nested_absmax" in sides or "nested_quant_map" in sides:
        said.take("nested_dtype", of=str, choices=("float32",))
        nested = said.take("nested_blocksize", of=int, choices=_BLOCKS), said.take("nested_offset", of=float)
        if not abs(nested[1]) <= _LARGEST:
            raise CheckpointError(f"{where}: nested_offset is {nested[1]!r:.80}, no finite float32")
    said.done()
    _check_map(sides, BOOKS[kind])
    return _State(BOOKS[kind], n, k, block, nested)


def _check_map(sides: Module, book: Codebook) -> None:
    values = sides.take("quant_map", torch.float32, shape=(16,))
    if not torch.equal(values, torch.tensor(book.values)):
        shown = ", ".join(f"{v:.6g}" for v in values.tolist())
        raise UnsupportedError(f"{sides.full('quant_map')} is [{shown}], not the table of {book.name}; nf4 and fp4 are read")


def _scales(sides: Module, state: _State) -> tuple[Tensor, int]:
    """The scales as groups along K, with the roundings of bitsandbytes: bit for bit its absmax."""
    blocks = -(-state.n * state.k // state.block)
    if state.nested is None:
        absmax = sides.take("absmax", torch.float32, shape=(blocks,))
    else:
        block, offset = state.nested
        index = sides.take("absmax", torch.uint8, shape=(blocks,)).int()
        scales = sides.take("nested_absmax", torch.float32, shape=(-(-blocks // block),)).repeat_interleave(block)[:blocks]
        book = sides.take("nested_quant_map", torch.float32, shape=(256,))
        absmax = book[index] * scales + torch.tensor(offset, dtype=torch.float32)
    return of_flat_blocks(absmax, state.n, state.k, state.block)


def write_weight(name: str, q: QuantTensor, add: Add) -> None:
    """Write a weight of NF4 or FP4 codes with float scales: as it was read if it still has those numbers, else with plain scales."""
    k = q.shape[1]
    origin = kept(q, LAYOUT) if _fits(name, q) else _made_origin(name, q)
    packed = q.codes.flatten() if k % 2 == 0 else pack(torch.cat([unpack(q.codes, 4, k).flatten(), origin["pad"]]), 4)
    add(name, swap_nibbles(packed).view(origin["dtype"]).reshape(origin["shape"]))
    for side, value in origin["sides"].items():
        add(f"{name}.{side}", value)


def _fits(name: str, q: QuantTensor) -> bool:
    """Whether the weight was read from bitsandbytes 4-bit tensors and has still their numbers."""
    held = kept(q, LAYOUT).get("sides", {})
    if f"{STATE}{q.format.code.name}" not in held:
        return False
    sides = Module.of(name, held)
    state = _state(sides)
    scales, group = _scales(sides, state)
    same = (state.n, state.k) == q.shape and q.format == QuantFormat(state.book, (1, group), "f32")
    return same and same_bits(scales, q.scales)


def _made_origin(name: str, q: QuantTensor) -> dict[str, Any]:
    n, k = q.shape
    absmax, block = _blocks(name, q)
    book = q.format.code
    assert isinstance(book, Codebook)
    said = {"quant_type": book.name, "blocksize": block, "dtype": "float32", "shape": [n, k]}
    blob = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    sides = {"absmax": absmax, "quant_map": torch.tensor(book.values), f"{STATE}{book.name}": blob}
    pad = torch.zeros(n * k % 2, dtype=torch.uint8)
    return {"sides": sides, "dtype": torch.uint8, "shape": (-1, 1), "pad": pad}


def _blocks(name: str, q: QuantTensor) -> tuple[Tensor, int]:
    """Scales of blocks of the flattened weight, of the shortest length that bitsandbytes knows and the scales allow."""
    n, k = q.shape
    group_n, group_k = q.format.group_extent(n, k)
    fine = math.gcd(group_k, k, _BLOCKS[-1])
    assert q.scales is not None
    rows = q.scales.float().repeat_interleave(group_n, 0)[:n]
    numbers = rows[:, torch.arange(k // fine) * fine // group_k]
    # the shortest: it straddles rows, where bitsandbytes' own code for CPUs is wrong, only if it must
    for block in _BLOCKS:
        if (absmax := to_flat_blocks(numbers, n, k, fine, block) if block >= fine else None) is not None:
            return absmax.contiguous(), block
    raise UnsupportedError(
        f"{name} has groups of {group_k} in rows of {k}; bitsandbytes cuts the flattened weight in blocks of {', '.join(map(str, _BLOCKS))}"
    )
