"""Fill the skeleton of a transformers model with what a checkpoint holds: QuantLinears where it is quantised, tensors elsewhere."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference
from qkernels.checkpoint import _tie
from qkernels.convert import _set, _why_skip, tie_key
from qkernels.embedding import QuantEmbedding
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import transposed
from qkernels.integrations import conversion, experts
from qkernels.integrations.transformers import few, namer, unexpected
from qkernels.io.modules import is_of_activations
from qkernels.kernels.registry import Compute
from qkernels.linear import QuantLinear
from qkernels.scaled import SCALE, ScaledActivation, ScaledLinear

log = logging.getLogger("qkernels")
Value = QuantTensor | QuantStack | Tensor
_MUCH = 0.05  # of a model's weights: where so many are decoded it is worth a warning; routers are fewer


class Loader:
    """Fills a skeleton: `add` for what the checkpoint holds, in any order, then `finish`.

    model     on the meta device, but for its buffers that no checkpoint holds
    device    where the weights go as they come
    compute   as in QuantLinear
    Raises    CheckpointError (not the tensors of this model), UnsupportedError (experts of a kind that is not loaded, or rules)
    """

    def __init__(self, model: Any, device: torch.device, compute: Compute) -> None:
        self.model, self.device, self.compute, self.dtype = model, device, compute, model.dtype
        self.own: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.name_of = namer(model, self.own)
        self.fp32 = tuple(model._get_dtype_plan(self.dtype))
        self.key_of: dict[str, str] = {}  # name in the model -> in the checkpoint
        self.unknown: list[str] = []
        self.pieces: dict[str, tuple[Any, list[conversion.Piece]]] = {}  # for rules that want several tensors
        self.plain: dict[str, Tensor] = {}
        self.made: dict[int, tuple[nn.Module, nn.Module]] = {}  # id of a module -> (itself, its replacement)
        self.experts: dict[str, dict[str, nn.ModuleList]] = {}
        self.saved: dict[str, dict[tuple[int, int], Value]] = {}  # parameter of all experts -> (expert, part) -> what was saved of it
        self.latest: tuple[weakref.ref[QuantTensor], QuantLinear] | None = None  # the weight that came last, and who has it
        self.scaled: dict[str, Tensor] = {}
        self.decoded: dict[str, int] = {}  # why -> how many numbers
        self.inputs: dict[str, Tensor] = {}  # name of a Linear -> what its input is multiplied by
        self.of_tie: dict[Any, dict[str, Value | None]] = {}  # tied names -> what the checkpoint has for each
        for name, t in self.own.items():
            self.of_tie.setdefault(tie_key(t), {})[name] = None

    # -- what comes ----------------------------------------------------------------------------------------------------------------

    def add(self, key: str, value: Value) -> None:
        """Take one tensor of the checkpoint, under its own name."""
        name, converter, pattern = self.name_of(key)
        if name not in self.own and name.removesuffix(".weight") in self.own:
            name = name.removesuffix(".weight")  # of a stack, which is a parameter and no module
        if name not in self.own and (router := name.replace(".router.linear.", ".router.")) in self.own:
            name = router  # as Unsloth calls that of gpt-oss
        if name not in self.own:
            self._add_unknown(key, name, value)
        elif converter is not None:
            pieces = self.pieces.setdefault(name, (converter, []))[1]
            pieces.append((key, pattern, value))
            if _count(v for _, _, v in pieces) >= self._wanted(name, converter):
                self._convert(name)
        else:
            self._place(name, value, key)

    def _add_unknown(self, key: str, name: str, value: Value) -> None:
        owner, _, leaf = name.rpartition(".")
        module = _submodule(self.model, owner)
        if leaf == "scales" and isinstance(value, Tensor) and module is not None and not any(True for _ in module.parameters()):
            self.scaled[owner] = value  # AWQ: the activation before a Linear is divided by them
        elif leaf == SCALE and isinstance(value, Tensor) and f"{owner}.weight" in self.own:
            self.inputs[owner] = value
        elif (found := experts.place(self.model, self.own, name)) is not None:
            target, place = found
            parts = self.saved.setdefault(target, {})
            parts[place] = value
            if _count(parts.values()) == self.own[target].numel():
                self._place(target, experts.of_all(target, self.saved.pop(target)), key)
        elif is_of_activations(name):
            log.debug("%s is left out: it quantises activations or the cache", key)
        elif leaf == "bias" and isinstance(value, Tensor) and f"{owner}.weight" in self.own and not bool(value.any()):
            log.info("%s is all zero, and the model has no such bias", key)
        else:
            self.unknown.append(key)

    def _wanted(self, name: str, converter: Any) -> int:
        """How many numbers the rule makes: all are there when so many have come, as none is lost."""
        first, *others = converter.target_patterns
        names = (name, *(name.replace(first, other) for other in others))
        return sum(self.own[n].numel() for n in names if n in self.own)

    def _convert(self, name: str) -> None:
        from transformers.core_model_loading import dot_natural_key

        converter, pieces = self.pieces.pop(name)
        pieces.sort(key=lambda piece: dot_natural_key(piece[0]))
        key = pieces[0][0]
        made = dict(conversion.convert(converter, name, pieces, self.model))
        del pieces
        for target in list(made):
            value = made.pop(target)
            if target not in self.own:
                self.unknown.append(key)
            elif isinstance(value, list) and self.own[target].dim() == 2 and len(value) == 1:
                self._place(target, value[0], key)
            else:
                self._place(target, value, key)

    def _place(self, name: str, value: Any, key: str) -> None:
        if name in self.key_of:
            raise CheckpointError(f"{self.key_of[name]!r} and {key!r} of the checkpoint are both {name!r} of the model")
        self.key_of[name] = key
        tied = self.of_tie[tie_key(self.own[name])]
        if len(tied) > 1:
            tied[name] = value  # until all have come
        else:
            self._put(name, value)

    # -- where it goes -------------------------------------------------------------------------------------------------------------

    def _put(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.plain[name] = self._plain(name, value)
        elif isinstance(value, QuantTensor):
            self._put_weight(name, (value,))
            self._share(name, value)
        elif isinstance(value, tuple):
            self._put_weight(name, value)
        else:
            self._put_experts(name, [(q,) for q in value] if isinstance(value, QuantStack) else value)

    def _plain(self, name: str, t: Tensor) -> Tensor:
        own = self.own[name]
        self._check_shape(name, tuple(t.shape), tuple(own.shape))
        if own.dtype != t.dtype and not (own.is_floating_point() and t.is_floating_point() and t.itemsize > 1):
            raise CheckpointError(f"{name!r} is {t.dtype} in the checkpoint, and nothing says how to make {own.dtype} of it")
        keeps = own.is_floating_point() and any(re.search(part.replace("*", ".*"), name) for part in self.fp32)
        return t.to(device=self.device, dtype=torch.float32 if keeps else own.dtype)

    def _check_shape(self, name: str, found: tuple[int, ...], own: tuple[int, ...]) -> None:
        if found != own:
            key = self.key_of.get(name, name)
            raise CheckpointError(f"{key!r} is {list(found)} in the checkpoint; the model that config.json describes has {list(own)}")

    def _put_weight(self, name: str, parts: conversion.Parts) -> None:
        owner, _, leaf = name.rpartition(".")
        module, shape = self.model.get_submodule(owner), tuple(self.own[name].shape)
        if id(module) in self.made:  # a module of two names
            _set(self.model, owner, self.made[id(module)][1])
            return
        turned = type(module).__name__ == "Conv1D"  # GPT-2's: [in, out]
        self._check_shape(name, _shape(parts), shape[::-1] if turned else shape)
        parts, reason = tuple(q.to(self.device) for q in parts), f"in a {type(module).__name__}"
        new: nn.Module | None = None
        if leaf == "weight" and (type(module) is nn.Linear or turned):
            parent = self.model.get_submodule(owner.rpartition(".")[0])
            reason = "" if turned else _why_skip(owner, module, None, (), None, {}, parent) or ""
            if not reason:
                new = experts.linear(parts, module.bias, self.compute, self.dtype).eval()
        elif leaf == "weight" and isinstance(module, nn.Embedding) and module.max_norm is None and len(parts) == 1:
            new = QuantEmbedding(module, parts[0], self.dtype).eval()
        if new is None:
            log.info("%s is decoded to %s: %s", name, self.own[name].dtype, reason)
            self.decoded[reason] = self.decoded.get(reason, 0) + self.own[name].numel()
            weight = torch.cat([reference.decode(q) for q in parts])
            self.plain[name] = self._plain(name, weight.T.contiguous() if turned else weight)
            return
        self.made[id(module)] = self.made[id(new)] = module, new  # new itself: where the parent has two names
        _set(self.model, owner, new)

    def _share(self, name: str, q: QuantTensor) -> None:
        """An embedding holds nothing where a head has the same weight, and its rows can be taken out of the form of that head's kernel."""
        new = self.made.get(id(self.model.get_submodule(name.rpartition(".")[0])), (None, None))[1]
        if isinstance(new, QuantLinear):
            self.latest = weakref.ref(q), new
        elif isinstance(new, QuantEmbedding) and self.latest and self.latest[0]() is q and (q.format.block or q.format.group[0] == 1):
            new.share(self.latest[1])

    def _put_experts(self, name: str, weights: Sequence[conversion.Parts]) -> None:
        owner, _, leaf = name.rpartition(".")
        module: Any = self.model.get_submodule(owner)
        experts.check(name, module)
        own = tuple(self.own[name].shape)
        n, k = _shape(weights[0])
        if (len(weights), *((n, k) if module.is_transposed else (k, n))) == own and n != k:  # as Qwen3-VL's lie: the other way round
            weights, n, k = [tuple(transposed(q) for q in parts) for parts in weights], k, n
        self._check_shape(name, (len(weights), k, n) if module.is_transposed else (len(weights), n, k), own)
        on_device = (tuple(q.to(self.device) for q in parts) for parts in weights)
        self.experts.setdefault(owner, {})[leaf] = experts.linears(module, leaf, on_device, self.compute, self.dtype)

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Put in place what had to wait, check that nothing lacks, and make the model ready to run."""
        for name in list(self.pieces):
            self._convert(name)
        for name in list(self.saved):
            self._place(name, experts.of_all(name, self.saved.pop(name)), name)
        ties = list(self._put_tied())
        self._check_names()
        if (decoded := sum(self.decoded.values())) > _MUCH * sum(t.numel() for t in self.own.values()):
            why = "; ".join(sorted(self.decoded, key=lambda reason: -self.decoded[reason])[:3])
            log.warning("%.1f million quantised weights are decoded, as no QuantLinear can be where they are: %s", decoded / 1e6, why)
        self.model.load_state_dict(self.plain, strict=False, assign=True)
        self.plain.clear()
        for name, source in ties:
            _tie(self.model, name, source)
        for owner, layers in self.experts.items():
            _set(self.model, owner, experts.replacement(self.model.get_submodule(owner), layers).eval())
        for owner, scales in self.scaled.items():
            _set(self.model, owner, ScaledActivation(self.model.get_submodule(owner), scales.to(self.device, self.dtype)).eval())
        for owner, scale in self.inputs.items():
            self._scale_input(owner, scale)
        self.model.to(self.device)  # the buffers that no checkpoint holds
        for part in (*self.model.modules(), *self.model.parameters(), *self.model.buffers()):
            part._is_hf_initialized = True

    def _scale_input(self, owner: str, scale: Tensor) -> None:
        linear = self.model.get_submodule(owner)
        if not isinstance(linear, QuantLinear):
            raise UnsupportedError(f"{owner}.{SCALE} multiplies the input of a {type(linear).__name__}; that of a QuantLinear alone can be")
        try:
            _set(self.model, owner, ScaledLinear.of(linear, scale.to(self.device)).eval())
        except FormatError as error:
            raise CheckpointError(f"{owner}: {error}") from error

    def _put_tied(self) -> Iterator[tuple[str, str]]:
        """Put tied weights in place, each once; return (name, name of the same tensor) for those that become one parameter."""
        for held in self.of_tie.values():
            there = {name: value for name, value in held.items() if value is not None}
            if len(held) == 1 or not there:
                continue
            first, value = next(iter(there.items()))
            plain = all(isinstance(v, Tensor) for v in there.values())
            for name, other in there.items():
                if plain and not torch.equal(other, value):  # type: ignore[arg-type]  # they are plain
                    raise CheckpointError(
                        f"{first!r} and {name!r} differ, but are tied by config.json: set tie_word_embeddings to false there"
                    )
            if plain:
                self._put(first, value)
                yield from ((name, first) for name in held if name != first)
            else:
                self._untie(held, value)
            self.key_of.update({name: self.key_of[first] for name in held if name not in self.key_of})
            held.clear()

    def _untie(self, held: Mapping[str, Value | None], value: Value) -> None:
        """Give every name a module of its own, as a quantised weight is no parameter that several could share."""
        for name in sorted(held, key=lambda name: isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)):
            self._put(name, value if (found := held[name]) is None else found)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.tie_word_embeddings = False  # nothing may put the one's codes into the other later

    def _check_names(self) -> None:
        model = type(self.model).__name__
        if missing := [name for name in self.own if name not in self.key_of]:
            raise CheckpointError(f"the checkpoint lacks {few(missing)} of {model}; it has {few(list(self.key_of.values()))}")
        if surplus := unexpected(self.model, self.unknown):
            raise CheckpointError(f"the checkpoint has {few(surplus)}, which {model} does not know")


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _shape(parts: conversion.Parts) -> tuple[int, int]:
    return sum(q.shape[0] for q in parts), parts[0].shape[1]


def _count(values: Iterable[Value]) -> int:
    return sum(torch.Size(value.shape).numel() for value in values)
