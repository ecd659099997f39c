"""AWQ checkpoints, as AutoAWQ and llm-awq write them: 4 bits, three packings, called versions.

Tensors of a module, whose weight is W [N, K] in G = ceil(K / group_size) groups, with Z words of 8 zero points for them:

               gemm                    gemv                  gemv_fast, llm-awq
    qweight    [K, N / 8] int32        [N, K / 8] int32      [N / 4, K] int16         codes
    qzeros     [G, N / 8] int32        [N, Z] int32          [8 Z, N] like scales     zero points; gemv_fast: -zero * scale
    scales     [G, N]                  [N, 8 Z]              [8 Z, N]                 float16 or bfloat16

    W[n, k] = (code - zero) * scale            gemm, gemv
    W[n, k] = code * scale + qzeros            gemv_fast
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantStack, QuantTensor
from qkernels.formats.packing import in_order, pack, unpack
from qkernels.io import gptq_family as family
from qkernels.io import weights
from qkernels.io.awq_words import COLUMNS, NIBBLES, PACK, UNPACK, reordered
from qkernels.io.gptq_settings import by_dynamic, ignore_how
from qkernels.io.modules import Module
from qkernels.io.settings import Settings
from qkernels.io.words import octets, to_words

# padding may hold anything, and zero points may be left out; `scales` of activations divide their output: a loader deals with them
LAYOUT = family.Layout("awq", ("qweight", "qzeros", "scales"), lone=("act", "gelu_impl"))
_FLOATS = (torch.float16, torch.bfloat16)
_MIDDLE = 8
_VERSIONS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast", "llm-awq": "gemv_fast"}


class Scheme(NamedTuple):
    """How a module is stored; zero_point: it has zero points of its own, where False is 8 for all."""

    version: str
    group_size: int
    zero_point: bool

    def groups(self, k: int) -> int:
        return 1 if self.group_size == -1 else -(-k // self.group_size)

    def padded(self, k: int) -> int:
        """Groups that the tensors of gemv and gemv_fast have room for."""
        size = k if self.group_size == -1 else self.group_size
        if size < 128 and size not in (32, 64):
            raise UnsupportedError(f"groups of {size} in {self.version}; 32, 64, and 128 or more have a layout there")
        words = {32: 4, 64: 2}.get(size, 1)
        return -(-self.groups(k) // (8 * words)) * 8 * words


SchemeOf = Callable[[str], Scheme | None]  # of a module by its path; None: it is not quantised


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Yield every weight and every other tensor of an AWQ checkpoint. Raises CheckpointError, UnsupportedError."""
    return read_modules(tensors, _schemes(settings))


def read_modules(tensors: Mapping[str, Tensor], scheme_of: SchemeOf) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """The same, of checkpoints that say otherwise how their modules are stored."""
    return family.read_modules(tensors, LAYOUT, scheme_of, _unpacked, _packed)


def write(items: Iterable[tuple[str, weights.Value]], settings: Mapping[str, Any] | None, add: weights.Add) -> Mapping[str, Any]:
    """Store weights as AWQ has them, by the settings of a checkpoint that was read, or anew as gemm (gemv_fast where they have minima).

    Raises UnsupportedError for a weight that the layout, or the settings, cannot hold exactly: the message says which limit.
    """
    scheme_of = None if settings is None else _schemes(settings)
    first: Scheme | None = None

    def stored(name: str, module: str, value: QuantTensor | QuantStack) -> dict[str, Tensor]:
        nonlocal first
        q = family.plain_weight(name, value, [4], ("f16", "bf16"), ("none", "int", "min"))
        first = first or Scheme("gemv_fast" if q.format.zero == "min" else "gemm", q.format.group[1], True)
        return _stored(q, first if scheme_of is None else scheme_of(module), settings is not None)

    dense = family.write_modules(items, add, stored)
    if settings is not None:
        return settings
    if first is None:
        raise UnsupportedError("no weight is quantised: an AWQ checkpoint has at least one")
    stated = {"quant_method": "awq", "bits": 4, "group_size": first.group_size, "zero_point": True, "version": first.version}
    return {**stated, "modules_to_not_convert": dense or None}


# -- tensors ----------------------------------------------------------------------------------------------------------------------


