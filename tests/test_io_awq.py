"""AWQ checkpoints: AutoAWQ's own packings and values, a few from the description (words.py), and files that are wrong."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values, random_quant
from checkpoints import copied, equal_tensors, replaced, saved, written
from words import gptq, numbers, words

from qkernels import formats, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantStack
from qkernels.io import awq as layout
from qkernels.io import gptq as gptq_layout

VERSIONS = ("gemm", "gemv", "gemv_fast")
FILES = {version: np.load(Path(__file__).parent / "golden" / f"awq_{version}.npz") for version in VERSIONS}
CASES = [(version, key.removesuffix(".dense")) for version, file in FILES.items() for key in file if key.endswith(".dense")]
STATED = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def golden(version, case):
    """Tensors of a module, its settings, and the values."""
    held = {f"m.fc.{leaf}": torch.from_numpy(FILES[version][f"{case}.{leaf}"]) for leaf in layout.LAYOUT.leaves}
    stated = {**STATED, "group_size": int(case.split("_")[0][1:]), "version": version}
    return held, stated, torch.from_numpy(FILES[version][f"{case}.dense"])


def read(tensors, **stated):
    return dict(layout.read(tensors, {**STATED, **stated}))


write = partial(written, layout)


@pytest.mark.parametrize(("version", "case"), CASES)
def test_golden(version, case):
    """The values are AutoAWQ's; in float16 they are rounded once there, from the same products and sums."""
    held, stated, dense = golden(version, case)
    q = read(held, **stated)["m.fc.weight"]
    equal_values(reference.decode(q).half(), dense)
    assert q.format.zero == ("min" if version == "gemv_fast" else "none" if "_sym_" in case else "int") and not q.origin
    tensors, given = write({"m.fc.weight": q}, stated)
    assert given is stated
    equal_tensors(tensors, held)
    if version != "gemv":
        again, made = write({"m.fc.weight": q})
        assert made == {**stated, "modules_to_not_convert": None}
        equal_tensors(again, held)


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_directory(version, tmp_path):
    """A checkpoint as AutoAWQ writes it, its version in capitals; written again it is the same, file for file."""
    held, stated, dense = golden(version, next(case for v, case in CASES if v == version))
    plain = {"m.fc.bias": torch.rand(len(dense)).half(), "m.act.scales": torch.rand(8), "lm_head.weight": torch.rand(9, 8)}
    stated = {**stated, "version": version.upper(), "modules_to_not_convert": ["lm_head"]}
    items = copied(saved(tmp_path / "source", held | plain, stated), tmp_path / "copy")
    equal_values(reference.decode(items.pop("m.fc.weight")).half(), dense)
    equal_tensors(items, plain)


def test_names_of_versions():
    held, stated, dense = golden("gemv_fast", CASES[-1][1])
    for names in ({"version": "llm-awq"}, {"version": None, "format": "GEMV_FAST"}, {"version": None, "backend": "llm-awq"}):
        equal_values(reference.decode(read(held, **{**stated, **names})["m.fc.weight"]).half(), dense)
    equal_values(reference.decode(read(held, **{**stated, "zero_point": False})["m.fc.weight"]).half(), dense)  # its minima tell
    held, stated, dense = golden("gemm", "g32_asym_32x160")
    legacy = {"w_bit": 4, "q_group_size": 32, "zero_point": True}
    equal_values(reference.decode(dict(layout.read(held, legacy))["m.fc.weight"]).half(), dense)


# -- what no producer makes: from the description ---------------------------------------------------------------------------------


def gemm(codes, zeros, scales):
    order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(codes.shape[0])]
    return {"m.fc.qweight": words(codes.T[:, order], 4), "m.fc.qzeros": words(zeros[:, order], 4), "m.fc.scales": scales}


