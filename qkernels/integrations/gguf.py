"""GGUF files of language models as transformers' checkpoints: the config from the key-values, names and order of rows as there.

What llama.cpp's converters did to the weights is undone without touching a number of them: rows that were permuted for its rotary
embedding go back as packed rows (io/gguf_names.py). transformers' own reader of key-values leaves out much that changes the numbers:
head sizes, experts' sizes, rotary scaling; so they are read here, and a key that is not known is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.integrations.transformers import described_by
from qkernels.io import CheckpointInfo, gguf, gguf_file, gguf_model, gguf_names
from qkernels.io.gguf_config import (
    ATTENTION_SCALE,
    EXPERTS,
    GRANTED,
    LOCAL_THETA,
    MOST_CHANNELS,
    REQUIRED,
    SHARED_EXPERT,
    SOFTCAPS,
    YARN,
    yarn_attention,
)
from qkernels.io.settings import Settings

Value = QuantTensor | QuantStack | Tensor


@dataclass(frozen=True)
class Architecture:
    """What a general.architecture of GGUF is in transformers.

    keys   key-values beyond the common ones -> field of the config
    """

    model_type: str
    keys: dict[str, str] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture("qwen2_moe", EXPERTS | SHARED_EXPERT),
    "qwen3moe": Architecture("qwen3_moe", EXPERTS),
    "gemma2": Architecture("gemma2", SOFTCAPS),
    "gemma3": Architecture("gemma3_text"),
    "phi3": Architecture("phi3"),
}
_KINDS_OF = {"phi3": ("longrope",)}  # of rope.scaling.type besides
_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
# which GGUF calls llama as well; that it has experts tells them apart
_MIXTRAL = Architecture("mixtral", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"})


def architecture_of(info: CheckpointInfo) -> tuple[str, Architecture]:
    """GGUF's name of the architecture, and what it is. Raises UnsupportedError for one that is not loaded."""
    name = info.settings.get("general.architecture")
    known = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None or not isinstance(name, str):
        others = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(
            f"{info.path} holds a model of the architecture {name!r}; {others} are loaded. qkernels.io.read yields its tensors"
        )
    return name, _MIXTRAL if name == "llama" and info.settings.get("llama.expert_count") else known


