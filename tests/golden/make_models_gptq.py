"""Make models/gptq-4bit/, gptq-8bit/, awq/ and auto-round/, with what make_models.py says. No test runs this.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
    pip install --no-deps --target made auto-gptq==0.7.1 auto-round==0.16.1
    pip download --no-deps --no-binary :all: --no-build-isolation autoawq==0.2.9
    tar xzf autoawq-0.2.9.tar.gz && mv autoawq-0.2.9/awq made
    python tests/golden/make_models_gptq.py made [producer ...]

AutoGPTQ's own classes find and pack its codes: in act-order for 4 bits, where the file is called as it calls it. AutoAWQ and AutoRound pack
the nearest points of a grid. None of them imports with this transformers, so their layers are taken without the packages around them, and
config.json says what they write there. Nothing of qkernels is imported.
"""

import copy
import importlib
import sys
import types
from pathlib import Path

import torch
from make_models import expect, linears, run, save


def stubs(*packages, **others):
    """Packages without their __init__, which imports far more than is needed; `others`: modules that are not there."""
    for name in packages:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(sys.argv[1], *name.split(".")))]
    for name, attributes in others.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)


def gptq(bits, group_size, file):
    stubs("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear", "auto_gptq.quantization")
    packer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    solver = importlib.import_module("auto_gptq.quantization.gptq").GPTQ
    torch.cuda.synchronize = lambda *_: None
    config = dict(
        bits=bits, group_size=group_size, damp_percent=0.01, desc_act=group_size > 0, static_groups=False, sym=True, true_sequential=True,
        model_name_or_path=None, model_file_base_name=file, is_marlin_format=False, quant_method="gptq",
    )  # fmt: skip

    def make(directory, model):
        stored, decoded = {}, {}
        for name, layer in linears(model).items():
            layer, (n, k) = copy.deepcopy(layer), layer.weight.shape
            x = torch.randn(1, 256, k) * torch.linspace(0.5, 2, k)[torch.randperm(k)]
            found = solver(layer)
            found.quantizer.configure(bits, perchannel=True, sym=True, mse=False)
            found.add_batch(x, layer(x))
            scales, zeros, g_idx = found.fasterquant(group_size=group_size, actorder=group_size > 0)
            layer.half()  # which is how its scales become float16
            packed = packer(bits, group_size, k, n, False, kernel_switch_threshold=128, weight_dtype=torch.float16)
            packed.pack(layer, scales, zeros, g_idx)
            stored |= {f"{name}.{leaf}": t.contiguous() for leaf, t in packed.state_dict().items()}
            packed.scales = packed.scales.float()
            decoded[f"{name}.weight"] = packed(torch.eye(k)).t().contiguous()
        save(directory, model, torch.float16, stored, config, file)
        expect(directory, model, decoded)

    return make


def on_grid(weight, size, least=0):
    """Layer of the points of a 4-bit grid that are nearest, their scales and zero points [N, K/size]."""
    groups = weight.detach().unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (15 - least)).half().float()
    zeros = (-low / scales).round().clamp(least, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    return layer, scales, zeros


def awq(directory, model):
    utils, gemm = dict(try_import=lambda name: (None, "")), dict(awq_gemm_triton=None, awq_dequantize_triton=None)
    missing = {"awq.utils.module": utils, "awq.utils.utils": dict(get_best_device=lambda: "cpu"), "awq.modules.triton.gemm": gemm}
    stubs("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.modules.triton", "awq.models", **missing)
    packer = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    unpack = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    stored, decoded = {}, {}
    for name, layer in linears(model).items():
        layer, scales, zeros = on_grid(layer.weight, 32)
        packed = packer.from_linear(layer, 4, 32, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        stored |= {f"{name}.{leaf}": t.contiguous() for leaf, t in packed.state_dict().items()}
        decoded[f"{name}.weight"] = unpack(packed.qweight, packed.qzeros, packed.scales.float(), 4, 32).t().contiguous()
    config = importlib.import_module("awq.models._config").AwqConfig(q_group_size=32).to_transformers_dict()
    save(directory, model, torch.float16, stored, config)
    expect(directory, model, decoded)


def auto_round(directory, model):
    stubs(
        "auto_round", "auto_round_extension", "auto_round_extension.torch", **{"auto_round.utils": dict(get_packing_device=lambda _: "cpu")}
    )
    sys.modules["auto_round.utils"].__path__ = [str(Path(sys.argv[1], "auto_round", "utils"))]
    packer = importlib.import_module("auto_round_extension.torch.qlinear_torch_zp").QuantLinear
    stored, decoded = {}, {}
    for name, layer in linears(model).items():
        layer, scales, zeros = on_grid(layer.weight, 32, least=1)
        packed = packer(4, 32, layer.in_features, layer.out_features, False)
        packed.device = "cpu"
        packed.pack(layer, scales, zeros, device="cpu")
        stored |= {f"{name}.{leaf}": t.contiguous() for leaf, t in packed.state_dict().items()}
        packed.scales = packed.scales.float()
        decoded[f"{name}.weight"] = packed(torch.eye(layer.in_features)).t().contiguous()
    config = dict(
        bits=4, group_size=32, sym=False, data_type="int", iters=200, nsamples=128, seqlen=2048, autoround_version="0.16.1",
        block_name_to_quantize="model.layers", quant_method="auto-round", packing_format="auto_round:auto_gptq",
    )  # fmt: skip
    save(directory, model, torch.float16, stored, config)
    expect(directory, model, decoded)


PRODUCERS = {
    "gptq-4bit": lambda *of: gptq(4, 32, "gptq_model-4bit-32g")(*of),
    "gptq-8bit": lambda *of: gptq(8, -1, "model")(*of),
    "awq": awq,
    "auto-round": auto_round,
}

if __name__ == "__main__":
    run(PRODUCERS, sys.argv[2:])
