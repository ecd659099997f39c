"""The golden GGUF files, and what is asked of any."""

import json
from pathlib import Path

import torch

from qkernels import io
from qkernels.formats import QuantStack, QuantTensor

GOLDEN = Path(__file__).parent / "golden"
PUT_IN = json.loads((GOLDEN / "gguf.json").read_text())
SPLIT = "gguf_split-0000{}-of-00003.gguf"
WHOLE = ["gguf_types.gguf", "gguf_aligned.gguf"]


def rewritten(source, path):
    info = io.detect(source)
    io.write(io.read(info), path, "gguf", settings=info.settings)
    return path.read_bytes()


def assert_same(before, after):
    for (name, old), (also, new) in zip(before, after, strict=True):
        assert name == also and type(old) is type(new)
        if isinstance(old, QuantStack):
            assert old.format == new.format and torch.equal(old.tensors["codes"], new.tensors["codes"])
        else:
            assert old.equal(new) if isinstance(old, QuantTensor) else torch.equal(old, new)
