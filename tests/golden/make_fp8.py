"""Make fp8.npz: FP8 and MXFP4 weights as transformers decodes them.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    python tests/golden/make_fp8.py

Keys are "<case>/weight" and "<case>/scale" (bytes of FP8 and of exponents, or float32) with "<case>/values" float32, and for a case with
blocks "<case>/block"; "mxfp4/blocks", "mxfp4/scales" and "mxfp4/values" [E, K, N], in the order of transformers' parameter. Rows repeat,
so that the file is small.
"""

from pathlib import Path

import numpy as np
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

RANDOM = np.random.default_rng(0)
FINITE = np.array([code for code in range(256) if code & 127 != 127], np.uint8)


def codes(n, k):
    """Every finite code; eight different rows."""
    rows = np.stack([np.roll(np.resize(FINITE, k + 251), 37 * row)[:k] for row in range(8)])
    return np.resize(rows, (n, k))


def fp8_case(n, k, scale, block=None):
    weight, scale = torch.from_numpy(codes(n, k)), torch.from_numpy(scale)
    exponents = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    values = _dequantize_fp8_weight(weight.view(torch.float8_e4m3fn), exponents, block, torch.float32)
    return {"weight": weight, "scale": scale, "values": values} | ({"block": np.array(block)} if block else {})


def scales(*shape):
    return RANDOM.uniform(0.001, 0.01, shape).astype(np.float32)


def mxfp4_case(experts, n, k):
    blocks = torch.from_numpy(RANDOM.integers(256, size=(experts, n, k // 32, 16), dtype=np.uint8))
    exponents = torch.from_numpy(RANDOM.integers(110, 140, size=(experts, n, k // 32), dtype=np.uint8))
    values = convert_moe_packed_tensors(blocks.clone(), exponents.clone(), dtype=torch.float32)  # which writes into what it is given
    return {"blocks": blocks, "scales": exponents, "values": values}


cases = {
    "block": fp8_case(576, 136, scales(5, 2), [128, 128]),
    "exponents": fp8_case(20, 100, RANDOM.integers(110, 130, size=(3, 5), dtype=np.uint8), [8, 24]),
    "mxfp8": fp8_case(6, 96, RANDOM.integers(110, 130, size=(6, 3), dtype=np.uint8), [1, 32]),
    "tensor": fp8_case(7, 40, scales(1)),
    "rows": fp8_case(7, 40, scales(7, 1)),
    "mxfp4": mxfp4_case(2, 6, 96),
}
arrays = {f"{case}/{field}": np.asarray(a) for case, fields in cases.items() for field, a in fields.items()}
np.savez_compressed(Path(__file__).with_name("fp8.npz"), **arrays)