def _unpacked(module: Module, scheme: Scheme) -> QuantTensor:
    """The weight of a module's tensors."""
    qweight = module.take("qweight", torch.int16 if scheme.version == "gemv_fast" else torch.int32, shape=(-1, -1))
    codes = UNPACK[scheme.version](qweight)
    n, k = codes.shape
    scales = _of_groups(module.take("scales", *_FLOATS, shape=_shapes(n, k, scheme)[0]), scheme, k)
    zeros = _zeros(module, n, k, scheme, scales.dtype)
    symmetric = scheme.version != "gemv_fast" and bool((zeros == _MIDDLE).all())
    if not scheme.zero_point and not symmetric:
        raise CheckpointError(f"{module.full('qzeros')} are not 8 all over, where the settings say zero_point = false")
    group, packed = (1, scheme.group_size), pack(codes, 4)
    if symmetric:
        return weights.assemble(module.name, Int(4, _MIDDLE), (n, k), group, packed, scales)
    return weights.assemble(module.name, Int(4), (n, k), group, packed, scales, zeros, "min" if scheme.version == "gemv_fast" else "int")


def _shapes(n: int, k: int, scheme: Scheme) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of scales and qzeros."""
    if scheme.version == "gemm":
        return (scheme.groups(k), n), (scheme.groups(k), n // 8)
    padded = scheme.padded(k)
    return ((n, padded), (n, padded // 8)) if scheme.version == "gemv" else ((padded, n), (padded, n))


def _of_groups(numbers: Tensor, scheme: Scheme, k: int) -> Tensor:
    """Numbers as they are stored -> [N, G], without padding."""
    numbers = numbers if scheme.version == "gemv" else numbers.t()
    return in_order(numbers[:, : scheme.groups(k)])


def _zeros(module: Module, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    if "qzeros" not in module and not scheme.zero_point:
        return torch.full((n, scheme.groups(k)), _MIDDLE, dtype=torch.uint8)
    shape = _shapes(n, k, scheme)[1]
    if scheme.version == "gemv_fast":
        return _of_groups(module.take("qzeros", dtype, shape=shape), scheme, k)
    words = module.take("qzeros", torch.int32, shape=shape)
    zeros = unpack(octets(words), 4, 8 * shape[1])
    return _of_groups(zeros if scheme.version == "gemv" else reordered(zeros, COLUMNS), scheme, k)


def _stored(q: QuantTensor, scheme: Scheme | None, by_settings: bool) -> dict[str, Tensor]:
    """The tensors of a weight: as a checkpoint that was read had them, where it has settings and they fit, or anew."""
    if scheme is None:
        raise UnsupportedError("the settings say that this module is not quantised")
    _check(q, scheme)
    made = {"qweight": PACK[scheme.version](unpack(q.codes, 4, q.shape[1])), **_packed(q, scheme)}
    held = family.as_held(made, q, LAYOUT, lambda module: _unpacked(module, scheme)) if by_settings else None
    return held or made


def _check(q: QuantTensor, scheme: Scheme) -> None:
    (n, k), group = q.shape, q.format.group_extent(*q.shape)[1]
    stated = k if scheme.group_size == -1 else min(scheme.group_size, k)
    if q.perm is not None:
        raise UnsupportedError("a permutation of its columns (act-order), which AWQ has not")
    if group != stated:
        raise UnsupportedError(f"groups of {group}, where others have {stated}: AWQ has one group size for all")
    if not scheme.zero_point and q.format.code != Int(4, _MIDDLE):
        raise UnsupportedError("zero points other than 8, where the settings say zero_point = false")
    rows, columns = {"gemm": (8, 1), "gemv": (1, 8), "gemv_fast": (4, 64)}[scheme.version]
    for axis, extent, unit in (("N", n, rows), ("K", k, columns)):
        if extent % unit:
            raise UnsupportedError(f"{axis} = {extent}; {scheme.version} takes multiples of {unit}")


def _packed(q: QuantTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a weight other than its codes, made anew."""
    assert q.scales is not None and isinstance(q.format.code, Int)
    fill = scheme.padded(q.shape[1]) - q.scales.shape[1] if scheme.version != "gemm" else 0
    scales = F.pad(q.scales, (0, fill))
    if scheme.version == "gemv_fast":
        minima = F.pad(_minima(q), (0, fill))
        return {"qzeros": in_order(minima.t()), "scales": in_order(scales.t())}
    zeros = torch.full(q.scales.shape, q.format.code.bias, dtype=torch.uint8) if q.zeros is None else q.zeros
    if q.format.zero not in ("none", "int") or int(zeros.max()) > 15:
        raise UnsupportedError(f"zero points of {q.format.name} beyond the integers 0 to 15; gemv_fast holds minima")
    if scheme.version == "gemv":
        return {"qzeros": to_words(pack(F.pad(zeros, (0, fill)), 4)), "scales": in_order(scales)}
    return {"qzeros": to_words(pack(reordered(zeros.t(), NIBBLES), 4)), "scales": in_order(scales.t())}


