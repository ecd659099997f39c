"""GGUF files of language models as transformers' checkpoints: the config from the key-values, names, and rows in transformers' order.

What llama.cpp's converters did to the weights is undone without touching a number of them: rows that were permuted for its rotary
embedding go back as packed rows, and norms that count from 1 have it taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkernels import io
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import take
from qkernels.integrations.transformers import described_by
from qkernels.io import CheckpointInfo
from qkernels.io.settings import Settings

Value = QuantTensor | QuantStack | Tensor
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERTS = {f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}  # {} is the expert's number
_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}


@dataclass(frozen=True)
class Architecture:
    """What a general.architecture of GGUF is in transformers.

    names      where a layer's tensors are called otherwise than in most models
    keys       key-values beyond the common ones -> field of the config
    fixed      fields that no key-value tells
    permuted   rows of q and k lie in the order of llama.cpp's rotary embedding: pairs beside each other
    norm_plus_one   norms are stored with 1 added
    """

    model_type: str
    names: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm_plus_one: bool = False


_MOE_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_GEMMA2_KEYS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mixtral": Architecture(  # GGUF calls it llama; that it has experts tells them apart
        "mixtral", _MIXTRAL, {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}, permuted=True
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        keys=_MOE_KEYS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture("qwen3_moe", keys=_MOE_KEYS, fixed={"norm_topk_prob": True}),
    "gemma2": Architecture("gemma2", _GEMMA, _GEMMA2_KEYS, norm_plus_one=True),
    "gemma3": Architecture("gemma3_text", _GEMMA, norm_plus_one=True),
    "phi3": Architecture("phi3", {"ffn_up": "mlp.gate_up_proj"}),
}
_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_ATTENTION_SCALE = {("gemma2", 46): 144, ("gemma3", 62): 168}  # query_pre_attn_scalar of the 27B models, which no key-value tells
_GEMMA3_LOCAL_THETA = 10000.0  # of its layers with a window; nor this


def architecture_of(info: CheckpointInfo) -> tuple[str, Architecture]:
    """GGUF's name of the architecture, and what it is. Raises UnsupportedError for one that is not loaded."""
    name = info.settings.get("general.architecture")
    known = ARCHITECTURES.get(name) if isinstance(name, str) and name != "mixtral" else None
    if known is None or not isinstance(name, str):
        others = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(
            f"{info.path} holds a model of the architecture {name!r}; {others} are loaded. qkernels.io.read yields its tensors"
        )
    return name, ARCHITECTURES["mixtral"] if name == "llama" and info.settings.get("llama.expert_count") else known


