"""GPTQ checkpoints: AutoGPTQ's own files and values, what no producer makes from the description (words.py), and files that are wrong."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values, random_quant
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from words import GOLDEN_LEAVES, equal_tensors, gptq, less_one, numbers, words

from qkernels import formats, io, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.io import gptq as layout

FILES = {bits: np.load(Path(__file__).parent / "golden" / f"gptq_{bits}.npz") for bits in (2, 3, 4, 8)}
CASES = [(bits, key.removesuffix(".dense")) for bits, file in FILES.items() for key in file if key.endswith(".dense")]
STATED = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}


def golden(bits, case, module="m.fc"):
    """Tensors of a module, its settings, and AutoGPTQ's values."""
    held = {f"{module}.{leaf}": torch.from_numpy(FILES[bits][f"{case}.{leaf}"]) for leaf in GOLDEN_LEAVES}
    stated = {"bits": bits, "group_size": int(case.split("_")[0][1:]), "sym": "_sym_" in case}
    return held, stated, torch.from_numpy(FILES[bits][f"{case}.dense"])


def read(tensors, **stated):
    return dict(layout.read(tensors, {**STATED, **stated}))


def write(items, stated=None):
    tensors = {}
    return tensors, layout.write(items.items(), stated, lambda name, t: tensors.update({name: t}))


@pytest.mark.parametrize(("bits", "case"), CASES)
def test_golden(bits, case):
    """The values are AutoGPTQ's; where its layer has 16 bits they are rounded once there, from the same products."""
    held, stated, dense = golden(bits, case)
    q = read(held, **stated)["m.fc.weight"]
    equal_values(reference.decode(q).to(dense.dtype), dense)
    several = q.scales.shape[1] > 1
    assert (q.perm is not None) == ("_act_" in case and several)
    assert (q.zeros is None) == stated["sym"] and not q.origin
    equal_tensors(write({"m.fc.weight": q}, {**STATED, **stated})[0], held)
    equal_tensors(write({"m.fc.weight": q})[0], held)


