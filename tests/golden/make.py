"""Make the golden vectors: weights that other libraries decoded, and some that they encoded. No test runs this; tests/test_golden.py reads.

    pip install numpy==2.4.6 torch==2.13.0 ml_dtypes==0.6.0 transformers==5.23.0
    pip install --no-deps gguf==0.19.0 torchao==0.18.0 hqq==0.2.8.post1 termcolor einops accelerate
    DISABLE_CUDA=1 python tests/golden/make.py

writes one <producer>.npz beside this file, the same bytes every time. A case is called by our name of its format and has the arrays

    codes         [N, ceil(K * bits / 8)]    uint8      the producer's codes, as one little-endian bit stream a row
    scales        [N groups, K groups]       float, or the bytes of e4m3 and e8m0
    zeros         like scales                uint8 or float
    tensor_scale  [1]                        float32
    values        [N, K]                     float32    what the producer decodes them to
    weight        [N, K]                     float32    what it made them from: only where it encoded, with these scales

Nothing of qkernels is imported: neither the values nor the packing can be right by agreement with itself.
"""

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from hqq.core.quantize import Quantizer
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

RANDOM = np.random.default_rng(0)
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def packed(codes, bits):
    """uint8 [N, K] -> bit streams."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little")


def gaussian(n, k):
    """In float16, as the files are then smaller; few lie half way between two codes, where not every producer rounds to even."""
    return RANDOM.standard_normal((n, k), dtype=np.float32).astype(np.float16).astype(np.float32)


def every_code(n, k, bits):
    """Random codes, after each of them once."""
    codes = RANDOM.integers(2**bits, size=(n, k), dtype=np.uint8)
    codes.flat[: 2**bits] = np.arange(2**bits)
    return codes


def from_ml_dtypes():
    """The types themselves: each code under scales that are powers of two, and each scale; FP8 also encodes."""
    cases = {}
    for name, dtype in {"e4m3": E4M3, "e5m2": ml_dtypes.float8_e5m2}.items():
        codes = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)
        scales = np.array([[1.0], [0.125], [-4.0]], np.float32)
        cases[f"{name}_g-1_sf32"] = dict(codes=codes, scales=scales, values=codes.view(dtype).astype(np.float32) * scales)
        largest = float(ml_dtypes.finfo(dtype).max)  # beyond it this type gives NaN or inf, where ours saturates
        values = np.sort(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32))
        values = values[np.isfinite(values)]
        ties = (values[1:] + values[:-1]) / 2
        weight = np.concatenate([values, ties, np.nextafter(ties, 9e9, dtype=np.float32), np.nextafter(ties, -9e9, dtype=np.float32)])
        weight = np.concatenate([weight, gaussian(1, 100)[0] * largest / 8])[None].clip(-largest, largest)
        rounded, one = weight.astype(dtype), np.ones((1, 1), np.float32)
        values = rounded.astype(np.float32)
        cases[f"{name}_g-1x-1_sf32"] = dict(codes=rounded.view(np.uint8), scales=one, values=values, weight=weight)
    for name, group, dtype in (("e2m1_g32_se8m0", 32, E8M0), ("e2m1_g16_se4m3", 16, E4M3)):
        codes, scales = every_code(256, group, 4), np.arange(256, dtype=np.uint8)[:, None]
        with np.errstate(over="ignore"):  # 2^127 times 6
            values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales.view(dtype).astype(np.float32)
        cases[name] = dict(codes=packed(codes, 4), scales=scales, values=values)
    return cases


def from_gguf():
    """ggml's MXFP4, encoded and decoded by gguf-py. In its blocks element j lies in the low, j + 16 in the high nibble of a byte."""
    weight = gaussian(9, 96) * np.exp2(RANDOM.integers(-120, 120, size=(9, 1))).astype(np.float32)
    raw = quantize(weight, gguf.GGMLQuantizationType.MXFP4)
    blocks = raw.reshape(9, 3, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1).reshape(9, 96)
    values = dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    return {"e2m1_g32_se8m0": dict(codes=packed(codes, 4), scales=blocks[..., 0], values=values, weight=weight)}


