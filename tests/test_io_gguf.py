"""GGUF: files of gguf-py and llama.cpp are read as they were made and written byte for byte."""

import os
import struct

import numpy as np
import pytest
import torch
from cases import equal_values, random_quant
from gguf_files import GOLDEN, PUT_IN, SPLIT, WHOLE, assert_same, rewritten

from qkernels import io, reference
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor, get
from qkernels.formats.ggml import TYPES
from qkernels.io.gguf_file import KeyValues


def first_file(name):
    return GOLDEN / (SPLIT.format(1) if "split" in name else name)


# -- what others write --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUT_IN)
def test_reads_what_was_put_in(name):
    found = dict(io.read(first_file(name)))
    assert list(found) == list(PUT_IN[name])
    for tensor, (type, shape, data) in PUT_IN[name].items():
        value = found[tensor]
        if isinstance(value, torch.Tensor):
            assert str(value.dtype) == ("torch.bfloat16" if type == "BF16" else f"torch.{type}")
            assert list(value.shape) == ([3, 6] if type == "BF16" else shape)
            stored = value
        else:
            assert value.format.name.removeprefix("ggml_") == type.lower()
            stored = value.codes if isinstance(value, QuantTensor) else value.tensors["codes"]
            assert list(stored.shape[-len(shape) :]) == shape and isinstance(value, QuantStack) == (len(shape) == 3)
        assert stored.contiguous().view(torch.uint8).numpy().tobytes().hex() == data, tensor


@pytest.mark.parametrize("name", ["gguf_types.gguf", "gguf_big_endian.gguf"])
def test_every_type_of_key_value(name):
    found = io.detect(GOLDEN / name).settings
    assert list(found)[:3] == ["general.architecture", "general.quantization_version", "general.file_type"]
    of = dict(uint8=255, int8=-128, uint16=65535, int16=-32768, uint32=4294967295, int32=-7, float32=0.5, bool=True, string="Grüße")
    of |= dict(uint64=2**64 - 1, int64=-(2**63), float64=0.1)
    for type, value in of.items():
        assert found[f"of.{type}"] == value and found[f"list.{type}"] == [value, value]
        assert found.types[f"list.{type}"] == f"[{found.types[f'of.{type}']}]"
    assert found["of.bool"] is True
    assert found["tokenizer.ggml.tokens"][3:] == ["é", "\udcff\udcfe"]
    assert found.types["general.file_type"] == "u32" and found.types["of.float64"] == "f64"


@pytest.mark.parametrize("name", [*WHOLE, "gguf_c.gguf"])
def test_rewriting_gives_the_same_bytes(name, tmp_path):
    assert rewritten(GOLDEN / name, tmp_path / "new.gguf") == (GOLDEN / name).read_bytes()


def test_a_file_that_llama_cpp_wrote():
    """Every type it has: the names and sizes are ggml's own."""
    found, stated = dict(io.read(GOLDEN / "gguf_c.gguf")), io.detect(GOLDEN / "gguf_c.gguf").settings
    plain = {"f32": 0, "f16": 1, "i8": 24, "i16": 25, "i32": 26, "i64": 27, "f64": 28, "bf16": 30}
    types = plain | {format.name.removeprefix("ggml_"): id for id, format in TYPES.items()}
    assert {name.lower(): types[name.lower()] for name in found} == types
    for name, value in found.items():
        raw = value if isinstance(value, torch.Tensor) else value.codes
        expected = np.random.default_rng(types[name.lower()]).bytes(raw.nbytes)
        assert value.shape[0] == 3 and raw.view(torch.uint8).numpy().tobytes() == expected
    assert stated["list.string"] == ["a", "", "\udcff"] and stated.types["list.empty"] == "[i32]"
    assert stated["of.f64"] == 0.1 != stated["of.f32"] == float(np.float32(0.1))


@pytest.mark.parametrize("name", ["gguf_big_endian.gguf", SPLIT.format(2)])
def test_others_become_one_little_endian_file(name, tmp_path):
    rewritten(GOLDEN / name, tmp_path / "new.gguf")
    assert_same(io.read(GOLDEN / name), io.read(tmp_path / "new.gguf"))
    before, after = (io.detect(path).settings for path in (GOLDEN / name, tmp_path / "new.gguf"))
    assert before == after and before.types.items() >= after.types.items() and "split.no" not in after


