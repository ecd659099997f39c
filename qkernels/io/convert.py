"""One checkpoint as another: every weight exactly where the layout holds its numbers, and, if asked to, the others quantised anew."""

from __future__ import annotations

import difflib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from qkernels import formats, reference
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantStack, QuantTensor
from qkernels.io import checkpoint, directory, gguf_config, gguf_file, gguf_model, gguf_tokenizer
from qkernels.io.detect import CheckpointInfo, detect
from qkernels.io.forms import code_bits, dense, few_rows, forms, has_minima
from qkernels.io.gptq_family import stays_dense
from qkernels.io.modules import is_of_activations
from qkernels.quantizers.rtn import rtn

Value = QuantTensor | QuantStack | Tensor
TARGETS = ("gptq", "awq", "awq:gemv", "awq:gemv_fast", "compressed-tensors", "bitsandbytes", "gguf", "qkernels")
TARGETS_OF_MIXES = tuple(f"gguf:{mix}" for mix in gguf_model.MIXES)
NO_TOKENIZER = "the file has no tokenizer: llama.cpp runs it on the numbers of tokens, not on text"
NO_CONFIG = "config.json and tokenizer are not made from a GGUF file's key-values: take them from the model's own repository"
_GROUPS = (128, 64, 32)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# files that say how another layout is read
_OF_LAYOUTS = {
    "config.json",
    "model.safetensors.index.json",
    "qkernels.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
}


@dataclass
class Report:
    """What became of the weights; `str` of it says it line by line."""

    exact: list[str] = field(default_factory=list)  # names of those that are carried exactly
    requantised: dict[str, tuple[str, str, float]] = field(default_factory=dict)  # name -> (from, to, relative error)
    dense: int = 0  # tensors that are not quantised
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{len(self.exact)} weights carried exactly, {len(self.requantised)} quantised anew, {self.dense} tensors not quantised"
        anew = [f"  {name}: {was} -> {now}, relative error {error:.4f}" for name, (was, now, error) in self.requantised.items()]
        return "\n".join([head, *anew, *self.notes])


def convert(source: str | os.PathLike[str], path: str | os.PathLike[str], to: str, *, requantize: bool = False) -> Report:
    """Write a checkpoint of any layout that is read as another one, tensor by tensor.

    to           one of TARGETS or TARGETS_OF_MIXES: "gguf:Q4_K_M" stores each weight in the type that llama.cpp's mix has for it
    requantize   what the layout cannot hold exactly is dequantised and rounded to the nearest format that it can
    Raises       UnsupportedError naming each weight that the layout cannot hold and why, unless `requantize`; FormatError (unknown target)
    """
    if to not in (*TARGETS, *TARGETS_OF_MIXES):
        near = difflib.get_close_matches(to, (*TARGETS, *TARGETS_OF_MIXES), n=1, cutoff=0.0)[0]
        raise FormatError(f"unknown target {to!r}; {', '.join((*TARGETS, *TARGETS_OF_MIXES))} can be written; nearest: {near}")
    return _Conversion(detect(source), Path(path), to, requantize).run()


