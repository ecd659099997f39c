"""compressed-tensors: its own values, its files byte for byte, weights of elsewhere, hostile files.

tests/golden/make_compressed_tensors.py made the files.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from cases import equal_values, random_quant
from safetensors import safe_open
from safetensors.torch import save_file

from qkernels import formats, io, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.io import compressed_tensors, compressed_words
from qkernels.io.modules import ACTIVATION_LEAVES

FILES = sorted((Path(__file__).parent / "golden").glob("compressed_tensors_*.safetensors"))
MODULE = "model.layer"


def stated(path):
    with safe_open(path, "pt") as file:
        return {case: json.loads(text) for case, text in file.metadata().items()}


CASES = [(path, case) for path in FILES for case in sorted(stated(path))]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].stem[-4:]}-{case[1]}")


def load(path, case):
    """(tensors, settings, values)"""
    with safe_open(path, "pt") as file:
        tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in file.keys() if name.startswith(f"{case}/")}  # noqa: SIM118
    return tensors, stated(path)[case], tensors.pop(f"values/{MODULE}")


def golden(case, version="0_20"):
    return load(FILES[0].with_name(f"compressed_tensors_{version}.safetensors"), case)


def read_one(tensors, settings):
    ((name, q),) = compressed_tensors.read(tensors, settings)
    assert name == f"{MODULE}.weight"
    return q


def written(items, settings=None):
    tensors = {}
    return tensors, compressed_tensors.write(items, settings, tensors.__setitem__)


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert (t.dtype, t.shape) == (b[name].dtype, b[name].shape), name
        assert t.flatten().tolist() == b[name].flatten().tolist(), name


@every_case
def test_values(case):
    tensors, settings, values = load(*case)
    mine = reference.decode(read_one(tensors, settings), values.dtype)
    if case[1] == "nvfp4":  # multiplied by the reciprocal of what the producer divides by: two roundings against one
        torch.testing.assert_close(mine, values, rtol=2**-22, atol=0)
    else:
        equal_values(mine, values)


@every_case
def test_written_as_read(case):
    tensors, settings, _ = load(*case)
    out, stated = written(compressed_tensors.read(tensors, settings), settings)
    same_tensors(out, tensors)
    assert stated == settings


@every_case
def test_written_anew(case):
    """The numbers of a checkpoint in settings of our own; they read back bit for bit, and are the producer's where it chose that format."""
    tensors, settings, _ = load(*case)
    q = read_one(tensors, settings)
    elsewhere = QuantTensor.from_tensors(q.format, q.shape, q.tensors())  # without its origin
    out, made = written([(f"{MODULE}.weight", elsewhere)])
    assert read_one(out, made).equal(q)
    if settings["version"] >= "0.18" and made["format"] == settings["format"]:
        same_tensors(out, tensors)


def test_directories(tmp_path):
    """Through the one door, with plain tensors and those of activations in between: files and settings are the same bytes."""
    tensors, settings, values = golden("pack-3-wide")
    settings["config_groups"]["group_0"]["targets"], settings["ignore"] = ["re:.*layer$"], ["lm_head", "re:.*embed.*"]
    tensors |= {f"{MODULE}.bias": torch.ones(3), "model.embed.weight": torch.ones(4, 5), "model.norm.weight": torch.ones(5)}
    tensors |= {f"{MODULE}.input_scale": torch.tensor([0.5]), "model.attn.k_scale": torch.tensor(2.0)}
    (tmp_path / "a").mkdir()
    save_file(tensors, str(tmp_path / "a/model.safetensors"), {"format": "pt"})
    (tmp_path / "a/config.json").write_text(json.dumps({"quantization_config": settings}, indent=2) + "\n")
    info = io.detect(tmp_path / "a")
    items = dict(io.read(info))
    equal_values(reference.decode(items[f"{MODULE}.weight"]), values)
    plain = {name for name, value in items.items() if isinstance(value, torch.Tensor)}
    assert {name for name in plain if name.rpartition(".")[2] in ACTIVATION_LEAVES} == {f"{MODULE}.input_scale", "model.attn.k_scale"}
    io.write(items.items(), tmp_path / "b", "compressed-tensors", settings=info.settings, config=info.config)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