def load_config(info: CheckpointInfo) -> Any:
    """Make transformers' config of the key-values. Raises CheckpointError and UnsupportedError, naming the key."""
    name, architecture = architecture_of(info)
    shapes = {t.name: t.shape for path in info.files for t in gguf_file.parse(path).tensors}
    mine = {key.removeprefix(f"{name}."): value for key, value in info.settings.items() if key.startswith(f"{name}.")}
    fields = _fields(name, architecture, Settings(mine, f"{info.path}: {name}"))
    if fields["num_hidden_layers"] > len(shapes):
        raise CheckpointError(f"{info.path} says {name}.block_count = {fields['num_hidden_layers']}, and has {len(shapes)} tensors")
    if name == "phi3":
        fields["rope_parameters"] |= _longrope(info, fields)
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
    fields: dict[str, Any] = GRANTED[name] | {field: s.take(key, of=int) for key, field in REQUIRED.items()}
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = s.take("attention.head_count_kv", of=int, default=heads)
    fields["rms_norm_eps"] = s.take("attention.layer_norm_rms_epsilon", of=float)
    head_dim = s.take("attention.key_length", of=int, default=fields["hidden_size"] // max(heads, 1))
    if not 1 <= head_dim <= MOST_CHANNELS:
        raise CheckpointError(f"{s.where}: a head has {head_dim} channels; 1 to {MOST_CHANNELS} are possible")
    if (value_dim := s.take("attention.value_length", of=int, default=head_dim)) != head_dim:
        raise UnsupportedError(f"{s.where}: keys have {head_dim} channels a head and values {value_dim}; they must be as many")
    if architecture.model_type != "phi3":
        fields["head_dim"] = head_dim
    fields |= {field: s.take(key, of=(int, float)) for key, field in architecture.keys.items()}
    window = s.take("attention.sliding_window", of=int, default=None)
    if window and name in ("gemma2", "gemma3", "phi3"):
        fields["sliding_window"] = window
    elif name == "phi3":
        fields["sliding_window"] = None
    if name in ("gemma2", "gemma3"):
        fields.setdefault("final_logit_softcapping", s.take("final_logit_softcapping", of=float, default=None))
        fields["query_pre_attn_scalar"] = ATTENTION_SCALE.get((name, fields["num_hidden_layers"]), head_dim)
    fields["rope_parameters"] = _rope(name, s, head_dim)
    s.ignore("vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "expert_feed_forward_length", "pooling_type")
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
    kind = s.take("rope.scaling.type", of=str, default="none", choices=("none", "linear", "yarn", *_KINDS_OF.get(name, ())))
    factor = s.take("rope.scaling.factor", of=float, default=1.0)
    original = s.take("rope.scaling.original_context_length", of=int, default=None)
    s.ignore("rope.scaling.finetuned")
    if name == "phi3":
        if kind in ("linear", "yarn") and factor != 1.0:
            raise UnsupportedError(f"{s.where}: rope.scaling.type is {kind!r}; Phi-3 has 'longrope' or none")
        attention = s.take("rope.scaling.attn_factor", of=float, default=None)
        return rope | {"original_max_position_embeddings": original, "attention_factor": attention}
    if kind != "none" and factor != 1.0:
        rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= _yarn(s, factor, original)
    if name == "gemma3":
        local = s.take("rope.freq_base_swa", of=float, default=LOCAL_THETA)
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return rope


def _yarn(s: Settings, factor: float, original: int | None) -> dict[str, Any]:
    """Of the parameters of YaRN those that are no usual ones, and where positions begin to be divided."""
    if (part := s.take("rope.scaling.yarn_ext_factor", of=float, default=1.0)) not in (1.0, -1.0):
        raise UnsupportedError(f"{s.where}: rope.scaling.yarn_ext_factor is {part}; 1 is possible")
    stated = {name: s.take(f"rope.scaling.yarn_{name}", of=float, default=usual) for name, usual in YARN.items()}
    # one key is llama.cpp's of before, the other of today; it multiplies what YaRN has itself, which transformers' stands for
    attention = s.take("rope.scaling.attn_factor", of=float, default=1.0) * s.take("rope.scaling.yarn_attn_factor", of=float, default=1.0)
    if wrong := {name: value for name, value in {**stated, "attn_factor": attention}.items() if not 0 < value < 1e6}:
        name, value = min(wrong.items())
        raise CheckpointError(f"{s.where}: rope.scaling of YaRN has {name} = {value}; positive numbers below a million are possible")
    if factor == 1.0:
        return {}
    found: dict[str, Any] = {name: value for name, value in stated.items() if value != YARN[name]}
    if original is not None:
        found["original_max_position_embeddings"] = original
    if attention != 1.0:
        found["attention_factor"] = attention * yarn_attention(factor)
    return found


def _longrope(info: CheckpointInfo, fields: dict[str, Any]) -> dict[str, Any]:
    """What Phi-3's two tensors of factors say: the one is for texts beyond the original context length, the other for shorter ones.

    Takes out of `fields` what belongs to them alone, which nobody needs where there are none.
    """
    rope = fields["rope_parameters"]
    original, attention = rope.pop("original_max_position_embeddings"), rope.pop("attention_factor")
    turned = int(fields["hidden_size"] // max(fields["num_attention_heads"], 1) * rope.get("partial_rotary_factor", 1.0))
    found = gguf.some(info, _FACTORS)
    if not found:
        if attention not in (None, 1.0):
            raise CheckpointError(f"{info.path} has phi3.rope.scaling.attn_factor = {attention}, and lacks {' and '.join(_FACTORS)}")
        return {}
    if original is None or original < 2:
        raise CheckpointError(
            f"{info.path} has {min(found)}, and phi3.rope.scaling.original_context_length = {original}; 2 at least is needed"
        )
    fields["original_max_position_embeddings"] = original
    made = {"rope_type": "longrope", "original_max_position_embeddings": original}
    if attention is not None:
        made["attention_factor"] = attention
    return made | {_FACTORS[name]: _numbers(name, found.get(name), turned // 2) for name in _FACTORS}


def _numbers(name: str, value: Value | None, count: int) -> list[float]:
    if not isinstance(value, Tensor) or tuple(value.shape) != (count,) or not bool(((value > 0) & value.isfinite()).all()):
        shape = "missing" if value is None else list(value.shape)
        raise CheckpointError(f"{name} is {shape}; {count} positive numbers are needed")
    return value.float().tolist()


def items(info: CheckpointInfo, model: Any) -> Iterator[tuple[str, Value]]:
    """The tensors of a file under the names, and in the shapes, of a transformers checkpoint of the same model."""
    arch, _ = architecture_of(info)
    for name, value in gguf_model.with_scales(info):
        if name == "rope_freqs.weight":
            _slow_down(model, value)
        elif name in gguf_names.DERIVED:
            if arch != "phi3":
                raise UnsupportedError(f"{info.path} has {name}, factors of the rotary embedding, which are loaded of phi3 alone")
        else:
            yield from _named(str(gguf_names.to_hf(arch, name)), name, gguf_model.as_in_hf(arch, name, value, info.settings))


def _named(target: str, name: str, value: Value) -> Iterator[tuple[str, Value]]:
    if "*" not in target:
        yield target, value
    elif len(value.shape) != 3:
        raise CheckpointError(f"{name} is {list(value.shape)}; the experts of a layer are three axes")
    else:
        for e, weight in enumerate(value):
            yield target.replace("*", str(e)), weight


def _slow_down(model: Any, factors: Value) -> None:
    """Divide the frequencies of the rotary embedding by Llama 3's factors, which the file has in place of what made them."""
    rotary = model.model.rotary_emb
    if not isinstance(factors, Tensor) or factors.shape != rotary.inv_freq.shape or bool((factors <= 0).any()):
        raise CheckpointError(f"rope_freqs.weight is {list(factors.shape)}; {list(rotary.inv_freq.shape)} positive numbers are needed")
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        buffer /= factors
