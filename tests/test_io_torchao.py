"""torchao: what it saved means what it says (tests/golden/make_torchao.py), and hostile files raise."""

import json
from pathlib import Path

import pytest
import torch
from cases import equal_values
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qkernels
from qkernels import formats, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io import torchao
from qkernels.io.shards import Tensors

FILE = Path(__file__).parent / "golden" / "torchao.safetensors"
GOLDEN = load_file(FILE)
with safe_open(FILE, "pt") as _file:
    METADATA = _file.metadata()
CASES = sorted(name.removesuffix(".values") for name in GOLDEN if name.endswith(".values"))
CONFIG = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    "modules_to_not_convert": None,
    "include_input_output_embeddings": False,
}


def parts(case):
    """The tensors and the metadata of one case."""
    tensors = {name: t for name, t in GOLDEN.items() if name.startswith(f"{case}._weight_")}
    return tensors, {"tensor_names": json.dumps([f"{case}.weight"]), f"{case}.weight": METADATA[f"{case}.weight"]}


def saved(directory, tensors, metadata, settings=CONFIG):
    save_file(tensors, directory / "model.safetensors", metadata)
    (directory / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return directory


def read(directory, tensors, metadata, settings=CONFIG):
    return dict(qkernels.io.read(saved(directory, tensors, metadata, settings)))


@pytest.fixture(scope="module")
def items():
    return dict(torchao.read(Tensors([FILE]), CONFIG))


@pytest.mark.parametrize("case", CASES)
def test_values(case, items):
    """Decoded in the wider type of torchao's and the scales', the values are rounded once to torchao's."""
    q, values = items[f"{case}.weight"], GOLDEN[f"{case}.values"]
    compute = torch.bfloat16 if q.scales.dtype == torch.bfloat16 else torch.float32
    equal_values(reference.decode(q, compute).to(values.dtype), values)
    assert formats.is_known(q.format)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("int8_PerRow", "u8b128_g-1_sf32"),
        ("int8_PerTensor", "u8b128_g-1x-1_sf32"),
        ("int8_PerGroup", "u8b128_g16_sf32"),
        ("int8_bf16", "u8b128_g-1_sf32"),
        ("int8_asymmetric", "u8_g-1_zi_sf32"),
        ("intx1_symmetric", "u1b1_g8_sf32"),
        ("intx5_symmetric", "u5b16_g8_sf32"),
        ("intx5_asymmetric", "u5_g8_zi_sf32"),
        ("intx4_bf16", "u4_g-1_zi_sbf16"),
        ("intx3_float_zeros", "u3b4_g8_zf_sf32"),
        ("int4_minima", "u4b8_g16_zm_sf32"),
        ("int4_no_minima", "u4b8_g16_sf32"),
        ("e4m3_PerRow", "e4m3_g-1_sf32"),
        ("e4m3_PerBlock", "e4m3_g16x4_sf32"),
        ("nvfp4", "e2m1_g16_se4m3"),
        ("nvfp4_tensor", "e2m1_g16_se4m3_t"),
        ("mx_e3m2", "e3m2_g32_se8m0"),
        ("mx_e2m1", "e2m1_g32_se8m0"),
    ],
)
def test_formats(case, name, items):
    assert items[f"{case}.weight"].format.name == name


def test_everything_else(items):
    assert items.keys() == {f"{case}.{leaf}" for case in CASES for leaf in ("weight", "values")} | {"plain.weight"}
    assert torch.equal(items["plain.weight"], torch.ones(3))


