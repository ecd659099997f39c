"""Models of transformers on disk, quantised or not, and what from_pretrained makes of them against transformers itself."""

import json
import re

import torch
import transformers
from safetensors.torch import save_file

import qkernels
from qkernels import io, reference

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = SMALL | {"num_key_value_heads": 2}
IDS = torch.arange(2, 10)[None]
LINEARS = r"(proj|fc\d?|c_\w+|w[123]|query_key_value|dense\w*)\.weight$"
EVERYTHING = rf"{LINEARS}|(embed_tokens|lm_head|wte|word_embeddings|gate)\.weight$"


def qwen3_moe(**changes):
    return transformers.Qwen3MoeConfig(**LLAMA, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **changes)


def gpt_oss():
    return transformers.GptOssConfig(**LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)


def qwen3_vl_moe():
    text = LLAMA | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2, with biases": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen2, tied": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "gemma3, tied, scaled embeddings": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=16, pad_token_id=49),
    "gpt2, Conv1D": lambda: transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=50, n_positions=32),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3),
    "qwen3 moe": qwen3_moe,
}


def save_dense(name, path, dtype=torch.float32, config=None, auto=transformers.AutoModelForCausalLM):
    torch.manual_seed(len(name))
    model = auto.from_config(config or CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.1)
            elif p.dim() > 1:
                p.normal_(std=0.1)  # so that the greedy tokens are no matter of chance
    model.save_pretrained(path)
    return model


def quantized(path, pattern=LINEARS, format="int4_g32"):
    """Items of a dense directory, those whose names fit quantised, and what transformers makes of their values (of_transformers)."""
    items, dense, config = {}, {}, json.loads((path / "config.json").read_text())
    for name, t in io.read(path):
        items[name] = dense[name] = t
        if t.dim() == 2 and re.search(pattern, name):
            turned = config["model_type"] == "gpt2" and "wte" not in name
            items[name] = qkernels.quantize(t.T.contiguous() if turned else t, format)
            dense[name] = reference.decode(items[name])
            dense[name] = dense[name].T if turned else dense[name]
    return items, of_transformers(path, dense)


def of_transformers(path, dense, auto=transformers.AutoModelForCausalLM):
    """A function: dtype -> the model that transformers loads of plain tensors."""
    plain = path.with_name(path.name + "-dense")
    plain.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in dense.items()}, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text((path / "config.json").read_text())
    return lambda dtype=torch.float32: auto.from_pretrained(plain, dtype=dtype, experts_implementation="eager").eval()


def written(items, path, layout="qkernels", **options):
    """The items as a checkpoint, with the config of `path`."""
    out = path.with_name(path.name + "-" + layout)
    config = json.loads((path / "config.json").read_text())
    io.write(items.items(), out, layout, config=config, **options)
    if layout == "qkernels":
        (out / "config.json").write_text(json.dumps(config))
    return out


def load(path, **options):
    return qkernels.from_pretrained(path, **{"compute": "float", "progress": False} | options)


def assert_same_model(got, dense, ids=IDS):
    """At most twice the error of torch's own in the same dtype, against the same model in float64, and an ulp."""
    with torch.no_grad():
        ours = got(ids).logits
        torchs, exact = dense(ours.dtype)(ids).logits, dense(torch.float64)(ids).logits
    allowed = 2 * (torchs - exact).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed
    assert not any(t.is_meta for t in (*got.parameters(), *got.buffers()))
    assert not got.training and not any(m.training for m in got.modules())


def greedy(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


def stored(items, config, layout):
    """Items as layouts store them that are only read; by their specifications."""
    tensors = {}
    for name, value in items.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif layout == "fp8":
            tensors |= {name: value.codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": value.scales}
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
        elif layout == "modelopt":
            tensors |= {name: value.codes, f"{name}_scale": value.scales, f"{name}_scale_2": value.tensor_scale[0]}
        elif layout == "mxfp4":
            codes, scales = value.tensors["codes"], value.tensors["scales"].view(torch.uint8)
            tensors |= {f"{name}_blocks": codes.view(*scales.shape, 16), f"{name}_scales": scales}
    said = {"quant_method": layout} | {
        "fp8": {"weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"},
        "modelopt": {"quant_algo": "NVFP4", "group_size": 16},
        "mxfp4": {"modules_to_not_convert": ["lm_head"]},
    }[layout]
    return tensors, config | {"quantization_config": said}


def store(items, path, layout):
    tensors, config = stored(items, json.loads((path / "config.json").read_text()), layout)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def rewritten(items, tmp_path):
    """Write the items in place of those of tmp_path / "m-qkernels"."""
    for file in (tmp_path / "m-qkernels").glob("*"):
        file.unlink()
    (tmp_path / "m-qkernels").rmdir()
    return written(items, tmp_path / "m")
