"""Round to nearest: one scale per group from its largest value, or from the clip that loses least.

The search tries a grid of clipping ratios and keeps, group by group, the scale with the smallest squared error. It helps codes of
up to 4 bits (relative error of Gaussian weights, int4 g128: 0.111 -> 0.101) and does nothing for 8, where it is off by default.
Symmetric integers may get negative scales: the longer side of the range (-8 of int4) goes to the side with the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import SCALE_DTYPES
from qkernels.reference import check_finite, code_values, encode, nearest_code, spread

_CHUNK = 1 << 22  # elements quantised at a time: bounds the temporaries to some 100 MB
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
    parts = [_scales(weight[i : i + rows].float(), format, search, tensor_scale) for i in range(0, n, rows)]
    scales = torch.cat([s for s, _ in parts])
    _check_scales(scales, format)
    zeros = torch.cat([z for _, z in parts if z is not None]) if format.zero != "none" else None
    codes = [
        encode(
            weight[i : i + rows],
            format,
            scales[i // group_n : (i + rows - 1) // group_n + 1],
            _slice(zeros, i, rows, group_n),
            tensor_scale,
        ).codes
        for i in range(0, n, rows)
    ]
    scales = scales.to(SCALE_DTYPES[format.scale])
    if zeros is not None:
        zeros = zeros.to(torch.uint8 if format.zero == "int" else scales.dtype)
    return QuantTensor(format, (n, k), torch.cat(codes), scales, zeros, tensor_scale)


def _slice(zeros: Tensor | None, i: int, rows: int, group_n: int) -> Tensor | None:
    return None if zeros is None else zeros[i // group_n : (i + rows - 1) // group_n + 1]


def _scales(weight: Tensor, format: QuantFormat, search: bool, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales [N / group_n, K / group_k] float32 and zeros of some rows; with `search`, the best of all candidates."""
    best: tuple[Tensor, Tensor | None] | None = None
    best_error: Tensor | None = None
    for scales, zeros in _candidates(weight, format, search, tensor_scale):
        if not search:
            return scales, zeros
        error = _group_error(weight, format, scales, zeros, tensor_scale)
        if best is None or best_error is None:
            best, best_error = (scales, zeros), error
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (torch.where(better, scales, best[0]), None if zeros is None or best[1] is None else torch.where(better, zeros, best[1]))
    assert best is not None
    return best


def _candidates(weight: Tensor, format: QuantFormat, search: bool, tensor_scale: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    low, high = _group_ends(weight, format)
    clips = (1.0, *_CLIPS) if search else (1.0,)
    if format.zero != "none":
        yield from (_affine(low * p, high * p, format) for p in clips)
        return
    absmax = torch.maximum(-low, high)
    if isinstance(format.code, Int):
        bias, top = format.code.bias, 2**format.bits - 1
        short = min(bias, top - bias) or max(bias, top - bias)
        yield from ((_stored(absmax * (p / short), format), None) for p in clips)
        if search and bias > top - bias:  # -8 … 7: the long side takes the extreme value, whatever its sign
            extreme = torch.where(high > -low, -absmax, absmax)
            yield from ((_stored(extreme * (p / bias), format), None) for p in clips)
        return
    values = code_values(format.code)
    largest = float(values[torch.isfinite(values)].abs().max())
    if format.scale == "e8m0":  # OCP: the exponent of the largest value, so that it may saturate; or one more, so that it does not
        top_exponent = int(torch.frexp(torch.tensor(largest)).exponent)
        exponent = torch.frexp(absmax).exponent - top_exponent
        yield from ((_stored(torch.ldexp(torch.ones_like(absmax), exponent + up), format), None) for up in (0, 1))
        return
    unit = largest if tensor_scale is None else largest * float(tensor_scale)
    yield from ((_stored(absmax * (p / unit), format), None) for p in clips)


def _affine(low: Tensor, high: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point that put [low, high] on the codes."""
    top = 2**format.bits - 1
    if format.zero == "int":  # a code between 0 and top must mean 0.0
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = _stored((high - low) / top, format)
    flat = scales == 0  # a constant group: the zero point alone must carry it
    if format.zero == "float":
        scales = torch.where(flat, _stored(low.abs().clamp(min=1e-4), format), scales)
    zeros = torch.where(scales == 0, 0.0, -low / torch.where(scales == 0, 1.0, scales))
    return scales, zeros.round().clamp(0, top) if format.zero == "int" else zeros.to(SCALE_DTYPES[format.scale]).float()


def _group_ends(weight: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, [N / group_n, K / group_k]."""
    n, k = weight.shape
    group_n, group_k = format.group_extent(n, k)
    padded = (
        F.pad(weight, (0, -k % group_k, 0, -n % group_n), mode="constant", value=float("nan")) if k % group_k or n % group_n else weight
    )
    groups = padded.unflatten(1, (-1, group_k)).unflatten(0, (-1, group_n))
    if padded is weight:
        return groups.amin((1, 3)), groups.amax((1, 3))
    return groups.nan_to_num(float("inf")).amin((1, 3)), groups.nan_to_num(float("-inf")).amax((1, 3))


def _group_error(weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None) -> Tensor:
    """Sum of squared errors of each group under these scales."""
    n, k = weight.shape
    group_n, group_k = format.group_extent(n, k)
    full = spread(scales if tensor_scale is None else scales * tensor_scale, format, n, k)
    x = weight * torch.where(full == 0, 0.0, 1.0 / full)
    shift = 0.0 if zeros is None else spread(zeros, format, n, k)
    value = code_values(format.code)[nearest_code(x + shift, format.code).int()] - shift
    error = (value * full - weight).square_()
    error = F.pad(error, (0, -k % group_k, 0, -n % group_n))
    return error.unflatten(1, (-1, group_k)).unflatten(0, (-1, group_n)).sum((1, 3))


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


def _encode_blocks(weight: Tensor, format: QuantFormat) -> QuantTensor:
    assert format.block is not None
    if format.block.encode is None:
        raise UnsupportedError(f"{format.name} can be read, not made: its block format has no encode")
    n, k = weight.shape
    format.codes_shape(n, k)  # checks K
    raw = format.block.encode(weight.float().unflatten(1, (-1, format.block.elements)))
    return QuantTensor(format, (n, k), raw.flatten(1).contiguous())
