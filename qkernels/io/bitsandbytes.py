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

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantStack, QuantTensor
from qkernels.io import bitsandbytes_4bit as four_bits
from qkernels.io import checked
from qkernels.io.settings import Settings

log = logging.getLogger("qkernels")

_INT8 = QuantFormat(Int(8, 128), (1, -1), "f32")


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
            yield weight, _read_int8(weight, tensors) if is_int8 else four_bits.read_weight(weight, tensors)
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
    for side in four_bits.SIDES:
        weight = name.removesuffix(f".{side}") if name.endswith(f".{side}") else weight
    if weight is not None:
        if weight not in tensors:
            raise CheckpointError(f"{name} belongs to {weight}, which is missing")
        return weight
    quantised = any(f"{name}.{side}" in tensors for side in four_bits.SIDES) or (leaf == "weight" and f"{module}.SCB" in tensors)
    return name if quantised else None


def _plain(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if any(f"{name}_{leaf}" in tensors for leaf in ("quant_state", "scb")) or name.endswith(("_quant_state", "_scb")):
        raise UnsupportedError(f"{name}: GPTQModel's names of bitsandbytes tensors are not read; those that bitsandbytes itself saves are")
    value = tensors[name]
    if name.endswith(".weight") and value.dtype in (torch.int8, torch.uint8):
        raise CheckpointError(f"{name} is {value.dtype} {list(value.shape)} but has neither {name}.{four_bits.STATE}… nor an SCB beside it")
    return value


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
    four = next((kind for kind in kinds if kind in four_bits.BOOKS), None)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four is not None,
        "load_in_8bit": four is None,
        # loaders ask the quant_state of each weight, and these only where they quantise themselves
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
    plain = q.format.block is None and q.format.scale in ("f32", "f16", "bf16") and not q.format.tensor_scale
    if plain and q.format.code == Int(8, 128):
        _write_int8(name, q, add)
        return "int8"
    if not plain or q.format.code not in four_bits.BOOKS.values():
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes holds nf4 and fp4 with float scales, and u8b128 with one per row")
    four_bits.write_weight(name, q, add)
    return q.format.code.name


def _write_int8(name: str, q: QuantTensor, add: Callable[[str, Tensor], None]) -> None:
    n, k = q.shape
    if q.format.zero != "none" or q.format.group_extent(n, k) != (1, k):
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes' int8 has one float scale per row and no zero point")
    if not name.endswith(".weight"):
        raise UnsupportedError(f"{name} is no .weight: bitsandbytes' int8 has no name for its scales")
    assert q.scales is not None
    scales = q.scales.float().flatten()
    sides = q.origin.get("sides", {}) if q.origin.get("layout") == "bitsandbytes" else {}
    if "SCB" not in sides or not torch.equal((sides["SCB"] / 127).view(torch.int32), scales.view(torch.int32)):
        sides = {"SCB": _row_maxima(name, scales), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    add(name, (q.codes + 128).view(torch.int8))
    for side, value in sides.items():
        add(f"{name.removesuffix('.weight')}.{side}", value)


def _row_maxima(name: str, scales: Tensor) -> Tensor:
    """SCB such that SCB / 127 is the scale, to the last bit: near one scale in 128 there is none."""
    largest = torch.tensor(torch.finfo(torch.float32).max)
    found = scales * 127
    for candidate in (torch.nextafter(found, largest), torch.nextafter(found, -largest)):
        found = torch.where((found / 127 != scales) & (candidate / 127 == scales), candidate, found)
    if (wrong := (found / 127 != scales).nonzero()).numel():
        row = int(wrong[0])
        raise UnsupportedError(f"{name}: row {row} has the scale {scales[row].item()!r}, which is SCB / 127 for no float32 SCB")
    return found
