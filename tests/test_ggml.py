"""ggml's block types against ggml's own C code: decoding is exact, for every byte; golden/make_ggml.py tells how the vectors were made."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values, random_blocks

import qkernels
from qkernels import formats, reference
from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import QuantTensor
from qkernels.formats.ggml import TYPES, type_id
from qkernels.quantizers.rtn import rtn
from qkernels.testing import assert_matmul_close

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


@made_types
def test_encodes_as_ggml_does(id):
    """Byte for byte: rows of zeros, constants, ties, one sign and magnitudes from 1e-7 to 1e3 among them."""
    assert torch.equal(rtn(weight(), TYPES[id]).codes, golden(id, "raw"))


def test_encoded_types_are_all_but_the_vector_codebooks():
    assert {f.name for f in TYPES.values() if f.block.encode is None} == {
        "iq1_s",
        "iq1_m",
        "iq2_xxs",
        "iq2_xs",
        "iq2_s",
        "iq3_xxs",
        "iq3_s",
    }
    assert {f.name for f in TYPES.values() if f.block.join is None and f.block.encode} == {"tq1_0"}
    with pytest.raises(UnsupportedError, match="iq2_xs can be read, not made"):
        rtn(weight(), formats.get("iq2_xs"))


@made_types
def test_encodes_in_chunks_of_blocks(id, monkeypatch):
    """The same bytes from few blocks at a time, from a weight that is no contiguous tensor, and from its rows."""
    whole = rtn(weight(), TYPES[id]).codes
    monkeypatch.setattr("qkernels.formats.ggml_encode._CHUNK", 512)
    assert torch.equal(rtn(weight().T.contiguous().T, TYPES[id]).codes, whole)
    assert torch.equal(rtn(weight()[2:3], TYPES[id]).codes, whole[2:3])


# Relative error of 16 x 1024 Gaussian weights that ggml's C code quantised and decoded.
ERRORS = {
    "q8_0": 0.0053,
    "q6_k": 0.0176,
    "q5_k": 0.0361,
    "q5_1": 0.0378,
    "q5_0": 0.0426,
    "q4_k": 0.0707,
    "iq4_nl": 0.0761,
    "iq4_xs": 0.0767,
    "q4_1": 0.0775,
    "q4_0": 0.0857,
    "ggml_nvfp4": 0.1028,
    "ggml_mxfp4": 0.1145,
    "q3_k": 0.1510,
    "iq3_s": 0.165,
    "iq3_xxs": 0.2135,
    "iq2_s": 0.263,
    "q2_k": 0.292,
    "iq2_xs": 0.31,
    "iq2_xxs": 0.355,
    "iq1_s": 0.51,
    "iq1_m": 0.58,
    "tq1_0": 0.80,
    "tq2_0": 0.80,
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_ggml(name):
    id = type_id(formats.get(name))
    gaussian = weight()[:3]
    error = decoded(id, golden(id, "raw")[:3]) - gaussian
    assert float(error.norm() / gaussian.norm()) < 1.03 * ERRORS[name]  # 2304 weights are a sample


@every_type
def test_every_code_has_its_value(id):
    """Each code that the bytes can give is among the values of the format's code, and random bytes give all that the type has."""
    format = TYPES[id]
    codes = format.block.split(raw_blocks(id, 1024)[:, None]).codes.unique()
    count = {"iq1_s": 6, "iq1_m": 6, "iq2_xxs": 6, "iq2_xs": 6, "iq2_s": 6, "iq3_xxs": 16, "iq3_s": 16, "tq1_0": 3}
    assert len(codes) == count.get(format.name, 2**format.bits)
    assert int(codes.max()) < 2**format.bits


@every_type
def test_catalogue(id):
    format = TYPES[id]
    assert formats.get(format.name) is format and formats.is_known(format) and type_id(format) == id
    assert pickle.loads(pickle.dumps(format)) == format
    assert format.block.elements % format.group[1] == 0
    assert format.nbytes(3, 2 * format.block.elements) == 6 * format.block.nbytes
    with pytest.raises(FormatError, match=f"{format.name} holds K in blocks of {format.block.elements}; K = {format.block.elements + 1}"):
        format.codes_shape(3, format.block.elements + 1)


def test_type_id_of_another_format():
    with pytest.raises(FormatError, match="u4b8_g128_sf16 is no ggml type"):
        type_id(formats.get("int4"))


@made_types
@pytest.mark.parametrize("size", [1e10, 1e30])
def test_scales_that_are_too_large(id, size):
    format = TYPES[id]
    huge = torch.full((1, format.block.elements), size)
    if format.name == "ggml_mxfp4":  # reaches as far as float32
        assert float(reference.decode(rtn(huge, format))[0, 0]) == pytest.approx(size, rel=0.34)
    else:
        with pytest.raises(FormatError, match="beyond the largest of its type"):
            rtn(huge, format)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq3_s", "ggml_mxfp4"])
def test_layer(name):
    q = random_blocks(formats.get(name), 17, 512)
    layer = qkernels.QuantLinear.from_quant_tensor(q, compute="float")
    x = torch.randn(3, 512)
    assert_matmul_close(layer(x), x, reference.decode(q, torch.float64))
    assert torch.equal(layer.state_dict()["weight"], q.codes)