def test_what_is_written_to_tensors_stays_out_of_the_file(tmp_path, recwarn):
    path = tmp_path / "copy.gguf"
    path.write_bytes((GOLDEN / "gguf_types.gguf").read_bytes())
    for _, value in io.read(path):
        tensor = value if isinstance(value, torch.Tensor) else value.codes if isinstance(value, QuantTensor) else value.tensors["codes"]
        tensor.zero_()
    assert path.read_bytes() == (GOLDEN / "gguf_types.gguf").read_bytes()
    assert not recwarn.list  # torch warns of read-only memory


def test_windows_of_a_large_file(monkeypatch):
    """The map is moved along: here after almost every tensor."""
    monkeypatch.setattr("qkernels.io.gguf.WINDOW", 1)
    monkeypatch.setattr("mmap.ALLOCATIONGRANULARITY", 4096)
    test_reads_what_was_put_in("gguf_types.gguf")


def test_a_file_that_shrinks(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes((GOLDEN / "gguf_types.gguf").read_bytes())
    info = io.detect(path)
    items = io.read(info)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkernels.io.gguf.WINDOW", 1)
        next(items)
        os.truncate(path, 2048)
        with pytest.raises(CheckpointError, match="has become shorter"):
            list(items)


# -- what we write ------------------------------------------------------------------------------------------------------------------


def test_natural_types(tmp_path):
    values = {
        "b": (True, "bool"), "s": ("x", "string"), "u": (3, "u32"), "i": (-3, "i32"), "big": (2**40, "u64"), "small": (-(2**40), "i64"),
        "f": (0.5, "f32"), "wide": (1e300, "f64"), "many": ([1, -2], "[i32]"), "words": (["a", ""], "[string]"), "yes": ([True], "[bool]"),
    }  # fmt: skip
    io.write([], tmp_path / "a.gguf", "gguf", settings={key: value for key, (value, _) in values.items()})
    found = io.detect(tmp_path / "a.gguf").settings
    assert found == {key: value for key, (value, _) in values.items()}
    assert found.types == {key: type for key, (_, type) in values.items()}
    found["u"] = 2**32 - 1  # keeps its type
    found.types["none"], found["none"] = "[f64]", []
    io.write([], tmp_path / "b.gguf", "gguf", settings=found)
    assert io.detect(tmp_path / "b.gguf").settings.types == {**found.types}


@pytest.mark.parametrize("value", [None, [], [1, "a"], [[1]], 2**64, {"a": 1}, -(2**63) - 1, b"x"])
def test_values_that_do_not_exist(value, tmp_path):
    items = iter([("a", torch.ones(1))])
    with pytest.raises(FormatError, match="'k' = "):
        io.write(items, tmp_path / "a.gguf", "gguf", settings={"k": value})
    assert not list(tmp_path.iterdir()) and next(items)  # not after gigabytes were written
    with pytest.raises(FormatError, match="key 3 = 1"):
        io.write([], tmp_path / "a.gguf", "gguf", settings={3: 1})
    with pytest.raises(FormatError, match=r"general\.alignment is"):
        io.write([], tmp_path / "a.gguf", "gguf", settings={"general.alignment": value})


@pytest.mark.parametrize("value", [-1, 2**32, "3", 1.5, None])
def test_values_that_do_not_fit_their_type(value, tmp_path):
    with pytest.raises(FormatError, match=r"'k' = .* u32"):
        io.write([], tmp_path / "a.gguf", "gguf", settings=KeyValues({"k": value}, {"k": "u32"}))


@pytest.mark.parametrize("alignment", [1, 2, 8, 4096])
def test_alignments(alignment, tmp_path):
    items = {"a": torch.arange(3, dtype=torch.int8), "b": torch.tensor([0.1, 0.2], dtype=torch.float64), "c": torch.ones(2, 1)}
    io.write(items.items(), tmp_path / "a.gguf", "gguf", settings={"x": "y", "general.alignment": alignment})
    assert_same(items.items(), io.read(tmp_path / "a.gguf"))


def blocks(n, k, name="q8_0"):
    format = get(name)
    return QuantTensor(format, (n, k), torch.randint(256, format.codes_shape(n, k), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "a",
            QuantTensor(get("int8"), (1, 128), torch.zeros(1, 128, dtype=torch.uint8), torch.ones(1, 1)),
            "a is .*which no type of ggml holds",
        ),
        ("a", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("a", torch.zeros(2, 0), "empty"),
        ("a", torch.tensor(1.0), "1 to 4 axes"),
        ("a", torch.zeros(1, 1, 1, 1, 1), "1 to 4 axes"),
        ("n" * 64, torch.zeros(1), "too long"),
    ],
)
def test_what_gguf_cannot_hold(name, value, says, tmp_path):
    with pytest.raises(UnsupportedError, match=says):
        io.write([("first", blocks(2, 64)), (name, value)], tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "type"),
    [
        ("u4b8_g32_sf16", "q4_0"), ("u4b8_g128_sf16", "q4_0"), ("u4b8_g-1_sf16", "q4_0"),
        ("u4_g64_zm_sf16", "q4_1"), ("u5b16_g32_sf16", "q5_0"),
        ("u5_g32_zm_sf16", "q5_1"), ("u8b128_g128_sf16", "q8_0"), ("e2m1_g32_se8m0", "ggml_mxfp4"), ("e2m1_g16_se4m3", "ggml_nvfp4"),
    ],
)  # fmt: skip
def test_other_weights_become_blocks_of_the_same_numbers(format, type, tmp_path):
    q, experts = random_quant(get(format), 6, 128), [random_quant(get(format), 3, 256, seed) for seed in range(2)]
    io.write({"a": q, "b": QuantStack.of(experts)}.items(), tmp_path / "a.gguf", "gguf")
    found = dict(io.read(tmp_path / "a.gguf"))
    assert found["a"].format.name == found["b"].format.name == type
    for made, read in zip([q, *experts], [found["a"], *found["b"]]):
        equal_values(reference.decode(read), reference.decode(made))


