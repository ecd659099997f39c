"""Make models/<producer>/: one small random Llama, quantised as a whole by each of several libraries. No test runs this.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
    pip install --no-deps bitsandbytes==0.50.2 accelerate==1.15.0 psutil packaging torchao==0.18.0
    pip install --no-deps hqq==0.2.8.post1 termcolor einops tqdm compressed-tensors==0.20.0 loguru
    DISABLE_CUDA=1 python tests/golden/make_models.py [producer ...]

makes the same bytes every time, but for the order of torchao's metadata. A directory has model.safetensors and config.json as the producer
makes them, and expected.npz with

    logits     [8, vocab]   float64    of the tokens IDS, by transformers in float64, from the weights as the producer decodes them
    tokens     [12]         int64      that follow greedily
    names      [layers]     str        weights that are quantised, as transformers calls them
    digests    [layers, 32] uint8      SHA-256 of each as the producer decodes it, in float32; for bitsandbytes-int8 in bfloat16, the
                                       model's dtype: it multiplies by a rounded 1 / 127, where one division would be exact

bitsandbytes, torchao, compressed-tensors and hqq quantise and save the model themselves. transformers' FP8 asks for a GPU: its quantising
step is called for each weight, and config.json is what it writes. make_models_gptq.py and make_models_gguf.py make the others. Nothing
of qkernels is imported.
"""

import copy
import hashlib
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

MODELS = Path(__file__).with_name("models")
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
SIZES = dict(
    num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=48,
    max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def random_model(**sizes):
    """In float32; every number is one of bfloat16 and of float16."""
    torch.manual_seed(37)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.randn(p.shape) * 0.1 + (p.dim() == 1)).bfloat16().half())
    return model


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def expect(directory, model, decoded, dtype=torch.float32):
    """Write expected.npz; `decoded`: names -> the producer's own values in float32, whose digests are those in `dtype`."""
    model = copy.deepcopy(model)
    for name, values in decoded.items():
        assert values.dtype == torch.float32, name
        weight = model.get_parameter(name)
        assert 0 < (values - weight).norm() < 0.3 * weight.norm(), name
        weight.data = values
    model = model.double()
    with torch.no_grad():
        logits = model(IDS).logits[0]
        made = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        best = model(made).logits[0, -13:-1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.001, "the tokens are a matter of chance"
    digests = [hashlib.sha256(v.to(dtype).float().contiguous().numpy().tobytes()).digest() for v in decoded.values()]
    np.savez_compressed(
        directory / "expected.npz",
        logits=logits.numpy(),
        tokens=made[0, -12:].numpy(),
        names=np.array(list(decoded)),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
    )


def save(directory, model, dtype, stored, config, file="model"):
    """A model whose linears are the tensors `stored`."""
    dense = {n: t.to(dtype) for n, t in model.state_dict().items() if n.removesuffix(".weight") not in linears(model)}
    save_file({n: t.contiguous() for n, t in (dense | stored).items()}, str(directory / f"{file}.safetensors"), {"format": "pt"})
    stated = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(stated | {"quantization_config": config}, indent=1) + "\n")


def by_transformers(directory, model, config, decode, dtype=torch.float32, names=()):
    """Quantised on load, and saved."""
    dense = directory / "dense"
    copy.deepcopy(model).bfloat16().save_pretrained(dense)
    made = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    shutil.rmtree(dense)
    made.save_pretrained(directory)
    expect(directory, model, {f"{n}.weight": decode(made.get_submodule(n)) for n in names or linears(model)}, dtype)


# -- bitsandbytes and torchao ------------------------------------------------------------------------------------------------------


def bitsandbytes_nf4(directory, model):
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_blockwise

    def decode(layer):  # its compiled function is wrong where blocks straddle rows
        state = layer.weight.quant_state
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = layer.weight.data.reshape(-1)
        return _dequantize_4bit_compute(codes, absmax, state.code, state.blocksize, state.shape, torch.float32)

    torch.compiler.set_stance("force_eager")
    how = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    by_transformers(directory, model, transformers.BitsAndBytesConfig(load_in_4bit=True, **how), decode)


def bitsandbytes_int8(directory, model):
    from bitsandbytes.functional import int8_vectorwise_dequant

    def decode(layer):
        return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)

    by_transformers(directory, model, transformers.BitsAndBytesConfig(load_in_8bit=True), decode, torch.bfloat16)


def torchao_int8(directory, model):
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    by_transformers(directory, model, config, lambda layer: layer.weight.dequantize(torch.float32))


def torchao_int4(directory, model):
    """With the head, but not the embedding, whatever the option is called."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = transformers.TorchAoConfig(how, include_input_output_embeddings=True)
    names = [*linears(model), "lm_head"]
    by_transformers(directory, model, config, lambda layer: layer.weight.to(torch.float32).dequantize(), names=names)


# -- compressed-tensors, FP8, hqq --------------------------------------------------------------------------------------------------


def compressed_tensors(directory, model):
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    made = copy.deepcopy(model).bfloat16()
    apply_quantization_config(made, config)
    for layer in linears(made).values():
        groups = layer.weight.detach().unflatten(1, (-1, 32))
        layer.weight_scale.data = calculate_qparams(groups.amin(-1), groups.amax(-1), args)[0].bfloat16()
    compressor = ModelCompressor.from_pretrained_model(made, quantization_format="pack-quantized")
    compressor.compress_model(made)
    made.save_pretrained(directory)
    compressor.update_config(directory)
    decoded = {}
    for name in linears(model):
        layer = made.get_submodule(name)
        held = {leaf: t.detach() for leaf, t in layer.state_dict().items()}
        held["weight_scale"] = held["weight_scale"].float()
        unpack = BaseCompressor.get_value_from_registry("pack-quantized").decompress
        decoded[f"{name}.weight"] = unpack(held, layer.quantization_scheme)["weight"]
    expect(directory, model, decoded)


def fp8(directory, model):
    from transformers.integrations.finegrained_fp8 import Fp8Quantize, _dequantize_fp8_weight

    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32))
    quantize = Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    stored, decoded = {}, {}
    for name, layer in linears(model).items():
        made = quantize.convert({f"{name}.weight": layer.weight.detach()})
        weight, scale = made.values()
        decoded[f"{name}.weight"] = _dequantize_fp8_weight(weight, scale, (32, 32), torch.float32)
        stored |= made
    save(directory, model, torch.bfloat16, stored, config.to_dict() | {"modules_to_not_convert": ["lm_head"]})
    expect(directory, model, decoded)


def hqq(directory, model):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    made = copy.deepcopy(model)
    made.config.architectures, made.config.dtype = ["LlamaForCausalLM"], "float32"
    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    AutoHQQHFModel.quantize_model(made, settings, compute_dtype=torch.float32, device="cpu")
    directory.rmdir()  # it makes its own, and says nothing of the quantisation in config.json
    AutoHQQHFModel.save_to_safetensors(made, str(directory))
    expect(directory, model, {f"{n}.weight": made.get_submodule(n).dequantize() for n in linears(model)})


def run(producers, wanted=()):
    """Make the directories of those that are wanted, or of all."""
    for producer in wanted or producers:
        shutil.rmtree(MODELS / producer, ignore_errors=True)
        (MODELS / producer).mkdir(parents=True)
        producers[producer](MODELS / producer, random_model())


PRODUCERS = {
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "bitsandbytes-int8": bitsandbytes_int8,
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "hqq": hqq,
}

if __name__ == "__main__":
    run(PRODUCERS, sys.argv[1:])
