"""The tolerance of the house, derived and not tuned: what a kernel's result may differ from the fp64 product by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Codebook, Int, QuantFormat, QuantTensor, nested
from qkernels.reference import spread

ACT_GROUP = 256  # the longest run of K that shares one int8 activation scale: of the CPU kernels


def assert_matmul_close(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    int8: QuantTensor | None = None,
    act_group: int | None = ACT_GROUP,
) -> None:
    """Compare y with the fp64 product of the dequantised weight; raise AssertionError beyond the derived bound.

    Shapes:
        y, x, bias   [..., N], [..., K], [N]     as the kernel saw them
        weight       [N, K] float64              dequantised
    The bound is twice the largest error of torch's own matmul in x's dtype, gamma_K |x| |W| in fp32, and one ulp.

    int8: the quantised weight, where the kernel quantises activations to int8. Besides, then: half a step of them, for every row and run
    of K, and what the entries of a codebook lie beside those that int8 holds. act_group: the longest such run, which ends with a group of
    the weight's as well (`act_extent`); None: one scale for all of K, whatever the weight's groups.
    """
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    assert y.shape == exact.shape and y.dtype == x.dtype, f"got {list(y.shape)} {y.dtype}, want {list(exact.shape)} {x.dtype}"
    if not y.numel():
        return
    allowed = _float_bound(x, weight, bias, exact)
    if int8 is not None:
        allowed = allowed + _int8_bound(x, weight, int8, act_group)
    error = (y.double() - exact).abs()
    bad = ~(error <= allowed)
    if bool(bad.any()):
        raise AssertionError(_report(y, exact, error, allowed, bad))


def assert_swiglu_close(
    y: Tensor, x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> None:
    """Compare y [..., N] with silu(x · gateᵀ + bias) · (x · upᵀ + bias) in fp64; raise AssertionError beyond the derived bound.

    gate, up [N, K] float64, dequantised. The bound is that of either product, as it goes through, and one ulp: silu's slope is below 1.1.
    """
    bias = [None if b is None else b.double() for b in (gate_bias, up_bias)]
    g, u = F.linear(x.double(), gate, bias[0]), F.linear(x.double(), up, bias[1])
    exact, info = F.silu(g) * u, torch.finfo(x.dtype)
    assert y.shape == exact.shape and y.dtype == x.dtype, f"got {list(y.shape)} {y.dtype}, want {list(exact.shape)} {x.dtype}"
    if not y.numel():
        return
    of_g, of_u = 1.1 * _float_bound(x, gate, gate_bias, g), _float_bound(x, up, up_bias, u)
    allowed = of_g * u.abs() + (F.silu(g).abs() + of_g) * of_u + info.eps * exact.abs() + info.smallest_normal * info.eps
    error = (y.double() - exact).abs()
    if bool((bad := ~(error <= allowed)).any()):
        raise AssertionError(_report(y, exact, error, allowed, bad))


def _float_bound(x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> Tensor:
    torch_y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    torch_error = (torch_y.double() - exact).abs().amax()
    magnitude = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    roundings = (x.shape[-1] + 8) * 2.0**-24
    info = torch.finfo(x.dtype)
    return 2 * torch_error + roundings / (1 - roundings) * magnitude + info.eps * exact.abs() + info.smallest_normal * info.eps


def _int8_bound(x: Tensor, weight: Tensor, q: QuantTensor, act_group: int | None) -> Tensor:
    n, k = q.shape
    code, extent = q.format.code, act_extent(q.format, n, k)
    rounding = torch.zeros_like(weight)
    if isinstance(code, Codebook) and (beside := beside_int8(code)):
        assert q.scales is not None
        rounding = beside * spread(q.scales.double().abs(), q.format, n, k).expand_as(weight)
    if q.perm is not None:  # groups are runs of the permuted columns
        x, weight, rounding = x[..., q.perm.long()], weight[:, q.perm.long()], rounding[:, q.perm.long()]
    total, extent = F.linear(x.double().abs(), rounding), k if act_group is None else extent
    longest, largest = act_group or k, 127 if act_group is None else act_largest(q.format)
    for start in range(0, k, extent):
        stop = min(start + extent, k)
        for i in range(start, stop, longest):
            run = slice(i, min(i + longest, stop))
            step = x[..., run].double().abs().amax(-1, keepdim=True) / largest
            total = total + 0.5 * step * (weight[:, run].abs() + rounding[:, run]).sum(1)
    return 1.001 * total  # the fp32 arithmetic of the scales


def act_extent(format: QuantFormat, n: int, k: int) -> int:
    """Columns that one int8 activation scale serves at most: the weight's group, or the block whose groups have integer scales."""
    block = format.block
    scaled = block is not None and not nested.is_kept(format) and nested.parts_of(format).scales is not None
    return block.elements if block is not None and scaled else format.group_extent(n, k)[1]


def beside_int8(code: Codebook) -> float:
    """How far an entry may lie beside a multiple of 1/127 of the largest; 0 where all are int8 themselves (IQ4)."""
    unit = max(abs(v) for v in code.values) / 127
    return max(abs(v - round(v / unit) * unit) for v in code.values)


def act_largest(format: QuantFormat) -> int:
    """Largest int8 activation: less where the sum of an activation and a code has to fit a byte (DotPairs in csrc/cpu/simd_avx512.h)."""
    return 120 if isinstance(format.code, Int) and format.bits <= 4 else 127


def _report(y: Tensor, exact: Tensor, error: Tensor, allowed: Tensor, bad: Tensor) -> str:
    at = tuple(bad.nonzero()[0].tolist())
    nmse = float(error.square().sum() / exact.square().sum().clamp(min=1e-300))
    return (
        f"{int(bad.sum())} of {bad.numel()} values are beyond the bound: max error {float(error.max()):.4g}, "
        f"NMSE {nmse:.4g}; first at {list(at)}: "
        f"got {float(y[at])!r}, want {float(exact[at])!r}, error {float(error[at]):.4g} > {float(allowed[at]):.4g}"
    )