def from_torchao():
    """NVFP4, MXFP4 and MXFP8 tensors, and integers with integer zero points; all encoded and decoded there."""
    cases = {}
    weight = torch.from_numpy(gaussian(6, 96)) * torch.logspace(-3, 0, 6)[:, None]
    q = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))
    cases["e2m1_g16_se4m3_t"] = dict(
        codes=q.qdata, scales=q.scale.view(torch.uint8), tensor_scale=q.per_tensor_scale[None], values=q.dequantize(), weight=weight
    )
    for name, dtype in {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.items():
        q = MXTensor.to_mx(weight, dtype, 32)
        values = q.dequantize()
        codes, scales = q.qdata.view(torch.uint8), q.scale.view(torch.uint8)
        cases[f"{name}_g32_se8m0"] = dict(codes=codes, scales=scales, values=values, weight=weight)
    for bits, group in {8: 96, 6: 48, 5: 32, 4: 32, 3: 24, 2: 16}.items():
        scales = torch.from_numpy(RANDOM.uniform(2, 6, (6, 96 // group)).astype(np.float32)) / 2**bits
        zeros = torch.from_numpy(RANDOM.integers(2**bits, size=(6, 96 // group), dtype=np.uint8))
        zeros[0, 0], zeros[1, 0] = 0, 2**bits - 1
        weight = torch.from_numpy(gaussian(6, 96))
        codes = quantize_affine(weight, (1, group), scales, zeros, torch.uint8, 0, 2**bits - 1)
        values = dequantize_affine(codes, (1, group), scales, zeros, torch.uint8, 0, 2**bits - 1)
        codes = packed(codes.numpy(), bits)
        cases[f"u{bits}_g{group}_zi_sf32"] = dict(codes=codes, scales=scales, zeros=zeros, values=values, weight=weight)
    return cases


def from_hqq():
    """Float zero points, as hqq optimises them (fp16, zeros beyond the codes among them), and as its min-max start encodes (fp32)."""
    cases = {}
    for bits, group in {8: 96, 4: 48, 3: 32, 2: 16}.items():
        weight = torch.from_numpy(gaussian(6, 96)) + torch.linspace(-2, 6, 6)[:, None]
        for scale, dtype in {"f16": torch.float16, "f32": torch.float32}.items():
            made, meta = Quantizer.quantize(weight, bits, group_size=group, axis=1, optimize=scale == "f16", device="cpu")
            meta |= {"compute_dtype": torch.float32, "scale": meta["scale"].to(dtype), "zero": meta["zero"].to(dtype)}
            groups = weight.numel() // group
            codes = Quantizer.unpack[meta["packing"]](made, dtype=torch.uint8)[:groups].reshape(6, 96)
            case = dict(codes=packed(codes.numpy(), bits), values=Quantizer.dequantize(made, meta))
            case |= dict(scales=meta["scale"].reshape(6, -1), zeros=meta["zero"].reshape(6, -1))
            cases[f"u{bits}_g{group}_zf_s{scale}"] = case | (dict(weight=weight) if scale == "f32" else {})
    return cases


def from_transformers():
    """FP8 in blocks, as its DeepSeek layers decode them, with blocks cut off at both edges."""
    codes = every_code(20, 100, 8)
    scales = RANDOM.uniform(0.1, 2.0, (3, 5)).astype(np.float32)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    values = _dequantize_fp8_weight(weight, torch.from_numpy(scales), [8, 24], torch.float32)
    return {"e4m3_g24x8_sf32": dict(codes=codes, scales=scales, values=values)}


for producer in (from_ml_dtypes, from_gguf, from_torchao, from_hqq, from_transformers):
    arrays = {f"{case}.{field}": np.asarray(a) for case, fields in producer().items() for field, a in fields.items()}
    np.savez_compressed(Path(__file__).with_name(producer.__name__.removeprefix("from_") + ".npz"), **arrays)
