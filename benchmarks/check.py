"""Correctness before speed: compare an output with the float64 product of the weights' meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Arithmetic, CheckFailed, Deviation, Prepared

# Largest NMSE of libraries other than ours, on Gaussian data. int8 activations: one scale per row gives about 8e-5, a row with a
# large outlier several times that. bf16: rounding of weights, activations' products and output. fp32: bf16-free arithmetic.
NMSE_LIMIT: dict[Arithmetic, float] = {"int8": 1e-3, "bf16": 5e-5, "fp32": 1e-9}

EDGE_ROWS = 32  # tails of M live at the end; all rows are compared up to three times this many


def rows_to_check(m: int) -> Tensor:
    """Indices of the rows that are compared: all of few; of many the first, the last and some spread over the rest."""
    if m <= 3 * EDGE_ROWS:
        return torch.arange(m)
    between = torch.linspace(EDGE_ROWS, m - EDGE_ROWS - 1, EDGE_ROWS).long()
    return torch.cat([torch.arange(EDGE_ROWS), between, torch.arange(m - EDGE_ROWS, m)])


def measure_deviation(y: Tensor, x: Tensor, weight: Tensor) -> Deviation:
    """Deviation of y [M, N] from x [M, K] @ weight[N, K].T in float64."""
    rows = rows_to_check(len(x))
    expected = x[rows].double() @ weight.double().T
    error = y[rows].double() - expected
    return Deviation((error.square().mean() / expected.square().mean()).item(), error.abs().max().item())


def check(prepared: Prepared, arithmetic: Arithmetic, x: Tensor, y: Tensor) -> Deviation:
    """Return the deviation of y.

    Raises: CheckFailed, saying how wrong it is, when the result may not be published.
    """
    if y.shape != (len(x), len(prepared.weight)):
        raise CheckFailed(f"wrong shape {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        raise CheckFailed(f"{(~torch.isfinite(y)).sum().item()} of {y.numel()} values are not finite")
    deviation = measure_deviation(y, x, prepared.weight)
    if prepared.check is not None:
        prepared.check(x, y)
    elif not deviation.nmse <= NMSE_LIMIT[arithmetic]:
        raise CheckFailed(f"NMSE {deviation.nmse:.2g} is over {NMSE_LIMIT[arithmetic]:.0e}, what {arithmetic} arithmetic may cost")
    return deviation
