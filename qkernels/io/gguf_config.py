"""config.json as key-values of GGUF: the hyper-parameters, and what llama.cpp takes for granted of a model where no key-value can say it.

Source: the converters of llama.cpp (its directory conversion/), and src/models/, which says what is read and what is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io import gguf_names
from qkernels.io.gguf_file import KeyValues

# keys of a GGUF file, behind the architecture -> config.json's; those that all models have, and those of experts
REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
EXPERTS = {
    "expert_count": "num_experts",  # num_local_experts of Mixtral
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SHARED_EXPERT = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
# Of each architecture what config.json must have besides: llama.cpp's value where the key lacks is another one than transformers' is.
_REQUIRED_OF = {
    "qwen2moe": {**EXPERTS, **SHARED_EXPERT},
    "qwen3moe": {**EXPERTS, "attention.key_length": "head_dim"},
    "gemma2": {**SOFTCAPS, "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
    "gemma3": {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window", "rope.freq_base": "rope_theta"},
}
_KEYS = {
    **REQUIRED,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    **EXPERTS,
    **SHARED_EXPERT,
    **SOFTCAPS,
}
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", *SOFTCAPS)
# What no key-value says: field of config.json -> the value that llama.cpp takes for granted.
_SILU = {"hidden_act": "silu"}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # has experts
GRANTED: dict[str, dict[str, Any]] = {
    "llama": _SILU,
    "qwen2": _SILU,
    "qwen3": {**_SILU, "attention_bias": False},
    "qwen2moe": {**_SILU, **_EVERY_LAYER, "norm_topk_prob": False, "qkv_bias": True},
    "qwen3moe": {**_SILU, **_EVERY_LAYER, "norm_topk_prob": True, "attention_bias": False},
    "gemma2": _GEMMA,
    "gemma3": {**_GEMMA, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    "phi3": {**_SILU, "attention_bias": False},
}
_UNSTATED = {"norm_topk_prob": False}  # transformers' value where config.json says none, if that may not be the one that is granted
ATTENTION_SCALE = {("gemma2", 46): 144, ("gemma3", 62): 168}  # query_pre_attn_scalar of the 27B models; of others it is head_dim
_LOCAL_LAYERS = {"gemma2": 2, "gemma3": 6}  # of so many layers the last attends to all that was before, the others to a window
_LARGEST = 1e30
MOST_CHANNELS = 1 << 16  # of a head; what is made for each has to be bounded
_LONGROPE = ("longrope", "su", "yarn")  # as Phi-3 has called the same one after the other
LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window, where nothing says another
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # what transformers and llama.cpp take where nothing is said


def key_values(config: Mapping[str, Any]) -> KeyValues:
    """Architecture and hyper-parameters of config.json, as llama.cpp calls them.

    Raises UnsupportedError for a model whose names are not known, or that has what a GGUF file cannot say; CheckpointError for a
    config.json that lacks what llama.cpp needs.
    """
    kind = config.get("model_type")
    arch = gguf_names.ARCHITECTURES.get(str(kind))
    if arch is None:
        raise UnsupportedError(
            f"model_type {kind!r}: a GGUF file of such a model is not written; those of {', '.join(gguf_names.ARCHITECTURES)} are"
        )
    rope = rope_parameters(config)
    stated = {**rope, **config, "num_experts": config.get("num_local_experts", config.get("num_experts"))}
    stated["rope_theta"] = rope.get("rope_theta")
    found = KeyValues({"general.architecture": arch, "general.quantization_version": 2})
    for key, name in _KEYS.items():
        value = stated.get(name)
        if type(value) is int or (key in _FLOATS and type(value) is float):
            found[f"{arch}.{key}"] = float(value) if key in _FLOATS else value
    required = REQUIRED | _REQUIRED_OF.get(arch, {})
    if missing := [name for key, name in required.items() if f"{arch}.{key}" not in found]:
        raise CheckpointError(f"config.json has no number {', '.join(missing)}")
    _check(arch, config)
    found.update((f"{arch}.{key}", value) for key, value in {**_rope_keys(arch, config), **_phi3_keys(arch, config, rope)}.items())
    return found


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embedding is the head too; Gemma's config.json need not say so."""
    stated = config.get("tie_word_embeddings")
    return bool(str(config.get("model_type")).startswith("gemma") if stated is None else stated)


