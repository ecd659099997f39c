"""Quantise a transformers model directory tensor by tensor, so that a model larger than the memory can be.

The model is built on the meta device, which says what its linears are called; transformers' own rules turn the names (and, for fused
layers, the tensors) of the checkpoint into the model's, as its `from_pretrained` does; every tensor is read, quantised or passed on,
written, and let go.
"""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import formats, quantizers
from qkernels.checkpoint import layers_of, stored_names
from qkernels.convert import Report, Row, _choose, _set
from qkernels.errors import CheckpointError, FormatError, QKernelsError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.formats.tensor import FIELDS
from qkernels.io import directory, native, shards
from qkernels.kernels import device as devices
from qkernels.kernels.registry import Compute, Problem
from qkernels.linear import _TENSORS, QuantLinear

Jobs = dict[str, tuple[Any, list[tuple[str, str]]]]  # name in the model -> (converter or None, [(name in the checkpoint, its pattern)])
_COMPANIONS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md")  # config, tokenizer, generation, code, model card


def quantize_directory(
    source: Path | str,
    target: Path | str,
    format: str | QuantFormat = "int4",
    *,
    quantizer: str | quantizers.Quantizer = "rtn",
    compute: Compute = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = ("lm_head",),
    shard_bytes: int = directory.SHARD_BYTES,
    progress: bool = True,
) -> Report:
    """Write to `target` what `replace_linear` and `save` would of the model in `source`, with config and tokenizer beside it.

    Arguments as `replace_linear`'s; in memory are one source tensor at a time (all parts of a fused one) and `shard_bytes` of
    output. Tensors keep the checkpoint's dtypes; tied ones are stored once. Bytes of the report are those of the files.
    Raises CheckpointError (the directory does not hold what its config.json describes), FormatError (NaN or inf: the layer is named),
    UnsupportedError (no Linear to replace), QKernelsError (no transformers); `target` is then as it was.
    """
    source, fmt, quantize, start = Path(source), formats.get(format), quantizers.get(quantizer), time.perf_counter()
    Problem(fmt, 1, 1, compute=compute)  # checks compute before any work
    model = skeleton(source)
    tensors = shards.open_directory(source)
    jobs, left_out = _jobs(model, tensors)
    report, dense = Report(), model.state_dict()
    linears, report.skipped = _choose(model, include, exclude, meta=True)
    report.skipped |= {name: f"not in {type(model).__name__}: left out, as transformers does" for name in left_out}
    layers, names, tied = _replace_on_meta(model, linears, fmt, compute)
    stored = partial(_stored, layers, tied)
    jobs = _checked(model, jobs, tensors, dense, stored, [name for name in names if name in dense])
    rows: dict[str, Row] = {}
    with native.Writer(target, layers, tied, shard_bytes) as writer, _reader(tensors, progress, f"quantizing to {fmt.name}") as read:
        _copy_companions(source, writer.directory)
        for name, t in _stream(model, jobs, read):
            layer, _, leaf = stored(name).rpartition(".")
            if leaf != "weight" or layer not in layers:
                writer.add(stored(name), t)
                continue
            try:
                q = quantize(t, fmt)
            except FormatError as error:
                raise FormatError(f"layer {layer}: {error}; nothing was written") from None
            layers[layer]["dtype"] = str(t.dtype).removeprefix("torch.")
            rows[layer] = Row(layer, fmt.name, _kernel(model.get_submodule(layer), q, t.dtype), t.nbytes, q.nbytes)
            for field, part in q.tensors().items():
                writer.add(f"{layer}.{_TENSORS[FIELDS.index(field)]}", part)
    report.replaced = [replace(rows[layers[name].get("shared_with", name)], name=name) for name, _ in linears]
    report.seconds = time.perf_counter() - start
    return report


def skeleton(directory: Path) -> nn.Module:
    """The model that a directory's config.json describes, on the meta device; no code of the directory's own is run.

    Raises CheckpointError (no or a bad config.json, weights that are quantised already), QKernelsError (no transformers).
    """
    config, path = load_config(directory, "quantizing a model directory"), directory / "config.json"
    if (directory / native.MANIFEST).exists() or getattr(config, "quantization_config", None):
        raise CheckpointError(f"the weights in {directory} are quantised already: start from the original ones")
    with described_by(path, "quantizing a model directory") as transformers:
        architecture = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        make = transformers.AutoModel.from_config if architecture == "AutoModel" else model_class(transformers, architecture)
        with torch.device("meta"):
            return make(config)


def load_config(directory: Path, what: str) -> Any:
    """Read a directory's config.json. Raises as `described_by`, whose arguments these are."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is no transformers model directory: config.json is missing")
    with described_by(path, what) as transformers:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


@contextmanager
def described_by(path: Path, what: str) -> Iterator[Any]:
    """Give transformers to build what the file `path` describes, and make a CheckpointError of all that goes wrong with it.

    Raises QKernelsError where transformers is not installed: `what` needs it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise QKernelsError(f"{what} needs transformers: pip install 'qkernels[transformers]'") from None
    try:
        yield transformers
    except QKernelsError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models
        reason = str(error).strip().partition("\n")[0]
        message = f"{path} describes no model that transformers {transformers.__version__} can build: {type(error).__name__}: {reason}"
        raise CheckpointError(message) from error


def model_class(transformers: Any, name: Any) -> Any:
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json names the architecture {name!r}, no model of transformers {transformers.__version__}")
    return found


# -- from the checkpoint's names to the model's ------------------------------------------------------------------------------------