ELSEWHERE = [
    "u4b8_g128_sf16",
    "u3b4_g-1_sf32",
    "u5_g32_zi_sbf16",
    "u1b1_g-1_sf32",
    "u8_g-1x-1_zi_sf16",
    "e4m3_g128x128_sf32",
    "e4m3_g-1x-1_sbf16",
]
ELSEWHERE += ["e2m1_g32_se8m0", "e2m3_g32_se8m0", "e4m3_g32_se8m0", "e2m1_g16_se4m3_t"]


@pytest.mark.parametrize("names", [[name] for name in ELSEWHERE] + [ELSEWHERE])
def test_elsewhere(names, tmp_path):
    """Weights that no checkpoint gave: alone, and as a checkpoint of mixed precision."""
    weights = {f"model.{i}.weight": random_quant(formats.get(name), 11, 256, seed=i) for i, name in enumerate(names)}
    io.write(weights.items(), tmp_path / "made", "compressed-tensors")
    back = dict(io.read(tmp_path / "made"))
    assert back.keys() == weights.keys() and all(back[name].equal(q) for name, q in weights.items())


@pytest.mark.parametrize("name", ["u4b8_g32_sf16", "u3_g32_zi_sf32"])
def test_permuted(name):
    q = random_quant(formats.get(name), 7, 96, perm=True)
    tensors, settings = written([(f"{MODULE}.weight", q)])
    back = read_one(tensors, settings)
    equal_values(reference.decode(back), reference.decode(q))
    assert settings["config_groups"]["group_0"]["weights"]["actorder"] == "group"


@pytest.mark.parametrize("kind", ["uneven", "unused", "sorted", "none"])
def test_index(kind):
    """Groups of any length, one without a column, and an index of -1 that names none; all come back as they were."""
    tensors, settings, _ = golden("pack-3-index", "0_17")
    g_idx, codes = tensors[f"{MODULE}.weight_g_idx"], golden_codes(tensors)
    changed = {
        "uneven": torch.where(torch.arange(96) % 5 == 0, 0, g_idx),
        "unused": torch.where(g_idx == 1, 2, g_idx),
        "sorted": torch.where(torch.arange(96) < 40, 0, torch.where(torch.arange(96) < 60, 1, 2)),
        "none": torch.full_like(g_idx, -1),
    }[kind].int()
    tensors[f"{MODULE}.weight_g_idx"] = changed
    q = read_one(tensors, settings)
    columns = changed.long() if kind != "none" else torch.arange(96) // 32
    zeros, scales = golden_zeros(tensors), tensors[f"{MODULE}.weight_scale"]
    equal_values(reference.decode(q), (codes - zeros[:, columns]) * scales[:, columns])
    same_tensors(written([(f"{MODULE}.weight", q)], settings)[0], tensors)


