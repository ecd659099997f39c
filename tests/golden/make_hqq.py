"""Make hqq.safetensors: layers that hqq quantised and encoded for safetensors, and what it decodes them to.

    pip install numpy==2.4.6 torch==2.13.0 safetensors==0.8.0
    pip install --no-deps hqq==0.2.8.post1 termcolor einops accelerate psutil packaging tqdm
    DISABLE_CUDA=1 python tests/golden/make_hqq.py

A case is the state_dict of one layer, "<case>/X.W_q", "<case>/X.scale" … as hqq names and makes them, and besides

    <case>/values    [N, K]    its weight, in its compute_dtype

hqq cannot decode three bits without a group size: there its own unpacked codes, without the padding, take the place of its function.
"""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import save_file

torch.manual_seed(0)
BITS = (1, 1.58, 2, 3, 4, 5, 6, 8)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# (N, K), bits, group_size, axis, dtype, other settings
CASES = {f"{bits}bit_axis{axis}": ((8, 48), bits, 16, axis, F32, {}) for bits in BITS for axis in (0, 1)} | {
    "4bit_fp16": ((8, 64), 4, 32, 1, F16, {}),
    "3bit_bf16": ((8, 64), 3, 32, 1, BF16, {}),
    "2bit_axis0_fp16": ((8, 48), 2, 16, 0, F16, {}),
    "4bit_straddling": ((8, 48), 4, 32, 1, F32, {}),
    "3bit_straddling": ((6, 40), 3, 16, 1, F32, {}),
    "4bit_rows": ((6, 40), 4, None, 1, F32, {}),
    "3bit_rows": ((7, 40), 3, None, 1, F32, {}),
    "8bit_columns": ((6, 40), 8, None, 0, F32, {}),
    "4bit_columns": ((8, 24), 4, 8, 0, F32, {}),
    "4bit_one": ((6, 40), 4, None, 1, F32, {"channel_wise": False}),
    "4bit_as_float": ((8, 64), 4, 32, 1, F16, {"view_as_float": True}),
    "3bit_as_float": ((8, 64), 3, 32, 1, F32, {"view_as_float": True}),
    "4bit_rounded": ((8, 64), 4, 64, 1, F16, {"round_zero": True}),
}


def made(shape, bits, group, axis, dtype, others):
    n, k = shape
    linear = torch.nn.Linear(k, n, bias=group is None)
    linear.weight.data = torch.randn(n, k) * torch.logspace(-1, 0, n)[:, None] + torch.linspace(-1, 2, n)[:, None]
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    config["weight_quant_params"] |= others
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    held = {f"X.{name}": t.detach() for name, t in layer.state_dict().items() if t is not None}
    if bits == 3 and group is None:
        codes = Quantizer.unpack[layer.meta["packing"]](layer.W_q, dtype=dtype)[:n]
        return held | {"values": (codes - layer.meta["zero"]) * layer.meta["scale"]}
    return held | {"values": layer.dequantize()}


tensors = {f"{case}/{name}": t.clone().contiguous() for case, what in CASES.items() for name, t in made(*what).items()}
file = Path(__file__).with_name("hqq.safetensors")
save_file(tensors, str(file))
file.chmod(0o644)
