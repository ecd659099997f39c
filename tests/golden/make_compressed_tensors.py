"""Make the golden files of compressed-tensors: modules that it compressed, and what it decompresses them to.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 safetensors
    pip install --no-deps compressed-tensors==0.20.0 loguru psutil    # then, in another environment, ==0.17.1
    python tests/golden/make_compressed_tensors.py

writes compressed_tensors_<major>_<minor>.safetensors beside this file: "<case>/<module>.<leaf>", and "<case>/values/<module>", with the
quantization_config of each case in the metadata. 0.17.1 writes the padded words of 3, 5, 6 and 7 bits, and weight_g_idx; 0.20.0 the
dense words. Scales have both signs, and codes the whole range. Values are in the producer's type, float32 or bfloat16.
"""

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file

VERSION = compressed_tensors.__version__
OLD = VERSION.startswith("0.17")
RANDOM = torch.Generator().manual_seed(0)


def uniform(low, high, *shape):
    return torch.rand(shape, generator=RANDOM) * (high - low) + low


def integers(low, high, *shape):
    return torch.randint(low, high + 1, shape, generator=RANDOM)


def scale_shape(args, n, k):
    """Shape of the scales of a strategy."""
    if args.strategy == "block":
        return tuple(-(-extent // size) for extent, size in zip((n, k), args.block_structure))
    return {"tensor": (1,), "channel": (n, 1)}.get(args.strategy, (n, k // (args.group_size or k)))


def spread(numbers, n, k):
    """One for each element."""
    numbers = numbers.reshape(1, 1) if numbers.dim() == 1 else numbers
    rows, columns = (-(-extent // count) for extent, count in zip((n, k), numbers.shape))
    return numbers.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def integer_case(format, n, k, dtype=torch.float32, g_idx=None, **args):
    """A module of integers, every code among them."""
    args = QuantizationArgs(type="int", **args)
    half, shape = 2 ** (args.num_bits - 1), scale_shape(args, n, k)
    scales = (uniform(0.01, 0.03, *shape) * (integers(0, 1, *shape) * 2 - 1)).to(dtype)
    zeros = integers(-half, half - 1, *shape).to(torch.int8) * (not args.symmetric)
    codes = integers(-half, half - 1, n, k)
    per_element = [spread(t.float(), n, k) for t in (zeros, scales)]
    if g_idx is not None:
        per_element = [t.float()[:, g_idx.long()] for t in (zeros, scales)]
    held = {"weight": ((codes - per_element[0]) * per_element[1]).to(dtype), "weight_scale": scales, "weight_zero_point": zeros}
    if g_idx is not None:
        held["weight_g_idx"] = g_idx
    if args.symmetric:
        del held["weight_zero_point"]
    return compressed(format, args, held)


def float_case(format, n, k, dtype=torch.float32, **args):
    """A module of FP8, FP4 or FP6, or of FP8 in blocks."""
    args = QuantizationArgs(type="float", **args)
    shape = scale_shape(args, n, k)
    scales = uniform(0.01, 0.03, *shape).to(dtype)
    if format.startswith("mx"):
        scales = torch.exp2(integers(-9, 3, *shape).float()).to(dtype)
    largest = {4: 6, 6: 7.5, 8: 448}[args.num_bits]
    held = {"weight": uniform(-largest, largest, n, k) * spread(scales.float(), n, k), "weight_scale": scales}
    held["weight"] = held["weight"].to(dtype)
    if format.startswith("nv"):
        held["weight_scale"] = uniform(30, 448, *shape).to(torch.float8_e4m3fn).float()
        held["weight_global_scale"] = torch.tensor([1873.7])
        held["weight"] = uniform(-6, 6, n, k) * spread(held["weight_scale"], n, k) / 1873.7
    return compressed(format, args, held)


def compressed(format, args, held):
    """(leaves, values, configuration)"""
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = {leaf: t.clone() for leaf, t in compressor.compress(held, scheme).items()}
    if format.startswith("nv"):  # in float32; `decompress` rounds to bfloat16
        n, k = held["weight"].shape
        codes = unpack_fp4_from_uint8(stored["weight_packed"], n, k, dtype=torch.float32)
        scales = stored["weight_scale"].float()
        values = dequantize(codes, scales, args=args, global_scale=stored["weight_global_scale"], dtype=torch.float32)
    else:
        values = compressor.decompress(stored, scheme)["weight"]
    return stored, values, scheme


def cases():
    sizes = {2: (7, 32), 3: (11, 40), 4: (9, 96), 5: (7, 160), 6: (6, 192), 7: (9, 40), 8: (5, 96)}
    for bits, (n, k) in sizes.items():
        group = dict(strategy="channel") if k % 32 else dict(strategy="group", group_size=32)
        for symmetric in (True, False):
            kind = "sym" if symmetric else "asym"
            yield f"pack-{bits}-{kind}", integer_case("pack-quantized", n, k, num_bits=bits, symmetric=symmetric, **group)
    yield "pack-3-wide", integer_case("pack-quantized", 3, 576, num_bits=3, strategy="group", group_size=64, symmetric=False)
    rows = 6 if OLD else 10  # 4-bit zero points one word high are not unpacked by 0.20.0
    yield (
        "pack-4-bf16",
        integer_case("pack-quantized", rows, 288, torch.bfloat16, num_bits=4, strategy="group", group_size=96, symmetric=False),
    )
    yield "pack-4-tensor", integer_case("pack-quantized", 6, 40, num_bits=4, strategy="tensor")
    if OLD:
        g_idx = torch.arange(96, dtype=torch.int32)[torch.randperm(96, generator=RANDOM)] // 32
        for bits, symmetric in ((4, True), (3, False)):
            args = dict(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32, actorder="group")
            yield f"pack-{bits}-index", integer_case("pack-quantized", 9, 96, g_idx=g_idx, **args)
        return
    yield "int-8-channel", integer_case("int-quantized", 7, 40, num_bits=8, strategy="channel")
    yield "int-8-asym", integer_case("int-quantized", 7, 96, num_bits=8, strategy="group", group_size=32, symmetric=False)
    yield "int-4-tensor", integer_case("int-quantized", 7, 40, torch.bfloat16, num_bits=4, strategy="tensor", symmetric=False)
    yield "naive-5-channel", integer_case("naive-quantized", 7, 40, num_bits=5, strategy="channel")
    yield "float-8-tensor", float_case("float-quantized", 5, 40, num_bits=8, strategy="tensor")
    yield "float-8-channel", float_case("naive-quantized", 5, 40, torch.bfloat16, num_bits=8, strategy="channel")
    yield "float-8-block", float_case("float-quantized", 8, 96, num_bits=8, strategy="block", block_structure=[4, 32])
    yield "nvfp4", float_case("nvfp4-pack-quantized", 7, 96, num_bits=4, strategy="tensor_group", group_size=16)
    for bits, format in ((4, "mxfp4-pack-quantized"), (6, "mxfp6-pack-quantized"), (8, "mxfp8-quantized")):
        yield format, float_case(format, 6, 96, num_bits=bits, strategy="group", group_size=32, scale_dtype=torch.uint8)


tensors, stated = {}, {}
for case, (stored, values, scheme) in cases():
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed")
    stated[case] = json.dumps({**config.model_dump(mode="json", exclude_none=True), "version": VERSION})
    tensors |= {f"{case}/model.layer.{leaf}": t.contiguous() for leaf, t in stored.items()}
    tensors[f"{case}/values/model.layer"] = values.detach().contiguous()
name = f"compressed_tensors_{'_'.join(VERSION.split('.')[:2])}.safetensors"
save_file(tensors, str(Path(__file__).with_name(name)), stated)
