"""Make torchao.safetensors: a checkpoint of torchao's tensors as its own functions flatten them, and what it decodes them to.

    pip install numpy==2.4.6 torch==2.13.0 safetensors==0.8.0
    pip install --no-deps torchao==0.18.0
    python tests/golden/make_torchao.py

Beside each "<case>.weight" lies "<case>.values" [N, K], in float32, or in the type that a case names.

torchao makes and decodes an Int4Tensor on a GPU alone: there the numbers are put into its class, and the values follow its documentation.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8Tensor, Int4Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerGroup, PerRow, PerTensor
from torchao.quantization.granularity import PerBlock

torch.manual_seed(0)
CASES = {}


def weight(n, k):
    return torch.randn(n, k) * torch.logspace(-1, 0, n)[:, None] + torch.linspace(0, 1, n)[:, None]


def add(case, q, values=None):
    CASES[f"{case}.weight"] = q
    CASES[f"{case}.values"] = q.dequantize() if values is None else values


def int4(n, k, group, zero):
    q = torch.randint(-8, 8, (n, k))
    scale, zero_point = torch.rand(2, k // group, n) * 0.1 - 0.03
    low, high = q[:, ::2] % 16, q[:, 1::2] % 16
    packed = (low + 16 * high).to(torch.uint8).view(torch.int8)
    values = q * scale.T.repeat_interleave(group, 1) + zero * zero_point.T.repeat_interleave(group, 1)
    return Int4Tensor(packed, scale.contiguous(), zero * zero_point, [1, group], torch.Size((n, k))), values


for granularity in (PerRow(), PerTensor(), PerGroup(16)):
    add(f"int8_{type(granularity).__name__}", Int8Tensor.from_hp(weight(5, 48), granularity))
add("int8_bf16", Int8Tensor.from_hp(weight(5, 48).bfloat16(), PerRow()))
add("int8_asymmetric", Int8Tensor.from_hp(weight(5, 48), PerRow(), mapping_type=MappingType.ASYMMETRIC))
for bits in range(1, 9):
    dtype = getattr(torch, f"int{bits}")
    add(f"intx{bits}_symmetric", IntxUnpackedToInt8Tensor.from_hp(weight(3, 24), (1, 8), dtype))
    add(f"intx{bits}_asymmetric", IntxUnpackedToInt8Tensor.from_hp(weight(3, 24), (1, 8), dtype, mapping_type=MappingType.ASYMMETRIC))
add("intx4_bf16", IntxUnpackedToInt8Tensor.from_hp(weight(3, 24).bfloat16(), (1, 24), torch.int4, mapping_type=MappingType.ASYMMETRIC))
floats = IntxUnpackedToInt8Tensor.from_hp(weight(3, 24), (1, 8), torch.int3)
floats.zero_point = torch.rand(3, 3) * 3 - 1
add("intx3_float_zeros", floats)
add("int4_minima", *int4(3, 32, 16, 1))
add("int4_no_minima", *int4(3, 32, 16, 0))
for granularity in (PerRow(), PerTensor(), PerBlock([4, 16])):
    add(f"e4m3_{type(granularity).__name__}", Float8Tensor.from_hp(weight(8, 48), granularity=granularity))
add("e5m2_PerRow", Float8Tensor.from_hp(weight(8, 48), torch.float8_e5m2, PerRow()))
nv = weight(6, 48)
add("nvfp4", NVFP4Tensor.to_nvfp4(nv))
add("nvfp4_tensor", NVFP4Tensor.to_nvfp4(nv, per_tensor_scale=per_tensor_amax_to_scale(nv.abs().amax())))
add("nvfp4_swizzled", NVFP4Tensor.to_nvfp4(weight(130, 80).bfloat16(), is_swizzled_scales=True))
for elem in (torch.float8_e4m3fn, torch.float8_e5m2, "fp6_e2m3", "fp6_e3m2", torch.float4_e2m1fn_x2):
    name = str(elem).removeprefix("torch.float8_").removeprefix("torch.float4_").removeprefix("fp6_")[:4]
    add(f"mx_{name}", MXTensor.to_mx(weight(4, 64), elem, 32))
add("mx_swizzled", MXTensor.to_mx(weight(6, 160), torch.float8_e4m3fn, 32, is_swizzled_scales=True))
CASES["plain.weight"] = torch.ones(3)

tensors, metadata = flatten_tensor_state_dict(CASES)
file = Path(__file__).with_name("torchao.safetensors")
save_file({name: t.contiguous() for name, t in tensors.items()}, str(file), metadata | {"format": "pt"})
file.chmod(0o644)
