"""Small models of every architecture that GGUF files are written of: config.json, weights of numpy's generator, a tokenizer."""

import json

import numpy as np
import torch
import transformers

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 48, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh"}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0, "beta_fast": 8.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=LINEAR),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN | {"attention_factor": 1.3}),
    "qwen3, the usual yarn": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN | {"beta_fast": None}),
    "qwen2moe": lambda: transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=64, norm_topk_prob=False),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, **GEMMA, rope_parameters=GEMMA3_ROPE),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=64, tie_word_embeddings=False),
    "phi3, part of a head turned": lambda: transformers.Phi3Config(
        **SIZES, sliding_window=None, partial_rotary_factor=0.75, tie_word_embeddings=True
    ),
}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0]}
LONG["long_factor"] = [2 * factor for factor in LONG["short_factor"]]
for _name, _original in (("phi3, longrope", 8), ("phi3, longrope, a short text", 600)):
    _sizes = SIZES | {"max_position_embeddings": 4 * _original, "original_max_position_embeddings": _original}
    CONFIGS[_name] = lambda sizes=_sizes: transformers.Phi3Config(**sizes, rope_parameters=dict(LONG))
IDS = torch.tensor([[1, 7, 33, 12, 5, 40, 21, 9, 30, 3, 17, 45]])


def save(name, path):
    """The model of that name as a directory."""
    config, random = CONFIGS[name](), np.random.default_rng(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            noise = torch.from_numpy(random.standard_normal(tuple(p.shape)).astype(np.float32)) * 0.2
            p.copy_(noise if p.dim() > 1 else p + noise)
    model.save_pretrained(path)
    with_experts = any("gate_up_proj" in n for n in model.state_dict()) and "num_experts_per_tok" in config.to_dict()
    assert not with_experts or any(".experts.0." in n for n in _names(path)), "transformers saves experts one by one"
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return model.eval()


def _names(path):
    with open(path / "model.safetensors", "rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


TOKENIZER = {
    "added_tokens": [{"id": i, "content": token, "special": True} for i, token in enumerate(("<pad>", "<s>", "</s>"))],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {chr(ord("a") + i): i + 3 for i in range(26)} | {"Ċ": 29, "Ġ": 30}, "merges": []},
}
