"""HQQ: what it saved means what it says (tests/golden/make_hqq.py), and hostile files raise."""

import json
import logging
from pathlib import Path

import pytest
import torch
from cases import equal_values
from safetensors.torch import load_file, save_file

import qkernels
from qkernels import formats, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io import hqq

GOLDEN = load_file(Path(__file__).parent / "golden" / "hqq.safetensors")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
STRIDED = [case for case in CASES if "axis0" in case]
CONFIG = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}, "offload_meta": False}, "skip_modules": ["lm_head"]}


def golden(case):
    held = {name.removeprefix(f"{case}/"): t for name, t in GOLDEN.items() if name.startswith(f"{case}/")}
    return held, held.pop("values")


def read(tensors, settings=CONFIG):
    return dict(hqq.read(tensors, settings))


@pytest.mark.parametrize("case", [case for case in CASES if case not in STRIDED])
def test_values(case):
    """Decoded in the compute_dtype, where every rounding is hqq's."""
    tensors, values = golden(case)
    items = read(tensors)
    q = items.pop("X.weight")
    assert items.keys() == {"X.bias"} & tensors.keys()
    equal_values(reference.decode(q, values.dtype), values)
    assert q.format.zero == "float" and formats.is_known(q.format)
    assert f"u{case[0] if case[1:4] != '.58' else 2}_" in q.format.name


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("4bit_fp16", "u4_g32_zf_sf16"),
        ("3bit_bf16", "u3_g32_zf_sbf16"),
        ("1.58bit_axis1", "u2_g16_zf_sf32"),
        ("4bit_straddling", "u4_g16_zf_sf32"),
        ("3bit_straddling", "u3_g8_zf_sf32"),
        ("4bit_rows", "u4_g-1_zf_sf32"),
        ("8bit_columns", "u8_g1x-1_zf_sf32"),
        ("4bit_columns", "u4_g1x-1_zf_sf32"),
        ("4bit_one", "u4_g-1x-1_zf_sf32"),
    ],
)
def test_formats(case, name):
    assert read(golden(case)[0])["X.weight"].format.name == name


@pytest.mark.parametrize("case", STRIDED)
def test_strided_groups_become_dense(case, caplog):
    tensors, values = golden(case)
    with caplog.at_level(logging.WARNING, "qkernels"):
        weight = read(tensors)["X.weight"]
    equal_values(weight, values)
    assert weight.dtype == values.dtype
    assert caplog.messages == ["1 HQQ weights have strided groups (axis 0), which no kernel takes; they are dense now: X …"]


