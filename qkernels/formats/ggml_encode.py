"""Encoders of ggml's block types, without an importance matrix: the blocks that ggml's reference C code makes, byte for byte on the CPU.

Every `encode_<type>` takes weights [N, B, elements of a block] float32 and returns Parts for the type's `join`. To give the same bytes they
do the same float32 operations in the same order: sums run element by element. For that, and for speed, groups lie as
[elements, N, B, groups of a block], one contiguous slice an element. Source: the algorithms of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels.errors import FormatError
from qkernels.formats.format import Parts
from qkernels.formats.ggml_search import (
    TINY,
    descend_symmetric,
    inverse_of,
    nearest_iq4,
    over,
    peak_of,
    search_affine,
    search_symmetric,
    search_table,
    total,
)

_CHUNK = 1 << 16  # weights encoded at a time: what the searches hold stays in the caches


@dataclass(frozen=True)
class Encoder:
    """What `Block.encode` is for a type: weights [N, B, elements] float32 to raw blocks. Raises FormatError for too large scales."""

    encode: Callable[[Tensor], Parts]
    join: Callable[[Parts], Tensor]

    def __call__(self, weight: Tensor) -> Tensor:
        chunks = weight.reshape(1, -1, weight.shape[-1]).split(_CHUNK // weight.shape[-1], 1)
        raw = torch.cat([self.join(_checked(self.encode(chunk), chunk)) for chunk in chunks], 1)
        return raw.view(*weight.shape[:2], -1)


def _checked(p: Parts, weight: Tensor) -> Parts:
    finite = all(bool(torch.isfinite(scale.float()).all()) for scale in (p.d, p.m) if scale is not None)
    # The searches take third powers, which overflow long after the scales: no float16 scale times codes reaches 2^30.
    if not finite or (p.d.dtype == torch.float16 and float(weight.abs().amax()) > 2.0**30):
        raise FormatError("the weight has groups whose scale is beyond the largest of its type: 65504 in float16, 448 in UE4M3")
    return p


def _grouped(weight: Tensor, size: int) -> Tensor:
    """[N, B, elements] to [size, N, B, groups]."""
    return weight.unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()


def _codes(grouped: Tensor) -> Tensor:
    """Invert `_grouped` for codes."""
    return grouped.movedim(0, -1).flatten(-2).to(torch.uint8)


def _rounded(x: Tensor) -> Tensor:
    """Round half away from zero."""
    whole = x.trunc()
    return torch.where((x - whole).abs() < 0.5, whole, whole + x.sign())


# -- one scale a block -------------------------------------------------------------------------------------------------------------


def encode_q4_0(weight: Tensor) -> Parts:
    return _symmetric(weight, 8)


def encode_q5_0(weight: Tensor) -> Parts:
    return _symmetric(weight, 16)


def _symmetric(weight: Tensor, bias: int) -> Parts:
    """The largest weight becomes code 0, whatever its sign."""
    d = peak_of(weight, -1) / -bias
    return Parts((weight * inverse_of(d) + (bias + 0.5)).clamp(max=2 * bias - 1).to(torch.uint8), d.half())


def encode_q4_1(weight: Tensor) -> Parts:
    return _affine(weight, 15)


def encode_q5_1(weight: Tensor) -> Parts:
    return _affine(weight, 31)


def _affine(weight: Tensor, top: int) -> Parts:
    """Codes from the smallest weight to the largest."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    d = (high - low) / top
    return Parts(((weight - low) * inverse_of(d) + 0.5).clamp(max=top).to(torch.uint8), d.half(), m=low.half())


def encode_q8_0(weight: Tensor) -> Parts:
    d = weight.abs().amax(-1, keepdim=True) / 127
    return Parts((_rounded(weight * inverse_of(d)) + 128).to(torch.uint8), d.half())


def encode_ternary(weight: Tensor) -> Parts:
    """TQ1_0, TQ2_0 and Q2_0: the fourth code of two bits is never used."""
    d = weight.abs().amax(-1, keepdim=True)
    return Parts((_rounded(weight * inverse_of(d)) + 1).to(torch.uint8), d.half())


def encode_q1_0(weight: Tensor) -> Parts:
    d = total(weight.abs().movedim(-1, 0))[..., None] / 128
    return Parts((weight >= 0).to(torch.uint8), d.half())


# -- 4-bit floats ------------------------------------------------------------------------------------------------------------------


def _e2m1(weight: Tensor, d: Tensor) -> Tensor:
    """Nearest codes under the scale `d`; of two the one nearer to zero, and never -0."""
    size = weight.abs()
    code = sum((size > midpoint * d).to(torch.uint8) for midpoint in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    assert isinstance(code, Tensor)
    code = torch.where(d == 0, 0, code)
    return torch.where((weight < 0) & (code > 0), code + 8, code)


def encode_mxfp4(weight: Tensor) -> Parts:
    """The largest power of two in a block falls on 4: a weight of more than 6 times the scale saturates."""
    peak = weight.abs().amax(-1, keepdim=True)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent - 3, -127).clamp(min=-127)
    d = torch.ldexp(torch.ones_like(peak), exponent)
    return Parts(_e2m1(weight, d), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu))


