"""Quantised weights to test with: random codes over the whole range, scales of both signs, zeros at both ends."""

import os

import torch

from qkernels.formats import Int, QuantTensor
from qkernels.formats.format import SCALE_DTYPES
from qkernels.formats.packing import pack

SWEEP = bool(os.environ.get("QKERNELS_SWEEP"))  # `make sweep`: all cases of the tests that take long, not a part of them


def random_quant(format, n, k, seed=0, perm=False):
    g = torch.Generator().manual_seed(seed)
    if format.block is not None:
        return random_blocks(format, n, k, g, perm)
    finite = torch.isfinite(torch.tensor(format.code.values)).nonzero().flatten()
    codes = pack(finite[torch.randint(len(finite), (n, k), generator=g)].to(torch.uint8), format.bits)
    shape, dtype = format.group_shape(n, k), SCALE_DTYPES[format.scale]
    scales = torch.rand(shape, generator=g) * 0.02 + 0.005
    if format.scale in ("f32", "f16", "bf16"):
        scales *= torch.randint(2, shape, generator=g) * 2 - 1
    zeros = None
    if format.zero == "int":
        zeros = torch.randint(2**format.bits, shape, generator=g).to(torch.uint8)
    elif format.zero == "float":
        zeros = (torch.rand(shape, generator=g) * 2**format.bits).to(dtype)
    elif format.zero == "min":
        zeros = ((torch.rand(shape, generator=g) - 0.9) * 0.02 * 2**format.bits).to(dtype)
    tensor_scale = torch.tensor([0.37]) if format.tensor_scale else None
    order = torch.randperm(k, generator=g).to(torch.int32) if perm else None
    return QuantTensor(format, (n, k), codes, scales.to(dtype), zeros, tensor_scale, order)


def random_blocks(format, n, k, g, perm):
    """Blocks of any bytes, but for the scales of a block and of its minima, which would be NaN or huge."""
    raw = torch.randint(256, format.codes_shape(n, k), generator=g, dtype=torch.uint8)
    parts = format.block.split(raw.unflatten(-1, (-1, format.block.nbytes)))

    def small(t, unit):
        if t.dtype == torch.float8_e8m0fnu:
            return torch.randint(118, 122, t.shape, generator=g, dtype=torch.uint8).view(t.dtype)
        sign = torch.randint(2, t.shape, generator=g) * 2 - 1 if t.dtype == torch.float16 else 1
        return ((torch.rand(t.shape, generator=g) * 0.02 + 0.005) * unit * sign).to(t.dtype)

    unit = 1 if parts.scales is None else 2.0**-5
    parts = parts._replace(d=small(parts.d, unit), m=None if parts.m is None else small(parts.m, 8 * unit))
    order = torch.randperm(k, generator=g).to(torch.int32) if perm else None
    return QuantTensor(format, (n, k), format.block.join(parts).flatten(1), perm=order)


def plain(formats):
    return [f for f in formats if f.block is None]


def is_symmetric_int(format):
    return isinstance(format.code, Int) and format.zero == "none"


def equal_values(a, b):
    """Assert equality without tolerance; NaN equals NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
