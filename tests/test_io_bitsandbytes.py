"""bitsandbytes: what it saved means what it says (tests/golden/make_bitsandbytes.py), goes back byte for byte, and hostile files raise."""

import json
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import equal_values, random_quant
from checkpoints import copied, equal_tensors, golden_cases, replaced, saved, written

from qkernels import formats, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Block, Int, QuantFormat, QuantTensor
from qkernels.io import bitsandbytes

GOLDEN = golden_cases("bitsandbytes.safetensors")
FOUR_BITS = sorted(GOLDEN.keys() - {"int8"})
CASES = [*FOUR_BITS, "int8"]
STATE = "X.weight.quant_state.bitsandbytes__nf4"
write = partial(written, bitsandbytes)
CONFIG = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def golden(case):
    """The tensors of a layer, its values, and the scales of its blocks."""
    held = dict(GOLDEN[case])
    values, absmax = held.pop("values"), held.pop("absmax", None)
    return held, values, held.get("X.weight.absmax") if absmax is None else absmax


def read(tensors, settings=CONFIG):
    return dict(bitsandbytes.read(tensors, settings))


def by_bitsandbytes(tensors):
    """Decode a layer's tensors with bitsandbytes' own loader and torch code; its compiled code is wrong where blocks straddle rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = functional.QuantState.from_dict({k: v for k, v in tensors.items() if k.startswith("X.weight.")}, "cpu")
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    with torch.compiler.set_stance("force_eager"):
        raw = tensors["X.weight"].reshape(-1).view(torch.uint8)
        return _dequantize_4bit_compute(raw, absmax, state.code, state.blocksize, state.shape, torch.float32)


@pytest.mark.parametrize("case", FOUR_BITS)
def test_values(case):
    tensors, values, absmax = golden(case)
    q = read(tensors)["X.weight"]
    equal_values(reference.decode(q), values)
    block = json.loads(bytes(next(t for name, t in tensors.items() if "quant_state" in name).tolist()))["blocksize"]
    group = q.format.group[1]
    first = torch.arange(values.numel() // group if q.shape[0] > 1 else q.scales.numel()) * group
    assert torch.equal(q.scales.flatten(), absmax[first // block]) and formats.is_known(q.format)
    assert case.startswith(q.format.code.name)


def test_values_of_int8():
    tensors, values, _ = golden("int8")
    items = read(tensors)
    q = items["X.weight"]
    assert q.format.name == "u8b128_g-1_sf32" and torch.equal(items["X.bias"], tensors["X.bias"])
    equal_values(reference.decode(q), tensors["X.weight"].float() * (tensors["X.SCB"] / 127)[:, None])
    # bitsandbytes multiplies by a rounded 1 / 127 at the end: two roundings where ours are two others
    torch.testing.assert_close(reference.decode(q), values, rtol=2**-22, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_byte_for_byte(case, tmp_path):
    tensors, _, _ = golden(case)
    again, settings = write(read(tensors), CONFIG)
    equal_tensors(again, tensors)
    assert settings is CONFIG
    copied(saved(tmp_path / "a", tensors, config={"model_type": "x", "quantization_config": CONFIG}), tmp_path / "b")


GPTQMODEL = {
    "bits": 4, "group_size": -1, "desc_act": False, "lm_head": False, "method": "bitsandbytes", "quant_method": "bitsandbytes",
    "format": "nf4", "checkpoint_format": "nf4", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "block_size": 64,
    "compress_statistics": True,
}  # fmt: skip


def named_by_gptqmodel(tensors):
    """As its BitsAndBytesLinear calls its buffers; built from its source, as it does not run here."""
    state = {name: "X.weight_quant_state" for name in tensors if ".quant_state." in name}
    sides = {f"X.weight.{side}": f"X.weight_{side}" for side in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    names = {**state, **sides, "X.SCB": "X.weight_scb"}
    return {names.get(name, name): t for name, t in tensors.items() if name != "X.weight_format"}


@pytest.mark.parametrize("case", CASES)
def test_names_of_gptqmodel(case, tmp_path):
    tensors, _, _ = golden(case)
    theirs, settings = named_by_gptqmodel(tensors), GPTQMODEL | ({"bits": 8, "format": "int8"} if case == "int8" else {})
    q = read(theirs, settings)["X.weight"]
    assert q.equal(read(tensors)["X.weight"])
    again, stated = write(read(theirs, settings), settings)
    equal_tensors(again, theirs)
    assert stated is settings
    assert "X.weight_absmax" in write({"X.weight": replace(q, scales=q.scales * 2)})[0] or case == "int8"
    copied(saved(tmp_path / "a", theirs, config={"model_type": "x", "quantization_config": settings}), tmp_path / "b")


def test_damage_under_the_names_of_gptqmodel():
    theirs = named_by_gptqmodel(golden("nf4")[0] if "nf4" in GOLDEN else golden(FOUR_BITS[0])[0])
    strange = torch.tensor(list(b'{"quant_type": "af4"}'), dtype=torch.uint8)
    for changed, message in (
        ({"X.weight_quant_state": strange}, "X.weight_quant_state: quant_type is 'af4'"),
        ({"X.weight_absmax": None}, "absmax is missing"),
        ({"X.weight": None}, "belongs to X.weight, which is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read({name: t for name, t in (theirs | changed).items() if t is not None}, GPTQMODEL)
    with pytest.raises(UnsupportedError, match="rotation is 'hadamard'"):
        read(theirs, GPTQMODEL | {"rotation": "hadamard"})


@pytest.mark.parametrize("case", FOUR_BITS)
def test_other_numbers_are_written_anew(case):
    """What the reader kept is of no use once the scales are others; the tensors are then not nested."""
    q = read(golden(case)[0])["X.weight"]
    q = replace(q, scales=q.scales * 2)
    tensors, settings = write({"X.weight": q})
    equal_values(by_bitsandbytes(tensors), reference.decode(q))
    assert settings["load_in_4bit"] and settings["bnb_4bit_quant_type"] == q.format.code.name
    equal_values(reference.decode(read(tensors, settings)["X.weight"]), reference.decode(q))


@pytest.mark.parametrize("shape", [(3, 64), (5, 96), (2, 384), (4, 8192), (1, 100)])
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_g-1_sf16", "nf4_g128_sbf16", "fp4_g32x2_sf32"])
def test_weights_from_elsewhere(name, shape):
    q = random_quant(formats.get(name), *shape)
    tensors, settings = write({"X.weight": q})
    equal_values(by_bitsandbytes(tensors), reference.decode(q))
    again = read(tensors, settings)["X.weight"]
    equal_values(reference.decode(again), reference.decode(q))
    equal_tensors(write({"X.weight": again})[0], tensors)


def test_loaded_by_its_layer():
    """Linear4bit takes the tensors that we write and multiplies by their values."""
    nn = pytest.importorskip("bitsandbytes.nn")
    q = random_quant(formats.get("nf4"), 24, 128)
    tensors, _ = write({"X.weight": q})
    packed = tensors.pop("X.weight")
    layer = nn.Linear4bit(128, 24, bias=False, quant_type="nf4")
    layer.weight = nn.Params4bit.from_prequantized(packed, {k.removeprefix("X.weight."): v for k, v in tensors.items()}, device="cpu")
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), x @ reference.decode(q).T, rtol=1e-5, atol=1e-5)


def test_int8_from_elsewhere():
    scb = torch.rand(40) + 0.1
    q = random_quant(formats.get("int8"), 40, 24)
    q = QuantTensor(q.format, q.shape, q.codes, (scb / 127)[:, None])
    tensors, settings = write({"X.weight": q, "Y.weight": torch.ones(2, 2), "Z.bias": torch.ones(2)})
    assert torch.equal(tensors["X.SCB"] / 127, scb / 127) and tensors["X.weight_format"].item() == 0
    assert settings["load_in_8bit"] and not settings["load_in_4bit"] and settings["llm_int8_skip_modules"] == ["Y"]
    assert read(tensors, settings)["X.weight"].equal(q)


def test_no_maximum_gives_the_scale():
    one = torch.rand(3000)
    lost = one[(torch.stack([one * 127, *(torch.nextafter(one * 127, torch.tensor(e)) for e in (0.0, 1e9))]) / 127 != one).all(0)]
    assert 0 < len(lost) < len(one) / 32
    q = random_quant(formats.get("int8"), 1, 24)
    with pytest.raises(UnsupportedError, match=r"row 0 has the scale .* SCB / 127 for no float32 SCB"):
        write({"X.weight": replace(q, scales=lost[:1, None])})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4", (4, 128), "X.weight is u4b8_g128_sf16; bitsandbytes holds nf4 and fp4"),
        ("u8b128_g32_sf32", (4, 64), "int8 has one float scale per row"),
        ("nf4_g8_sf32", (4, 64), "groups of 8 in rows of 64; bitsandbytes cuts the flattened weight in blocks of 32, 64"),
        ("nf4_g-1_sf32", (4, 50), "groups of 50 in rows of 50"),
    ],
)
def test_cannot_be_write(name, shape, message):
    with pytest.raises(UnsupportedError, match=message):
        write({"X.weight": random_quant(formats.get(name), *shape)})


def test_cannot_be_written_together():
    blocks = QuantFormat(Int(8, 128), block=Block(32, 34, lambda raw: raw), name="blocks")
    with pytest.raises(UnsupportedError, match=r"X.weight is blocks; bitsandbytes holds"):
        write({"X.weight": QuantTensor(blocks, (1, 32), torch.zeros(1, 34, dtype=torch.uint8))})
    four, eight = (random_quant(formats.get(name), 2, 64) for name in ("nf4", "int8"))
    with pytest.raises(UnsupportedError, match="permuted columns"):
        write({"X.weight": replace(four, perm=torch.arange(64).flip(0).int())})
    with pytest.raises(UnsupportedError, match=r"not both: X.weight, Y.weight"):
        write({"X.weight": four, "Y.weight": read(golden("int8")[0])["X.weight"]})
    with pytest.raises(UnsupportedError, match=r"is a stack \[2, 2, 64\]"):
        write({"X.weight": formats.QuantStack.of([eight, eight])})


def test_dense_under_its_config(caplog):
    dense = {"X.weight": torch.ones(4, 4), "norm.weight": torch.ones(4)}
    with caplog.at_level(logging.WARNING, "qkernels"):
        assert read(dense) == dense
        assert caplog.messages == [
            "no weight of this bitsandbytes checkpoint is quantised: its config asks to quantise on load, which is not done"
        ]
        read(golden("nf4")[0] | dense | {"X.weight": golden("nf4")[0]["X.weight"]})
    assert len(caplog.messages) == 1


def blob(**changes):
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [5, 128]} | changes
    return {STATE: json.dumps({key: value for key, value in said.items() if value is not ...})}


HOSTILE = {
    "truncated JSON": ({STATE: '{"quant_type": "nf4", "blocks'}, "bitsandbytes__nf4 is no JSON: Unterminated"),
    "10 MB": ({STATE: " " * 10_000_000}, "has more than 65536 bytes, the most that are read"),
    "nested 1000 deep": ({STATE: "[" * 1000 + "]" * 1000}, "is no JSON"),
    "a huge number": ({STATE: '{"blocksize": 1' + "0" * 5000 + "}"}, "is no JSON"),
    "no object": ({STATE: "[]"}, "is no JSON object"),
    "no UTF-8": ({STATE: torch.tensor([255], dtype=torch.uint8)}, "is no JSON"),
    "floats for JSON": ({STATE: torch.ones(9)}, "bitsandbytes__nf4 is torch.float32"),
    "blocksize 0": (blob(blocksize=0), "blocksize is 0; 32, 64,"),
    "blocksize 63": (blob(blocksize=63), "blocksize is 63; 32, 64,"),
    "blocksize true": (blob(blocksize=True), "blocksize is True, not int"),
    "no blocksize": (blob(blocksize=...), "lacks blocksize"),
    "another type": (blob(quant_type="fp4"), "quant_type is 'fp4'; 'nf4' are read"),
    "dtype": (blob(dtype="int8"), "dtype is 'int8'"),
    "larger shape": (blob(shape=[5, 256]), r"X.weight has 320 bytes; its quant_state says 5 x 256, 640 bytes"),
    "huge shape": (blob(shape=[2**30, 2**30]), "X.weight has 320 bytes"),
    "negative shape": (blob(shape=[-5, -128]), r"shape is \[-5, -128\], not 2 positive integers"),
    "shape of floats": (blob(shape=[5.0, 128]), "not 2 positive integers"),
    "unknown key": (blob(blocksizes=3), "blocksizes = 3, which is unknown.*did you mean blocksize"),
    "nested keys alone": (blob(nested_offset=0.0), "nested_offset = 0.0, which is unknown"),
    "15 values": ({"X.weight.quant_map": torch.ones(15)}, r"X.weight.quant_map is \[15\], not \[16\]"),
    "half values": ({"X.weight.quant_map": torch.ones(16).half()}, "quant_map is torch.float16"),
    "no values": ({"X.weight.quant_map": None}, "X.weight.quant_map is missing"),
    "absmax too short": ({"X.weight.absmax": torch.ones(9)}, r"X.weight.absmax is \[9\], not \[10\]"),
    "absmax in bytes": ({"X.weight.absmax": torch.ones(10, dtype=torch.uint8)}, "absmax is torch.uint8, not torch.float32"),
    "no absmax": ({"X.weight.absmax": None}, "X.weight.absmax is missing"),
    "weight too short": ({"X.weight": torch.ones(319, 1, dtype=torch.uint8)}, "X.weight has 319 bytes"),
    "weight of int64": ({"X.weight": torch.ones(40, 1, dtype=torch.int64)}, "X.weight is torch.int64"),
    "no weight": ({"X.weight": None}, "belongs to X.weight, which is missing"),
    "no state": ({STATE: None}, "X.weight has no quant_state.bitsandbytes__nf4 or fp4 beside it"),
    "two states": ({STATE.replace("nf4", "fp4"): "{}"}, "exactly one is needed"),
    "nested in part": ({"X.weight.nested_absmax": torch.ones(1)}, "lacks nested_dtype"),
    "alone": ({"Y.weight": torch.ones(4, 1, dtype=torch.uint8)}, r"Y.weight is torch.uint8 \[4, 1\], codes .* and has no scale"),
}  # fmt: skip


def changed(tensors, changes):
    texts = {k: torch.frombuffer(bytearray(v.encode()), dtype=torch.uint8) for k, v in changes.items() if isinstance(v, str)}
    return replaced(tensors, changes | texts)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case):
    changes, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message):
        read(changed(golden("nf4")[0], changes))


NESTED = {
    "offset NaN": ({"nested_offset": float("nan")}, {}, "is no JSON: NaN is no number of it"),
    "offset beyond": ({"nested_offset": 10**400}, {}, "no finite float32"),
    "blocks": ({"nested_blocksize": 100}, {}, "nested_blocksize is 100"),
    "dtype": ({"nested_dtype": "float16"}, {}, "nested_dtype is 'float16'"),
    "map": ({}, {"X.weight.nested_quant_map": torch.ones(255)}, r"nested_quant_map is \[255\], not \[256\]"),
    "no map": ({}, {"X.weight.nested_quant_map": None}, "nested_quant_map is missing"),
    "scales": ({}, {"X.weight.nested_absmax": torch.ones(1)}, r"nested_absmax is \[1\], not \[2\]"),
    "absmax": ({}, {"X.weight.absmax": torch.ones(300)}, "absmax is torch.float32, not torch.uint8"),
}


@pytest.mark.parametrize("case", NESTED)
def test_hostile_nested(case):
    said, changes, message = NESTED[case]
    tensors = golden("nf4_nested")[0]
    said = json.loads(bytes(tensors[STATE].tolist())) | said
    with pytest.raises(CheckpointError, match=message):
        read(changed(tensors, changes | {STATE: json.dumps(said)}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"X.SCB": torch.ones(11)}, CheckpointError, r"X.SCB is \[11\], not \[12\]"),
        ({"X.SCB": torch.ones(12).half()}, CheckpointError, "X.SCB is torch.float16"),
        ({"X.SCB": None}, CheckpointError, "X.weight is torch.int8 .* has no scale beside it"),
        ({"X.weight": torch.ones(12, 96)}, CheckpointError, "X.weight is torch.float32, not torch.int8"),
        ({"X.weight_format": torch.tensor(2, dtype=torch.uint8)}, UnsupportedError, "X.weight_format is 2: a GPU's tile order"),
        ({"X.weight_quant_state": torch.ones(3)}, CheckpointError, "X.weight_quant_state is torch.float32"),
        ({"X.weight_scb": torch.ones(12)}, CheckpointError, "X.SCB and X.weight_scb are the same tensor"),
    ],
)
def test_hostile_int8(changes, error, message):
    with pytest.raises(error, match=message):
        read(changed(golden("int8")[0], changes))


def test_not_supported():
    with pytest.raises(UnsupportedError, match=r"quant_map is \[0, 1, 2, .*not the table of nf4"):
        read(changed(golden("nf4")[0], {"X.weight.quant_map": torch.arange(16.0)}))
    with pytest.raises(UnsupportedError, match="weights of two dimensions are read"):
        read(changed(golden("nf4")[0], blob(shape=[5, 8, 16])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both true"),
        ({"load_in_4bit": True, "_load_in_4bit": False}, "contradicts itself"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1, not bool"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"bnb_4bit_zero_point": 3}, "bnb_4bit_zero_point = 3, which is unknown"),
    ],
)
def test_hostile_settings(settings, message):
    with pytest.raises(CheckpointError, match=message):
        read({}, settings)
    with pytest.raises(CheckpointError, match=message):
        write({}, settings)


def test_packed_in_two_dimensions():
    """Some dumps keep [N, K / 2]; the shape goes back too."""
    tensors, values, _ = golden("nf4")
    tensors["X.weight"] = tensors["X.weight"].view(5, 64)
    items = read(tensors)
    equal_values(reference.decode(items["X.weight"]), values)
    equal_tensors(write(items)[0], tensors)
