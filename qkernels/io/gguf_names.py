"""What GGUF files call the tensors of Hugging Face models, and what the converters of llama.cpp do to them: functions of names alone.

>>> to_hf("llama", "blk.0.attn_q.weight")
'model.layers.0.self_attn.q_proj.weight'
>>> to_hf("qwen3moe", "blk.0.ffn_up_exps.weight")                      # a stack of all experts: * is the expert's number
'model.layers.0.mlp.experts.*.up_proj.weight'
>>> to_gguf("qwen3moe", "model.layers.0.mlp.experts.7.up_proj.weight")
('blk.0.ffn_up_exps.weight', 7)

An architecture is what general.architecture says; ARCHITECTURES has it by `model_type`. Source: gguf-py's tensor_mapping.py, and
convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# Tensors that llama.cpp computes with and that are no weights of the model: they follow from its configuration.
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_FFN = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS = {"ffn_gate_inp": "mlp.gate"} | {f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")}
_SHARED_EXPERT = {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = {
    "llama": _ATTENTION | _FFN_NORM | _FFN | _MIXTRAL,
    "qwen2": _ATTENTION | _FFN_NORM | _FFN,
    "qwen3": _ATTENTION | _QK_NORM | _FFN_NORM | _FFN,
    "qwen2moe": _ATTENTION | _FFN_NORM | _EXPERTS | _SHARED_EXPERT | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    "qwen3moe": _ATTENTION | _QK_NORM | _FFN_NORM | _EXPERTS,
    "gemma2": _ATTENTION | _GEMMA_NORMS | _FFN,
    "gemma3": _ATTENTION | _QK_NORM | _GEMMA_NORMS | _FFN,
    "phi3": _PHI | _FFN_NORM,
}
_GGUF_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<leaf>weight|bias)")
_HF_NAME = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<stem>[\w.]+)\.(?P<leaf>weight|bias)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def to_hf(arch: str, name: str) -> str | None:
    """The name in a Hugging Face checkpoint, with * for the number where the tensor has all experts; None for those in DERIVED.

    Raises UnsupportedError for an architecture or a name that is not known.
    """
    known, m = _block(arch), _GGUF_NAME.fullmatch(name)
    if name in DERIVED:
        return None
    stem = m and (known if m["layer"] else _MODEL).get(m["stem"])
    if not m or not stem:
        raise UnsupportedError(f"the tensor {name!r} is not known in models of architecture {arch!r}")
    return f"model.layers.{m['layer']}.{stem}.{m['leaf']}" if m["layer"] else f"{stem}.{m['leaf']}"


def to_gguf(arch: str, name: str) -> tuple[str, int | None]:
    """The name in a GGUF file, and which of the experts there it is. Raises UnsupportedError as `to_hf`."""
    known, m = _block(arch), _HF_NAME.fullmatch(name)
    if m:
        expert = _EXPERT.search(m["stem"])
        hf_stem = _EXPERT.sub("*", m["stem"])
        for stem, hf in (known if m["layer"] else _MODEL).items():
            if hf == hf_stem:
                gguf_name = f"blk.{m['layer']}.{stem}.{m['leaf']}" if m["layer"] else f"{stem}.{m['leaf']}"
                return gguf_name, int(expert[0]) if expert else None
    raise UnsupportedError(f"the tensor {name!r} is not known in models of architecture {arch!r}")


def _block(arch: str) -> Mapping[str, str]:
    if arch not in _BLOCK:
        raise UnsupportedError(f"the tensor names of the architecture {arch!r} are not known; those of {', '.join(_BLOCK)} are")
    return _BLOCK[arch]


def norm_offset(arch: str, name: str) -> float:
    """What a GGUF file has added to a weight: 1 to Gemma's norms, which multiply by 1 + weight. Subtract it in float32."""
    return 1.0 if arch in ("gemma2", "gemma3") and name.endswith("norm.weight") else 0.0


# -- the order of rows ----------------------------------------------------------------------------------------------------------

# In files of architecture "llama" the two numbers that RoPE turns together are neighbours; in Hugging Face checkpoints they lie half a
# head apart. The converters reorder the rows of q and k, weight and bias; whole rows, so that packed ones are reordered as they are.


def rotated_heads(arch: str, name: str, settings: Mapping[str, Any]) -> int | None:
    """How many heads the rows of a tensor of a GGUF file are, where their order is not the one of Hugging Face; else None.

    Of k these are the heads of keys, which may be fewer. Raises CheckpointError when the key-values do not say.
    """
    m = _GGUF_NAME.fullmatch(name)
    if arch != "llama" or not m or not m["layer"] or m["stem"] not in ("attn_q", "attn_k"):
        return None
    of_all = settings.get("llama.attention.head_count")
    heads = settings.get("llama.attention.head_count_kv", of_all) if m["stem"] == "attn_k" else of_all
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"{name} is stored in the order of RoPE, and the key-values do not say of how many heads: {heads!r:.80}")
    return heads


def rows_to_hf(rows: int, heads: int) -> Tensor:
    """Which row of a GGUF file each row of the Hugging Face weight is: hf = gguf[rows_to_hf(n, heads)], [rows] int64."""
    return _rows(rows, heads).view(heads, -1, 2).transpose(1, 2).flatten()


def rows_to_gguf(rows: int, heads: int) -> Tensor:
    """Invert `rows_to_hf`."""
    return _rows(rows, heads).view(heads, 2, -1).transpose(1, 2).flatten()


def _rows(rows: int, heads: int) -> Tensor:
    if rows % (2 * heads):
        raise CheckpointError(f"{rows} rows are not {heads} heads of an even size")
    return torch.arange(rows)