def test_golden_directory(tmp_path):
    """All of them as one checkpoint, each module by an entry of `dynamic`; written again it is the same, file for file."""
    tensors, dynamic, expected = {}, {}, {}
    for i, (bits, case) in enumerate(CASES):
        module = f"model.layers.{i}.mlp.fc"
        held, stated, dense = golden(bits, case, module)
        tensors |= held | {f"{module}.bias": torch.rand(dense.shape[0]).half()}
        dynamic[f"+:^model\\.layers\\.{i}\\."] = stated
        expected[f"{module}.weight"] = dense
    tensors |= {"model.norm.weight": torch.rand(8), "lm_head.weight": torch.rand(16, 8)}
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": {**STATED, "dynamic": {"-:.*lm_head": {}, **dynamic}}}
    (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    info = io.detect(source)
    assert info.layout == "gptq"
    items = dict(io.read(info))
    assert items.keys() == expected.keys() | {name for name in tensors if name.endswith(("bias", "norm.weight", "head.weight"))}
    for name, dense in expected.items():
        equal_values(reference.decode(items[name]).to(dense.dtype), dense)
    io.write(items.items(), tmp_path / "copy", "gptq", settings=info.settings, config=info.config)
    for file in source.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    io.write(items.items(), tmp_path / "anew", "gptq")  # without the settings: others that say the same
    equal_tensors(load_file(tmp_path / "anew" / "model.safetensors"), tensors)
    again = dict(io.read(tmp_path / "anew"))
    assert all(again[name].equal(items[name]) for name in expected)


def test_legacy_settings_file(tmp_path):
    held, stated, dense = golden(4, "g32_asym_none_32x96")
    save_file(held, tmp_path / "model.safetensors")
    legacy = {"wbits": 4, "q_group_size": stated["group_size"], "zero_point": True, "model_name_or_path": None, "static_groups": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(legacy))
    equal_values(reference.decode(dict(io.read(tmp_path))["m.fc.weight"]).half(), dense)


# -- what no producer makes: from the description ---------------------------------------------------------------------------------


def index(kind, k, size, seed=0):
    g = np.random.default_rng(seed)
    plain = np.arange(k) // size
    if kind == "random":
        return g.permutation(plain)
    if kind == "empty group":  # the second has no column, the others are of any length
        drawn = g.integers(plain.max() + 1, size=k)
        return np.where(drawn == 1, 0, drawn)
    if kind == "reversed":
        return plain.max() - plain
    return plain


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 8, 24, 100]),
    st.sampled_from([8, 32, 40, 96, 100, 160]),
    st.sampled_from([-1, 16, 32, 48, 64, 128]),
    st.sampled_from(["plain", "random", "empty group", "reversed"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_description(bits, n, k, group_size, kind, exact, sym, seed):
    """Any shape, group and order, zero points that borrow from their neighbours among them; and back to the same words."""
    size = k if group_size == -1 else group_size
    codes, zeros, scales = numbers(n, k, bits, -(-k // size), seed)
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    held, weight = gptq(codes, zeros, scales, index(kind, k, size, seed), bits, exact)
    stated = {**STATED, "bits": bits, "group_size": group_size, "checkpoint_format": "gptq_v2" if exact else "gptq"}
    q = read(held, **stated)["m.fc.weight"]
    equal_values(reference.decode(q), weight)
    assert (q.format.zero == "none") == bool((zeros == 2 ** (bits - 1)).all())
    tensors, given = write({"m.fc.weight": q}, stated)
    assert given is stated
    equal_tensors(tensors, held)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_borrowed_words(bits):
    """A zero point of 0 takes from the field above; the whole word gives it back, where field by field would not. 3 bits: they wrap."""
    zeros = np.zeros((1, 32), int)
    zeros[0, 1::2] = 2
    codes = np.arange(32 * 32).reshape(32, 32) % 2**bits
    held, weight = gptq(codes, zeros, torch.ones(1, 32).half(), np.zeros(32, int), bits)
    assert torch.equal(held["m.fc.qzeros"], words((zeros - 1) % 2**bits, bits)) == (bits == 3)
    equal_values(reference.decode(read(held, bits=bits)["m.fc.weight"]), weight)


@pytest.mark.parametrize(("label", "exact"), [("gptq", True), ("gptq_v2", False)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mislabelled_symmetric_zeros(bits, label, exact):
    codes, zeros, scales = numbers(32, 64, bits, 2)
    held, weight = gptq(codes, np.full_like(zeros, 2 ** (bits - 1)), scales, np.arange(64) // 32, bits, exact)
    stated = {**STATED, "bits": bits, "sym": True, "checkpoint_format": label}
    q = read(held, **stated)["m.fc.weight"]
    assert q.format == formats.get(f"u{bits}b{2 ** (bits - 1)}_g32_sf16") and q.origin.keys() == {"qzeros"}
    equal_values(reference.decode(q), weight)
    equal_tensors(write({"m.fc.weight": q}, stated)[0], held)
    right = {**held, "m.fc.qzeros": less_one(np.full((2, 32), 2 ** (bits - 1)), bits)}
    equal_tensors(write({"m.fc.weight": q})[0], right)  # anew: as the label says


def test_missing_index_and_order():
    """Without g_idx the groups follow each other, a short one at the end; each tensor is read once, and comes where the file has it."""
    codes, zeros, scales = numbers(8, 40, 4, 2)
    held, weight = gptq(codes, zeros, scales, np.arange(40) // 32, 4)
    del held["m.fc.g_idx"]
    asked = []

    class Counted(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    tensors = Counted({"a": torch.ones(1), "m.fc.bias": torch.ones(8), **held, "m.norm.weight": torch.ones(4)})
    items = read(tensors)
    assert list(items) == ["a", "m.fc.bias", "m.fc.weight", "m.norm.weight"] and sorted(asked) == sorted(tensors)
    equal_values(reference.decode(items["m.fc.weight"]), weight)
    equal_tensors(write(items, STATED)[0], tensors)
    assert "m.fc.g_idx" in write(items)[0]
    held["m.fc.g_idx"] = torch.arange(40) // 32  # of 64 bits
    equal_tensors(write(read(held), STATED)[0], held)


@pytest.mark.parametrize(("bits", "widths"), {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}.items())
def test_planes(bits, widths):
    """GPTQModel's gptq_p: of 32 codes the low bits of all come first; zero points are stored as they are."""

    def planes(codes):
        runs, found = np.asarray(codes).reshape(len(codes), -1, 32), []
        for i, width in enumerate(widths):
            found.append(words(runs // 2 ** sum(widths[:i]) % 2**width, width))
        return torch.cat(found, -1).flatten(1)

    codes, zeros, scales = numbers(32, 96, bits, 3)
    for order in ("plain", "random"):
        g_idx = index(order, 96, 32)
        held, weight = gptq(codes, zeros, scales, g_idx, bits)
        held |= {"m.fc.qweight": planes(codes).t().contiguous(), "m.fc.qzeros": planes(zeros)}
        stated = {**STATED, "bits": bits, "checkpoint_format": "gptq_p"}
        q = read(held, **stated)["m.fc.weight"]
        equal_values(reference.decode(q), weight)
        equal_tensors(write({"m.fc.weight": q}, stated)[0], held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_type(dtype):
    codes, zeros, scales = numbers(8, 64, 4, 2)
    scales[0, :4] = torch.tensor([0.0, -0.0, 6e-8, float("nan")])
    held, weight = gptq(codes, zeros, scales.to(dtype), np.arange(64) // 32, 4)
    q = read(held)["m.fc.weight"]
    equal_values(reference.decode(q), weight)
    equal_tensors(write({"m.fc.weight": q}, STATED)[0], held)


def test_warnings(caplog):
    codes, zeros, scales = numbers(32, 64, 4, 2)
    held, _ = gptq(codes * 0, np.full_like(zeros, 3), scales, np.arange(64) // 32, 4)
    held["m.fc.qzeros"][1, 2] = -1  # as AutoGPTQ stores a zero point of 0
    with caplog.at_level(logging.WARNING, "qkernels"):
        read(held)
    assert "m.fc: all codes are 0" in caplog.text and "m.fc: 1 words of qzeros end in fields of 15" in caplog.text


# -- files that are wrong ---------------------------------------------------------------------------------------------------------


def changed(**leaves):
    """Tensors of a sound module, some replaced; None takes one away."""
    codes, zeros, scales = numbers(16, 64, 4, 2)
    held = gptq(codes, zeros, scales, np.arange(64) // 32, 4)[0] | {f"m.fc.{leaf}": t for leaf, t in leaves.items()}
    return {name: t for name, t in held.items() if t is not None}


I32 = torch.int32
WRONG = {
    "dtype of codes": ({"qweight": torch.zeros(8, 16)}, r"m\.fc: qweight is \[8, 16\] torch.float32, not .* torch.int32"),
    "dimensions": ({"qweight": torch.zeros(8, dtype=I32)}, r"qweight is \[8\] torch.int32"),
    "empty": ({"qweight": torch.zeros(0, 16, dtype=I32), "g_idx": torch.zeros(0, dtype=I32)}, "qweight is empty"),
    "rows": ({"qweight": torch.zeros(9, 16, dtype=I32)}, "qweight has 9 rows; 64 columns, as g_idx has, of 4 bits take 8"),
    "no scales": ({"scales": None}, "m.fc: scales is missing"),
    "no zeros": ({"qzeros": None}, "m.fc: qzeros is missing"),
    "no codes": ({"qweight": None}, r"m\.fc\.\w+ is there, but m\.fc\.qweight is missing"),
    "scales of integers": ({"scales": torch.ones(2, 16, dtype=I32)}, r"scales is \[2, 16\] torch.int32, not \[2, 16\] torch.float16"),
    "scales the other way": ({"scales": torch.ones(16, 2).half()}, r"scales is \[16, 2\] .*, not \[2, 16\]"),
    "zeros": ({"qzeros": torch.zeros(2, 3, dtype=I32)}, r"qzeros is \[2, 3\] torch.int32, not \[2, 2\]"),
    "index beyond": ({"g_idx": torch.full((64,), 2, dtype=I32)}, r"m\.fc: g_idx\[0\] is 2; there are 2 groups"),
    "index below": ({"g_idx": torch.full((64,), -1, dtype=I32)}, r"g_idx\[0\] is -1"),
    "index of floats": ({"g_idx": torch.zeros(64)}, "g_idx is .* torch.float32, not"),
    "codes beyond K": (
        {"qweight": torch.full((8, 16), -1, dtype=I32), "g_idx": torch.arange(60, dtype=I32) // 32},
        "qweight has bits set beyond the 60 columns",
    ),
    "surplus": ({"input_scale": torch.ones(1)}, "m.fc.input_scale lies beside m.fc.qweight; a quantised module has qweight"),
    "two weights": ({"weight": torch.ones(16, 64)}, "m.fc.weight lies beside"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case):
    leaves, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        read(changed(**leaves))


def test_tensors_of_no_module():
    with pytest.raises(CheckpointError, match="called qweight, and not <module>"):
        read({"qweight": torch.zeros(8, 16, dtype=I32)})


WRONG_SETTINGS = {
    "group of other shapes": ({"group_size": 16}, CheckpointError, r"scales is \[2, 16\] torch.float16, not \[4, 16\]"),
    "no group": ({"group_size": 0}, CheckpointError, "group_size is 0; -1"),
    "group beyond words": ({"group_size": 2**70}, CheckpointError, "group_size is"),
    "text": ({"bits": "4"}, CheckpointError, "bits is '4', not int"),
    "fraction": ({"bits": 7.5}, CheckpointError, "bits is 7.5, not int"),
    "bool": ({"bits": True}, CheckpointError, "bits is True, not int"),
    "no such bits": ({"bits": 9}, CheckpointError, "bits is 9; 2, 3, 4 and 8 are read"),
    "5 bits": ({"bits": 5}, UnsupportedError, "bits is 5; 2, 3, 4 and 8 are read, and in 'gptq_p' 5, 6 and 7"),
    "missing": ({"bits": None}, CheckpointError, "lacks bits or w_bit or wbits"),
    "unknown": ({"bit": 4}, CheckpointError, "has bit = 4, which is unknown.*did you mean bits"),
    "synonyms": ({"wbits": 3}, CheckpointError, "contradicts itself"),
    "sym": ({"zero_point": False}, CheckpointError, "contradicts itself: sym and zero_point are both False"),
    "method": ({"quant_method": "awq"}, CheckpointError, "quant_method is 'awq'; 'gptq' are read"),
    "marlin": ({"checkpoint_format": "marlin"}, UnsupportedError, "tiles of Marlin: take the model's GPTQ files"),
    "marlin flag": ({"is_marlin_format": True}, UnsupportedError, "tiles of Marlin"),
    "tiles": (
        {"checkpoint_format": "bitblas"},
        UnsupportedError,
        "checkpoint_format is 'bitblas'; 'gptq', 'gptq_v2' and 'gptq_p' are read",
    ),
    "word": ({"pack_dtype": "int16"}, UnsupportedError, "pack_dtype is 'int16'"),
    "dynamic": ({"dynamic": []}, CheckpointError, r"dynamic is \[\], not dict"),
    "excluded": ({"dynamic": {"-:m\\..*": {}}}, CheckpointError, "m.fc: qweight is there, but the settings say that this module is not"),
    "pattern": ({"dynamic": {"+:m(": {}}}, CheckpointError, r"'m\(' is no regular expression"),
    "long pattern": ({"dynamic": {"a" * 2000: {}}}, CheckpointError, "2000 characters"),
    "override": ({"dynamic": {"m": {"bitz": 3}}}, CheckpointError, "dynamic: m has bitz = 3, which is unknown"),
    "override of no object": ({"dynamic": {"m": 3}}, CheckpointError, "dynamic: m is 3, no JSON object"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings(case):
    stated, kind, message = WRONG_SETTINGS[case]
    with pytest.raises(kind, match=message):
        read(changed(), **stated)


def test_planes_are_of_whole_runs():
    held = changed(qweight=torch.zeros(9, 16, dtype=I32), g_idx=torch.arange(57, dtype=I32) // 32)
    with pytest.raises(UnsupportedError, match=r"m\.fc: \[N, K\] = \[16, 57\]; 'gptq_p' takes multiples of 32"):
        read(held, bits=5, checkpoint_format="gptq_p")
    q = random_quant(formats.get("u5b16_g32_sf16"), 16, 64)
    with pytest.raises(UnsupportedError, match="takes multiples of 32"):
        write({"m.fc.weight": q}, {**STATED, "bits": 5, "checkpoint_format": "gptq_p"})


def test_dynamic():
    """The first pattern that matches from the start of the path decides; keys that change no number are left alone there too."""
    codes, zeros, scales = numbers(32, 64, 8, 1)
    held, weight = gptq(codes, zeros, scales, np.zeros(64, int), 8)
    dynamic = {"fc": {"bits": 2}, "-:.*head": {}, "+:m\\.f": {"bits": 8, "group_size": -1, "damp_percent": 0.1}, "m": {"bits": 3}}
    equal_values(reference.decode(read(held, dynamic=dynamic)["m.fc.weight"]), weight)


# -- weights from elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("name", ["u4b8_g32_sf16", "u8_g64_zi_sbf16", "u3b4_g-1_sf32", "u2_g16_zi_sf16", "u4_g128_sf16", "u4b3_g32_sf16"])
def test_anew(name, perm):
    q = random_quant(formats.get(name), 32, 96, perm=perm)
    tensors, stated = write({"lm_head.weight": q})
    assert stated["desc_act"] == perm and stated["lm_head"] and "dynamic" not in stated
    again = dict(layout.read(tensors, stated))["lm_head.weight"]
    equal_values(reference.decode(again), reference.decode(q))
    if q.format.code in (formats.Int(q.format.bits), formats.Int(q.format.bits, 2 ** (q.format.bits - 1))) and q.zeros is not None:
        assert again.format == q.format


def test_anew_mixed():
    """Modules that differ from most, and those of a block that are not quantised, get entries of `dynamic`."""
    names = {"model.layers.0.q": "int4_g32", "model.layers.1.q": "int4_g32", "model.layers.0.v": "u8_g-1_zi_sbf16"}
    items = {f"{module}.weight": random_quant(formats.get(name), 32, 64) for module, name in names.items()}
    items |= {"model.layers.0.gate.weight": torch.ones(4, 64), "model.embed.weight": torch.ones(9, 64)}
    tensors, stated = write(items)
    assert stated["dynamic"] == {"-:^model\\.layers\\.0\\.gate$": {}, "+:^model\\.layers\\.0\\.v$": {"bits": 8, "group_size": -1}}
    assert not stated["sym"] and (stated["bits"], stated["group_size"]) == (4, 32)
    again = dict(layout.read(tensors, json.loads(json.dumps(stated))))
    assert all(again[name].equal(q) if isinstance(q, QuantTensor) else torch.equal(again[name], q) for name, q in items.items())


def refused(name, n=32, k=64, **fields):
    q = random_quant(formats.get(name), n, k)
    return QuantTensor(q.format, q.shape, **{**q.tensors(), **fields})


UNWRITABLE = {
    "float zeros": (refused("u4_g32_zf_sf16"), "m.fc.weight has zero points of type 'float'; 'none', 'int' are held"),
    "minima": (refused("u4_g32_zm_sf16"), "zero points of type 'min'"),
    "codebook": (refused("nf4_g32_sf16"), "codes of nf4_g32_sf16; integers are held"),
    "float codes": (refused("e2m1_g32_sf16"), "codes of e2m1_g32_sf16; integers"),
    "bits": (refused("u5b16_g32_sf16"), "5 bits; 2, 3, 4, 8 are held"),
    "blocks of rows": (refused("u4b8_g32x8_sf16"), "groups of 8 rows"),
    "scale type": (refused("u4b8_g32_se4m3"), "e4m3 scales; f16, bf16, f32 are held"),
    "tensor scale": (refused("u4b8_g32_sf16_t"), "a scale for the whole tensor"),
    "N": (refused("u4b8_g32_sf16", n=20), "N = 20; codes of 4 bits fill words where it is a multiple of 8"),
    "K": (refused("u3b4_g32_sf16", k=48), "K = 48; codes of 3 bits fill words where it is a multiple of 32"),
    "zeros": (refused("u4_g32_zi_sf16", zeros=torch.full((32, 2), 16, dtype=torch.uint8)), "a zero point of 16; those of 4 bits end at 15"),
    "stack": (QuantStack.of([refused("int4_g32")] * 2), r"m.fc.weight is a stack \[2, 32, 64\]"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_unwritable(case):
    value, message = UNWRITABLE[case]
    with pytest.raises(UnsupportedError, match=message):
        write({"m.fc.weight": value})


def test_unwritable_by_settings():
    q = refused("u4_g32_zi_sf16", zeros=torch.full((32, 2), 9, dtype=torch.uint8))
    for stated, message in (
        ({"bits": 8}, "4 bits in groups of 32, where the settings say 8 in groups of 32"),
        ({"group_size": 16}, "in groups of 16"),
        ({"sym": True}, "taken for symmetric ones"),
        ({"dynamic": {"-:.*fc": {}}}, "m.fc: the settings say that this module is not quantised"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            write({"m.fc.weight": q}, {**STATED, **stated})
    with pytest.raises(UnsupportedError, match="no weight is quantised"):
        write({"a": torch.ones(1)})


def test_stale_origin():
    """What a file said of other numbers is not written with these."""
    codes, zeros, scales = numbers(32, 96, 4, 3)
    held, _ = gptq(codes, zeros, scales, index("empty group", 96, 32), 4)
    q = read(held)["m.fc.weight"]
    assert q.origin
    other = QuantTensor.from_tensors(q.format, q.shape, q.tensors() | {"scales": q.scales * 2})
    other = QuantTensor(**{**vars(other), "origin": q.origin})
    with pytest.raises(UnsupportedError, match="4 bits in groups of 2, where the settings say 4 in groups of 32"):
        write({"m.fc.weight": other}, STATED)
