"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, their scales quantised again or not, and int8 with a scale per row.

    X.weight                                   4 bit: two codes a byte, the first in the high nibble, [N * K / 2, 1], of any dtype
    X.weight.absmax                            one float32 per block, or one uint8 where the scales are nested
    X.weight.nested_absmax, nested_quant_map   scale = nested_quant_map[absmax] * nested_absmax[block / nested_blocksize] + nested_offset
    X.weight.quant_map                         float32 [16]: the values of the codes
    X.weight.quant_state.bitsandbytes__nf4     JSON, as bytes
    X.weight, X.SCB                            8 bit: int8 [N, K], float32 [N]; W = weight * SCB / 127

Whether a weight is quantised is told by its tensors: with full-precision ones the config only asks to quantise on load.
Source: the tensors that bitsandbytes 0.50.2 saves.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Codebook, Int, QuantFormat, QuantStack, QuantTensor
from qkernels.formats.codebook import FP4, NF4
from qkernels.formats.packing import pack, unpack
from qkernels.io import checked
from qkernels.io.groups import of_flat_blocks, to_flat_blocks
from qkernels.io.settings import Settings

log = logging.getLogger("qkernels")

_BOOKS = {"nf4": NF4, "fp4": FP4}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "quant_state.bitsandbytes__"
_SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in _BOOKS))
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INT8 = QuantFormat(Int(8, 128), (1, -1), "f32")
_LARGEST = torch.finfo(torch.float32).max


class _State(NamedTuple):
    """What the JSON of a 4-bit weight says; `nested` is (blocksize, offset) of the quantised scales."""

    book: Codebook
    n: int
    k: int
    block: int
    nested: tuple[int, float] | None


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Go through a checkpoint: 4- and 8-bit weights as QuantTensor, everything else as it is. See `qkernels.io`."""
    _check_settings(settings)
    done: set[str] = set()
    for name in tensors:
        weight = _weight_of(name, tensors)
        if weight is None:
            yield name, _plain(name, tensors)
        elif weight not in done:
            done.add(weight)
            is_int8 = f"{weight.removesuffix('.weight')}.SCB" in tensors
            yield weight, _read_int8(weight, tensors) if is_int8 else _read_4bit(weight, tensors)
    if not done:
        log.warning("no weight of this bitsandbytes checkpoint is quantised: its config asks to quantise on load, which is not done")


def _check_settings(values: Mapping[str, Any]) -> None:
    settings = Settings(values, "quantization_config")
    settings.take("quant_method", of=str, default="bitsandbytes", choices=("bitsandbytes",))
    four = settings.take("load_in_4bit", "_load_in_4bit", of=bool, default=False)
    eight = settings.take("load_in_8bit", "_load_in_8bit", of=bool, default=False)
    if four and eight:
        raise CheckpointError("quantization_config contradicts itself: load_in_4bit and load_in_8bit are both true")
    # what each tensor says of itself, and how bitsandbytes computes
    settings.ignore("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype")
    settings.ignore("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")
    settings.done()


def _weight_of(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The quantised weight that a tensor is or belongs to; None for a tensor of its own."""
    module, _, leaf = name.rpartition(".")
    weight = f"{module}.weight" if leaf in ("SCB", "weight_format") else None
    for side in _SIDES:
        weight = name.removesuffix(f".{side}") if name.endswith(f".{side}") else weight
    if weight is not None:
        if weight not in tensors:
            raise CheckpointError(f"{name} belongs to {weight}, which is missing")
        return weight
    quantised = any(f"{name}.{side}" in tensors for side in _SIDES) or (leaf == "weight" and f"{module}.SCB" in tensors)
    return name if quantised else None


