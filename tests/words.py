"""GPTQ's and AWQ's layouts built from their description, in numpy: what no producer makes here, or makes no longer."""

import numpy as np
import torch

GOLDEN_LEAVES = ("qweight", "qzeros", "scales", "g_idx")


def words(codes, bits):
    """Codes along the last axis as one little-endian bit stream in 32-bit words."""
    stream = (np.asarray(codes).astype(np.int64)[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*stream.shape[:-2], -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32).copy())


def less_one(zeros, bits):
    """Words of zero points as "gptq" (v1) has them: one less in every field of the whole word; 3 bits: each field by itself."""
    if bits == 3:
        return words((zeros - 1) % 8, 3)
    ones = sum(2 ** (bits * i) for i in range(32 // bits))
    exact = words(zeros, bits).numpy().view(np.uint32).astype(np.int64)
    return torch.from_numpy(((exact - ones) % 2**32).astype(np.uint32).view(np.int32))


def numbers(n, k, bits, groups, seed=0):
    """Random (codes [N, K], zeros [G, N] with both ends among them, scales [G, N] of both signs)."""
    g = np.random.default_rng(seed)
    zeros = g.integers(2**bits, size=(groups, n))
    zeros.flat[: 2 if zeros.size > 1 else 0] = 0, 2**bits - 1
    scales = (g.uniform(0.005, 0.02, (groups, n)) * g.choice([-1, 1], (groups, n))).astype(np.float16)
    return g.integers(2**bits, size=(n, k)), zeros, torch.from_numpy(scales)


def gptq(codes, zeros, scales, g_idx, bits, exact=False):
    """Tensors of a module "m.fc", and the weight that they are."""
    held = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words(zeros, bits) if exact else less_one(zeros, bits),
        "scales": scales,
        "g_idx": torch.as_tensor(g_idx, dtype=torch.int32),
    }
    weight = torch.from_numpy(codes - zeros[g_idx].T).float() * scales.float()[torch.as_tensor(g_idx)].t()
    return {f"m.fc.{leaf}": t for leaf, t in held.items()}, weight


def equal_tensors(a, b):
    """Assert that two mappings have the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype and t.shape == b[name].shape, name
        assert torch.equal(t.contiguous().flatten().view(torch.uint8), b[name].contiguous().flatten().view(torch.uint8)), name
