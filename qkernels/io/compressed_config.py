"""What the settings of a compressed-tensors checkpoint say: how the weight of which module is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Float, Int
from qkernels.formats.format import Code
from qkernels.io.modules import expression
from qkernels.io.settings import Settings

# format -> what its weights may be: (type, bits)
FORMATS: dict[str, tuple[tuple[str, int], ...]] = {
    "pack-quantized": tuple(("int", bits) for bits in range(1, 9)),
    "int-quantized": tuple(("int", bits) for bits in range(1, 9)),
    "naive-quantized": (*(("int", bits) for bits in range(1, 9)), ("float", 8)),
    "float-quantized": (("float", 8),),
    "nvfp4-pack-quantized": (("float", 4),),
    "mxfp4-pack-quantized": (("float", 4),),
    "mxfp6-pack-quantized": (("float", 6),),
    "mxfp8-quantized": (("float", 8),),
}
FLOATS = {4: Float(2, 1), 6: Float(2, 3), 8: Float(4, 3)}
_WHERE = "quantization_config"


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored.

    format     one of FORMATS
    code       what its numbers are in canonical codes; asymmetric integers have no bias
    symmetric  False: there are zero points
    group      (n, k) that shares a scale; -1 is the whole axis
    indexed    the columns of a group are named by a weight_g_idx ("actorder": "group")
    """

    format: str
    code: Code
    symmetric: bool
    group: tuple[int, int]
    indexed: bool = False

    @property
    def stored(self) -> str:
        """The leaf that holds the codes."""
        return "weight_packed" if "pack" in self.format else "weight"

    @property
    def packs_zeros(self) -> bool:
        return self.format == "pack-quantized" and self.group[0] == 1

    @property
    def needed(self) -> list[str]:
        """The leaves beside the codes."""
        zeros = [] if self.symmetric else ["weight_zero_point"]
        shape = ["weight_shape"] if self.format == "pack-quantized" else []
        return ["weight_scale", *zeros, *shape, *(["weight_global_scale"] if self.format.startswith("nvfp4") else [])]


