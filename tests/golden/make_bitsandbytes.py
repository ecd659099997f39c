"""Make bitsandbytes.safetensors: layers that bitsandbytes quantised and saved, and what it decodes them to.

    pip install numpy==2.4.6 torch==2.13.0 safetensors==0.8.0
    pip install --no-deps bitsandbytes==0.50.2 packaging
    python tests/golden/make_bitsandbytes.py

A case is the state_dict of one layer: "<case>/X.weight", "<case>/X.weight.absmax" … as bitsandbytes names and makes them, and besides

    <case>/values    [N, K]    float32    its weight
    <case>/absmax    [blocks]  float32    the scales of its blocks, where they are nested

Its compiled dequantisation on the CPU is wrong where blocks straddle rows, so its plain torch code is asked.
"""

from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

torch.manual_seed(0)
torch.compiler.set_stance("force_eager")

# (N, K), type, blocksize, nested, storage, dtype
CASES = {
    "nf4": ((5, 128), "nf4", 64, False, torch.uint8, torch.float32),
    "fp4": ((4, 192), "fp4", 32, False, torch.uint8, torch.float16),
    "nf4_straddling": ((6, 96), "nf4", 64, False, torch.uint8, torch.bfloat16),
    "fp4_straddling": ((3, 160), "fp4", 128, False, torch.uint8, torch.float32),
    "nf4_nested": ((50, 192), "nf4", 32, True, torch.uint8, torch.bfloat16),
    "fp4_nested_straddling": ((7, 96), "fp4", 64, True, torch.uint8, torch.float32),
    "nf4_bf16": ((6, 64), "nf4", 64, True, torch.bfloat16, torch.bfloat16),
    "nf4_fp16": ((6, 64), "nf4", 128, False, torch.float16, torch.float16),
    "fp4_fp32": ((6, 64), "fp4", 64, False, torch.float32, torch.float32),
    "nf4_odd": ((3, 33), "nf4", 64, False, torch.uint8, torch.float32),
    "fp4_odd_nested": ((5, 77), "fp4", 32, True, torch.uint8, torch.float32),
    "nf4_one_row": ((1, 100), "nf4", 64, False, torch.uint8, torch.float32),
}


def four_bits(shape, kind, block, nested, storage, dtype):
    weight = torch.randn(shape) * torch.logspace(-2, 0, shape[0])[:, None]
    packed, state = functional.quantize_4bit(weight.to(dtype), None, None, block, nested, kind, storage)
    held = {"X.weight": packed} | {f"X.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        held["absmax"] = absmax
    flat = packed.reshape(-1).view(torch.uint8)
    return held | {"values": _dequantize_4bit_compute(flat, absmax, state.code, block, shape, torch.float32)}


def eight_bits():
    layer = bnb.nn.Linear8bitLt(96, 12, bias=True, has_fp16_weights=False)
    weight = torch.randn(12, 96) * torch.logspace(-2, 0, 12)[:, None]
    layer.load_state_dict({"weight": weight, "bias": torch.randn(12)})
    held = {f"X.{name}": t for name, t in layer.to("cpu").half().state_dict().items()}
    if "X.SCB" not in held:  # it quantises when it moves to a GPU
        codes, maxima, _ = functional.int8_vectorwise_quant(weight.half())
        held |= {"X.weight": codes, "X.SCB": maxima, "X.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return held | {"values": functional.int8_vectorwise_dequant(held["X.weight"], held["X.SCB"])}


made = {case: four_bits(*what) for case, what in CASES.items()} | {"int8": eight_bits()}
tensors = {f"{case}/{name}": t.contiguous() for case, held in made.items() for name, t in held.items()}
file = Path(__file__).with_name("bitsandbytes.safetensors")
save_file(tensors, str(file))
file.chmod(0o644)