def _number(stated: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = stated.get(name, default)
    if type(value) not in (int, float) or not 0 < value < _LARGEST:
        raise CheckpointError(f"config.json has {name} = {value!r:.80}, which is no positive number below {_LARGEST}")
    return float(value)


def _check(arch: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what llama.cpp would take otherwise than config.json says it."""
    granted = dict(GRANTED[arch])
    if arch in _LOCAL_LAYERS:
        layers, every = config["num_hidden_layers"], _LOCAL_LAYERS[arch]
        granted["query_pre_attn_scalar"] = ATTENTION_SCALE.get((arch, layers), config["head_dim"])
        granted["sliding_window_pattern"] = every
        if isinstance(types := config.get("layer_types"), list):
            granted["layer_types"] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(types))]
    for name, wanted in granted.items():
        value = config.get(name)
        value = _UNSTATED.get(name, wanted) if value is None else value
        if value != wanted:
            said = f"config.json has {name} = {value!r:.80}"
            raise UnsupportedError(f"{said}, which a GGUF file of the architecture {arch} cannot say: there it is {wanted!r:.80}")


def notes(config: Mapping[str, Any]) -> list[str]:
    """What of a config.json llama.cpp does otherwise, as it does of every file of such a model: windows of Mistral and Qwen."""
    kind, window = str(config.get("model_type")), config.get("sliding_window")
    arch, most = gguf_names.ARCHITECTURES[kind], config.get("max_position_embeddings")
    used = config.get("use_sliding_window", not kind.startswith("qwen"))
    if arch in (*_LOCAL_LAYERS, "phi3") or not used or not isinstance(window, int) or not isinstance(most, int) or window >= most:
        return []
    return [f"config.json has sliding_window = {window}, and llama.cpp has no window in {arch}: of longer texts it attends to all tokens"]


# -- rotary embeddings ----------------------------------------------------------------------------------------------------------


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the rotary embedding, under the keys of today or of before; of Gemma 3 what its layers without a window have."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json has rope parameters that are {found!r:.80}, no JSON object")
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**theta, **found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def _rope_keys(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    rope, found = rope_parameters(config), dict[str, Any]()
    plain = ("default", "linear", "llama3")  # llama.cpp would turn Gemma's layers with a window by YaRN, too
    known = ("default", *_LONGROPE) if arch == "phi3" else plain if arch in _LOCAL_LAYERS else (*plain, "yarn")
    if (kind := rope["rope_type"]) not in known:
        raise UnsupportedError(f"rope_type {kind!r}: a GGUF file of such a model is not written; {', '.join(known)} are")
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(_number(rope, "factor"))}
    if kind == "yarn":
        found |= _yarn_keys(config, {name: value for name, value in rope.items() if value is not None})
    if arch == "gemma3":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if not isinstance(local, Mapping):
            raise CheckpointError(f"config.json has sliding_attention = {local!r:.80}, no JSON object")
        if (of_local := local.get("rope_type", "default")) != "default":
            raise UnsupportedError(f"the layers with a window have rope_type {of_local!r}, which a GGUF file cannot say")
        found["rope.freq_base_swa"] = float(_number({**config, **local}, "rope_theta" if local else "rope_local_base_freq", LOCAL_THETA))
    return found


def _yarn_keys(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's; llama.cpp's factor of cosines and sines multiplies the usual one, transformers' stands in its place."""
    if rope.get("truncate", True) is not True:
        raise UnsupportedError(
            "truncate = False of rope_type 'yarn', which a GGUF file cannot say: there channels are rounded to whole ones"
        )
    factor, original = _number(rope, "factor"), _number(rope, "original_max_position_embeddings", config["max_position_embeddings"])
    found = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": int(original)}
    found |= {f"rope.scaling.yarn_{name}": _number(rope, name, usual) for name, usual in YARN.items() if rope.get(name, usual) != usual}
    usual = yarn_attention(factor)
    if "mscale" in rope and "mscale_all_dim" in rope:
        wanted = yarn_attention(factor, _number(rope, "mscale")) / yarn_attention(factor, _number(rope, "mscale_all_dim"))
    else:
        wanted = usual
    if (wanted := _number(rope, "attention_factor", wanted)) != usual:
        found["rope.scaling.attn_factor"] = wanted / usual
    return found


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by, where positions are divided by `factor`. Source: Peng et al. 2023."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _phi3_keys(arch: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """What files of Phi-3 have besides: llama.cpp tells Phi-4 by a window of 0."""
    if arch != "phi3":
        return {}
    found = {
        "rope.dimension_count": _turned(config),
        "rope.scaling.original_context_length": _original(config),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope["rope_type"] in _LONGROPE:
        found["rope.scaling.attn_factor"] = _attention_factor(config, rope)
    return found


def _turned(config: Mapping[str, Any]) -> int:
    """Channels of a head that the rotary embedding turns."""
    size = config["hidden_size"] // int(_number(config, "num_attention_heads"))
    return int(size * _number({**config, **rope_parameters(config)}, "partial_rotary_factor", 1.0))


def _original(config: Mapping[str, Any]) -> int:
    original = int(_number(config, "original_max_position_embeddings", 4096))  # transformers' value where nothing is said
    if original < 2:
        raise CheckpointError(f"config.json has original_max_position_embeddings = {original}; 2 at least is needed")
    return original


def _attention_factor(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by. Source: transformers."""
    original = _original(config)
    factor = _number(rope, "factor", config["max_position_embeddings"] / original)
    return float(_number(rope, "attention_factor", math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0))


def derived(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that llama.cpp divides the frequencies of the rotary embedding by, of a config that `key_values` has taken."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, rope)}
    if rope["rope_type"] in _LONGROPE and config.get("model_type") == "phi3":
        return {
            f"rope_factors_{kind}.weight": _factors(rope.get(f"{kind}_factor"), kind, _turned(config) // 2) for kind in ("long", "short")
        }
    return {}


def _factors(stated: Any, kind: str, count: int) -> Tensor:
    numbers = stated if isinstance(stated, list) else []
    if len(numbers) != count or not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers):
        raise CheckpointError(f"config.json has {kind}_factor = {stated!r:.80}, which is not {count} positive numbers")
    return torch.tensor(numbers, dtype=torch.float32)


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Tensor:
    """Those of Llama 3.1, [head / 2] float32. Source: transformers."""
    size = int(
        _number({"head_dim": config.get("head_dim") or config["hidden_size"] // int(_number(config, "num_attention_heads"))}, "head_dim")
    )
    if size > MOST_CHANNELS:
        raise CheckpointError(f"config.json has heads of {size} channels; {MOST_CHANNELS} at most are possible")
    base = _number(rope, "rope_theta", 10000.0)
    turns = _number(rope, "original_max_position_embeddings") / (2 * math.pi) * base ** -(torch.arange(0, size, 2).double() / size)
    low, high, factor = (_number(rope, name) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divided by all of the factor
    factors = (1 / ((1 - smooth) / factor + smooth)).float()
    if not bool(factors.isfinite().all()):
        raise CheckpointError(f"config.json has rope parameters of which no frequencies can be made: {rope!r:.200}")
    return factors
