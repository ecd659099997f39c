"""What the settings of a GPTQ checkpoint say of its modules, and the settings of a new one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantTensor
from qkernels.io.expressions import compiled
from qkernels.io.gptq_planes import WIDTHS
from qkernels.io.settings import Settings

BITS = (2, 3, 4, 8)
T = TypeVar("T")
HOW = (
    "act_bits", "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp", "auto_mapping_dict",
    "autoround_version", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "cache_examples_on_gpu",
    "damp_auto_increment", "damp_percent", "dataset", "device", "disable_exllama", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "enable_quanted_input", "exllama_config", "foem", "gptaq", "gptaq_alpha", "gradient_accumulate_steps", "hessian", "iters", "lm_head",
    "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr", "model_file_base_name", "model_free", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "nsamples", "offload_to_disk",
    "offload_to_disk_path", "pad_token_id", "parallel_packing", "provider", "quant_block_list", "quantizer", "scale_dtype", "seqlen",
    "static_attention_dtype", "static_attention_granularity", "static_groups", "static_kv_dtype", "static_kv_granularity", "super_bits",
    "super_group_size", "supported_types", "to_quant_block_names", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "v2",
    "v2_alpha", "v2_memory_device", "vram_strategy",
)  # fmt: skip


def ignore_how(s: Settings) -> None:
    """Leave out what tells how AutoGPTQ, GPTQModel, optimum, AutoAWQ or AutoRound found the codes, or how they run them."""
    s.take("data_type", of=str, choices=("int", "int_sym", "int_asym", "int_asym_dq"), default="int")
    s.ignore(*HOW)


class Scheme(NamedTuple):
    """How a module is stored.

    group_size   columns that share a scale; -1: all
    sym          it says that every zero point is 2^(bits - 1)
    exact        zero points are stored as they are, not less one
    planar       codes and zero points lie in planes, not in one stream
    """

    bits: int
    group_size: int
    sym: bool
    exact: bool
    planar: bool = False


SchemeOf = Callable[[str], Scheme | None]  # of a module by its path; None: it is not quantised


def schemes(settings: Mapping[str, Any]) -> SchemeOf:
    """What the settings say of each module."""
    s = Settings(settings, "the settings of GPTQ")
    s.take("quant_method", "method", of=str, choices=("gptq",), default="gptq")
    label = _label(s)
    base = _overridden(s, Scheme(0, 0, True, label != "gptq", label == "gptq_p"), required=True)
    scheme_of = by_dynamic(s, base, lambda inner: _overridden(inner, base))
    ignore_how(s)
    s.done()
    return scheme_of


def by_dynamic(s: Settings, base: T, overridden: Callable[[Settings], T]) -> Callable[[str], T | None]:
    """What GPTQModel's `dynamic` says of each module, by the first pattern that matches its path; `base` where none does.

    "-:<regex>" leaves modules out: None. "+:<regex>" or "<regex>" stores them otherwise: `overridden` makes a scheme of the entry.
    """

    def rule(pattern: str, stated: Any) -> tuple[re.Pattern[str], T | None]:
        where = f"{s.where}: dynamic: {pattern}"
        if pattern.startswith("-:"):
            return compiled(pattern[2:], where), None
        inner = Settings(stated, where)
        scheme = overridden(inner)
        ignore_how(inner)
        inner.done()
        return compiled(pattern.removeprefix("+:"), where), scheme

    rules = [rule(pattern, stated) for pattern, stated in s.take("dynamic", of=dict, default={}).items()]
    return lambda module: next((scheme for pattern, scheme in rules if pattern.match(module)), base)


def _label(s: Settings) -> str:
    """Which of the layouts of words down K it is; UnsupportedError for others."""
    label = s.take("checkpoint_format", "format", "version", of=str, default="gptq").lower()
    if s.take("is_marlin_format", of=bool, default=False) or label == "marlin":
        raise UnsupportedError("this checkpoint is in the tiles of Marlin: take the model's GPTQ files, which hold the same numbers")
    if label not in ("gptq", "gptq_v2", "gptq_p"):
        raise UnsupportedError(f"{s.where}: checkpoint_format is {label!r}; 'gptq', 'gptq_v2' and 'gptq_p' are read")
    word = s.take("pack_dtype", of=str, default="int32").removeprefix("torch.")
    if word != "int32":
        raise UnsupportedError(f"{s.where}: pack_dtype is {word!r}; words of 'int32' are read")
    return label


def _overridden(s: Settings, base: Scheme, required: bool = False) -> Scheme:
    """A scheme, of which the settings say all or a part."""
    other: dict[str, Any] = {} if required else {"default": None}
    bits = s.take("bits", "w_bit", "wbits", of=int, **other)
    size = s.take("group_size", "q_group_size", of=int, **other)
    sym, zero_point = s.take("sym", of=bool, default=None), s.take("zero_point", of=bool, default=None)
    if sym is not None and sym is zero_point:
        raise CheckpointError(f"{s.where} contradicts itself: sym and zero_point are both {sym}")
    s.take("desc_act", of=bool, default=None)  # g_idx tells
    if bits is not None and bits not in (WIDTHS if base.planar else BITS):
        message = f"{s.where}: bits is {bits}; 2, 3, 4 and 8 are read, and in 'gptq_p' 5, 6 and 7"
        raise (UnsupportedError if 1 <= bits <= 8 else CheckpointError)(message)
    if size is not None and size != -1 and not 1 <= size < 2**31:
        raise CheckpointError(f"{s.where}: group_size is {size}; -1 (all columns), or at least 1, is possible")
    told = sym if sym is not None else None if zero_point is None else not zero_point
    return Scheme(bits or base.bits, size or base.group_size, base.sym if told is None else told, *base[3:])


def scheme_of_weight(q: QuantTensor) -> Scheme:
    return Scheme(
        q.format.bits, q.format.group[1], q.zeros is None and q.format.code == Int(q.format.bits, 2 ** (q.format.bits - 1)), False
    )


def stated(made: Mapping[str, Scheme], dense: Iterable[str], desc_act: bool) -> dict[str, Any]:
    """Settings of a new checkpoint: what most modules have, and `dynamic` entries for the others."""
    if not made:
        raise UnsupportedError("no weight is quantised: a GPTQ checkpoint has at least one")
    bits, size = Counter((scheme.bits, scheme.group_size) for scheme in made.values()).most_common(1)[0][0]
    others = {module: s for module, s in made.items() if (s.bits, s.group_size) != (bits, size)}
    dynamic: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in dense}
    dynamic |= {f"+:^{re.escape(module)}$": {"bits": s.bits, "group_size": s.group_size} for module, s in others.items()}
    new = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": desc_act,
        "sym": all(scheme.sym for scheme in made.values()),
        "lm_head": any(module.rpartition(".")[2] == "lm_head" for module in made),
        "checkpoint_format": "gptq",
    }
    return new | ({"dynamic": dynamic} if dynamic else {})
