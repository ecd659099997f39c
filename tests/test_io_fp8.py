"""FP8, gpt-oss and ModelOpt checkpoints: values of transformers and torchao (tests/golden), names, and hostile files."""

import numpy as np
import pytest
import torch
from cases import equal_values
from checkpoints import GOLDEN, replaced, saved

from qkernels import io, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack
from qkernels.io import fp8, modelopt, mxfp4
from qkernels.io.modules import ACTIVATION_LEAVES

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def golden(case, file="fp8.npz", mark="/"):
    with np.load(GOLDEN / file) as arrays:
        return {key.removeprefix(f"{case}{mark}"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{case}{mark}")}


def fp8_case(case, scale_name="weight_scale_inv", **more):
    """(tensors, settings, values)"""
    held = golden(case)
    tensors = {"a.weight": held["weight"].view(torch.float8_e4m3fn), f"a.{scale_name}": held["scale"]}
    block = {"weight_block_size": held["block"].tolist()} if "block" in held else {}
    return tensors, {**FP8, **block, **more}, held["values"]


NAMED = {
    "block": "e4m3_g128x128_sf32",
    "exponents": "e4m3_g24x8_se8m0",
    "mxfp8": "e4m3_g32_se8m0",
    "tensor": "e4m3_g-1x-1_sf32",
    "rows": "e4m3_g-1_sf32",
}


@pytest.mark.parametrize("scale_name", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("case", NAMED)
def test_fp8(case, scale_name):
    tensors, settings, values = fp8_case(case, scale_name)
    ((name, q),) = fp8.read(tensors, settings)
    assert (name, q.format.name) == ("a.weight", NAMED[case])
    equal_values(reference.decode(q), values)


@pytest.mark.parametrize("case,shape", [("tensor", []), ("tensor", [1, 1]), ("rows", [7]), ("rows", [7, 1])])
def test_fp8_shapes_of_scales(case, shape):
    tensors, settings, values = fp8_case(case)
    tensors["a.weight_scale_inv"] = tensors["a.weight_scale_inv"].reshape(shape)
    ((_, q),) = fp8.read(tensors, settings)
    equal_values(reference.decode(q), values)


def test_fp8_exponents_need_no_block_of_mxfp8():
    tensors, settings, values = fp8_case("mxfp8", "weight_scale")
    del settings["weight_block_size"]
    ((_, q),) = fp8.read(tensors, settings)
    equal_values(reference.decode(q), values)
    tensors["a.weight_scale"] = tensors["a.weight_scale"].view(torch.float8_e8m0fnu)
    ((_, same),) = fp8.read(tensors, {**settings, "scale_fmt": "ue8m0"})
    assert same.equal(q)


def test_mxfp8_by_its_name(tmp_path):
    """As transformers calls it; the bytes beside the weight are exponents whether scale_fmt says so or not."""
    tensors, settings, values = fp8_case("mxfp8")
    settings |= {"quant_method": "mxfp8", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    info = io.detect(saved(tmp_path / "model", tensors, settings))
    assert info.layout == "fp8"
    equal_values(reference.decode(dict(io.read(info))["a.weight"]), values)


@pytest.mark.parametrize("case", ["rows", "tensor", "block"])
def test_gptqmodel_divides(case):
    """Under DeepSeek's names: what the settings say of the scales decides. Built from GPTQModel's nn_modules/qlinear/fp8.py."""
    tensors, settings, values = fp8_case(case)
    tensors["a.weight_scale_inv"] = 1 / tensors["a.weight_scale_inv"]
    own = {"bits": 8, "group_size": -1, "desc_act": False, "lm_head": False, "method": "fp8", "format": "float8_e4m3fn"}
    own |= {"checkpoint_format": "fp8", "pack_dtype": "int32", "meta": {}, "weight_scale_method": case, "weight_scale_semantics": "inverse"}
    ((_, q),) = fp8.read(tensors, settings | own)
    torch.testing.assert_close(reference.decode(q), torch.as_tensor(values).float(), rtol=2e-7, atol=0)
    with pytest.raises(CheckpointError, match="weight_scale_semantics is 'direct'"):
        list(fp8.read(tensors, settings | own | {"weight_scale_semantics": "direct"}))
    with pytest.raises(CheckpointError, match="and no weight_scale_semantics: do the scales divide"):
        list(fp8.read(tensors, settings | own | {"weight_scale_semantics": None}))
    with pytest.raises(CheckpointError, match=r"dynamic = .*unknown"):  # in settings that are not GPTQModel's
        list(fp8.read(tensors, settings | {"dynamic": {"-:a": {}}}))


def test_fp8_directory(tmp_path):
    """With what is no weight, in the order of the file; scales of activations can be told from weights."""
    tensors, settings, values = fp8_case("block", modules_to_not_convert=["lm_head", "b.gate"])
    tensors |= {"a.bias": torch.ones(576), "b.gate.weight": torch.ones(3, 4), "norm.weight": torch.ones(5), "norm.scale": torch.ones(5)}
    tensors |= {"a.input_scale": torch.tensor(0.5), "attn.k_scale": torch.tensor(0.5), "a.activation_scale_ub": torch.tensor([1200.0])}
    items = dict(io.read(saved(tmp_path / "model", tensors, settings)))
    equal_values(reference.decode(items.pop("a.weight")), values)
    assert items.keys() == tensors.keys() - {"a.weight", "a.weight_scale_inv"}
    activations = {name for name in items if name.rpartition(".")[2] in ACTIVATION_LEAVES}
    assert activations == {"a.input_scale", "attn.k_scale", "a.activation_scale_ub"}


def test_fbgemm():
    tensors, _, values = fp8_case("rows", "weight_scale")
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": None}
    ((_, q),) = fp8.read(tensors, settings)
    equal_values(reference.decode(q), values)


def test_fp8_experts_in_one_tensor():
    tensors, settings, values = fp8_case("exponents")
    stacked = {"experts.gate_up_proj": torch.stack([tensors["a.weight"].view(torch.uint8)] * 2).view(torch.float8_e4m3fn)}
    stacked["experts.gate_up_proj_scale_inv"] = torch.stack([tensors["a.weight_scale_inv"], tensors["a.weight_scale_inv"] + 1])
    ((name, stack),) = fp8.read(stacked, settings)
    assert name == "experts.gate_up_proj" and isinstance(stack, QuantStack) and stack.shape == (2, *values.shape)
    equal_values(reference.decode(stack[0]), values)
    equal_values(reference.decode(stack[1]), 2 * values)


def test_fp4_experts():
    """DeepSeek-V4's: int8 bytes of two codes beside `.scale` exponents; the numbers are those of gpt-oss."""
    held = golden("mxfp4")
    tensors = {"a.weight": held["blocks"][0].flatten(1).view(torch.int8), "a.scale": held["scales"][0].view(torch.float8_e8m0fnu)}
    ((name, q),) = fp8.read(tensors, {**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"})
    assert (name, q.format.name) == ("a.weight", "e2m1_g32_se8m0")
    equal_values(reference.decode(q), held["values"][0].T)
    with pytest.raises(CheckpointError, match=r"a.weight is torch.int8"):
        list(fp8.read(tensors, {**FP8, "weight_block_size": [128, 128]}))


@pytest.mark.parametrize("shape,block,message", [
    ([5, 1], [128, 128], r"a.weight_scale_inv is \[5, 1\], its weight \[576, 136\]: .* blocks of \[128, 128\] have \[5, 2\]"),
    ([2, 5], [128, 128], r"blocks of \[128, 128\] have \[5, 2\]"),
    ([5, 2], [64, 64], r"blocks of \[64, 64\] have \[9, 3\]"),
    ([5, 2], None, "no block size is stated"),
    ([10], None, "no block size is stated"),
])  # fmt: skip
def test_fp8_shapes_refused(shape, block, message):
    tensors, settings, _ = fp8_case("block")
    tensors["a.weight_scale_inv"] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=message):
        list(fp8.read(tensors, {**settings, "weight_block_size": block}))


HOSTILE_FP8 = {
    "no scale": ({"a.weight_scale_inv": None}, {}, "a.weight is torch.float8_e4m3fn .* has no scale beside it"),
    "no weight": ({"a.weight": None, "b.weight": torch.ones(2, 2, dtype=torch.int8)}, {}, "b.weight is torch.int8"),
    "two scales": ({"a.weight_scale": torch.ones(1)}, {}, "a.weight has two scales: a.weight_scale_inv and a.weight_scale"),
    "dense weight": ({"a.weight": torch.ones(7, 40)}, {}, "a.weight is torch.float32 and has the scale a.weight_scale_inv"),
    "type of scales": ({"a.weight_scale_inv": torch.ones(7, 1).double()}, {}, "a.weight_scale_inv is torch.float64, not torch.float32"),
    "four dimensions": ({"a.weight": torch.ones(1, 1, 7, 40).to(torch.float8_e4m3fn)}, {}, r"is \[1, 1, 7, 40\]; a weight has two"),
    "no columns": ({"a.weight": torch.ones(7, 0).to(torch.float8_e4m3fn)}, {}, r"is \[7, 0\]; .* none of them 0"),
    "stack": ({"a.weight": torch.ones(3, 7, 40).to(torch.float8_e4m3fn)}, {}, r"is \[7, 1\], and a.weight a stack \[3, 7, 40\]"),
    "left out": ({}, {"ignored_layers": ["a"]}, "a.weight has the scale a.weight_scale_inv, and the settings list it"),
    "two lists": ({}, {"ignored_layers": ["b"], "modules_to_not_convert": ["c"]}, "contradicts itself"),
    "list of numbers": ({}, {"ignored_layers": [3]}, "no list of names"),
    "block": ({}, {"weight_block_size": [128]}, r"weight_block_size is \[128\], not"),
    "block of floats": ({}, {"weight_block_size": [128.0, 128]}, "weight_block_size is"),
    "block of 0": ({}, {"weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
    "format": ({}, {"fmt": "e5m2"}, "fmt is 'e5m2'; 'e4m3'"),
    "unknown key": ({}, {"scale_fnt": "ue8m0"}, "scale_fnt = 'ue8m0', which is unknown.*did you mean scale_fmt"),
}


@pytest.mark.parametrize("tensors,settings,message", HOSTILE_FP8.values(), ids=HOSTILE_FP8)
def test_hostile_fp8(tensors, settings, message):
    held, stated, _ = fp8_case("rows")
    held = replaced(held, tensors)
    with pytest.raises(CheckpointError, match=message):
        list(fp8.read(held, {**stated, **settings}))


def test_fnuz_is_named():
    tensors, settings, _ = fp8_case("rows")
    tensors["a.weight"] = tensors["a.weight"].view(torch.float8_e4m3fnuz)
    with pytest.raises(UnsupportedError, match=r"a.weight is torch.float8_e4m3fnuz"):
        list(fp8.read(tensors, settings))


EXPERTS = "model.layers.0.mlp.experts"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def gpt_oss():
    held = golden("mxfp4")
    tensors = {f"{EXPERTS}.gate_up_proj_blocks": held["blocks"], f"{EXPERTS}.gate_up_proj_scales": held["scales"]}
    return tensors | {f"{EXPERTS}.gate_up_proj_bias": torch.ones(2, 6)}, held["values"]


def test_mxfp4(tmp_path):
    tensors, values = gpt_oss()
    items = dict(io.read(saved(tmp_path / "model", tensors, MXFP4)))
    assert items.keys() == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_bias"}
    stack = items[f"{EXPERTS}.gate_up_proj"]
    assert stack.format.name == "e2m1_g32_se8m0" and stack.shape == (2, 6, 96)
    for q, transposed in zip(stack, values):
        equal_values(reference.decode(q), transposed.T)


HOSTILE_MXFP4 = {
    "no scales": ("scales", lambda t: None, "gate_up_proj_blocks has no .*gate_up_proj_scales beside it"),
    "no blocks": ("blocks", lambda t: None, "gate_up_proj_scales has no .*gate_up_proj_blocks beside it"),
    "type of blocks": ("blocks", lambda t: t.view(torch.int8), "gate_up_proj_blocks is torch.int8, not torch.uint8"),
    "type of scales": ("scales", lambda t: t.float(), "gate_up_proj_scales is torch.float32"),
    "blocks of 8": ("blocks", lambda t: t[..., :8], r"blocks is \[2, 6, 3, 8\]"),
    "fewer scales": ("scales", lambda t: t[:, :5], r"gate_up_proj_scales is \[2, 5, 3\], not \[2, 6, 3\]"),
    "three dimensions": ("blocks", lambda t: t.flatten(2), r"blocks is \[2, 6, 48\]"),
    "no experts": ("blocks", lambda t: t[:0], r"blocks is \[0, 6, 3, 16\]"),
}


@pytest.mark.parametrize("part,changed,message", HOSTILE_MXFP4.values(), ids=HOSTILE_MXFP4)
def test_hostile_mxfp4(part, changed, message):
    tensors, _ = gpt_oss()
    name = f"{EXPERTS}.gate_up_proj_{part}"
    new = changed(tensors.pop(name))
    with pytest.raises(CheckpointError, match=message):
        list(mxfp4.read(tensors if new is None else {**tensors, name: new}, MXFP4))
    with pytest.raises(CheckpointError, match="group_size = 16, which is unknown"):
        list(mxfp4.read(gpt_oss()[0], {**MXFP4, "group_size": 16}))


def nvfp4():
    """torchao's tensors under ModelOpt's names: both multiply by the scale of the tensor."""
    held = golden("e2m1_g16_se4m3_t", "torchao.npz", ".")
    tensors = {"model.a.weight": held["codes"], "model.a.weight_scale": held["scales"].view(torch.float8_e4m3fn)}
    tensors |= {"model.a.weight_scale_2": held["tensor_scale"].reshape([]), "model.a.input_scale": torch.tensor(0.5)}
    return tensors, held["values"]


def stated(algorithm, **more):
    return {"producer": {"name": "modelopt", "version": "0.33"}, "quantization": {"quant_algo": algorithm, **more}}


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"])
def test_nvfp4(algorithm, tmp_path):
    tensors, values = nvfp4()
    tensors["lm_head.weight"] = torch.ones(3, 4)
    settings = stated(algorithm, group_size=16, exclude_modules=["lm_head", "model.b*"], kv_cache_quant_algo="FP8")
    items = dict(io.read(saved(tmp_path / "model", tensors, hf_quant_config=settings)))
    assert items.keys() == {"model.a.weight", "model.a.input_scale", "lm_head.weight"}
    q = items["model.a.weight"]
    assert q.format.name == "e2m1_g16_se4m3_t"
    equal_values(reference.decode(q), values)


def test_nvfp4_in_config_json(tmp_path):
    tensors, values = nvfp4()
    group = {
        "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "input_activations": {},
        "targets": ["Linear"],
    }
    settings = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "producer": {},
    }
    equal_values(reference.decode(dict(io.read(saved(tmp_path / "model", tensors, settings)))["model.a.weight"]), values)
    group["weights"]["group_size"] = 32
    with pytest.raises(CheckpointError, match="group_size is 32, and NVFP4 has groups of 16"):
        dict(io.read(saved(tmp_path / "other", tensors, settings)))


@pytest.mark.parametrize("algorithm,case,shape", [
    ("FP8", "tensor", []), ("FP8_PER_CHANNEL_PER_TOKEN", "rows", [7]), ("FP8_PB_WO", "block", [5, 2]), ("FP8_PB_WO", "block", [5, 1, 2, 1]),
    ("MXFP8", "mxfp8", [6, 3]),
])  # fmt: skip
def test_modelopt_fp8(algorithm, case, shape):
    tensors, _, values = fp8_case(case, "weight_scale")
    tensors["a.weight_scale"] = tensors["a.weight_scale"].reshape(shape)
    ((_, q),) = modelopt.read(tensors, stated(algorithm))
    assert q.format.name == NAMED[case]
    equal_values(reference.decode(q), values)


def test_modelopt_mixed():
    tensors, values = nvfp4()
    more, _, fp8_values = fp8_case("tensor", "weight_scale")
    layers = {"model.a": {"quant_algo": "NVFP4", "group_size": 16}, "a": {"quant_algo": "FP8"}}
    items = dict(modelopt.read({**tensors, **more}, stated("MIXED_PRECISION", quantized_layers=layers)))
    equal_values(reference.decode(items["model.a.weight"]), values)
    equal_values(reference.decode(items["a.weight"]), fp8_values)
    del layers["a"]
    with pytest.raises(CheckpointError, match=r"a.weight has a scale, and quantized_layers does not list it"):
        list(modelopt.read({**tensors, **more}, stated("MIXED_PRECISION", quantized_layers=layers)))


HOSTILE_MODELOPT = {
    "no second scale": ({"weight_scale_2": None}, {}, "model.a.weight_scale_2 is missing"),
    "no scale": ({"weight_scale": None}, {}, "model.a.weight_scale is missing"),
    "no scales": ({"weight_scale": None, "weight_scale_2": None}, {}, "model.a.weight is torch.uint8 .* no scale beside it"),
    "no weight": ({"weight": None}, {}, "model.a.weight is missing"),
    "type of scales": ({"weight_scale": torch.ones(6, 6)}, {}, "weight_scale is torch.float32, not torch.float8_e4m3fn"),
    "shape of scales": (
        {"weight_scale": torch.ones(6, 3).to(torch.float8_e4m3fn)},
        {},
        r"model.a.weight: .* scales of 6 x 96 .* is \[6, 3\], not \[6, 6\]",
    ),
    "two second scales": ({"weight_scale_2": torch.ones(2)}, {}, r"weight_scale_2 is \[2\], not \[1\]"),
    "FP8 weight": ({"weight": torch.ones(6, 48).to(torch.float8_e4m3fn)}, {}, "weight is torch.float8_e4m3fn, not torch.uint8"),
    "three dimensions": ({"weight": torch.ones(1, 6, 48, dtype=torch.uint8)}, {}, r"is \[1, 6, 48\]; packed weights have two"),
    "other algorithm": ({}, {"quant_algo": "FP8"}, "weight is torch.uint8, not torch.float8_e4m3fn"),
    "excluded": ({}, {"exclude_modules": ["model.*"]}, "model.a.weight has a scale, and exclude_modules"),
    "group size": ({}, {"group_size": 32}, "group_size is 32, and NVFP4 has groups of 16"),
    "names": ({}, {"exclude_modules": [1]}, "no list of names"),
    "unknown key": ({}, {"exclude_module": ["lm_head"]}, "exclude_module .* is unknown.*did you mean exclude_modules"),
    "no layers": ({}, {"quant_algo": "MIXED_PRECISION"}, "lacks quantized_layers"),
}


@pytest.mark.parametrize("leaves,settings,message", HOSTILE_MODELOPT.values(), ids=HOSTILE_MODELOPT)
def test_hostile_modelopt(leaves, settings, message):
    tensors, _ = nvfp4()
    for leaf, t in leaves.items():
        del tensors[f"model.a.{leaf}"]
        tensors |= {} if t is None else {f"model.a.{leaf}": t}
    with pytest.raises(CheckpointError, match=message):
        list(modelopt.read(tensors, {"quantization": {"quant_algo": "NVFP4", **settings}}))


def test_scales_of_inputs(tmp_path):
    """They come beside the weight, which is as it is without them; no other layout has loaders that would apply them."""
    tensors, _ = nvfp4()
    plain, scale = dict(modelopt.read(tensors, stated("NVFP4_AWQ"))), torch.rand(96).bfloat16()
    found = dict(modelopt.read({**tensors, "model.a.pre_quant_scale": scale}, stated("NVFP4_AWQ")))
    assert torch.equal(found.pop("model.a.pre_quant_scale"), scale) and found["model.a.weight"].equal(plain["model.a.weight"])
    for wrong, message in ((torch.ones(95), r"model.a.pre_quant_scale is \[95\], not \[96\]"), (torch.ones(96).int(), "torch.int32")):
        with pytest.raises(CheckpointError, match=message):
            list(modelopt.read({**tensors, "model.a.pre_quant_scale": wrong}, stated("NVFP4_AWQ")))
    for layout in ("gptq", "compressed-tensors", "gguf"):
        with pytest.raises(UnsupportedError, match=f"model.a.pre_quant_scale multiplies the input of its layer, .* {layout}"):
            io.write({"model.a.pre_quant_scale": scale}.items(), tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()


def test_modelopt_unsupported():
    tensors, _ = nvfp4()
    with pytest.raises(UnsupportedError, match=r"quant_algo is 'W4A16_AWQ', which is not read; NVFP4"):
        list(modelopt.read(tensors, stated("W4A16_AWQ")))
    with pytest.raises(UnsupportedError, match="has_zero_point is True"):
        list(modelopt.read(tensors, stated("NVFP4", has_zero_point=True)))
    more, _, _ = fp8_case("mxfp8", "weight_scale")
    for algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        with pytest.raises(CheckpointError, match=f"a.weight_scale is torch.uint8, which contradicts the quant_algo {algorithm}"):
            list(modelopt.read(more, stated(algorithm)))
    more, _, _ = fp8_case("rows", "weight_scale")
    with pytest.raises(CheckpointError, match="the quant_algo FP8 has one scale"):
        list(modelopt.read(more, stated("FP8")))
    with pytest.raises(CheckpointError, match=r"FP8_PB_WO has blocks of \[128, 128\]"):
        list(modelopt.read({**more, "a.weight_scale": torch.ones(7)}, stated("FP8_PB_WO")))