def _minima(q: QuantTensor) -> Tensor:
    """-zero * scale, where that is a number of the scales' type."""
    assert q.scales is not None and isinstance(q.format.code, Int)
    if q.format.zero == "min":
        assert q.zeros is not None
        return q.zeros
    zeros = torch.tensor(float(q.format.code.bias)) if q.zeros is None else q.zeros.double()
    exact = -zeros * q.scales.double()
    minima = exact.to(q.scales.dtype)
    if not torch.equal(minima.double(), exact):
        raise UnsupportedError(f"zero points whose product with the scale is no {q.scales.dtype}; gemm and gemv hold them as they are")
    return minima


# -- settings ---------------------------------------------------------------------------------------------------------------------


def _schemes(settings: Mapping[str, Any]) -> SchemeOf:
    """What the settings say of each module."""
    s = Settings(settings, "the settings of AWQ")
    s.take("quant_method", "method", of=str, choices=("awq",), default="awq")
    size = _group_size(s, None)
    zero_point = s.take("zero_point", of=bool, default=True)
    backend = s.take("backend", of=str, default="").lower()
    version = s.take("version", "format", of=str, default="llm-awq" if backend == "llm-awq" else "gemm").lower()
    if backend == "llm-awq":
        version = "llm-awq"
    if version not in _VERSIONS:
        advice = ": take the model's gemm files, which hold the same numbers" if version == "marlin" else ""
        raise UnsupportedError(f"{s.where}: version is {version!r}; {', '.join(_VERSIONS)} are read{advice}")
    dense = s.take("modules_to_not_convert", of=list, default=[])
    version = _VERSIONS[version]
    scheme = Scheme(version, size, zero_point or version == "gemv_fast")  # whose minima are there in any case
    by_rules = by_dynamic(s, scheme, lambda inner: _overridden(inner, scheme))
    ignore_how(s)
    s.ignore("sym", "desc_act", "checkpoint_format", "do_fuse", "fuse_max_seq_len", "modules_to_fuse")  # GPTQ's, as transformers adds
    s.ignore("pack_dtype")  # GPTQModel's, which the tensors tell
    s.done()

    def scheme_of(module: str) -> Scheme | None:
        return None if any(f".{part}." in f".{module}." for part in dense) else by_rules(module)

    return scheme_of


def _group_size(s: Settings, base: Scheme | None) -> int:
    """Columns of a group; of 4 bits, as no others are read. Without a base both have to be stated."""
    needed: dict[str, Any] = {} if base is None else {"default": None}
    if (bits := s.take("bits", "w_bit", of=int, **needed)) not in (4, None):
        raise UnsupportedError(f"{s.where}: bits is {bits}; 4 are read")
    size = s.take("group_size", "q_group_size", of=int, **needed)
    if size is None and base is not None:
        return base.group_size
    if size != -1 and not 1 <= size < 2**31:
        raise CheckpointError(f"{s.where}: group_size is {size}; -1 (all columns), or at least 1, is possible")
    return int(size)


def _overridden(s: Settings, base: Scheme) -> Scheme:
    """A scheme, of which an entry of `dynamic` says a part."""
    s.ignore("desc_act")
    sym, zero_point = s.take("sym", of=bool, default=not base.zero_point), s.take("zero_point", of=bool, default=None)
    zero_point = not sym if zero_point is None else zero_point
    return Scheme(base.version, _group_size(s, base), zero_point or base.version == "gemv_fast")