def test_the_scale_of_nvfp4_lies_beside_it(tmp_path):
    """As llama.cpp loads it: one number, or one for each expert; for token_embd it knows none."""
    q, experts = random_quant(get("nvfp4"), 6, 128), [random_quant(get("nvfp4"), 3, 64, seed) for seed in range(2)]
    io.write({"a.weight": q, "b.weight": QuantStack.of(experts)}.items(), tmp_path / "a.gguf", "gguf")
    found = dict(io.read(tmp_path / "a.gguf"))
    assert found["a.weight"].format.name == found["b.weight"].format.name == "ggml_nvfp4"
    assert found["a.scale"].shape == (1,) and found["b.scale"].shape == (2,) and found["b.scale"].dtype == torch.float32
    scales = [*found["a.scale"], *found["b.scale"]]
    for made, read, scale in zip([q, *experts], [found["a.weight"], *found["b.weight"]], scales):
        equal_values(reference.decode(read, torch.float64) * scale.double(), reference.decode(made, torch.float64))
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight is e2m1_g16_se4m3_t"):
        io.write([("token_embd.weight", q)], tmp_path / "b.gguf", "gguf")


@pytest.mark.parametrize(
    ("format", "k", "says"),
    [
        ("u4_g32_zi_sf16", 64, "which no type of ggml holds; u4b8_g32_sf16, "),
        ("u4b8_g32_sbf16", 64, "no type of ggml"),
        ("u4b8_g32x2_sf16", 64, "no type of ggml"), ("e2m1_g16_se4m3_t", 64, "no type of ggml"),
        ("u4b8_g16_sf16", 64, "in groups of 16"),
        ("u4b8_g48_sf16", 96, "in groups of 48"), ("u4b8_g64_sf16", 96, "K = 96 in groups of 64"), ("e2m1_g16_se4m3", 96, "blocks of 64"),
    ],
)  # fmt: skip
def test_weights_that_no_blocks_hold(format, k, says, tmp_path):
    with pytest.raises(UnsupportedError, match=f"layer has K|layer is {format}") as raised:
        io.write([("layer", random_quant(get(format), 4, k))], tmp_path / "a.gguf", "gguf")
    assert says in str(raised.value)