class Config:
    """`scheme(module)` says how a weight is stored, `named(module)` whether a target is its very name.

    Raises CheckpointError (unknown keys, contradictions), UnsupportedError (sparse or fake-quantised weights, transforms).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        top = Settings(settings, _WHERE)
        top.take("quant_method", of=str, default="compressed-tensors", choices=["compressed-tensors"])
        self.version: str | None = top.take("version", of=str, default=None)
        format = top.take("format", of=str, default=None)
        groups = top.take("config_groups", of=dict)
        ignored = [_target(target, "ignore") for target in top.take("ignore", of=list, default=[])]
        _refuse_others(top)
        top.done()
        pairs = [pair for name in groups for pair in _groups(Settings(groups[name], f"{_WHERE}: {name}"), format)]
        self._by_name = {target: scheme for target, scheme in reversed(pairs) if isinstance(target, str)}  # of two the first
        self._by_expression = [(target, scheme) for target, scheme in pairs if not isinstance(target, str)]
        self._by_class = [scheme for target, scheme in self._by_name.items() if target[:1].isupper() and "." not in target]
        self._ignored = {target for target in ignored if isinstance(target, str)}
        self._ignored_expressions = [target for target in ignored if not isinstance(target, str)]

    def named(self, module: str) -> bool:
        return module in self._by_name

    def scheme(self, module: str) -> Scheme:
        """The scheme of a quantised module: of a target that is its name, else of an expression, else of a class of modules."""
        if module in self._ignored or any(target.match(module) for target in self._ignored_expressions):
            raise CheckpointError(f"{module} is quantised, and {_WHERE}: ignore says that it is not")
        if module in self._by_name:
            return self._by_name[module]
        found = [scheme for target, scheme in self._by_expression if target.match(module)][:1] or list(dict.fromkeys(self._by_class))
        if len(found) > 1:
            raise UnsupportedError(f"{module}: which of {len(found)} schemes of classes it has, only a model says; name it in targets")
        if found:
            return found[0]
        raise CheckpointError(f"{module} is quantised, and no target in {_WHERE}: config_groups means it")


def _refuse_others(top: Settings) -> None:
    for name in ("sparsity_config", "transform_config"):
        value = top.take(name, of=dict, default={})
        if value and value.get("format") != "dense":  # dense: it only says so
            raise UnsupportedError(f"{_WHERE}: {name} is {value!r:.200}; sparse or transformed weights are not read")
    top.ignore("quantization_status", "kv_cache_scheme", "global_compression_ratio", "moe_sparsity_config", "run_compressed", "dequantize")


def _target(target: Any, where: str) -> str | re.Pattern[str]:
    if not isinstance(target, str):
        raise CheckpointError(f"{_WHERE}: {where} has {target!r:.80}, no name")
    return expression(target[3:], f"{_WHERE}: {where}") if target.startswith("re:") else target


def _groups(group: Settings, format: str | None) -> list[tuple[str | re.Pattern[str], Scheme]]:
    """Every target of a group with its scheme, expressions compiled; none where the group quantises no weights."""
    targets = [_target(target, "targets") for target in group.take("targets", of=list)]
    group.ignore("input_activations", "output_activations")
    own, weights = group.take("format", of=str, default=format), group.inner("weights")
    group.done()
    if weights is None:
        return []
    if own not in FORMATS:
        raise UnsupportedError(f"{group.where}: format is {own!r}, which is not read; {', '.join(FORMATS)} are")
    scheme = _scheme(weights, own)
    return [(target, scheme) for target in targets]


def _scheme(args: Settings, format: str) -> Scheme:
    bits, kind = args.take("num_bits", of=int, default=8), args.take("type", of=str, default="int").lower()
    symmetric = args.take("symmetric", of=bool, default=True)
    if args.take("dynamic", of=(bool, str), default=False):
        raise UnsupportedError(f"{args.where}: dynamic weights are quantised when they are loaded; stored ones are read")
    actorder = args.take("actorder", of=(bool, str), default=None)
    group = _group(args)
    args.ignore("scale_dtype", "zp_dtype", "observer", "observer_kwargs")
    args.done()
    if (kind, bits) not in FORMATS[format]:
        possible = ", ".join(f"{kind} of {bits}" for kind, bits in FORMATS[format])
        raise CheckpointError(f"{args.where}: {kind} of {bits} bits contradict the format {format}; {possible} bits are possible")
    if kind == "float" and not symmetric:
        raise UnsupportedError(f"{args.where}: symmetric is False; floats are read without zero points")
    code = FLOATS[bits] if kind == "float" else Int(bits, 2 ** (bits - 1) if symmetric else 0)
    return Scheme(format, code, symmetric, group, actorder in (True, "group", "dynamic"))


def _group(args: Settings) -> tuple[int, int]:
    size, block = args.take("group_size", of=int, default=None), args.take("block_structure", of=(list, str), default=None)
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = args.take("strategy", of=str, default=inferred).lower()
    if strategy in ("group", "tensor_group"):
        if size is None or size < 1:
            raise CheckpointError(f"{args.where}: group_size is {size}, and the strategy {strategy} needs one")
        return 1, size
    if size not in (None, -1, 0):
        raise CheckpointError(f"{args.where}: group_size {size} contradicts the strategy {strategy!r}")
    if strategy == "block":
        return _block(args.where, block)
    if strategy not in ("tensor", "channel"):
        raise UnsupportedError(f"{args.where}: strategy is {strategy!r}; tensor, channel, group, tensor_group and block are read")
    return (-1, -1) if strategy == "tensor" else (1, -1)


def _block(where: str, block: Any) -> tuple[int, int]:
    """[128, 128], or "128x128" as it was once written."""
    written = isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block)
    sizes = [int(size) for size in block.split("x")] if written else block
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{where}: block_structure is {block!r:.80}, no [rows, columns]")
    return sizes[0], sizes[1]
