"""Quantised weights to test with: random codes over the whole range, scales of both signs, zeros at both ends."""

import dataclasses
import os

import pytest
import torch

from qkernels.formats import Int, QuantTensor
from qkernels.formats.format import SCALE_DTYPES
from qkernels.formats.packing import pack
from qkernels.formats.rows import take

SWEEP = bool(os.environ.get("QKERNELS_SWEEP"))  # `make sweep`: all cases of the tests that take long, not a part of them


def random_quant(format, n, k, seed=0, perm=False):
    if format.block is not None:
        return random_blocks(format, n, k, seed, perm)
    g = torch.Generator().manual_seed(seed)
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


def _sensible(d):
    """Which blocks have scales of 0.001 … 0.1."""
    return ((d.float().abs() > 1e-3) & (d.float().abs() < 0.1)).all(-1)


def random_blocks(format, n, k, seed=0, perm=False):
    """A weight of a block format from random bytes: every code and every sub-scale, under scales of a sensible size and both signs."""
    g = torch.Generator().manual_seed(seed)
    block = format.block
    raw = torch.randint(256, (n, k // block.elements, block.nbytes), generator=g).to(torch.uint8)
    if block.join is not None:
        parts = block.split(raw)
        signs = torch.randint(2, parts.d.shape, generator=g) * 2 - 1 if parts.d.dtype == torch.float16 else 1
        d = (torch.rand(parts.d.shape, generator=g) * 0.02 + 0.005) * signs
        m = None if parts.m is None else ((torch.rand(parts.m.shape, generator=g) - 0.9) * 0.02 * 2**format.bits).half()
        raw = block.join(parts._replace(d=d.to(parts.d.dtype), m=m))
    else:  # redrawn until every scale is of such a size
        bad = ~_sensible(block.split(raw).d)
        while bad.any():
            raw[bad] = fresh = torch.randint(256, (int(bad.sum()), block.nbytes), generator=g).to(torch.uint8)
            bad[bad.clone()] = ~_sensible(block.split(fresh[None]).d)[0]
    order = torch.randperm(k, generator=g).to(torch.int32) if perm else None
    return QuantTensor(format, (n, k), raw.flatten(1), perm=order)


def whole(format, k):
    """k, or the next that is a multiple of the format's blocks."""
    return k if format.block is None else -(-k // format.block.elements) * format.block.elements


def with_parts(q, **changed):
    """A weight of nested blocks with other parts [N, B, ...]; a function changes what is there."""
    if q.format.block.join is None:
        pytest.skip("its parts cannot be joined")
    parts = q.format.block.split(q.codes.unflatten(-1, (-1, q.format.block.nbytes)))
    changed = {name: new(getattr(parts, name)) if callable(new) else new for name, new in changed.items()}
    return dataclasses.replace(q, codes=q.format.block.join(parts._replace(**changed)).flatten(1))


def plain(formats):
    return [f for f in formats if f.block is None]


def is_symmetric_int(format):
    return isinstance(format.code, Int) and format.zero == "none"


def equal_values(a, b):
    """Assert equality without tolerance; NaN equals NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_rows(kernel, packed, q):
    """Rows out of a kernel's own form are those of the weight: the first, the last, and some twice."""
    if kernel.rows is not None and (q.format.block is not None or q.format.group[0] == 1):
        index = torch.tensor([q.shape[0] - 1, 0, q.shape[0] // 2, 0])
        assert kernel.rows(packed, index).equal(take(q, index))