def golden_codes(tensors):
    """Padded 3-bit words by arithmetic: ten codes in each."""
    words = tensors[f"{MODULE}.weight_packed"].long()
    return torch.stack([words // 8**i % 8 for i in range(10)], -1).flatten(1)[:, : tensors[f"{MODULE}.weight_shape"][1]].float()


def golden_zeros(tensors):
    words = tensors[f"{MODULE}.weight_zero_point"].long()
    return torch.stack([words // 8**i % 8 for i in range(10)], 1).flatten(0, 1)[: tensors[f"{MODULE}.weight_shape"][0]].float()


def test_stack():
    """Experts in one tensor: three dimensions, packed slice by slice."""
    tensors, settings, values = golden("pack-3-wide")
    stacked = {name: torch.stack([t, t.flip(1) if name.endswith("weight_scale") else t]) for name, t in tensors.items()}
    stacked[f"{MODULE}.weight_shape"] = torch.tensor([2, *tensors[f"{MODULE}.weight_shape"]])
    stack = read_one(stacked, settings)
    assert isinstance(stack, QuantStack) and stack.shape == (2, 3, 576)
    equal_values(reference.decode(stack[0]), values)
    assert not torch.equal(reference.decode(stack[1]), values)
    same_tensors(written([(f"{MODULE}.weight", stack)], settings)[0], stacked)
    stacked[f"{MODULE}.weight_shape"][0] = 3
    with pytest.raises(CheckpointError, match=r"weight_shape is \[3, 3, 576\], and weight_packed \[2, 3, 54\]"):
        read_one(stacked, settings)


@pytest.mark.parametrize(
    "version,which", [("0.17.1", "0_17"), ("0.15.0.1", "0_17"), ("0.18.0", "0_20"), ("0.18.0.post1", "0_20"), ("1.0", "0_20")]
)
@pytest.mark.parametrize("case", ["pack-3-sym", "pack-3-asym"])  # K = 40 takes four words in both layouts
def test_ambiguous_words(version, which, case):
    tensors, settings, values = golden(case, which)
    settings["version"] = version
    q = read_one(tensors, settings)
    equal_values(reference.decode(q), values)
    same_tensors(written([(f"{MODULE}.weight", q)], settings)[0], tensors)
    other = {**settings, "version": "0.18.0" if which == "0_17" else "0.17.0"}
    with pytest.raises(UnsupportedError, match="does not write them"):
        written([(f"{MODULE}.weight", q)], other)


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", None])
@pytest.mark.parametrize("name,k", [("u4b8_g32_sf32", 96), ("u3b4_g-1_sf32", 10), ("u8_g32_zi_sf32", 64)])
def test_unmistakable_words(name, k, version):
    """Weights of elsewhere under the settings of any version, where the two layouts are one."""
    q = random_quant(formats.get(name), 9, k)
    tensors, settings = written([(f"{MODULE}.weight", q)])
    settings["version"] = version
    again, _ = written([(f"{MODULE}.weight", q)], settings)
    same_tensors(again, tensors)
    assert read_one(again, settings).equal(q)


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_words_of_the_stated_version(version):
    q = random_quant(formats.get("u3_g-1_zi_sf32"), 11, 40)
    _, settings = written([(f"{MODULE}.weight", q)])
    settings["version"] = version
    tensors, _ = written([(f"{MODULE}.weight", q)], settings)
    assert read_one(tensors, settings).equal(q)
    assert torch.equal(golden_codes(tensors), reference.unpack(q.codes, 3, 40).float()) == (version == "0.17.1")


@pytest.mark.parametrize("version", [None, "0.18.0.a20260701", "0.17.2.dev3", "nightly"])
def test_ambiguous_words_without_a_version(version):
    tensors, settings, _ = golden("pack-3-sym")
    settings["version"] = version
    with pytest.raises(CheckpointError, match="set quantization_config: version"):
        read_one(tensors, settings)
    for unmistakable in ("pack-5-sym", "pack-4-sym"):  # by its width, and as both layouts are one
        tensors, settings, values = golden(unmistakable)
        settings["version"] = version
        equal_values(reference.decode(read_one(tensors, settings)), values)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [1, 10, 33, 40])
def test_words(bits, padded, count):
    codes = formats.packing.pack(torch.randint(2**bits, (3, count), dtype=torch.uint8), bits)
    words = compressed_words.to_words(codes, bits, count, padded)
    assert words.shape == (3, compressed_words.width(count, bits, padded)) and words.dtype == torch.int32
    assert torch.equal(compressed_words.from_words("w", words, bits, count, padded), codes)
    words[1, -1] |= -(2**31)  # the last bit of a row
    if (padded and 32 % bits) or (count * bits) % 32:
        with pytest.raises(CheckpointError, match="bits set beyond"):
            compressed_words.from_words("w", words, bits, count, padded)


def test_which_group():
    """A module's very name goes before an expression, and that before a class."""
    q8, q4 = (random_quant(formats.get(name), 6, 64) for name in ("u8b128_g-1_sf32", "u4b8_g32_sf32"))
    items = {"a.x.weight": q8, "a.y.weight": q4, "b.weight": q8}
    tensors, settings = written(items.items())
    groups = settings["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"] = ["re:a.*", "b"], ["a.y", "Linear"]
    back = dict(compressed_tensors.read(tensors, settings))
    assert all(back[name].equal(q) for name, q in items.items())
    groups["group_0"]["targets"], groups["group_1"]["targets"] = ["Linear", "a.x"], ["Embedding", "re:a.y"]
    with pytest.raises(UnsupportedError, match="b: which of 2 schemes of classes"):
        dict(compressed_tensors.read(tensors, settings))
    groups["group_0"]["targets"].remove("Linear")
    groups["group_1"]["targets"].remove("Embedding")
    with pytest.raises(CheckpointError, match="b is quantised, and no target"):
        dict(compressed_tensors.read(tensors, settings))


def change(*path, to):
    """Set a value within the settings."""

    def changed(tensors, settings):
        for key in path[:-1]:
            settings = settings[key]
        settings[path[-1]] = to

    return changed


def weights(key, to):
    return change("config_groups", "group_0", "weights", key, to=to)


def tensor(leaf, to):
    """Replace a tensor by one, or by a function of it; None takes it away."""

    def changed(tensors, settings):
        old = tensors.pop(f"{MODULE}.{leaf}", None)
        new = to(old) if callable(to) else to
        if new is not None:
            tensors[f"{MODULE}.{leaf}"] = new

    return changed


HOSTILE = {
    "unknown key": ("pack-4-sym", change("formatt", to="x"), "has formatt = 'x', which is unknown.*did you mean format"),
    "unknown key of weights": ("pack-4-sym", weights("groupsize", 32), "groupsize = 32, which is unknown"),
    "no groups": ("pack-4-sym", change("config_groups", to=None), "lacks config_groups"),
    "group is a list": ("pack-4-sym", change("config_groups", "group_0", to=["Linear"]), "group_0 is .*, no JSON object"),
    "targets hold a number": ("pack-4-sym", change("config_groups", "group_0", "targets", to=[3]), "targets has 3, no name"),
    "bad expression": ("pack-4-sym", change("config_groups", "group_0", "targets", to=["re:(a"]), "expression '\\(a', which is none"),
    "bad expression in ignore": ("pack-4-sym", change("ignore", to=["re:*"]), "ignore has the expression"),
    "ignored": ("pack-4-sym", change("ignore", to=["re:model.*"]), "model.layer is quantised, and .*ignore says that it is not"),
    "other module": ("pack-4-sym", change("config_groups", "group_0", "targets", to=["model.other"]), "no target in"),
    "group size": ("pack-4-sym", weights("group_size", 48), r"scales of model.layer.weight are \[9, 3\]; \[9, 2\] belong to 9 x 96"),
    "huge group size": ("pack-4-sym", weights("group_size", 2**40), r"\[9, 1\] belong to"),
    "group size 0": ("pack-4-sym", weights("group_size", 0), "group_size is 0, and the strategy group needs one"),
    "group size of a channel": ("pack-3-sym", weights("group_size", 32), "group_size 32 contradicts the strategy 'channel'"),
    "bits": ("pack-4-sym", weights("num_bits", 5), "12 words for 96 codes.* of 5 bits"),
    "17 bits": ("pack-4-sym", weights("num_bits", 17), "int of 17 bits contradict the format pack-quantized"),
    "type": ("pack-4-sym", weights("type", "float"), "float of 4 bits contradict"),
    "block": ("float-8-block", weights("block_structure", "4x"), "block_structure is '4x', no"),
    "block of other size": ("float-8-block", weights("block_structure", "3x32"), r"are \[2, 3\]; \[3, 3\] belong to .* groups of 3 x 32"),
    "no zero points": ("pack-4-sym", weights("symmetric", False), "weight_zero_point is missing"),
    "surplus zero points": ("pack-4-asym", weights("symmetric", True), "weight_zero_point is there"),
    "no scale": ("pack-4-sym", tensor("weight_scale", None), "weight_scale is missing"),
    "no shape": ("pack-4-sym", tensor("weight_shape", None), "weight_shape is missing"),
    "no codes": ("int-8-channel", tensor("weight", None), "model.layer.weight is missing"),
    "surplus codes": ("pack-4-sym", tensor("weight", torch.ones(9, 96, dtype=torch.int8)), "model.layer.weight is there"),
    "codes without a scale": ("int-8-channel", tensor("weight_scale", None), "int8 .*has no scale beside it"),
    "type of scales": ("pack-4-sym", tensor("weight_scale", lambda t: t.double()), "weight_scale is torch.float64, not torch.float32"),
    "type of codes": ("pack-4-sym", tensor("weight_packed", lambda t: t.long()), "weight_packed is torch.int64, not torch.int32"),
    "type of FP8": ("float-8-tensor", tensor("weight", lambda t: t.view(torch.int8)), "weight is torch.int8, not torch.float8_e4m3fn"),
    "four dimensions": ("pack-4-sym", tensor("weight_packed", lambda t: t[None, None]), r"is \[1, 1, 9, 12\]; two dimensions"),
    "stack of one tensor": (
        "pack-4-sym",
        tensor("weight_packed", lambda t: t[None]),
        r"weight_shape is \[9, 96\], and weight_packed \[1, 9, 12\]",
    ),
    "shape lies about K": (
        "pack-4-sym",
        tensor("weight_shape", torch.tensor([9, 88])),
        "12 words for 88 codes of 4 bits; .11. or .11. are",
    ),
    "shape lies within a word": ("pack-3-sym", tensor("weight_shape", torch.tensor([11, 39])), "bits set beyond its 39 codes"),
    "shape lies about N": (
        "pack-4-sym",
        tensor("weight_shape", torch.tensor([8, 96])),
        r"weight_shape is \[8, 96\], and weight_packed \[9, 12\]",
    ),
    "huge shape": ("pack-4-sym", tensor("weight_shape", torch.tensor([9, 2**40])), "12 words for 1099511627776 codes"),
    "negative shape": ("pack-4-sym", tensor("weight_shape", torch.tensor([9, -96])), r"weight_shape is \[9, -96\]"),
    "long shape": ("pack-4-sym", tensor("weight_shape", torch.ones(10**6, dtype=torch.long)), r"weight_shape is \[1, 1, 1, 1\], and"),
    "zero points of other height": ("pack-4-asym", tensor("weight_zero_point", lambda t: t[:1]), "1 words for 9 codes"),
    "zero points in a row": ("pack-4-asym", tensor("weight_zero_point", lambda t: t.flatten()), r"weight_zero_point is \[6\]; it has two"),
    "zero points of fewer groups": (
        "pack-4-asym",
        tensor("weight_zero_point", lambda t: t[:, :2]),
        r"zero points of .* are \[9, 2\]; \[9, 3\]",
    ),
    "large codes": ("naive-5-channel", tensor("weight", lambda t: t.fill_(16)), "numbers from 16 to 16, and num_bits is 5"),
    "no index": ("pack-4-sym", weights("actorder", "group"), "weight_g_idx is missing, and actorder says"),
    "short index": ("pack-4-sym", tensor("weight_g_idx", torch.zeros(95, dtype=torch.int32)), r"weight_g_idx is \[95\]; the weight has 96"),
    "index of no group": ("pack-4-sym", tensor("weight_g_idx", torch.full((96,), 3)), r"g_idx\[0\] is 3; there are 3 groups"),
    "global scale 0": ("nvfp4", tensor("weight_global_scale", torch.zeros(1)), r"weight_global_scale is \[0.0\] \[1\]; one number"),
    "global scale inf": ("nvfp4", tensor("weight_global_scale", torch.tensor([torch.inf])), "weight_global_scale is .inf."),
    "two global scales": ("nvfp4", tensor("weight_global_scale", torch.ones(2)), r"weight_global_scale is \[1.0, 1.0\] \[2\]"),
    "no global scale": ("nvfp4", tensor("weight_global_scale", None), "weight_global_scale is missing"),
    "no rows": ("float-8-tensor", tensor("weight", lambda t: t[:0]), "a weight is at least 1 x 1"),
    "no experts": ("float-8-tensor", tensor("weight", lambda t: t[None, :0][:0]), "a stack of no weights"),
    "nothing quantised": ("pack-4-sym", lambda tensors, settings: tensors.clear(), "no module has weight_packed or weight_scale"),
}


@pytest.mark.parametrize("case,changed,message", HOSTILE.values(), ids=HOSTILE)
def test_hostile(case, changed, message):
    tensors, settings, _ = golden(case)
    changed(tensors, settings)
    with pytest.raises(CheckpointError, match=message):
        list(compressed_tensors.read(tensors, settings))


def test_named_but_dense():
    tensors, settings, _ = golden("pack-4-sym")
    settings["config_groups"]["group_0"]["targets"] = ["Linear", "model.other"]
    with pytest.raises(CheckpointError, match=r"model.other.weight is torch.float32 and has no weight_scale, and config_groups names it"):
        list(compressed_tensors.read({**tensors, "model.other.weight": torch.ones(4, 4)}, settings))
    list(compressed_tensors.read({**tensors, "model.another.weight": torch.ones(4, 4)}, settings))


UNSUPPORTED = {
    "sparse": (change("format", to="sparse-24-bitmask"), "format is 'sparse-24-bitmask'"),
    "marlin": (change("config_groups", "group_0", "format", to="marlin-24"), "format is 'marlin-24', which is not read; pack-quantized"),
    "fake": (change("config_groups", "group_0", "format", to="dense"), "format is 'dense'"),
    "sparsity": (change("sparsity_config", to={"format": "sparse-bitmask"}), "sparsity_config is .*sparse-bitmask"),
    "transform": (change("transform_config", to={"config_groups": {"R1": {}}}), "transform_config is .*R1"),
    "dynamic": (weights("dynamic", True), "dynamic weights"),
    "by token": (weights("strategy", "token"), "strategy is 'token'"),
}


@pytest.mark.parametrize("changed,message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported(changed, message):
    tensors, settings, _ = golden("pack-3-sym")
    if "sparse-24" in message:
        del settings["config_groups"]["group_0"]["format"]
    changed(tensors, settings)
    with pytest.raises(UnsupportedError, match=message):
        list(compressed_tensors.read(tensors, settings))


REFUSED = {
    "codebook": ("nf4_g64_sf32", "integers and small floats"),
    "float zero points": ("u4_g32_zf_sf16", "zero points are integers"),
    "minima": ("u4_g32_zm_sf16", "zero points are integers"),
    "other bias": ("u4b3_g32_sf16", "the bias is half the range"),
    "group that cuts K": ("u4b8_g48_sf16", "a group that divides K"),
    "blocks of integers": ("u4b8_g32x8_sf16", "f32, f16 or bf16 scales for all, a row or a group"),
    "e5m2": ("e5m2_g-1_sf32", "can be written"),
    "exponents of integers": ("u4b8_g32_se8m0", "packed integers have f32"),
    "columns of one scale": ("e4m3_g32x-1_sf32", "a scale is for all"),
}


@pytest.mark.parametrize("name,message", REFUSED.values(), ids=REFUSED)
def test_refused(name, message):
    with pytest.raises(UnsupportedError, match=message):
        written([("a.weight", random_quant(formats.get(name), 8, 64))])


def test_refused_by_settings():
    """Weights that are not what the given settings say, and what is no weight of a module."""
    _, settings, _ = golden("pack-4-sym")
    for name, message in {
        "u8b128_g32_sf32": "of u4b8 codes",
        "u4_g32_zi_sf32": "zero points: none",
        "u4b8_g16_sf32": r"groups of \(1, 32\)",
        "u4b8_g32_se8m0": "scales of pack-quantized are f32",
    }.items():
        with pytest.raises(UnsupportedError, match=message):
            written([(f"{MODULE}.weight", random_quant(formats.get(name), 8, 64))], settings)
    with pytest.raises(UnsupportedError, match="columns permuted; the settings"):
        written([(f"{MODULE}.weight", random_quant(formats.get("u4b8_g32_sf32"), 8, 64, perm=True))], settings)
    with pytest.raises(UnsupportedError, match="no weight of a module"):
        written([("gate_up_proj", random_quant(formats.get("u4b8_g32_sf32"), 8, 64))])
    with pytest.raises(UnsupportedError, match="no weight is quantised"):
        written([("a.weight", torch.ones(3))])


def test_changed_since_it_was_read():
    """What `origin` remembers is used only where it still says the same."""
    tensors, settings, _ = golden("pack-4-index", "0_17")
    q = read_one(tensors, settings)
    foreign = QuantTensor(q.format, q.shape, origin={"layout": "gptq", "padded": True, "scale_shape": (3,)}, **q.tensors())
    same_tensors(written([(f"{MODULE}.weight", foreign)], settings)[0], tensors)
    other = copy.copy(q.origin)
    other["weight_g_idx"] = q.origin["weight_g_idx"].roll(1)
    changed = QuantTensor(q.format, q.shape, origin=other, **q.tensors())
    assert read_one(*written([(f"{MODULE}.weight", changed)], settings)).equal(q)
    tensors, settings, _ = golden("nvfp4")
    q = read_one(tensors, settings)
    changed = QuantTensor(q.format, q.shape, origin=q.origin, **{**q.tensors(), "tensor_scale": torch.tensor([0.25])})
    assert written([(f"{MODULE}.weight", changed)], settings)[0][f"{MODULE}.weight_global_scale"] == 4
