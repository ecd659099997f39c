"""The searches of ggml's encoders: for each group of weights, the scale whose codes lose least.

Groups lie as [elements, N, B, groups of a block]; what is found of them as [N, B, groups of a block]. Everything is float32, in the order
of ggml's C code, so that the bytes come out the same. Source: the algorithms of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qkernels.formats.ggml_blocks import IQ4

TINY = 1e-15  # groups with no larger weight are zeros


def total(terms: Tensor) -> Tensor:
    """Add slices one after the other."""
    added = terms[0].clone()
    for term in terms[1:]:
        added += term
    return added


def peak_of(x: Tensor, dim: int) -> Tensor:
    """The value of largest magnitude, with its sign; the first of several. The dimension stays, with extent 1."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True)) + 0.0  # never -0


def over(number: float, x: Tensor) -> Tensor:
    """Divide and round once; `number / x` is the number times the reciprocal in torch."""
    return torch.tensor(number) / x


def inverse_of(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def search_symmetric(x: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Codes in 0 … 2 * bound - 1 and scales of groups: 19 guesses, each with its best scale; errors count by the squares of the weights."""
    peak = peak_of(x, 0)
    live = peak.abs() >= TINY
    peak = torch.where(live, peak, 1.0)
    importance = x * x
    importance_x = importance * x

    def fit(start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = (-start / peak * x).round_().clamp_(-bound, bound - 1)
        return codes, total(importance_x * codes), total(importance * codes * codes)

    steps = torch.tensor(0.1) * torch.tensor([0, *range(-9, 0), *range(1, 10)])
    best = torch.full_like(x[0], -1.0)
    codes, scale = torch.zeros_like(x), torch.zeros_like(x[0])
    for start in bound + steps:
        new, xl, ll = fit(start)
        better = (ll > 0) & (xl * xl > best * ll)
        codes = torch.where(better, new, codes)
        scale = torch.where(better, xl / ll, scale)
        best = torch.where(better, scale * xl, best)
    return torch.where(live, codes + bound, 0.0), scale


def descend_symmetric(x: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Codes in 0 … 2 * bound - 1 and scales of groups: one guess, then five sweeps that move one code at a time."""
    peak = peak_of(x, 0)
    live = peak.abs() >= TINY
    codes = (over(-bound, torch.where(live, peak, 1.0)) * x).round_().clamp_(-bound, bound - 1)
    importance = x * x
    importance_x = importance * x
    xl, ll = total(importance_x * codes), total(importance * codes * codes)
    for i in [*range(len(x))] * 5:
        w, wx, old = importance[i], importance_x[i], codes[i]
        new_xl, new_ll = xl - wx * old, ll - w * old * old
        new = (x[i] * new_ll / new_xl).round_().clamp_(-bound, bound - 1)
        possible = (new_xl > 0) & (new != old)
        new_xl, new_ll = new_xl + wx * new, new_ll + w * new * new
        better = possible & (new_ll > 0) & (new_xl * new_xl * ll > xl * xl * new_ll)
        codes[i] = torch.where(better, new, old)
        xl, ll = torch.where(better, new_xl, xl), torch.where(better, new_ll, ll)
    return torch.where(live, codes + bound, 0.0), torch.where(ll > 0, xl / ll, 0.0)


def search_affine(
    x: Tensor, importance: Tensor, top: int, first: float, steps: int, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Codes in 0 … top, scales and negated minima of groups: guesses of the scale, each with the best scale and minimum for its codes."""
    low, high = x.amin(0).clamp(max=0.0), x.amax(0)
    flat = high == low
    sum_w, sum_x = total(importance), total(importance * x)

    def error(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        return total(importance * loss(scale * codes + low - x))

    span = torch.where(flat, 1.0, high - low)
    inverse = over(top, span)
    codes = (inverse * (x - low)).round_().clamp_(0, top)
    scale = 1 / inverse
    best = error(codes, scale, low)
    for start in first + torch.tensor(0.1) * torch.arange(steps + 1) + top:
        new = (start / torch.where(flat, 1.0, high - low) * (x - low)).round_().clamp_(0, top)
        weighted = importance * new
        sum_l, sum_ll, sum_xl = total(weighted), total(weighted * new), total(weighted * x)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        new_scale = torch.where(new_low > 0, sum_xl / sum_ll, new_scale)
        new_low = new_low.clamp(max=0.0)
        new_error = error(new, new_scale, new_low)
        better = (determinant > 0) & (new_error < best) & ~flat
        codes, best = torch.where(better, new, codes), torch.where(better, new_error, best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    return torch.where(flat, 0.0, codes), torch.where(flat, 0.0, scale), 0.0 - low


def nearest_iq4(x: Tensor) -> Tensor:
    """Codes of the nearest values; of two the greater."""
    table = torch.tensor(IQ4.values, device=x.device)
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2, right=True, out_int32=True)


def search_table(x: Tensor) -> Tensor:
    """Scales of groups: 16 guesses, each with its best scale; errors count by the squares of the weights."""
    table = torch.tensor(IQ4.values, device=x.device)
    peak = peak_of(x, 0)
    live = peak[0].abs() >= TINY
    peak = torch.where(live, peak, 1.0)
    importance = x * x
    best, scale = torch.full_like(x[0], -1.0), torch.zeros_like(x[0])
    for inverse in (1 / (peak / 127), *(over(i - 127, peak) for i in range(-7, 8))):
        values = table[nearest_iq4(inverse * x)]
        weighted = importance * values
        xl, ll = total(weighted * x), total(weighted * values)
        better = xl * xl > best * ll
        scale = torch.where(better, xl / ll, scale)
        best = torch.where(better, scale * xl, best)
    return torch.where(live, scale, 0.0)