def _plain(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name.endswith(".weight_quant_state"):
        raise UnsupportedError(f"{name}: GPTQModel's names of bitsandbytes tensors are not read; save it with transformers or bitsandbytes")
    value = tensors[name]
    if name.endswith(".weight") and value.dtype in (torch.int8, torch.uint8):
        raise CheckpointError(f"{name} is {value.dtype} {list(value.shape)} but has neither {name}.{_STATE}… nor an SCB beside it")
    return value


def _read_4bit(name: str, tensors: Mapping[str, Tensor]) -> QuantTensor:
    sides = {side: tensors[f"{name}.{side}"] for side in _SIDES if f"{name}.{side}" in tensors}
    state = _state(name, sides)
    weight = checked.tensor(tensors, name, _STORAGES)
    count = state.n * state.k
    raw = weight.reshape(-1).view(torch.uint8)
    if raw.numel() != -(-count // 2):
        raise CheckpointError(f"{name} has {raw.numel()} bytes; its quant_state says {state.n} x {state.k}, {-(-count // 2)} bytes")
    codes = _swapped(raw)
    scales, group = _scales(name, sides, state)
    format = QuantFormat(state.book, (1, group), "f32")
    origin = {"layout": "bitsandbytes", "sides": sides, "dtype": weight.dtype, "shape": tuple(weight.shape), "pad": codes[count:]}
    return QuantTensor(format, (state.n, state.k), pack(codes[:count].view(state.n, state.k), 4), scales, origin=origin)


def _swapped(raw: Tensor) -> Tensor:
    """Codes of bytes whose first one is in the high nibble: uint8 [L] -> [2 L]."""
    return unpack(raw, 4, 2 * raw.numel()).view(-1, 2).flip(-1).flatten()


def _state(name: str, sides: Mapping[str, Tensor]) -> _State:
    stated = [side for side in sides if side.startswith(_STATE)]
    if len(stated) != 1:
        raise CheckpointError(f"{name} has {' and '.join(stated) or 'no ' + _STATE + 'nf4 or fp4'} beside it; exactly one is needed")
    where = f"{name}.{stated[0]}"
    blob = checked.tensor({where: sides[stated[0]]}, where, (torch.uint8,), (-1,))
    if blob.numel() > checked.MOST_JSON:
        raise CheckpointError(f"{where} has {blob.numel()} bytes; {checked.MOST_JSON} at most are read")
    said = Settings(checked.json_object(bytes(blob.tolist()), where), where)
    kind = said.take("quant_type", of=str, choices=(stated[0].removeprefix(_STATE),))
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
    _check_map(name, sides, _BOOKS[kind])
    return _State(_BOOKS[kind], n, k, block, nested)


def _check_map(name: str, sides: Mapping[str, Tensor], book: Codebook) -> None:
    values = _side(name, sides, "quant_map", torch.float32, 16)
    if not torch.equal(values, torch.tensor(book.values)):
        shown = ", ".join(f"{v:.6g}" for v in values.tolist())
        raise UnsupportedError(f"{name}.quant_map is [{shown}], not the table of {book.name}; nf4 and fp4 are read")


def _side(name: str, sides: Mapping[str, Tensor], side: str, dtype: torch.dtype, count: int) -> Tensor:
    return checked.tensor({f"{name}.{key}": t for key, t in sides.items()}, f"{name}.{side}", (dtype,), (count,))


def _scales(name: str, sides: Mapping[str, Tensor], state: _State) -> tuple[Tensor, int]:
    """The scales as groups along K, with the roundings of bitsandbytes: bit for bit its absmax."""
    blocks = -(-state.n * state.k // state.block)
    if state.nested is None:
        absmax = _side(name, sides, "absmax", torch.float32, blocks)
    else:
        block, offset = state.nested
        index = _side(name, sides, "absmax", torch.uint8, blocks).int()
        scales = _side(name, sides, "nested_absmax", torch.float32, -(-blocks // block)).repeat_interleave(block)[:blocks]
        absmax = _side(name, sides, "nested_quant_map", torch.float32, 256)[index] * scales + torch.tensor(offset, dtype=torch.float32)
    return of_flat_blocks(absmax, state.n, state.k, state.block)


def _read_int8(name: str, tensors: Mapping[str, Tensor]) -> QuantTensor:
    module = name.removesuffix(".weight")
    weight = checked.tensor(tensors, name, (torch.int8,), (-1, -1))
    n, k = weight.shape
    sides = {"SCB": checked.tensor(tensors, f"{module}.SCB", (torch.float32,), (n,))}
    if f"{module}.weight_format" in tensors:
        order = sides["weight_format"] = checked.tensor(tensors, f"{module}.weight_format", (torch.uint8,), ())
        if order.item() != 0:
            raise UnsupportedError(f"{module}.weight_format is {order.item()}: a GPU's tile order; 0, rows, is read. Save it anew")
    codes = weight.contiguous().view(torch.uint8) + 128  # modulo 256
    return QuantTensor(_INT8, (n, k), codes, sides["SCB"][:, None] / 127, origin={"layout": "bitsandbytes", "sides": sides})


def write(
    items: Iterable[tuple[str, QuantTensor | QuantStack | Tensor]],
    settings: Mapping[str, Any] | None,
    add: Callable[[str, Tensor], None],
) -> Mapping[str, Any]:
    """Write what `read` gave byte for byte, and other weights whose codes are NF4, FP4 or int8; see `qkernels.io`.

    Scales of other weights are not nested. Raises UnsupportedError for a weight that bitsandbytes cannot hold exactly, saying why.
    """
    if settings is not None:
        _check_settings(settings)
    kinds: dict[str, str] = {}
    skipped = []
    for name, value in items:
        if isinstance(value, QuantStack):
            raise UnsupportedError(f"{name} is a stack {list(value.shape)}; bitsandbytes holds single weights")
        if isinstance(value, QuantTensor):
            kinds.setdefault(_write_weight(name, value, add), name)
        else:
            add(name, value)
            skipped += [name.removesuffix(".weight")] if value.dim() == 2 and name.endswith(".weight") else []
    if "int8" in kinds and len(kinds) > 1:
        raise UnsupportedError(f"bitsandbytes loads 4 or 8 bits in one model, not both: {', '.join(kinds.values())}")
    return _made_settings(kinds, skipped) if settings is None else settings


def _made_settings(kinds: Mapping[str, str], skipped: list[str]) -> dict[str, Any]:
    four = next((kind for kind in kinds if kind in _BOOKS), None)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four is not None,
        "load_in_8bit": four is None,
        "bnb_4bit_quant_type": four or "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_threshold": 6.0,
        # else a loader takes these for weights that were quantised
        "llm_int8_skip_modules": skipped or None,
    }


def _write_weight(name: str, q: QuantTensor, add: Callable[[str, Tensor], None]) -> str:
    if q.perm is not None:
        raise UnsupportedError(f"{name} has permuted columns (act-order); bitsandbytes holds them in order")
    if q.format.code == Int(8, 128):
        _write_int8(name, q, add)
        return "int8"
    if q.format.code not in _BOOKS.values() or q.scales is None or q.format.scale not in ("f32", "f16", "bf16") or q.format.tensor_scale:
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes holds nf4 and fp4 with float scales, and u8b128 with one per row")
    _write_4bit(name, q, add)
    return q.format.code.name


def _write_4bit(name: str, q: QuantTensor, add: Callable[[str, Tensor], None]) -> None:
    codes = unpack(q.codes, 4, q.shape[1]).flatten()
    origin = q.origin if _fits(name, q) else _made_origin(name, q)
    add(name, pack(_swapped(pack(torch.cat([codes, origin["pad"]]), 4)), 4).view(origin["dtype"]).reshape(origin["shape"]))
    for side, value in origin["sides"].items():
        add(f"{name}.{side}", value)


def _fits(name: str, q: QuantTensor) -> bool:
    """Whether the weight was read from bitsandbytes 4-bit tensors and has still their numbers."""
    sides = q.origin.get("sides", {})
    if q.origin.get("layout") != "bitsandbytes" or f"{_STATE}{q.format.code.name}" not in sides or q.scales is None:
        return False
    state = _state(name, sides)
    scales, group = _scales(name, sides, state)
    same = (state.n, state.k) == q.shape and q.format == QuantFormat(state.book, (1, group), "f32")
    return same and torch.equal(scales.view(torch.uint8), q.scales.view(torch.uint8))


def _made_origin(name: str, q: QuantTensor) -> dict[str, Any]:
    n, k = q.shape
    absmax, block = _blocks(name, q)
    book = q.format.code
    assert isinstance(book, Codebook)
    said = {"quant_type": book.name, "blocksize": block, "dtype": "float32", "shape": [n, k]}
    blob = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    sides = {"absmax": absmax, "quant_map": torch.tensor(book.values), f"{_STATE}{book.name}": blob}
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
    for block in _BLOCKS:
        if (absmax := to_flat_blocks(numbers, n, k, fine, block) if block >= fine else None) is not None:
            return absmax.contiguous(), block
    raise UnsupportedError(
        f"{name} has groups of {group_k} in rows of {k}; bitsandbytes cuts the flattened weight in blocks of {', '.join(map(str, _BLOCKS))}"
    )


def _write_int8(name: str, q: QuantTensor, add: Callable[[str, Tensor], None]) -> None:
    n, k = q.shape
    if q.format.zero != "none" or q.format.group_extent(n, k) != (1, k) or q.format.scale not in ("f32", "f16", "bf16"):
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes' int8 has one float scale per row and no zero point")
    if not name.endswith(".weight"):
        raise UnsupportedError(f"{name} is no .weight: bitsandbytes' int8 has no name for its scales")
    assert q.scales is not None
    scales = q.scales.float().flatten()
    sides = q.origin.get("sides", {}) if q.origin.get("layout") == "bitsandbytes" else {}
    if "SCB" not in sides or not torch.equal(sides["SCB"] / 127, scales):
        sides = {"SCB": _row_maxima(name, scales), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    add(name, (q.codes + 128).view(torch.int8))
    for side, value in sides.items():
        add(f"{name.removesuffix('.weight')}.{side}", value)


def _row_maxima(name: str, scales: Tensor) -> Tensor:
    """SCB such that SCB / 127 is the scale, to the last bit: near one scale in 128 there is none."""
    largest = torch.tensor(_LARGEST)
    found = scales * 127
    for candidate in (torch.nextafter(found, largest), torch.nextafter(found, -largest)):
        found = torch.where((found / 127 != scales) & (candidate / 127 == scales), candidate, found)
    if (wrong := (found / 127 != scales).nonzero()).numel():
        row = int(wrong[0])
        raise UnsupportedError(f"{name}: row {row} has the scale {scales[row].item()!r}, which is SCB / 127 for no float32 SCB")
    return found
