"""Checkpoints to test readers and writers with: golden ones, spoilt ones, saved, written again, compared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qkernels import io

GOLDEN = Path(__file__).parent / "golden"


def golden_cases(name):
    """Case -> its tensors, of a golden file that calls them "<case>/<name>"."""
    cases = {}
    for full, t in load_file(GOLDEN / name).items():
        case, _, own = full.partition("/")
        cases.setdefault(case, {})[own] = t
    return cases


def replaced(tensors, changes):
    """Tensors, some of them others; None takes one away."""
    return {name: t for name, t in {**tensors, **changes}.items() if t is not None}


def saved(directory, tensors, settings=None, metadata=None, **files):
    """A directory with these tensors, settings in its config.json, and other JSON files."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata or {"format": "pt"})
    for name, said in {**({"config": {"quantization_config": settings}} if settings else {}), **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(said, indent=2) + "\n")
    return directory


def copied(source, target):
    """Read a directory and write it again as what it is: the same files, byte for byte. Returns what was read."""
    info = io.detect(source)
    items = dict(io.read(info))
    io.write(items.items(), target, info.layout, settings=info.settings, config=info.config)
    assert {file.name for file in source.iterdir()} == {file.name for file in target.iterdir()}
    for file in source.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name
    return items


def written(layout, items, settings=None):
    """What the writer of a layout (a module of qkernels.io) stores and states."""
    tensors = {}
    return tensors, layout.write(dict(items).items(), settings, tensors.__setitem__)


def equal_tensors(a, b):
    """Assert that two mappings have the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype and t.shape == b[name].shape, name
        assert torch.equal(t.contiguous().flatten().view(torch.uint8), b[name].contiguous().flatten().view(torch.uint8)), name