def namer(model: Any, own: dict[str, Tensor]) -> Callable[[str], tuple[str, Any, str]]:
    """A function that says what a checkpoint's name is in the model whose state_dict is `own`, by transformers' rules.

    It returns the name, the converter that makes it or None, and the converter's pattern for the checkpoint's name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}

    def name_of(key: str) -> tuple[str, Any, str]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own and key in own:
            name, pattern = key, None
        return name, by_pattern.get(pattern or ""), pattern or key

    return name_of


def unexpected(model: Any, keys: Iterable[str]) -> list[str]:
    """Of names that the model does not have, those that are not known to be obsolete, or of layers that transformers never has."""
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(keys))
    model._adjust_missing_and_unexpected_keys(found)
    return sorted(key for key in found.unexpected_keys if not _predicts_more_tokens(model.config.get_text_config(), key))


def _predicts_more_tokens(config: Any, key: str) -> bool:
    """Whether a tensor is of a layer behind the last, as DeepSeek-V3 and its kin have for tokens beyond the next."""
    layers, more = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", 0)
    place = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return isinstance(more, int) and place is not None and layers <= int(place[1]) < layers + more


def _jobs(model: Any, tensors: shards.Tensors) -> tuple[Jobs, list[str]]:
    """Which tensors of the checkpoint make which of the model, by transformers' rules; and those that the model does not know."""
    from transformers.core_model_loading import dot_natural_key

    own = model.state_dict()
    name_of = namer(model, own)
    jobs: Jobs = {}
    unknown = []
    for key in sorted(tensors, key=dot_natural_key):  # the order that some of the rules rely on
        name, converter, pattern = name_of(key)
        if name not in own:
            unknown.append(key)
        elif converter is None and name in jobs:
            raise CheckpointError(f"{jobs[name][1][0][0]!r} and {key!r} of the checkpoint are both {name!r} of the model")
        else:
            jobs.setdefault(name, (converter, []))[1].append((key, pattern))
    return jobs, unexpected(model, unknown)


def _stream(model: Any, jobs: Jobs, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under the model's name, made from what `read` gives for the checkpoint's names."""
    for name, (converter, parts) in jobs.items():
        if converter is None:
            yield name, read(parts[0][0])
            continue
        converter = copy.deepcopy(converter)
        for key, pattern in parts:
            converter.add_tensor(name, key, pattern, partial(read, key))
        try:
            converted = converter.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{name!r} cannot be made from {', '.join(key for key, _ in parts)}: {error}") from error
        for target in list(converted):
            t = converted.pop(target)
            yield target, t[0] if isinstance(t, list) else t


def _checked(
    model: nn.Module, jobs: Jobs, tensors: shards.Tensors, dense: Mapping[str, Tensor], stored: Callable[[str], str], wanted: list[str]
) -> Jobs:
    """Go through the work without data: every name and shape must be the model's. Returns the jobs without copies of tied tensors."""
    found: dict[str, str] = {}
    copies = set()
    for name, t in _stream(model, jobs, lambda key: torch.empty(tensors.shapes[key], device="meta")):
        if name in dense and t.shape != dense[name].shape:
            raise CheckpointError(f"{name!r} is {list(t.shape)} in the checkpoint; config.json makes it {list(dense[name].shape)}")
        first = found.setdefault(stored(name), name)
        if first != name:
            if not torch.equal(*(tensors[jobs[n][1][0][0]] for n in (first, name))):
                raise CheckpointError(f"{first!r} and {name!r} differ, but are tied by config.json: set tie_word_embeddings to false there")
            copies.add(name)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {few(missing)} of {type(model).__name__}; it has {few(list(tensors))}")
    return {name: job for name, job in jobs.items() if name not in copies}


def few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


# -- to the saved names ------------------------------------------------------------------------------------------------------------


def _replace_on_meta(
    model: nn.Module, linears: list[tuple[str, nn.Linear]], format: QuantFormat, compute: Compute
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, str]]:
    """Put empty QuantLinears into the skeleton; return what `save` would write of it: layers, names of tensors, tied names."""
    made: dict[int, QuantLinear] = {}
    for name, m in linears:
        made.setdefault(id(m), QuantLinear(m.in_features, m.out_features, m.bias is not None, format, compute=compute, device="meta"))
        _set(model, name, made[id(m)])
    layers = layers_of(model)
    return layers, *stored_names(model.state_dict(keep_vars=True), layers)


def _stored(layers: Mapping[str, Mapping[str, Any]], tied: Mapping[str, str], name: str) -> str:
    """The name that a tensor of the model is saved under: a tied one's is another's."""
    owner, _, leaf = name.rpartition(".")
    return f"{layers[owner].get('shared_with', owner)}.{leaf}" if owner in layers else tied.get(name, name)


def _kernel(layer: Any, q: QuantTensor, dtype: torch.dtype) -> str:
    return layer._plan(devices.current("cpu"), None, dtype, q.perm is not None).kernel.name


def _copy_companions(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and (file.suffix in _COMPANIONS or file.stem == "LICENSE") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


@contextmanager
def _reader(tensors: shards.Tensors, show: bool, text: str) -> Iterator[Callable[[str], Tensor]]:
    """Give a function that reads a tensor and moves a progress bar over the bytes of the checkpoint."""
    with byte_bar(set(tensors.files.values()), show, text) as advance:

        def read(key: str) -> Tensor:
            t = tensors[key]
            advance(t.nbytes)
            return t

        yield read


@contextmanager
def byte_bar(files: Iterable[Path], show: bool, text: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of some files: give the function that moves it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not show) as bar:
        task = bar.add_task(text, total=sum(file.stat().st_size for file in files))
        yield lambda count: bar.advance(task, count)