def test_in_several_files(tmp_path):
    """transformers writes the same metadata into each."""
    tensors, metadata = parts("int8_PerRow")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for file, name in zip(names, tensors, strict=True):
        save_file({name: tensors[name]}, tmp_path / file, metadata)
    index = {"weight_map": dict(zip(tensors, names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    items = dict(qkernels.io.read(tmp_path))
    equal_values(reference.decode(items["int8_PerRow.weight"]), GOLDEN["int8_PerRow.values"])


def test_pickles_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin"):
        qkernels.io.detect(tmp_path)


def test_an_older_float8_without_its_block_size(tmp_path):
    for case in ("e4m3_PerRow", "e4m3_PerTensor"):
        tensors, metadata = described(case, {"block_size": None})
        q = read(tmp_path, tensors, metadata)[f"{case}.weight"]
        equal_values(reference.decode(q), GOLDEN[f"{case}.values"])
    with pytest.raises(CheckpointError, match=r"block_size is \[\], not 2 positive integers"):
        read(tmp_path, *described("e4m3_PerBlock", {"block_size": None}))


def described(case, changes):
    """A case whose attributes are changed."""
    tensors, metadata = parts(case)
    said = json.loads(metadata[f"{case}.weight"])
    said["_data"] |= changes
    return tensors, metadata | {f"{case}.weight": json.dumps(said)}


DESCRIBED = [
    ("int8_PerRow", {"block_size": [0, 48]}, r"block_size is \[0, 48\], not 2 positive integers"),
    ("int8_PerRow", {"block_size": [1, 47]}, r"block_size is \[1, 47\], which does not divide 5 x 48"),
    ("int8_PerRow", {"block_size": [1, 24]}, r"_weight_scale is \[5, 1\]; \[5, 2\] is needed"),
    ("int8_PerRow", {"block_size": [1, 2, 3]}, "not 2 positive integers"),
    ("int8_PerRow", {"block_size": "1x48"}, "block_size is '1x48', not list"),
    ("int8_PerRow", {"bias": 3}, "bias = 3, which is unknown"),
    ("intx4_symmetric", {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}}, "target_dtype is 'int9'; int1, int2"),
    ("intx4_symmetric", {"target_dtype": {}}, "target_dtype is None"),
    ("intx4_symmetric", {"target_dtype": {"_type": "torch.dtype", "_data": "int3"}}, r"_weight_qdata holds -?\d, beyond int3"),
    ("int4_minima", {"shape": [3, 64]}, r"shape is \[3, 64\], but int4_minima._weight_qdata holds 3 x 32 codes"),
    ("int4_minima", {"block_size": [3, 16]}, "block_size has 3 rows; an Int4Tensor has 1"),
    ("int4_minima", {"block_size": [1, 8]}, r"_weight_scale is \[2, 3\]; \[4, 3\]"),
    ("nvfp4", {"block_size": 32}, "block_size is 32; 16 are read"),
    ("nvfp4", {"is_swizzled_scales": True}, r"_weight_scale is \[6, 3\]; \[1, 512\] is needed"),
    ("nvfp4_swizzled", {"is_swizzled_scales": False}, r"\[130, 5\] is needed"),
    ("mx_e4m3", {"elem_dtype": {"_type": "torch.dtype", "_data": "float8_e5m2"}}, "qdata is torch.float8_e4m3fn; torch.float8_e5m2"),
    ("mx_e4m3", {"elem_dtype": "fp7"}, "elem_dtype is 'fp7'"),
    ("mx_e4m3", {"block_size": 128}, "has K = 64, no multiple of its blocks of 128"),
]


@pytest.mark.parametrize(("case", "changes", "message"), DESCRIBED)
def test_hostile_descriptions(case, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, *described(case, changes))


METADATA_CASES = {
    "no names": ({"tensor_names": None}, "has no tensor_names, as torchao writes them"),
    "names": ({"tensor_names": "{}"}, "tensor_names is no JSON list of names"),
    "names of numbers": ({"tensor_names": "[1]"}, "tensor_names is no JSON list of names"),
    "deep": ({"tensor_names": "[" * 100000}, "tensor_names is no JSON"),
    "not described": ({"int8_PerRow.weight": None}, "names 'int8_PerRow.weight' but does not describe it"),
    "truncated": ({"int8_PerRow.weight": '{"_type": "Int8'}, "metadata: int8_PerRow.weight is no JSON"),
    "10 MB": ({"int8_PerRow.weight": " " * 10_000_000}, "has 10000000 bytes; 65536 at most"),
    "nested": ({"int8_PerRow.weight": '{"_type":' * 1000}, "is no JSON"),
    "no type": ({"int8_PerRow.weight": "{}"}, "lacks _type"),
    "no data": ({"int8_PerRow.weight": '{"_type": "Int8Tensor"}'}, "lacks _data"),
    "data": ({"int8_PerRow.weight": '{"_type": "Int8Tensor", "_data": 3}'}, "_data is 3, not dict"),
    "plain": ({"int8_PerRow.weight": '{"_type": "Tensor"}'}, "_weight_qdata belongs to no tensor that the metadata describes"),
    "twice": ({"tensor_names": '["int8_PerRow.weight", "x.weight"]', "x.weight": '{"_type": "Int8Tensor"}'}, "x.weight is in the metadata"),
    "no module": ({"tensor_names": '["weight"]', "weight": '{"_type": "Int8Tensor"}'}, "weight has no module"),
}


@pytest.mark.parametrize("case", METADATA_CASES)
def test_hostile_metadata(case, tmp_path):
    changes, message = METADATA_CASES[case]
    tensors, metadata = parts("int8_PerRow")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tensors, {key: value for key, value in (metadata | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        ("int8_PerRow", {"scale": None}, CheckpointError, r"has the tensors .* and .*'scale'"),
        ("int8_PerRow", {"qdata": torch.ones(5, 48)}, CheckpointError, "qdata is torch.float32; torch.int8"),
        ("int8_PerRow", {"qdata": torch.ones(2, 5, 48, dtype=torch.int8)}, UnsupportedError, "weights of two dimensions"),
        ("int8_PerRow", {"scale": torch.ones(5, 1, dtype=torch.int32)}, CheckpointError, "scale is torch.int32"),
        ("int8_PerRow", {"bonus": torch.ones(5)}, CheckpointError, "_weight_bonus belongs to no tensor"),
        (
            "intx3_float_zeros",
            {"scale": torch.ones(3, 3).bfloat16()},
            UnsupportedError,
            "numbers that torch.bfloat16, the type of the scales",
        ),
        ("int4_minima", {"zero_point": torch.ones(2, 3).half()}, CheckpointError, "zero_point is torch.float16; torch.float32"),
        ("nvfp4_tensor", {"per_tensor_scale": torch.ones(2)}, CheckpointError, r"per_tensor_scale is \[2\]; \[1, 1\]"),
        ("mx_e2m3", {"qdata": torch.full((4, 64), 64, dtype=torch.uint8)}, CheckpointError, "holds the code 64, beyond 6 bits"),
    ],
)
def test_hostile_tensors(case, changes, error, message, tmp_path):
    tensors, metadata = parts(case)
    tensors = tensors | {f"{case}._weight_{leaf}": t for leaf, t in changes.items()}
    with pytest.raises(error, match=message):
        read(tmp_path, {name: t for name, t in tensors.items() if t is not None}, metadata)


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "SomethingNew"])
def test_classes_that_are_not_read(kind, tmp_path):
    tensors, metadata = parts("int4_minima")
    metadata["int4_minima.weight"] = metadata["int4_minima.weight"].replace("Int4Tensor", kind)
    with pytest.raises(UnsupportedError, match=f"int4_minima.weight is a {kind}, which is not read; Int8Tensor, Intx"):
        read(tmp_path, tensors, metadata)


def test_scaled_activations(tmp_path):
    tensors, metadata = parts("int8_PerRow")
    said = json.loads(metadata["int8_PerRow.weight"])
    said["_tensor_data_names"].append("act_pre_scale")
    tensors["int8_PerRow._weight_act_pre_scale"] = torch.ones(48)
    with pytest.raises(UnsupportedError, match="act_pre_scale: a weight whose activations are scaled first"):
        read(tmp_path, tensors, metadata | {"int8_PerRow.weight": json.dumps(said)})


def test_hostile_settings(tmp_path):
    with pytest.raises(CheckpointError, match="quant_types = 3, which is unknown"):
        read(tmp_path, *parts("int8_PerRow"), {**CONFIG, "quant_types": 3})
