"""AutoRound checkpoints: the tensors of GPTQ, AWQ or compressed-tensors, as `packing_format` says; nothing of it is written here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantTensor
from qkernels.io import awq, gptq, layers
from qkernels.io.gptq_settings import HOW, ignore_how
from qkernels.io.gptq_settings import Scheme as GPTQScheme
from qkernels.io.settings import Settings

_LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptq")  # GPTQ's, whose zero points are stored less one
_EXACT = ("auto_round", "auto_round:gptqmodel")  # GPTQ's, whose zero points are stored as they are
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_OTHERS = "auto_round:llm_compressor"  # and what follows it
_PATTERN = frozenset("*+?^$()[]{}|\\")  # a name with one of these is a regular expression


class Stated(NamedTuple):
    """What the settings, or an entry of `extra_config`, say."""

    bits: int
    group_size: int
    sym: bool


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Yield every weight and every other tensor of an AutoRound checkpoint. Raises CheckpointError, UnsupportedError."""
    packing = settings.get("packing_format") or "auto_round:gptq"  # which AutoRound's own loaders take where it is absent
    if isinstance(packing, str) and packing.startswith(_OTHERS):
        others = _of_others(settings)
        yield from importlib.import_module("qkernels.io.compressed_tensors").read(tensors, others)
        return
    stated_of = _stated(settings)
    if packing in _AWQ:
        yield from awq.read_modules(tensors, lambda module: _of_awq(stated_of(module)))
    elif packing in (*_LESS_ONE, *_EXACT):
        yield from gptq.read_modules(tensors, lambda module: _of_gptq(stated_of(module), packing in _EXACT))
    else:
        known = ", ".join((*_LESS_ONE, *_EXACT, *_AWQ, _OTHERS))
        raise UnsupportedError(f"the settings of AutoRound: packing_format is {packing!r:.80}; {known} are read")


def _of_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of AutoRound itself, which tell in fewer words what config_groups tell."""
    if not settings.get("config_groups"):
        kind = f"{settings.get('bits')} bits of {settings.get('data_type')}"
        raise UnsupportedError(
            f"the settings of AutoRound lack config_groups ({kind}): llm_compressor's packing is read where they are there"
        )
    own = ("packing_format", "bits", "group_size", "sym", "data_type", *HOW)
    return {**{key: value for key, value in settings.items() if key not in own}, "quant_method": "compressed-tensors"}


def _of_gptq(stated: Stated, exact: bool) -> GPTQScheme | None:
    if stated.bits >= 16:
        return None
    if not 2 <= stated.bits <= 8:  # 5, 6 and 7 too, which GPTQModel stores in planes, while here all are one stream
        raise UnsupportedError(f"{stated.bits} bits; 2 to 8 are read")
    return GPTQScheme(stated.bits, stated.group_size, stated.sym, exact)


def _of_awq(stated: Stated) -> awq.Scheme | None:
    if stated.bits >= 16:
        return None
    if stated.bits != 4:
        raise UnsupportedError(f"{stated.bits} bits in the packing of AWQ, which has 4")
    return awq.Scheme("gemm", stated.group_size, True)


def _stated(settings: Mapping[str, Any]) -> Callable[[str], Stated]:
    """What the settings say of each module."""
    s = Settings(settings, "the settings of AutoRound")
    s.take("quant_method", of=str, choices=("auto-round",), default="auto-round")
    s.take("packing_format", of=str, default="")
    base = _numbers(s, None)
    extra = s.take("extra_config", of=dict, default={})
    ignore_how(s)
    s.ignore("desc_act", "modules_to_not_convert")
    s.done()
    exact, patterns = {}, []
    for name, stated in extra.items():
        inner = Settings(stated, f"{s.where}: extra_config: {name}")
        numbers = _numbers(inner, base)
        ignore_how(inner)
        inner.done()
        exact[name] = numbers
        if _PATTERN & set(name):
            patterns.append((layers.compiled(name, inner.where), numbers))

    def stated_of(module: str) -> Stated:
        if module in exact:
            return exact[module]
        return next((numbers for pattern, numbers in patterns if pattern.search(module)), base)

    return stated_of


def _numbers(s: Settings, base: Stated | None) -> Stated:
    def take(name: str) -> Any:
        return s.take(name, of=int) if base is None else s.take(name, of=int, default=getattr(base, name))

    stated = Stated(take("bits"), take("group_size"), s.take("sym", of=bool, default=base.sym if base else True))
    if stated.bits >= 16:
        s.ignore("data_type")
    if stated.bits < 1 or (stated.group_size != -1 and not 1 <= stated.group_size < 2**31):
        raise CheckpointError(f"{s.where}: {stated.bits} bits in groups of {stated.group_size}; at least 1, or groups of -1, are possible")
    return stated
