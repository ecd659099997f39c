"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, their scales quantised again or not, and int8 with a scale per row.

    X.weight                                   4 bit: two codes a byte, the first in the high nibble, [N * K / 2, 1], of any dtype
    X.weight.absmax                            one float32 per block, or one uint8 where the scales are nested
    X.weight.nested_absmax, nested_quant_map   scale = nested_quant_map[absmax] * nested_absmax[block / nested_blocksize] + nested_offset
    X.weight.quant_map                         float32 [16]: the values of the codes
    X.weight.quant_state.bitsandbytes__nf4     JSON, as bytes
    X.weight, X.SCB                            8 bit: int8 [N, K], float32 [N]; W = weight * SCB / 127

Whether a weight is quantised is told by its tensors: with full-precision ones the config only asks to quantise on load. GPTQModel has other
names for the same: X.weight_absmax, …, X.weight_quant_state without the kind, which the JSON tells, and X.weight_scb.
Source: the tensors that bitsandbytes 0.50.2 saves; of the other names, GPTQModel 7.7.0, nn_modules/qlinear/bitsandbytes.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantTensor
from qkernels.formats.tensor import same_bits
from qkernels.io import bitsandbytes_4bit as four_bits
from qkernels.io import checked
from qkernels.io.modules import by_owner, dense
from qkernels.io.settings import Settings
from qkernels.io.weights import Add, Value, assemble, kept, single

log = logging.getLogger("qkernels")

_INT8 = Int(8, 128)
_OF_GPTQMODEL = {f"weight_{side}": f"weight.{side}" for side in four_bits.SIDES if "." not in side} | {"weight_scb": "SCB"}


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Go through a checkpoint: 4- and 8-bit weights as QuantTensor, everything else as it is. See `qkernels.io`."""
    _check_settings(settings)
    tensors = _Renamed(tensors)
    count = 0
    for name, quantised in by_owner(tensors, lambda name: _weight_of(name, tensors)):
        count += quantised
        if not quantised:
            yield name, dense(name, tensors[name])
            continue
        is_int8 = f"{name.removesuffix('.weight')}.SCB" in tensors
        q = _read_int8(name, tensors) if is_int8 else four_bits.read_weight(name, tensors)
        yield name, replace(q, origin={**q.origin, "names": "GPTQModel"}) if name in tensors.of_gptqmodel else q
    if not count:
        log.warning("no weight of this bitsandbytes checkpoint is quantised: its config asks to quantise on load, which is not done")


class _Renamed(Mapping[str, Tensor]):
    """Tensors by the names of bitsandbytes, whatever names they have; `of_gptqmodel` are the weights whose names were GPTQModel's."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._stored = tensors, dict[str, str]()
        self.of_gptqmodel: set[str] = set()
        for name in tensors:
            module, _, leaf = name.rpartition(".")
            known = name
            if leaf == "weight_quant_state":
                known = f"{module}.weight.{four_bits.STATE}{four_bits.kind(name, tensors[name])}"
            elif leaf in _OF_GPTQMODEL:
                known = f"{module}.{_OF_GPTQMODEL[leaf]}"
            if known != name:
                self.of_gptqmodel.add(f"{module}.weight")
            if self._stored.setdefault(known, name) != name:
                raise CheckpointError(f"{self._stored[known]} and {name} are the same tensor of {module}.weight")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _name_of_gptqmodel(name: str) -> str:
    if f".weight.{four_bits.STATE}" in name:
        return f"{name.partition(f'.weight.{four_bits.STATE}')[0]}.weight_quant_state"
    ours = next((ours for ours, leaf in _OF_GPTQMODEL.items() if name.endswith(f".{leaf}")), None)
    return name if ours is None else f"{name.removesuffix(_OF_GPTQMODEL[ours])}{ours}"


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
    # GPTQModel's; what its tensors say of themselves again
    settings.take("method", of=str, default="bitsandbytes", choices=("bitsandbytes",))
    for name in ("format", "checkpoint_format"):
        settings.take(name, of=str, default="bitsandbytes", choices=("bitsandbytes", "nf4", "fp4", "int8"))
    settings.take("bits", of=int, default=4, choices=(4, 8))
    settings.take("group_size", of=int, default=-1, choices=(-1,))
    settings.take("desc_act", of=bool, default=False, choices=(False,))
    settings.take("sym", of=bool, default=True, choices=(True,))
    if rotation := settings.take("rotation", of=str, default=None):
        raise UnsupportedError(f"quantization_config: rotation is {rotation!r}; weights that are multiplied by rotations are not read")
    settings.ignore("block_size", "compress_statistics", "dynamic", "lm_head", "activation", "pack_dtype", "meta")
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
    return assemble(name, _INT8, (n, k), (1, -1), codes, sides["SCB"] / 127, origin={"layout": four_bits.LAYOUT, "sides": sides})


def write(items: Iterable[tuple[str, Value]], settings: Mapping[str, Any] | None, add: Add) -> Mapping[str, Any]:
    """Write what `read` gave byte for byte, and other weights whose codes are NF4, FP4 or int8; see `qkernels.io`.

    Scales of other weights are not nested. Raises UnsupportedError for a weight that bitsandbytes cannot hold exactly, saying why.
    """
    if settings is not None:
        _check_settings(settings)
    kinds: dict[str, str] = {}
    skipped = []
    for name, value in items:
        if isinstance(value, Tensor):
            add(name, value)
            skipped += [name.removesuffix(".weight")] if value.dim() == 2 and name.endswith(".weight") else []
        else:
            q = single(name, value, "bitsandbytes")
            theirs = kept(q, four_bits.LAYOUT).get("names") == "GPTQModel"
            kinds.setdefault(_write_weight(name, q, (lambda n, t: add(_name_of_gptqmodel(n), t)) if theirs else add), name)
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


def _write_weight(name: str, q: QuantTensor, add: Add) -> str:
    if q.perm is not None:
        raise UnsupportedError(f"{name} has permuted columns (act-order); bitsandbytes holds them in order")
    plain = q.format.block is None and q.format.scale in ("f32", "f16", "bf16") and not q.format.tensor_scale
    if plain and q.format.code == _INT8:
        _write_int8(name, q, add)
        return "int8"
    if not plain or q.format.code not in four_bits.BOOKS.values():
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes holds nf4 and fp4 with float scales, and u8b128 with one per row")
    four_bits.write_weight(name, q, add)
    return q.format.code.name


def _write_int8(name: str, q: QuantTensor, add: Add) -> None:
    n, k = q.shape
    if q.format.zero != "none" or q.format.group_extent(n, k) != (1, k):
        raise UnsupportedError(f"{name} is {q.format.name}; bitsandbytes' int8 has one float scale per row and no zero point")
    if not name.endswith(".weight"):
        raise UnsupportedError(f"{name} is no .weight: bitsandbytes' int8 has no name for its scales")
    assert q.scales is not None
    scales = q.scales.float().flatten()
    sides = kept(q, four_bits.LAYOUT).get("sides", {})
    if "SCB" not in sides or not same_bits(sides["SCB"] / 127, scales):
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