def encode_nvfp4(weight: Tensor) -> Parts:
    groups = weight.unflatten(-1, (-1, 16))
    d = _e4m3(groups.abs().amax(-1, keepdim=True) / 6)
    return Parts(_e2m1(groups, d.float()).flatten(-2), d.flatten(-2))


def _e4m3(scale: Tensor) -> Tensor:
    """Round half up, in each of ggml's own ranges: subnormals stay subnormal, and 248 and more become 448. NaN: too large."""
    normal = ((scale.view(torch.int32) + (1 << 19)) >> 20) - (120 << 3)  # the exponent's bias is 7 rather than 127
    normal = torch.where(scale > 464, 0x7F, torch.where(normal >= 15 << 3, 0x7E, normal))
    subnormal = (scale * 512 + 0.5).clamp(max=7).int()
    return torch.where(scale < 2.0**-6, subnormal, normal).to(torch.uint8).view(torch.float8_e4m3fn)


# -- super-blocks ------------------------------------------------------------------------------------------------------------------


def _nested_affine(x: Tensor, top: int, scale_top: int, found: tuple[Tensor, ...]) -> Parts:
    """Quantise scales and minima of groups, and the weights anew with what they became."""
    codes, *levels = found

    def quantised(level: Tensor) -> tuple[Tensor, Tensor]:
        peak = level.amax(-1, keepdim=True).clamp(min=0.0)
        return (peak / scale_top).half(), (torch.where(peak > 0, over(scale_top, peak), 0.0) * level).round_().clamp_(0, scale_top)

    (d, scales), (m, mins) = map(quantised, levels)
    step, low = d.float() * scales, m.float() * mins
    codes = torch.where(step == 0, codes, ((x + low) / step).round_().clamp_(0, top))
    return Parts(_codes(codes), d, scales.to(torch.uint8), -m, mins.to(torch.uint8))


def _nested_symmetric(x: Tensor, bound: int, scale_bound: int, found: tuple[Tensor, Tensor], empty: int = 0) -> Parts:
    """Quantise scales of groups, and the weights anew with what they became; `empty` are the scales of a block of zeros."""
    codes, level = found
    peak = peak_of(level, -1)
    live = peak.abs() >= TINY
    inverse = torch.where(live, over(-scale_bound, peak), 0.0)
    d = inverse_of(inverse).half()
    scales = torch.where(live, (inverse * level).round_().clamp_(-scale_bound, scale_bound - 1), empty)
    step = d.float() * scales
    codes = torch.where(step == 0, codes * live, (x / step).round_().clamp_(-bound, bound - 1) + bound)
    return Parts(_codes(codes), d, scales.to(torch.int8))


def encode_q2_k(weight: Tensor) -> Parts:
    x = _grouped(weight, 16)
    return _nested_affine(x, 3, 15, search_affine(x, x.abs(), 3, -0.5, 15, torch.abs))


def encode_q3_k(weight: Tensor) -> Parts:
    x = _grouped(weight, 16)
    return _nested_symmetric(x, 4, 32, descend_symmetric(x, 4), empty=-32)  # whose bytes are zeros


def _rms_importance(x: Tensor) -> Tensor:
    # In double, as torch's float32 root may be off by one ulp.
    return (total(x * x) / len(x)).double().sqrt().float() + x.abs()


def encode_q4_k(weight: Tensor) -> Parts:
    x = _grouped(weight, 32)
    return _nested_affine(x, 15, 63, search_affine(x, _rms_importance(x), 15, -1.0, 20, torch.square))


def encode_q5_k(weight: Tensor) -> Parts:
    x = _grouped(weight, 32)
    return _nested_affine(x, 31, 63, search_affine(x, _rms_importance(x), 31, -0.5, 15, torch.square))


def encode_q6_k(weight: Tensor) -> Parts:
    x = _grouped(weight, 16)
    return _nested_symmetric(x, 32, 128, search_symmetric(x, 32))


# -- IQ4: a table of 16 values -----------------------------------------------------------------------------------------------------


def encode_iq4_nl(weight: Tensor) -> Parts:
    d = search_table(_grouped(weight, 32))
    return Parts(nearest_iq4(weight * inverse_of(d)).to(torch.uint8), d.half())


def encode_iq4_xs(weight: Tensor) -> Parts:
    x = _grouped(weight, 32)
    level = search_table(x)
    d = peak_of(level, -1) / -32
    scales = (inverse_of(d) * level).round_().clamp_(-32, 31)
    return Parts(_codes(nearest_iq4(x * inverse_of(d * scales))), d.half(), scales.to(torch.int8))
