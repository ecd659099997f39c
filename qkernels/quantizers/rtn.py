"""Round to nearest: one scale per group from its largest value, or from the clip that loses least.

The search tries a grid of clipping ratios and keeps, group by group, the scale with the smallest squared error. It helps codes of
up to 4 bits (relative error of Gaussian weights, int4 g128: 0.117 -> 0.097) and does nothing for 8, where it is off by default.
Symmetric integers may get negative scales: the longer side of the range (-8 of int4) goes to the side with the largest weight.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import SCALE_DTYPES
from qkernels.quantizers import nearest
from qkernels.reference import check_finite, code_values

_CHUNK = 1 << 20  # elements quantised at a time: bounds the temporaries to some 30 MB
_CLIPS = tuple(1.0 - i / 40 for i in range(1, 17))  # 0.975 … 0.6 of the largest value


def rtn(weight: Tensor, format: QuantFormat, *, clip_search: bool | None = None) -> QuantTensor:
    """Quantise a weight by rounding to nearest.

    weight        [N, K] float, finite
    clip_search   look for the clip with the smallest squared error; None: for codes of up to 4 bits
    Raises        FormatError (NaN, inf, scales beyond the range of the scale type), UnsupportedError (block formats without encode)
    """
    check_finite(weight)
    if format.block is not None:
        return _encode_blocks(weight, format)
    search = format.bits <= 4 if clip_search is None else clip_search
    n, k = weight.shape
    group_n, _ = format.group_extent(n, k)
    tensor_scale = _tensor_scale(weight, format)
    rows = max(1, _CHUNK // (k * group_n)) * group_n
    parts = [_quantize_rows(weight[i : i + rows], format, search, tensor_scale) for i in range(0, n, rows)]
    codes, scales, zeros = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    assert codes is not None and scales is not None
    _check_scales(scales, format)
    scales = scales.to(SCALE_DTYPES[format.scale])
    _check_underflow(weight, scales, format)
    if zeros is not None:
        zeros = zeros.to(torch.uint8 if format.zero == "int" else scales.dtype)
    return QuantTensor(format, (n, k), codes, scales, zeros, tensor_scale)


def _quantize_rows(weight: Tensor, format: QuantFormat, search: bool, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes, scales and zeros (float32) of some rows; with `search`, each group's best of all candidates."""
    scales, zeros = _candidates(weight, format, search, tensor_scale)
    index = torch.zeros((*scales.shape[:2], 1), dtype=torch.int64, device=weight.device)
    if scales.shape[2] > 1:
        index = nearest.best_scales(weight, format, scales, zeros, tensor_scale)[0][..., None]
    scales = scales.gather(2, index)[..., 0]
    zeros = None if zeros is None else zeros.gather(2, index)[..., 0]
    return nearest.codes(weight, format, scales, zeros, tensor_scale), scales, zeros