def test_negative_scales_of_nvfp4(tmp_path):
    q = random_quant(get("e2m1_g16_se4m3"), 4, 64)
    q.scales.view(torch.uint8)[1, 2] ^= 0x80
    with pytest.raises(UnsupportedError, match="layer has scales that are negative"):
        io.write([("layer", q)], tmp_path / "a.gguf", "gguf")


def test_a_permutation_cannot_be_said(tmp_path):
    q = blocks(2, 64)
    q = QuantTensor(q.format, q.shape, q.codes, perm=torch.arange(64, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match="permutation"):
        io.write([("a", q)], tmp_path / "a.gguf", "gguf")


def test_whole_or_not_at_all(tmp_path):
    def broken():
        yield "a", torch.ones(3)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        io.write(broken(), tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        io.write([], tmp_path / "a.gguf", "gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"
    with pytest.raises(FormatError, match="twice"):
        io.write([("a", torch.ones(3))] * 2, tmp_path / "b.gguf", "gguf")


def test_gguf_py_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed: pip install --no-deps gguf==0.19.0")
    q, experts = blocks(3, 96), QuantStack.of([blocks(2, 32), blocks(2, 32)])
    items = {"q": q, "experts": experts, "plain": torch.randn(2, 5), "half": torch.randn(7).bfloat16()}
    io.write(items.items(), tmp_path / "a.gguf", "gguf", settings={"general.architecture": "llama", "n": [1, -2], "general.alignment": 64})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "llama" and reader.fields["n"].contents() == [1, -2]
    found = {t.name: t for t in reader.tensors}
    assert list(found) == list(items) and found["q"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(found["q"].data, q.codes.numpy()) and np.array_equal(found["experts"].data, experts.tensors["codes"].numpy())
    assert np.array_equal(found["plain"].data, items["plain"].numpy())
    assert found["half"].data.tobytes() == items["half"].view(torch.uint8).numpy().tobytes()


# -- split models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / SPLIT.format(i)).write_bytes((GOLDEN / SPLIT.format(i)).read_bytes())
    return [tmp_path / SPLIT.format(i) for i in (1, 2, 3)]


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_any_part_finds_all(parts, given_part):
    info = io.detect(parts[given_part])
    assert info.files == tuple(parts)
    assert info.settings == io.detect(GOLDEN / "gguf_types.gguf").settings  # without split.count and its kin


@pytest.mark.parametrize("given_part", [0, 2])
def test_parts_that_do_not_fit(parts, given_part):
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf"):
        io.detect(parts[given_part])
    parts[1].write_bytes(parts[0].read_bytes())  # split.no is another
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf says split\.no"):
        io.detect(parts[given_part])
    parts[1].unlink()
    parts[1].symlink_to(parts[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf"):
        io.detect(parts[given_part])
    parts[1].unlink()
    parts[1].write_bytes(patched(second, "split.count", "<H", 4))
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf says split\.no"):
        io.detect(parts[given_part])
    parts[1].write_bytes(second.replace(b"one_axis", b"Q8_0.wei").replace(b"four.axes", b"int16.int"))
    for path in parts:
        path.write_bytes(patched(path.read_bytes(), "split.tensors.count", "<i", 14))
    with pytest.raises(CheckpointError, match=r"split.tensors.count = 14; its parts have 13"):
        io.detect(parts[given_part])


def patched(data, key, form, value):
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def test_a_tensor_in_two_parts(parts):
    parts[2].write_bytes(parts[2].read_bytes().replace(b"one_axis", b"f.tensor"))
    parts[1].write_bytes(parts[1].read_bytes().replace(b"bf16", b"int8"))
    with pytest.raises(CheckpointError, match="'int8' lies in two files"):
        io.detect(parts[0])


@pytest.mark.parametrize(
    ("name", "source"),
    [("model.gguf", SPLIT.format(1)), ("m-00001-of-00002.gguf", SPLIT.format(1)), ("m-00001-of-00002.gguf", "gguf_types.gguf")],
)
def test_names_of_parts(name, source, tmp_path):
    (tmp_path / name).write_bytes((GOLDEN / source).read_bytes())
    with pytest.raises(CheckpointError, match=r"split\.count = .*unlike its name"):
        io.detect(tmp_path / name)