@pytest.mark.parametrize(("n", "k", "size"), [(8, 40, 16), (24, 64, -1), (8, 32, 128), (576, 8, 32), (8, 192, 128)])
def test_odd_shapes(n, k, size):
    """Groups that K is no multiple of, one group, bfloat16 scales of both signs."""
    length = k if size == -1 else size
    codes, zeros, scales = numbers(n, k, 4, -(-k // length))
    held = gemm(codes, zeros, scales.bfloat16())
    q = read(held, group_size=size)["m.fc.weight"]
    equal_values(reference.decode(q), gptq(codes, zeros, scales.bfloat16(), np.arange(k) // length, 4)[1])
    equal_tensors(write({"m.fc.weight": q}, {**STATED, "group_size": size})[0], held)
    equal_tensors(write({"m.fc.weight": q})[0], held)


def test_symmetric():
    """zero_point = false: zero points are 8, there or left out."""
    codes, zeros, scales = numbers(24, 64, 4, 2)
    held = gemm(codes, np.full_like(zeros, 8), scales)
    absent = {name: t for name, t in held.items() if "qzeros" not in name}
    both = [read(tensors, zero_point=False)["m.fc.weight"] for tensors in (held, absent)]
    assert both[0].equal(both[1]) and both[0].format == formats.get("int4_g32")
    for q, tensors in zip(both, (held, absent)):
        equal_tensors(write({"m.fc.weight": q}, {**STATED, "zero_point": False})[0], tensors)
        equal_tensors(write({"m.fc.weight": q})[0], held)
    with pytest.raises(CheckpointError, match=r"m\.fc\.qzeros are not 8 all over, where the settings say zero_point = false"):
        read(gemm(codes, zeros, scales), zero_point=False)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_padding_is_kept(version):
    """Numbers of groups that are not there mean nothing, and are written as they were."""
    held, stated, dense = golden(version, "g64_asym_32x192")
    for name in ("m.fc.scales", "m.fc.qzeros"):
        pad = held[name][:, -1:] if version == "gemv" else held[name][-1:]
        pad.fill_(7)
    q = read(held, **stated)["m.fc.weight"]
    assert q.origin.keys() == {"layout", "scales", "qzeros"}
    equal_values(reference.decode(q).half(), dense)
    equal_tensors(write({"m.fc.weight": q}, stated)[0], held)
    other = random_quant(formats.get(q.format.name), *q.shape)
    object.__setattr__(other, "origin", q.origin)  # of other numbers: not taken
    assert read(write({"m.fc.weight": other}, stated)[0], **stated)["m.fc.weight"].equal(other)


# -- files that are wrong ---------------------------------------------------------------------------------------------------------


I32 = torch.int32
WRONG = {
    "dtype of codes": ({"qweight": torch.zeros(64, 3)}, r"m\.fc\.qweight is torch.float32, not torch.int32"),
    "empty": ({"qweight": torch.zeros(0, 3, dtype=I32)}, r"qweight is \[0, 3\], not \[any, any\]"),
    "packing of gemv": ({"qweight": torch.zeros(24, 8, dtype=I32)}, r"scales is \[2, 24\], not \[1, 64\]"),
    "no scales": ({"scales": None}, "m.fc.scales is missing"),
    "no zeros": ({"qzeros": None}, "m.fc.qzeros is missing"),
    "no codes": ({"qweight": None}, r"m\.fc\.\w+ is there, but m\.fc\.qweight is missing"),
    "zeros": ({"qzeros": torch.zeros(2, 24, dtype=I32)}, r"qzeros is \[2, 24\], not \[2, 3\]"),
    "scales": ({"scales": torch.ones(2, 24)}, "scales is torch.float32, not torch.float16 or torch.bfloat16"),
    "surplus": ({"g_idx": torch.ones(64)}, "m.fc.g_idx lies beside m.fc.qweight; a quantised module has qweight, qzeros, scales, bias"),
}


def changed(**leaves):
    return replaced(gemm(*numbers(24, 64, 4, 2)), {f"m.fc.{leaf}": t for leaf, t in leaves.items()})


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case):
    leaves, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        read(changed(**leaves))


def test_settings_of_gptqmodel():
    """Its own keys beside AutoAWQ's, and `dynamic`: modules left out, and others in another group size."""
    own = {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "desc_act": False, "lm_head": False}
    own |= {"meta": {"quantizer": ["gptqmodel:7.7.0"], "mse": 0.0}, "group_size": 128}
    dynamic = {"-:.*gate": {}, r"+:m\.f": {"group_size": 32, "bits": 4, "sym": False, "mse": 2.0}}
    expected = read(changed())["m.fc.weight"]
    assert read(changed(), **own, dynamic=dynamic)["m.fc.weight"].equal(expected)
    with pytest.raises(CheckpointError, match=r"m\.fc: qweight is there, but the settings say"):
        read(changed(), **own, dynamic={"-:m": {}} | dynamic)
    with pytest.raises(UnsupportedError, match="dynamic: m: bits is 8; 4 are read"):
        read(changed(), **own, dynamic={"m": {"bits": 8}})
    with pytest.raises(CheckpointError, match="qzeros are not 8 all over"):
        read(changed(), **own, dynamic={"m": {"group_size": 32, "zero_point": False}})


WRONG_SETTINGS = {
    "group of other shapes": ({"group_size": 16}, CheckpointError, r"scales is \[2, 24\], not \[4, 24\]"),
    "no group": ({"group_size": 0}, CheckpointError, "group_size is 0"),
    "group missing": ({"group_size": None}, CheckpointError, "lacks group_size or q_group_size"),
    "text": ({"bits": "4"}, CheckpointError, "bits is '4', not int"),
    "bits": ({"bits": 8}, UnsupportedError, "bits is 8; 4 are read"),
    "unknown": ({"zeropoint": True}, CheckpointError, "has zeropoint = True, which is unknown.*did you mean zero_point"),
    "synonyms": ({"format": "gemv"}, CheckpointError, "contradicts itself"),
    "method": ({"quant_method": "gptq"}, CheckpointError, "quant_method is 'gptq'"),
    "marlin": ({"version": "marlin"}, UnsupportedError, "version is 'marlin'.*take the model's gemm files"),
    "no such version": ({"version": "gemw"}, UnsupportedError, "version is 'gemw'; gemm, gemv, gemv_fast, llm-awq are read"),
    "codes of 32 bits": ({"version": "gemv_fast"}, CheckpointError, "qweight is torch.int32, not torch.int16"),
    "group of no words": ({"version": "gemv", "group_size": 16}, UnsupportedError, "m.fc: groups of 16 in gemv; 32, 64, and 128 or more"),
    "excluded": ({"modules_to_not_convert": ["fc"]}, CheckpointError, "m.fc: qweight is there, but the settings say"),
    "excluded by no list": ({"modules_to_not_convert": "fc"}, CheckpointError, "modules_to_not_convert is 'fc', not list"),
    "data type": ({"data_type": "mx_fp"}, CheckpointError, "data_type is 'mx_fp'"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings(case):
    stated, kind, message = WRONG_SETTINGS[case]
    with pytest.raises(kind, match=message):
        read(changed(), **stated)


def test_gemv_fast_is_of_whole_blocks():
    with pytest.raises(CheckpointError, match="qweight has 32 columns; those of gemv_fast are a multiple of 64"):
        read({"m.fc.qweight": torch.zeros(2, 32, dtype=torch.int16), "m.fc.scales": torch.ones(32, 8).half()}, version="gemv_fast")


# -- weights from elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sym", [False, True])
def test_from_gptq(version, sym):
    """What GPTQ holds AWQ holds, number for number; gemv_fast where the products of zero points and scales have 16 bits too."""
    codes, zeros, scales = numbers(64, 128, 4, 4)
    zeros = np.full_like(zeros, 8) if sym else zeros
    if version == "gemv_fast":
        scales = torch.full_like(scales, 0.125)
    held, weight = gptq(codes, zeros, scales, np.arange(128) // 32, 4)
    items = dict(gptq_layout.read(held, {"quant_method": "gptq", "bits": 4, "group_size": 32}))
    tensors, stated = write(items, {**STATED, "version": version})
    q = dict(layout.read(tensors, stated))["m.fc.weight"]
    equal_values(reference.decode(q), weight)
    if version != "gemv_fast":
        assert q.equal(items["m.fc.weight"]) and (q.format.code == Int(4, 8)) == sym
        equal_tensors(write({"m.fc.weight": q})[0] if version == "gemm" else tensors, tensors)


def test_anew_lists_what_stays_dense():
    q = random_quant(formats.get("int4_g32"), 32, 64)
    dense = {"model.layers.0.gate.weight": torch.ones(4, 64), "model.embed.weight": torch.ones(9, 64)}
    tensors, stated = write({"model.layers.0.fc.weight": q, **dense})
    assert stated["modules_to_not_convert"] == ["model.layers.0.gate"]
    again = dict(layout.read(tensors, stated))
    assert again.pop("model.layers.0.fc.weight").equal(q)
    equal_tensors(again, dense)


UNWRITABLE = {
    "bits": (["u8b128_g32_sf16"], {}, "m.fc0.weight has 8 bits; 4 are held"),
    "scale": (["u4b8_g32_sf32"], {}, "f32 scales; f16, bf16 are held"),
    "float zeros": (["u4_g32_zf_sf16"], {}, "zero points of type 'float'; 'none', 'int', 'min' are held"),
    "minima": (["u4_g32_zm_sf16"], {"version": "gemm"}, "m.fc0: zero points of u4_g32_zm_sf16 beyond the integers 0 to 15"),
    "two groups": (["u4b8_g32_sf16", "u4b8_g64_sf16"], {}, "m.fc1: groups of 64, where others have 32: AWQ has one group size for all"),
    "group of settings": (["u4b8_g64_sf16"], {"group_size": 32}, "m.fc0: groups of 64, where others have 32"),
    "rounded": (["u4_g32_zi_sf16"], {"version": "gemv_fast"}, "zero points whose product with the scale is no torch.float16"),
    "zero points": (["u4_g32_zi_sf16"], {"zero_point": False}, "zero points other than 8, where the settings say zero_point = false"),
    "excluded": (["u4b8_g32_sf16"], {"modules_to_not_convert": ["m"]}, "m.fc0: the settings say that this module is not quantised"),
    "codebook": (["nf4_g32_sf16"], {}, "codes of nf4_g32_sf16; integers are held"),
    "nothing": ([], {}, "no weight is quantised"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_unwritable(case):
    names, stated, message = UNWRITABLE[case]
    items = {f"m.fc{i}.weight": random_quant(formats.get(name), 32, 64) for i, name in enumerate(names)}
    with pytest.raises(UnsupportedError, match=message):
        write(items, {**STATED, **stated} if stated else None)


def test_unwritable_shapes():
    for q, stated, message in (
        (random_quant(formats.get("int4_g32"), 12, 64), None, "N = 12; gemm takes multiples of 8"),
        (random_quant(formats.get("int4_g32"), 8, 36), {"version": "gemv"}, "K = 36; gemv takes multiples of 8"),
        (random_quant(formats.get("u4_g32_zm_sf16"), 8, 96), None, "K = 96; gemv_fast takes multiples of 64"),
        (random_quant(formats.get("int4_g32"), 8, 64, perm=True), None, "a permutation of its columns"),
        (QuantStack.of([random_quant(formats.get("int4_g32"), 8, 64)] * 2), None, r"is a stack \[2, 8, 64\]"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            write({"m.fc.weight": q}, stated and {**STATED, **stated})