def _candidates(weight: Tensor, format: QuantFormat, search: bool, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales [N / group_n, K / group_k, C], as the format stores them, and zeros; one candidate, or with `search` some to choose from."""
    low, high = (end[..., None] for end in _group_ends(weight, format))
    clips = torch.tensor((1.0, *_CLIPS) if search else (1.0,), dtype=torch.float64, device=weight.device)
    if format.zero != "none":
        return _affine(low * clips.float(), high * clips.float(), format)
    absmax = torch.maximum(-low, high)
    if isinstance(format.code, Int):
        bias, top = format.code.bias, 2**format.bits - 1
        short = min(bias, top - bias) or max(bias, top - bias)
        scales = absmax * (clips / short).float()
        if search and bias > top - bias:  # -8 … 7: the long side takes the extreme value, whatever its sign
            extreme = torch.where(high > -low, -absmax, absmax)
            scales = torch.cat([scales, extreme * (clips / bias).float()], 2)
        return _stored(scales, format), None
    values = code_values(format.code)
    largest = float(values[torch.isfinite(values)].abs().max())
    if format.scale == "e8m0":  # OCP: the exponent of the largest value, so that it may saturate; or one more, so that it does not
        top_exponent = math.frexp(largest)[1]
        up = torch.tensor((0, 1) if search else (0,), device=weight.device)
        return _stored(torch.exp2((torch.frexp(absmax).exponent - top_exponent + up).float()), format), None
    unit = largest if tensor_scale is None else largest * float(tensor_scale)
    return _stored(absmax * (clips / unit).float(), format), None


def _affine(low: Tensor, high: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point, or minimum, that put [low, high] on the codes."""
    top = 2**format.bits - 1
    if format.zero == "int":  # a code between 0 and top must mean 0.0
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = _stored((high - low) / top, format)
    if format.zero == "min":
        return scales, _stored(low, format)
    flat = scales == 0  # a constant group: the zero point alone must carry it
    if format.zero == "float":
        scales = torch.where(flat, _stored(low.abs().clamp(min=1e-4), format), scales)
    zeros = torch.where(scales == 0, 0.0, -low / torch.where(scales == 0, 1.0, scales))
    return scales, zeros.round().clamp(0, top) if format.zero == "int" else zeros.to(SCALE_DTYPES[format.scale]).float()


def _group_ends(weight: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, [N / group_n, K / group_k]."""
    n, k = weight.shape
    weight = weight.float()
    group_n, group_k = format.group_extent(n, k)
    padded = (
        F.pad(weight, (0, -k % group_k, 0, -n % group_n), mode="constant", value=float("nan")) if k % group_k or n % group_n else weight
    )
    groups = padded.unflatten(1, (-1, group_k)).unflatten(0, (-1, group_n))
    if padded is weight:
        return groups.amin((1, 3)), groups.amax((1, 3))
    return groups.nan_to_num(float("inf")).amin((1, 3)), groups.nan_to_num(float("-inf")).amax((1, 3))


def _stored(scales: Tensor, format: QuantFormat) -> Tensor:
    """Scales rounded to what the format can store, as float32."""
    return scales.to(SCALE_DTYPES[format.scale]).float()


def _tensor_scale(weight: Tensor, format: QuantFormat) -> Tensor | None:
    """NVFP4's second level: the largest group scale becomes the largest e4m3 value."""
    if not format.tensor_scale:
        return None
    values = code_values(format.code)
    largest = float(values[torch.isfinite(values)].abs().max()) * torch.finfo(SCALE_DTYPES[format.scale]).max
    return (weight.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)


def _check_scales(scales: Tensor, format: QuantFormat) -> None:
    bad = ~torch.isfinite(scales)
    if bool(bad.any()):
        limit = torch.finfo(SCALE_DTYPES[format.scale]).max
        row, column = bad.nonzero()[0].tolist()
        raise FormatError(
            f"the scale of group [{row}, {column}] is beyond {limit:g}, the largest {format.scale} scale that {format.name} holds; "
            "use a format with sf32 scales"
        )


def _check_underflow(weight: Tensor, scales: Tensor, format: QuantFormat) -> None:
    """Raise when groups lose weights that matter because their scale became 0: beside larger ones, they would round to 0 anyway."""
    lost = scales.float() == 0
    if not bool(lost.any()):
        return
    low, high = _group_ends(weight, format)
    absmax = (high - low if format.zero == "min" else torch.maximum(low.abs(), high.abs())).float()  # a minimum carries what is constant
    largest = torch.where(lost, absmax, 0.0).amax()
    if float(largest) > float(absmax.amax()) / 64:
        info = torch.finfo(SCALE_DTYPES[format.scale])
        least = info.smallest_normal * info.eps  # the least subnormal
        raise FormatError(
            f"weights of up to {float(largest):.3g} need a scale that {format.scale} ({least:.3g} and more) rounds to 0; "
            "use a format with sf32 scales"
        )


def _encode_blocks(weight: Tensor, format: QuantFormat) -> QuantTensor:
    assert format.block is not None
    if format.block.encode is None:
        raise UnsupportedError(f"{format.name} can be read, not made: its block format has no encode")
    n, k = weight.shape
    format.codes_shape(n, k)  # checks K
    raw = format.block.encode(weight.float().unflatten(1, (-1, format.block.elements)))
    return QuantTensor(format, (n, k), raw.flatten(1).contiguous())