class _Conversion:
    """One run: a look at every weight, then the writing, both tensor by tensor."""

    def __init__(self, info: CheckpointInfo, path: Path, to: str, requantize: bool) -> None:
        self.layout, _, self.variant = to.partition(":")
        self.info, self.path, self.to, self.requantize = info, path, to, requantize
        self.settings: Mapping[str, Any] | None = None  # of a GGUF file
        if self.layout == "gguf":
            self.settings = self._key_values()
        self.report = Report()
        self.form: dict[str, int] = {}  # of each weight that is carried exactly, which of its forms
        self.refused: dict[str, str] = {}
        self.example: tuple[str, QuantTensor] | None = None  # the first of them: a layout may want all to be alike
        self.dense: list[str] = []  # modules that a loader has to be told of
        self.bits: list[int] = []  # of the refused ones
        self.columns: list[int] = []
        self.left_out: set[str] = set()  # scales of activations and caches

    def run(self) -> Report:
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise CheckpointError(f"{self.path} exists: name a new one")
        for name, value in self.items():
            self._look(name, value)
        if self.refused and not self.requantize:
            advice = f"{self.to} cannot hold {len(self.refused)} weights exactly; --requantize (requantize=True) rounds them to what it can"
            raise UnsupportedError(advice, self.refused)
        config = {key: value for key, value in self.info.config.items() if key not in ("quantization_config", "compression_config")}
        checkpoint.write(self._converted(), self.path, self.layout, settings=self._settings(), config=config or None)
        self._companions(config)
        if self.left_out:
            self.report.notes.append(f"{len(self.left_out)} scales of activations and caches are left out: {min(self.left_out)} …")
        return self.report

    def items(self) -> Iterable[tuple[str, Value]]:
        """What is read, under the names and in the order of rows that the target has."""
        if self.info.layout == "gguf":
            return checkpoint.read(self.info) if self.layout == "gguf" else gguf_model.to_hf(self.info)
        if self.layout != "gguf":
            return self._of_weights()
        assert self.settings is not None
        return gguf_model.items(self._of_weights(), self.settings, self.info.config)

    def _of_weights(self) -> Iterator[tuple[str, Value]]:
        """What is read, but for scales of activations and caches: the settings that are written say nothing of those."""
        for name, value in checkpoint.read(self.info):
            if self.info.layout != "dense" and isinstance(value, Tensor) and is_of_activations(name):
                self.left_out.add(name)
            else:
                yield name, value

    # -- the look ----------------------------------------------------------------------------------------------------------------------

    def _look(self, name: str, value: Value) -> None:
        if isinstance(value, Tensor):
            self.dense += [name.removesuffix(".weight")] if stays_dense(name, value) else []
            return
        why = []
        for i, form in enumerate(_forms(value)):
            reason = self._why_not(name, form)
            if reason is None:
                self.form[name] = i
                if self.example is None and isinstance(form, QuantTensor):
                    self.example = (name, few_rows(form))
                return
            why.append(reason)
        self.refused[name] = why[0]
        self.columns.append(value.shape[-1])
        self.bits.append(code_bits(value.format))
        if isinstance(value, QuantStack) and self.layout != "gguf":
            raise UnsupportedError(f"{self.to} holds no stacks", {name: why[0]})

    def _why_not(self, name: str, value: QuantTensor | QuantStack) -> str | None:
        """Ask the writer, which says what it cannot hold; the first weight comes with it, as all have to be alike to some."""
        if self.layout == "gguf" and self.variant:
            wanted = self._mixed(name, value)
            if wanted is not None and wanted != value.format:
                return f"{name} is {value.format.name}; {self.variant} stores {wanted.name}"
        with_first = [(name, value)] if self.example is None else [self.example, (name, value)]
        try:
            checkpoint.try_write(with_first, self.layout, self._settings(with_first[0][1].format.group[1]))
        except UnsupportedError as error:
            return str(error)
        return None

    # -- the writing -------------------------------------------------------------------------------------------------------------------

    def _converted(self) -> Iterator[tuple[str, Value]]:
        for name, value in self.items():
            if isinstance(value, Tensor):
                wanted = self._mixed(name, value) if self.variant and self.layout == "gguf" and value.dim() in (2, 3) else None
                if wanted is None:
                    self.report.dense += 1
                    yield name, value
                    continue
                yield name, self._quantised(name, value, wanted, str(value.dtype).removeprefix("torch."))
            elif name in self.form:
                self.report.exact.append(name)
                yield name, next(islice(_forms(value), self.form[name], None))
            else:
                yield name, self._quantised(name, dense(value), self._nearest(name, value), value.format.name)

    def _quantised(self, name: str, weight: Tensor, format: QuantFormat, was: str) -> QuantTensor | QuantStack:
        weights = weight.float() if weight.dim() == 3 else weight.float()[None]
        made = [self._rounded(w, format) for w in weights]
        wrong = sum(float((reference.decode(q) - w).square().sum()) for q, w in zip(made, weights))
        self.report.requantised[name] = (was, format.name, math.sqrt(wrong) / (float(weights.norm()) or 1.0))
        return QuantStack.of(made) if weight.dim() == 3 else made[0]

    def _rounded(self, weight: Tensor, format: QuantFormat) -> QuantTensor:
        q = rtn(weight, format)
        if self.layout != "bitsandbytes" or format.bits != 8:
            return q
        assert q.scales is not None
        return reference.encode(weight, format, q.scales * 127 / 127)  # as it stores the largest value of a row in their place

    def _nearest(self, name: str, value: QuantTensor | QuantStack) -> QuantFormat:
        """The format of the target that is most like a weight's."""
        k, bits = value.shape[-1], code_bits(value.format)
        if self.layout == "gguf":
            return self._mixed(name, value) or gguf_model.nearest(bits, k)
        if self.layout == "bitsandbytes":
            four = min(self.bits) <= 4 if self.example is None else self.example[1].format.bits == 4
            return formats.get("nf4" if four else "int8")
        group = value.format.group_extent(value.shape[-2], k)[1]
        if self.layout == "awq":
            group = self._awq_group()
            minima = self.variant == "gemv_fast" or (self.example is not None and self.example[1].format.zero == "min")
            return QuantFormat(Int(4), (1, group), "f16", "min" if minima else "int")
        bits = next(b for b in ((2, 3, 4, 8) if self.layout == "gptq" else range(2, 9)) if b >= bits)
        group = group if group in _GROUPS else next((g for g in _GROUPS if k % g == 0), -1)
        if not has_minima(value):
            return QuantFormat(Int(bits, 2 ** (bits - 1)), (1, group), "f16")
        return QuantFormat(Int(bits), (1, group), "f16", "int")

    def _awq_group(self) -> int:
        if self.example is not None:
            return self.example[1].format.group[1]
        return next((g for g in _GROUPS if all(k % g == 0 for k in self.columns)), -1)

    def _mixed(self, name: str, value: Value) -> QuantFormat | None:
        """The type that the mix has for a weight; None where it says nothing."""
        if not self.variant:
            return None
        assert self.settings is not None
        layers = self.settings.get(f"{self.settings.get('general.architecture')}.block_count", 0)
        tied = gguf_config.is_tied(self.info.config) if self.info.layout != "gguf" else not self._has_output()
        return gguf_model.type_of(self.variant, name, value.shape[-1], layers, tied)

    def _has_output(self) -> bool:
        return any(t.name == "output.weight" for file in self.info.files for t in gguf_file.parse(file).tensors)

    # -- what is stated ----------------------------------------------------------------------------------------------------------------

    def _key_values(self) -> Mapping[str, Any]:
        stated = gguf_file.KeyValues(self.info.settings)
        if self.info.layout != "gguf":
            made = gguf_config.key_values(self.info.config)
            tokenizer = gguf_tokenizer.key_values(self.info.path, self.info.config)
            stated = gguf_file.KeyValues({**made, **tokenizer}, {**made.types, **tokenizer.types})
        if self.variant:
            stated["general.file_type"] = gguf_model.MIXES[self.variant][2]
        return stated

    def _settings(self, group: int | None = None) -> Mapping[str, Any] | None:
        if self.layout != "awq" or not self.variant:
            return self.settings
        group = self._awq_group() if group is None else group
        stated = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": self.variant}
        return {**stated, "modules_to_not_convert": self.dense or None}

    def _companions(self, config: Mapping[str, Any]) -> None:
        """Tokenizer, generation config and the like lie beside the weights of a directory."""
        if self.layout == "gguf":
            self.report.notes += [] if self.info.layout == "gguf" else gguf_config.notes(self.info.config)
            self.report.notes += [] if self.settings and "tokenizer.ggml.tokens" in self.settings else [NO_TOKENIZER]
        elif self.info.layout == "gguf":
            self.report.notes.append(NO_CONFIG)
        if not (self.info.path.is_dir() and self.path.is_dir()):
            return
        for file in sorted(self.info.path.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS and file.name not in _OF_LAYOUTS:
                shutil.copyfile(file, self.path / file.name)
        if self.layout == "qkernels" and config:
            directory.write_config(self.path, config)


def _forms(value: QuantTensor | QuantStack) -> Iterator[QuantTensor | QuantStack]:
    """Forms of a weight, or those that all weights of a stack have."""
    if isinstance(value, QuantTensor):
        yield from forms(value)
        return
    yield value
    for alike in islice(zip(*(forms(q) for q in value)), 1, None):
        if len({q.format for q in alike}) > 1:
            return
        yield QuantStack.of(alike)
