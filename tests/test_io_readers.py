"""What all readers have in common, and the ways in which they take what is stored."""

import importlib

import pytest
import torch
from checkpoints import saved

from qkernels import io
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantStack, QuantTensor
from qkernels.io import checked, weights
from qkernels.io.modules import Module, walk

SETTINGS = {
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "auto-round": {"bits": 4, "group_size": 32},
    "compressed-tensors": {"config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True},
    "hqq": {},
    "torchao": {},
    "fp8": {},
    "mxfp4": {},
    "modelopt": {"quant_algo": "NVFP4"},
}
every_layout = pytest.mark.parametrize("layout", SETTINGS)


def read(directory, layout, tensors, **more):
    stated = {"quant_method": layout, **SETTINGS[layout], **more}
    metadata = {"format": "pt", "tensor_names": "[]"}  # as torchao needs it
    return dict(io.read(saved(directory, tensors, stated, metadata)))


@every_layout
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_scale(layout, dtype, tmp_path):
    with pytest.raises(CheckpointError, match=r"a.weight is torch.\w+ \[2, 4\], codes of a quantised weight, and has no scale beside it"):
        read(tmp_path, layout, {"a.weight": torch.ones(2, 4).to(dtype)})


@every_layout
def test_settings_that_nobody_knows(layout, tmp_path):
    with pytest.raises(CheckpointError, match="has rotated = True, which is unknown"):
        read(tmp_path, layout, {"a.weight": torch.ones(2, 4)}, rotated=True)


@every_layout
def test_settings_of_another(layout):
    reader = importlib.import_module(f"qkernels.io.{layout.replace('-', '_')}")
    with pytest.raises(CheckpointError, match="quant_method is 'other'"):
        list(reader.read({}, {**SETTINGS[layout], "quant_method": "other"}))


def test_mlx_is_named(tmp_path):
    saved(tmp_path, {"a.weight": torch.ones(2, 4)}, None)
    (tmp_path / "config.json").write_text('{"quantization": {"bits": 4, "group_size": 64}}')
    with pytest.raises(UnsupportedError, match=r"quantised by MLX .*'bits': 4"):
        io.detect(tmp_path)


def test_a_module_takes_what_is_asked():
    module = Module({"m.a": torch.ones(2, 1), "m.b": torch.ones(0, 3), "x": torch.ones(1)}, "m", ("a", "b", "c"))
    assert module.leaves == ["a", "b"] and module.find("c", torch.float32) is None
    assert module.take("a", torch.float16, torch.float32, shape=(-1, 1)).shape == (2, 1)
    assert module.numbers("a", torch.float32, shape=(1, 2)).shape == (1, 2)
    for ask, message in (
        (lambda: module.take("c", torch.float32), r"m.c is missing; a, b is there"),
        (lambda: module.take("a", torch.float16, torch.int8), r"m.a is torch.float32, not torch.float16 or torch.int8"),
        (lambda: module.take("a", torch.float32, shape=(2, 2)), r"m.a is \[2, 1\], not \[2, 2\]"),
        (lambda: module.take("a", torch.float32, shape=(2,)), r"m.a is \[2, 1\], not \[2\]"),
        (lambda: module.take("b", torch.float32, shape=(-1, -1)), r"m.b is \[0, 3\], not \[any, any\]"),
        (lambda: module.numbers("a", torch.float32, shape=(1,)), r"m.a is \[2, 1\], not \[1\]"),
        (lambda: Module({"m.a": torch.ones(1)}, "m", ("a",)).done(), r"m.a is there, which the settings of m leave no use for"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ask()


def test_walk():
    """In the order of the names, a module where its first tensor comes."""
    names = ("z", "m.bias", "m.scale", "n.scale", "m.q", "y")
    tensors = {name: torch.ones(1) for name in names}
    found = list(walk(tensors, ("q",), ("q", "scale")))
    assert [name for name, _ in found] == ["z", "m.bias", "m.weight", "n.scale", "y"] and found[2][1].leaves == ["q", "scale"]
    assert [name for name, _ in walk(tensors, ("q",), ("q", "scale"), beside=("bias",))] == [name for name, _ in found]
    with pytest.raises(CheckpointError, match=r"m\.bias lies beside m.q; a quantised module has q, scale"):
        list(walk(tensors, ("q",), ("q", "scale"), beside=()))
    with pytest.raises(CheckpointError, match=r"a tensor is called q, and not <module>\.q"):
        list(walk({"q": torch.ones(1)}, ("q",), ("q",)))


def test_assemble_names_what_does_not_fit():
    codes, scales = torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3)
    assert weights.assemble("a.weight", Int(8, 128), (3, 4), (1, -1), codes, scales).scales.shape == (3, 1)
    for changes, message in (
        ({"shape": (3, 0)}, "a.weight is 3 x 0"),
        ({"shape": (3, 5)}, r"a.weight: format \S+ needs codes \[3, 5\]"),
        ({"scales": torch.ones(2)}, r"a.weight: the tensor of scales of 3 x 4 weights in groups of 1 x all is \[2\], not \[3, 1\]"),
        ({"scales": scales.double()}, "a.weight: .*float64"),
        ({"zeros": scales}, "a.weight: a code with a bias has its zero point already"),
        ({"zeros": scales, "code": Int(8)}, r"a.weight: format \S+ needs zeros \[3, 1\] torch.uint8, not .* torch.float32"),
        ({"zeros": scales[:2].byte(), "code": Int(8)}, "a.weight: the tensor of zero points of 3 x 4"),
    ):
        given = {"code": Int(8, 128), "shape": (3, 4), "group": (1, -1), "codes": codes, "scales": scales} | changes
        with pytest.raises(CheckpointError, match=message):
            weights.assemble("a.weight", **given)


def test_names_are_put_before_errors_once():
    for error, kind in ((CheckpointError, CheckpointError), (UnsupportedError, UnsupportedError)):
        for message in ("is wrong", "m.fc: is wrong"):
            with pytest.raises(kind, match=r"^m\.fc: is wrong$"), weights.naming("m.fc"):
                raise error(message)


def test_origin_is_of_one_layout():
    q = QuantTensor(*_quant(), origin={"layout": "gptq", "scales": None})
    assert weights.kept(q, "gptq") == q.origin and not weights.kept(q, "awq")
    with pytest.raises(UnsupportedError, match=r"a.weight is a stack \[2, 3, 4\]; it holds single weights"):
        weights.single("a.weight", QuantStack.of([q, q]), "it")
    assert weights.single("a.weight", q, "it") is q


def _quant():
    q = weights.assemble("a", Int(8, 128), (3, 4), (1, -1), torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3))
    return q.format, q.shape, q.codes, q.scales


def test_json():
    assert checked.json_object(b'{"a": Infinity}', "there", finite=False)["a"] == float("inf")
    for text, message in ((b'{"a": Infinity}', "Infinity is no number"), (b"\xff", "is no JSON"), ("[1]", "is no JSON object")):
        with pytest.raises(CheckpointError, match=f"there {message}|there is no JSON: {message}"):
            checked.json_object(text, "there")
    with pytest.raises(CheckpointError, match="there has more than 5 bytes"):
        checked.json_object("{}    ", "there", most=5)