def load_config(info: CheckpointInfo) -> Any:
    """Make transformers' config of the key-values. Raises CheckpointError and UnsupportedError, naming the key."""
    from qkernels.io import gguf_file

    name, architecture = architecture_of(info)
    shapes = {t.name: t.shape for path in info.files for t in gguf_file.parse(path).tensors}
    mine = {key.removeprefix(f"{name}."): value for key, value in info.settings.items() if key.startswith(f"{name}.")}
    fields = _fields(name, architecture, Settings(mine, f"{info.path}: {name}"))
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{info.path} lacks token_embd.weight")
    fields |= {"vocab_size": shapes["token_embd.weight"][0], "tie_word_embeddings": "output.weight" not in shapes}
    if architecture.model_type == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in shapes
    for token in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id"
        fields[f"{token}_token_id"] = info.settings.get(key)
    with described_by(info.path, "loading a model") as transformers:
        config = transformers.AutoConfig.for_model(architecture.model_type, **fields)
        config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def _fields(name: str, architecture: Architecture, s: Settings) -> dict[str, Any]:
    fields: dict[str, Any] = {field: s.take(key, of=int) for key, field in _COMMON.items()}
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = s.take("attention.head_count_kv", of=int, default=heads)
    fields["rms_norm_eps"] = s.take("attention.layer_norm_rms_epsilon", of=float)
    head_dim = s.take("attention.key_length", of=int, default=fields["hidden_size"] // max(heads, 1))
    if (value_dim := s.take("attention.value_length", of=int, default=head_dim)) != head_dim:
        raise UnsupportedError(f"{s.where}: keys have {head_dim} channels a head and values {value_dim}; they must be as many")
    if architecture.model_type != "phi3":
        fields["head_dim"] = head_dim
    fields |= {field: s.take(key, of=(int, float)) for key, field in architecture.keys.items()} | architecture.fixed
    window = s.take("attention.sliding_window", of=int, default=None)
    if window and name in ("gemma2", "gemma3", "phi3"):
        fields["sliding_window"] = window
    elif name == "phi3":
        fields["sliding_window"] = None
    if name in ("gemma2", "gemma3"):
        fields["query_pre_attn_scalar"] = _ATTENTION_SCALE.get((name, fields["num_hidden_layers"]), head_dim)
    fields["rope_parameters"] = _rope(name, s, head_dim)
    s.ignore("vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "expert_feed_forward_length")
    s.done()
    return fields


def _rope(name: str, s: Settings, head_dim: int) -> dict[str, Any]:
    """What transformers calls rope_parameters."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": s.take("rope.freq_base", of=float, default=10000.0)}
    turned = s.take("rope.dimension_count", of=int, default=head_dim)
    if turned != head_dim:
        if name != "phi3":
            raise UnsupportedError(f"{s.where}: rope.dimension_count is {turned}; as many as a head has channels are possible: {head_dim}")
        rope["partial_rotary_factor"] = turned / head_dim
    kind = s.take("rope.scaling.type", of=str, default="none", choices=("none", "linear", "yarn"))
    factor = s.take("rope.scaling.factor", of=float, default=1.0)
    original = s.take("rope.scaling.original_context_length", of=int, default=None)
    s.ignore("rope.scaling.finetuned")
    if kind != "none" and factor != 1.0:
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    if name == "gemma3":
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA}}
    return rope


def items(info: CheckpointInfo, model: Any) -> Iterator[tuple[str, Value]]:
    """The tensors of a file under the names, and in the shapes, of a transformers checkpoint of the same model."""
    _, architecture = architecture_of(info)
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture.permuted else {}
    for name, value in io.read(info):
        stem, leaf = _stem(name), name.rpartition(".")[2]
        if name == "rope_freqs.weight":
            _slow_down(model, value)
        elif stem.startswith("rope_factors"):
            raise UnsupportedError(f"{info.path} has {name}: rotary embeddings with a factor for every frequency (longrope) are not loaded")
        elif leaf == "scale":
            if not isinstance(value, Tensor) or bool((value != 1).any()):
                raise UnsupportedError(f"{info.path} has {name}, a scale beside a weight, which a QuantLinear does not apply")
        elif leaf != "input_scale":  # which is for activations
            if stem in heads:
                value = _unpermuted(value, heads[stem])
            elif architecture.norm_plus_one and stem.endswith("norm") and isinstance(value, Tensor):
                value = value.float() - 1
            elif stem == "ffn_gate_inp_shexp" and isinstance(value, Tensor):
                value = value.reshape(1, -1)
            yield from _named(name, stem, value, architecture)


def _stem(name: str) -> str:
    """What a tensor is within its layer: "attn_q" of "blk.0.attn_q.weight"."""
    return re.sub(r"^blk\.\d+\.", "", name).rpartition(".")[0]


def _named(name: str, stem: str, value: Value, architecture: Architecture) -> Iterator[tuple[str, Value]]:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?[\w.]+\.(weight|bias)", name)
    names = _TOP if found is None or found[1] is None else _LAYER | _EXPERTS | architecture.names
    if found is None or stem not in names:
        yield name, value  # which no model knows
        return
    prefix = "" if found[1] is None else f"model.layers.{found[1]}."
    target = f"{prefix}{names[stem]}.{found[2]}"
    if "{}" not in target:
        yield target, value
    elif len(value.shape) != 3:
        raise CheckpointError(f"{name} is {list(value.shape)}; the experts of a layer are three axes")
    else:
        for e, weight in enumerate(value):
            yield target.format(e), weight


def _unpermuted(value: Value, heads: int) -> Value:
    """Rows in transformers' order: both halves of a head's channels after each other, not turn by turn."""
    n = value.shape[0]
    if n % (2 * heads) or len(value.shape) == 3:
        return value  # of a shape that is no model's: that is said where it is placed
    rows = torch.arange(n).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    return take(value, rows) if isinstance(value, QuantTensor) else value[rows]  # type: ignore[index]  # a plain tensor


def _slow_down(model: Any, factors: Value) -> None:
    """Divide the frequencies of the rotary embedding by Llama 3's factors, which the file has in place of what made them."""
    rotary = model.model.rotary_emb
    if not isinstance(factors, Tensor) or factors.shape != rotary.inv_freq.shape or bool((factors <= 0).any()):
        raise CheckpointError(f"rope_freqs.weight is {list(factors.shape)}; {list(rotary.inv_freq.shape)} positive numbers are needed")
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        buffer /= factors
