"""The judge: encode, decode and multiply in plain torch, for every format, never compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import FormatError
from qkernels.formats import Codebook, Float, Int, QuantFormat, QuantTensor
from qkernels.formats.format import SCALE_DTYPES, Code
from qkernels.formats.packing import pack, unpack


def decode(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise: return the [N, K] weight that `q` stands for, computed in `dtype`."""
    weight = _decode_blocks(q, dtype) if q.format.block is not None else _decode_groups(q, dtype)
    return weight if q.perm is None else torch.empty_like(weight).index_copy_(1, q.perm.long(), weight)


def _decode_groups(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    n, k = q.shape
    assert q.scales is not None
    weight = code_values(q.format.code, dtype, q.codes.device)[unpack(q.codes, q.format.bits, k).int()]
    shift = None if q.zeros is None else spread(q.zeros.to(dtype), q.format, n, k)
    if shift is not None and q.format.zero != "min":
        weight = weight - shift
    scales = q.scales.to(dtype)
    if q.tensor_scale is not None:
        scales = scales * q.tensor_scale.to(dtype)
    weight = weight * spread(scales, q.format, n, k)
    return weight if shift is None or q.format.zero != "min" else weight + shift


def _decode_blocks(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    block = q.format.block
    assert block is not None
    parts = block.split(q.codes.unflatten(-1, (-1, block.nbytes)))

    def of_element(numbers: Tensor, finer: Tensor | None) -> Tensor:
        numbers = numbers.to(dtype)
        if finer is not None:
            numbers = numbers.repeat_interleave(finer.shape[-1] // numbers.shape[-1], -1) * finer.to(dtype)
        return numbers.repeat_interleave(block.elements // numbers.shape[-1], -1)

    weight = code_values(q.format.code, dtype, q.codes.device)[parts.codes.int()] * of_element(parts.d, parts.scales)
    return (weight if parts.m is None else weight + of_element(parts.m, parts.mins)).flatten(1)


def encode(
    weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None = None, tensor_scale: Tensor | None = None
) -> QuantTensor:
    """Round a weight to the codes of given scales (and zeros): the nearest value, clamped at the ends of the range.

    Shapes:
        weight        [N, K]                         any float
        scales        [N / group_n, K / group_k]     any float, stored in the format's scale type
        zeros         like scales                    stored as the format's zero type
        tensor_scale  [1]                            float32
    """
    n, k = weight.shape
    scales = scales.to(SCALE_DTYPES[format.scale])
    if zeros is not None:
        zeros = zeros.to(torch.uint8 if format.zero == "int" else scales.dtype)
    full = scales.float() if tensor_scale is None else scales.float() * tensor_scale
    inverse = torch.where(full == 0, 0.0, 1.0 / full)
    x = weight.float() * spread(inverse, format, n, k)
    if zeros is not None:
        x = x + spread(zeros.float() if format.zero != "min" else -zeros.float() * inverse, format, n, k)
    codes = pack(nearest_code(x, format.code), format.bits)
    return QuantTensor(format, (n, k), codes, scales.contiguous(), zeros, tensor_scale)


def matmul(x: Tensor, q: QuantTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """x [..., K] times the weight, plus bias: [..., N], all in `dtype`."""
    return F.linear(x.to(dtype), decode(q, dtype), None if bias is None else bias.to(dtype))


def spread(per_group: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    """Repeat one value per group over the elements of the group: [N / group_n, K / group_k] -> [N, K] (or broadcastable to it)."""
    group_n, group_k = format.group_extent(n, k)
    if group_n != 1:
        per_group = per_group.repeat_interleave(group_n, 0)[:n]
    return per_group.repeat_interleave(group_k, 1)[:, :k]


def code_values(code: Code, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Value of every code, [2^bits]."""
    return torch.tensor(code.values, dtype=dtype, device=device)


def nearest_code(x: Tensor, code: Code) -> Tensor:
    """Code (uint8) of the representable value nearest to each element of x, in units of the scale.

    Integers round half to even, floats half to the even mantissa, codebooks half to the lower entry.
    """
    if isinstance(code, Int):
        return (x.round() + code.bias).clamp_(0, 2**code.bits - 1).to(torch.uint8)
    _, thresholds, codes = (t.to(x.device) for t in ordered(code))
    if isinstance(code, Float):
        index = torch.bucketize(x.abs(), thresholds, out_int32=True)
        return (index + torch.signbit(x) * 2 ** (code.bits - 1)).to(torch.uint8)
    return codes[torch.bucketize(x, thresholds, out_int32=True)]


class Ordered(NamedTuple):
    """The finite values of a code (floats: their magnitudes) in ascending order.

    A number belongs to values[i], i = the count of thresholds below it: midpoints, moved by one ulp where the tie goes up.
    """

    values: Tensor  # float32
    thresholds: Tensor  # float32, one fewer
    codes: Tensor  # uint8


@lru_cache(maxsize=64)
def ordered(code: Float | Codebook) -> Ordered:
    """Values, thresholds and codes for rounding to a code that is no integer."""
    values = torch.tensor(code.values, dtype=torch.float64, device="cpu")
    if isinstance(code, Float):
        values = values[: 2 ** (code.bits - 1)]
    values, order = values[torch.isfinite(values)].sort(stable=True)
    thresholds = ((values[1:] + values[:-1]) / 2).float()
    if isinstance(code, Float):  # ties go to the even mantissa: between an odd code and the next, up
        thresholds[1::2] = torch.nextafter(thresholds[1::2], thresholds.new_zeros(()))
    return Ordered(values.float(), thresholds, order.to(torch.uint8))


def check_finite(weight: Tensor, what: str = "the weight") -> None:
    """Raise FormatError when `weight` is not a dense 2-D matrix of finite float64, float32, bfloat16 or float16."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(f"{what} must be a 2-D float matrix, not {list(weight.shape)} {weight.dtype}")
    if weight.layout != torch.strided or weight.dtype.itemsize < 2:
        raise FormatError(f"{what} is {weight.dtype}, {weight.layout}: write `.to_dense()` or `.to(torch.bfloat16)` first")
    if 0 in weight.shape:
        raise FormatError(f"{what} is empty: {list(weight.shape)}")
    if not all(torch.isfinite(end) for end in torch.aminmax(weight)):  # one pass: a NaN is both
        bad = (~torch.isfinite(weight)).nonzero()
        row, column = bad[0].tolist()
        raise FormatError(f"{what} has {len(bad)} NaN or infinite values; the first is {weight[row, column].item()} at [{row}, {column}]")


def permuted(q: QuantTensor, perm: Tensor) -> QuantTensor:
    """The same codes, declared to be the columns `perm` of the weight."""
    return replace(q, perm=perm.to(torch.int32))
