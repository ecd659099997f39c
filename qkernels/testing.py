"""The tolerance of the house, derived and not tuned: what a kernel's result may differ from the fp64 product by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACT_GROUP = 256  # the longest run of K that shares one int8 activation scale


def assert_matmul_close(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    compute: str = "float",
    group: int | None = None,
    perm: Tensor | None = None,
    code_step: Tensor | None = None,
) -> None:
    """Compare y with the fp64 product of the dequantised weight; raise AssertionError beyond the derived bound.

    Shapes:
        y, x, bias   [..., N], [..., K], [N]     as the kernel saw them
        weight       [N, K] float64              dequantised
        perm         [K]                         order in which columns form groups (int8 only)
        code_step    [N, K] or broadcastable     int8 only: largest |value| of an inexact codebook times its scale; rounded to /127
    compute          "float": twice the largest error of torch's own matmul in x's dtype, the bound gamma_K |x| |W| in fp32, one ulp
                     "int8": besides, half a step of int8 activations: absmax / 127 per row and run of K
    group            extent of the weight's groups along K; None or -1: all of K. Runs are at most ACT_GROUP long
    """
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    assert y.shape == exact.shape and y.dtype == x.dtype, f"got {list(y.shape)} {y.dtype}, want {list(exact.shape)} {x.dtype}"
    if not y.numel():
        return
    allowed = _float_bound(x, weight, bias, exact)
    if compute == "int8":
        allowed = allowed + _int8_bound(x, weight, group, perm, code_step)
    error = (y.double() - exact).abs()
    bad = ~(error <= allowed)
    if bool(bad.any()):
        raise AssertionError(_report(y, exact, error, allowed, bad))


def _float_bound(x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> Tensor:
    torch_y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    torch_error = (torch_y.double() - exact).abs().amax()
    magnitude = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    roundings = (x.shape[-1] + 8) * 2.0**-24
    info = torch.finfo(x.dtype)
    return 2 * torch_error + roundings / (1 - roundings) * magnitude + info.eps * exact.abs() + info.smallest_normal * info.eps


def _int8_bound(x: Tensor, weight: Tensor, group: int | None, perm: Tensor | None, code_step: Tensor | None) -> Tensor:
    if perm is not None:
        x, weight = x[..., perm.long()], weight[:, perm.long()]
        code_step = code_step if code_step is None or code_step.shape[-1] == 1 else code_step[:, perm.long()]
    k = x.shape[-1]
    extent = k if group is None or group == -1 else min(group, k)
    rounding = torch.zeros_like(weight) if code_step is None else (0.5 / 127 * code_step.double()).expand_as(weight)
    total = F.linear(x.double().abs(), rounding)
    for start in range(0, k, extent):
        stop = min(start + extent, k)
        for i in range(start, stop, ACT_GROUP):
            run = slice(i, min(i + ACT_GROUP, stop))
            step = x[..., run].double().abs().amax(-1, keepdim=True) / 127
            total = total + 0.5 * step * (weight[:, run].abs() + rounding[:, run]).sum(1)
    return 1.001 * total  # the fp32 arithmetic of the scales


def _report(y: Tensor, exact: Tensor, error: Tensor, allowed: Tensor, bad: Tensor) -> str:
    at = tuple(bad.nonzero()[0].tolist())
    nmse = float(error.square().sum() / exact.square().sum().clamp(min=1e-300))
    return (
        f"{int(bad.sum())} of {bad.numel()} values are beyond the bound: max error {float(error.max()):.4g}, "
        f"NMSE {nmse:.4g}; first at {list(at)}: "
        f"got {float(y[at])!r}, want {float(exact[at])!r}, error {float(error[at]):.4g} > {float(allowed[at]):.4g}"
    )
