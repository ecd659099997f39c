"""ggml's block types against ggml's own C code: decoding is exact, for every byte; golden/make_ggml.py tells how the vectors were made."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values, random_blocks

import qkernels
from qkernels import formats, reference
from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import Int, QuantTensor
from qkernels.formats.ggml import TYPES, type_id
from qkernels.quantizers.rtn import rtn

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "ggml.npz"))
FLOAT_SCALES = {39: (1, 0xFE), 40: (4, 0x7E)}  # how many bytes are float scales, and the last that we and ggml take for the same number

every_type = pytest.mark.parametrize("id", TYPES, ids=lambda id: TYPES[id].name)
joined_types = pytest.mark.parametrize("id", [id for id, f in TYPES.items() if f.block.join], ids=lambda id: TYPES[id].name)
made_types = pytest.mark.parametrize("id", [id for id, f in TYPES.items() if f.block.encode], ids=lambda id: TYPES[id].name)


def golden(id, field):
    return torch.from_numpy(GOLDEN[f"{id}.{field}"])


def weight():
    return torch.from_numpy(GOLDEN["weight"]).float()


def raw_blocks(id, blocks):
    raw = np.frombuffer(np.random.RandomState(id).bytes(blocks * TYPES[id].block.nbytes), np.uint8).reshape(blocks, -1)
    return torch.from_numpy(raw.copy())


def decoded(id, raw):
    return reference.decode(QuantTensor(TYPES[id], (len(raw), raw.shape[1] // TYPES[id].block.nbytes * TYPES[id].block.elements), raw))


@every_type
def test_decodes_as_ggml_does(id):
    equal_values(decoded(id, golden(id, "blocks")), golden(id, "values"))


@every_type
def test_decodes_every_byte_as_ggml_does(id):
    """A thousand blocks of random bytes, by the hash of their values; -0 is 0, and so is what is not finite."""
    raw = raw_blocks(id, 1024)
    scales, last = FLOAT_SCALES.get(id, (0, 0))
    raw[:, :scales] = raw[:, :scales].clamp(max=last)
    values = decoded(id, raw)
    values = torch.where(torch.isfinite(values), values, 0.0) + 0.0
    assert hashlib.sha256(values.numpy().tobytes()).digest() == GOLDEN[f"{id}.digest"].tobytes()


@joined_types
def test_blocks_come_apart_and_together(id):
    raw = raw_blocks(id, 300)[:, None]
    assert torch.equal(TYPES[id].block.join(TYPES[id].block.split(raw)), raw)