def test_a_directory(tmp_path):
    tensors, values = golden("4bit_fp16")
    norm = torch.ones(5)
    save_file(tensors | {"norm.weight": norm}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    items = dict(qkernels.io.read(tmp_path))
    assert items.keys() == {"X.weight", "norm.weight"} | ({"X.bias"} & tensors.keys()) and torch.equal(items["norm.weight"], norm)
    equal_values(reference.decode(items["X.weight"], torch.float16), values)


def test_pickles_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    (tmp_path / "qmodel.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"only qmodel\.pt"):
        qkernels.io.detect(tmp_path)


def number(value, dtype=torch.int32):
    return torch.tensor(value, dtype=dtype)


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


FLAG = number(1, torch.uint8)
HOSTILE = {
    "bits": ({"nbits": number(7)}, "nbits 7 in packing '4bit_u8'; 8 in 8bit_u8"),
    "bits NaN": ({"nbits": torch.tensor(float("nan"))}, r"X.nbits is \[\] \[nan\]; one finite number is needed"),
    "packing": ({"packing": text("3bit_32")}, "nbits 4 in packing '3bit_32'"),
    "no ASCII": ({"packing": torch.full((9,), 255, dtype=torch.uint8)}, "nbits 4 in packing"),
    "long packing": ({"packing": torch.zeros(10_000_000, dtype=torch.uint8)}, "X.packing has 10000000 characters; 64 at most"),
    "axis": ({"axis": number(2)}, "X.axis is 2; 0 or 1"),
    "no axis": ({"axis": None}, "X.axis is missing"),
    "axes": ({"axis": number([1, 1])}, r"X.axis is \[2\] \[1, 1\]; one finite number"),
    "group 0": ({"group_size": number(0)}, "group_size is 0, which does not divide 8 x 64"),
    "group 33": ({"group_size": number(33)}, "group_size is 33"),
    "group -32": ({"group_size": number(-32)}, "group_size is -32"),
    "another group": ({"group_size": number(64)}, r"X.W_q is \[8, 32\] torch.uint8; 8 x 64 codes in 4bit_u8 are \[4, 64\]"),
    "shape": ({"shape": number([8, 128], torch.int64)}, r"32 x 32 codes in 4bit_u8 are \[16, 32\]"),
    "huge shape": ({"shape": number([2**31 - 1, 2**31 - 32], torch.int64)}, "X.W_q is|does not divide"),
    "negative shape": ({"shape": number([-8, -64], torch.int64)}, r"X.shape is \[-8, -64\], not 2 positive"),
    "shape of three": ({"shape": number([8, 8, 8], torch.int64)}, r"X.shape is \[3\]; \[2\]"),
    "odd rows": ({"shape": number([1, 32], torch.int64), "W_q": torch.zeros(1, 32, dtype=torch.uint8)}, r"are \[0.5, 32\]"),
    "scale short": ({"scale": torch.ones(15, 1).half()}, r"X.scale is \[15, 1\]; \[16, 1\] is needed"),
    "scale flat": ({"scale": torch.ones(16).half()}, r"X.scale is \[16\]"),
    "scale of integers": ({"scale": torch.ones(16, 1, dtype=torch.int32)}, "X.scale is torch.int32"),
    "no scale": ({"scale": None}, "X.scale is missing"),
    "no zero": ({"zero": None}, "X.zero is missing"),
    "codes as floats": ({"W_q": torch.ones(8, 16).half()}, "X.W_q is torch.float16; torch.uint8 is possible"),
    "floats as codes": ({"view_as_float": FLAG}, "X.W_q is torch.uint8; torch.float16"),
    "no codes": ({"W_q": torch.zeros(0, 32, dtype=torch.uint8)}, r"X.W_q is \[0, 32\]"),
    "compute": ({"compute_dtype": text("os.system")}, "compute_dtype is 'os.system'; torch.float16"),
    "one scale": ({"channel_wise": number(0, torch.uint8)}, r"X.W_q is \[8, 32\]"),
    "unknown": ({"bonus": torch.ones(3)}, "X.bonus beside X.W_q is unknown"),
}


def changed(case, changes):
    return {name: t for name, t in (golden(case)[0] | {f"X.{k}": v for k, v in changes.items()}).items() if t is not None}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case):
    changes, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message):
        read(changed("4bit_fp16", changes))


def test_codes_beyond_their_bits():
    codes = golden("5bit_axis1")[0]["X.W_q"].clone()
    codes[1, 2] = 32
    with pytest.raises(CheckpointError, match=r"X.W_q holds the code 32, beyond 5 bits"):
        read(changed("5bit_axis1", {"W_q": codes}))


def test_scales_of_one_that_are_many():
    with pytest.raises(CheckpointError, match=r"X.zero is \[2\]; channel_wise is 0, and one number is needed"):
        read(changed("4bit_one", {"zero": torch.ones(2)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_scale": FLAG}, "X.quant_scale: scales or zero points that are quantised themselves are not read"),
        ({"quant_zero": FLAG}, "X.quant_zero: scales or zero points"),
        ({"scale_q": torch.ones(3)}, "X.scale_q: scales or zero points"),
        ({"zero": torch.ones(16, 1)}, "X.scale is torch.float16, its zero torch.float32"),
    ],
)
def test_not_supported(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        read(changed("4bit_fp16", changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"quant_method": "hq"}, "quant_method is 'hq'"), ({"quant_configs": {}}, "quant_configs = {}, which is unknown")],
)
def test_hostile_settings(settings, message):
    with pytest.raises(CheckpointError, match=message):
        read({}, settings)
