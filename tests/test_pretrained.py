"""from_pretrained: every kind of checkpoint gives what transformers gives of the same numbers, dequantised."""

import copy
import gc
import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from checkpoints import saved
from pretrained import (
    CONFIGS,
    EVERYTHING,
    IDS,
    LINEARS,
    LLAMA,
    SMALL,
    assert_same_model,
    gpt_oss,
    greedy,
    load,
    of_transformers,
    quantized,
    qwen3_vl_moe,
    rewritten,
    save_dense,
    store,
    written,
)
from test_cli import Watch

import qkernels
from qkernels import CheckpointError, FormatError, QuantLinear, UnsupportedError, io, reference
from qkernels.embedding import QuantEmbedding
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import join
from qkernels.integrations import conversion
from qkernels.integrations.experts import JoinedLinear, QuantExperts
from qkernels.integrations.loader import Loader
from qkernels.io import shards

pytestmark = pytest.mark.usefixtures("one_thread")


# -- models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [LINEARS, EVERYTHING], ids=["linears", "embeddings, heads and routers too"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen2, tied"])
def test_same_as_transformers(tmp_path, name, pattern):
    save_dense(name, tmp_path / "m")
    items, dense = quantized(tmp_path / "m", pattern)
    got = load(written(items, tmp_path / "m"))
    assert_same_model(got, dense)
    assert torch.equal(greedy(got), greedy(dense()))
    held = [m.quant_tensor() for m in got.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    if "m" not in name or "llama" in name or "gemma" in name:  # not fused
        for q in (v for n, v in items.items() if isinstance(v, QuantTensor)):
            assert any(q.equal(other) for other in held)  # the checkpoint's own numbers


@pytest.mark.parametrize(
    ("dtype", "shard_bytes"), [(torch.float32, 20_000), (torch.bfloat16, 20_000), (torch.float16, 4_000_000_000)], ids=str
)
def test_dtypes_and_shards(tmp_path, dtype, shard_bytes):
    save_dense("qwen2, with biases", tmp_path / "m", dtype)
    items, dense = quantized(tmp_path / "m", EVERYTHING)
    path = written(items, tmp_path / "m", shard_bytes=shard_bytes)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard_bytes < 30_000)
    got = load(path)
    assert got(IDS).logits.dtype == dtype
    assert_same_model(got, dense)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    got = load(path, dtype=other)
    assert got(IDS).logits.dtype == other == got.config.dtype
    assert_same_model(got, dense)


# -- layouts -----------------------------------------------------------------------------------------------------------------------


WRITTEN = {
    "gptq": "int4_g32",
    "awq": "u4_g32_zi_sf16",
    "compressed-tensors": "int4_g32",
    "bitsandbytes": "nf4",
}


@pytest.mark.parametrize("name", ["qwen2, tied", "mixtral"])
@pytest.mark.parametrize("layout", WRITTEN)
def test_layouts(tmp_path, layout, name):
    save_dense(name, tmp_path / "m", torch.float16)
    items, dense = quantized(tmp_path / "m", format=WRITTEN[layout])
    got = load(written(items, tmp_path / "m", layout, shard_bytes=40_000))
    assert sum(isinstance(m, QuantLinear) for m in got.modules()) == (20 if name == "mixtral" else 14)
    assert_same_model(got, dense)
    assert not hasattr(got.config, "quantization_config")
    got = load(tmp_path / f"m-{layout}", dtype=torch.float32)
    assert torch.equal(greedy(got), greedy(dense()))


@pytest.mark.parametrize("name", ["llama", "qwen3 moe"])
@pytest.mark.parametrize(("layout", "format"), [("fp8", "e4m3_g32x32_sf32"), ("modelopt", "nvfp4")])
def test_layouts_that_are_only_read(tmp_path, layout, format, name):
    save_dense(name, tmp_path / "m")
    items, dense = quantized(tmp_path / "m", format=format)
    assert_same_model(load(store(items, tmp_path / "m", layout)), dense)


def test_awq_activations_are_divided(tmp_path):
    """AWQ multiplies the Linear after a GELU by scales, and stores them beside the activation."""
    config = transformers.Starcoder2Config(**LLAMA)
    save_dense("starcoder2", tmp_path / "m", torch.float16, config)
    items, _ = quantized(tmp_path / "m", format="u4_g32_zi_sf16")
    dense = {n: v if isinstance(v, torch.Tensor) else reference.decode(v) for n, v in items.items()}
    for i in range(2):
        items[f"model.layers.{i}.mlp.act.scales"] = scales = torch.rand(96).half() + 0.5
        dense[f"model.layers.{i}.mlp.c_proj.weight"] /= scales
    got = load(written(items, tmp_path / "m", "awq"), dtype=torch.float32)
    assert_same_model(got, of_transformers(tmp_path / "m", dense))


def test_kwargs_generation_config_and_marks(tmp_path):
    save_dense("llama", tmp_path / "m")
    items, dense = quantized(tmp_path / "m")
    path = written(items, tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 7}))
    got = load(path, attn_implementation="eager", device="cpu", progress=True)
    assert got.config._attn_implementation == "eager"
    assert got.generation_config.max_new_tokens == 3 and got.generation_config.eos_token_id == 7
    assert all(m._is_hf_initialized for m in got.modules())
    assert_same_model(got, dense)
    for bad in ({"compute": "int3"}, {"dtype": "int8"}):
        with pytest.raises(FormatError):
            load(path, **bad)


def test_dense_directories_load_with_a_warning(tmp_path, caplog):
    save_dense("mixtral", tmp_path / "m")
    dense = of_transformers(tmp_path / "m", dict(io.read(tmp_path / "m")))
    with caplog.at_level(logging.WARNING, "qkernels"):
        got = load(tmp_path / "m")
    assert "replace_linear" in caplog.text
    assert_same_model(got, dense)


def test_what_no_linear_can_be_is_decoded(tmp_path, caplog):
    save_dense("llama", tmp_path / "m")
    items, dense = quantized(tmp_path / "m")
    items["model.norm.weight"] = QuantTensor.from_tensors(*one_row(items["model.norm.weight"]))
    path = written(items, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[1, 64\].*\[64\]"):
        load(path)
    save_dense("mixtral", tmp_path / "x")
    items, dense = quantized(tmp_path / "x", "gate")
    with caplog.at_level(logging.INFO, "qkernels"):
        got = load(written(items, tmp_path / "x"))
    assert "gate.weight is decoded" in caplog.text and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert_same_model(got, dense)


def test_a_model_that_is_mostly_decoded_says_so(tmp_path, caplog):
    """Falcon's linears are of a class of its own, whose forward may be another one; a router is no matter for a warning."""
    config = transformers.FalconConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    save_dense("falcon", tmp_path / "m", config=config)
    items, dense = quantized(tmp_path / "m")
    with caplog.at_level(logging.WARNING, "qkernels"):
        assert_same_model(load(written(items, tmp_path / "m")), dense)
    assert "0.0 million quantised weights are decoded, as no QuantLinear can be where they are: in a FalconLinear" in caplog.text


def one_row(t):
    q = qkernels.quantize(t[None], "int8")
    return q.format, q.shape, q.tensors()


# -- memory ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [*(("llama", layout) for layout in (*WRITTEN, "qkernels")), ("mixtral", "gptq")])
def test_memory(tmp_path, monkeypatch, layout, name):
    """What lives at any time is not much more than the files hold: no dense copy, no second one."""
    sizes = SMALL | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes) if name == "llama" else transformers.MixtralConfig(**sizes, num_local_experts=2)
    save_dense(name, tmp_path / "m", torch.float16, config)
    items, _ = quantized(tmp_path / "m", format=WRITTEN.get(layout, "int4"))
    path = written(items, tmp_path / "m", layout)
    items.clear()
    files, watch = sum(f.stat().st_size for f in path.glob("*.safetensors")), Watch()
    for owner, function in ((Loader, "add"), (Loader, "finish"), (shards.Tensors, "__getitem__")):
        monkeypatch.setattr(owner, function, watch.around(getattr(owner, function)))
    monkeypatch.setattr(QuantLinear, "_prepare", watch.around(QuantLinear._prepare))
    try:
        got = load(path)
        assert watch.look() <= watch.peak <= 1.3 * files
        assert watch.peak > 0.8 * files and got(IDS).logits.isfinite().all()
    finally:
        gc.unfreeze()


# -- experts -----------------------------------------------------------------------------------------------------------------------


def test_experts_are_held_one_by_one(tmp_path):
    save_dense("qwen3 moe", tmp_path / "m")
    items, _ = quantized(tmp_path / "m")
    got = load(written(items, tmp_path / "m"))
    experts = got.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts) and not list(experts.inner.parameters())
    for e in range(4):
        gate, up, down = (items[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert experts.gate_up_proj[e].quant_tensor().equal(join([gate, up]))
        assert experts.down_proj[e].quant_tensor().equal(down)


@pytest.mark.parametrize("plain", [(), ("down_proj",)], ids=["all", "down_proj dense"])
def test_gpt_oss(tmp_path, plain):
    """A stack is a parameter of the model, the other way round: [E, N, K] where the parameter is [E, K, N]; rows alternate."""
    save_dense("gpt-oss", tmp_path / "m", config=gpt_oss())
    items, dense = {}, {}
    for name, t in io.read(tmp_path / "m"):
        items[name] = dense[name] = t
        if name.endswith(("gate_up_proj", "down_proj")) and not name.endswith(plain or "-"):
            items[name] = QuantStack.of([qkernels.quantize(w.T.contiguous(), "mxfp4") for w in t])
            dense[name] = torch.stack([reference.decode(q).T for q in items[name]])
    model = of_transformers(tmp_path / "m", dense)
    got = load(store(items, tmp_path / "m", "mxfp4"))
    assert sum(isinstance(m, QuantLinear) for m in got.modules()) == (8 if plain else 16)
    assert_same_model(got, model)
    assert torch.equal(greedy(got), greedy(model()))


VL = transformers.AutoModelForImageTextToText


def test_experts_that_were_taken_apart(tmp_path):
    """Quantisers store experts one by one whose model has them in one parameter, and knows no rule for it: Qwen3-VL's."""
    save_dense("qwen3 vl", tmp_path / "m", config=qwen3_vl_moe(), auto=VL)
    items, dense = {}, {}
    for name, t in io.read(tmp_path / "m"):
        items[name] = dense[name] = t
        if ".experts." in name:
            owner, part = name.rsplit(".", 1)
            halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
            for (e, w), (p, i) in itertools.product(enumerate(items.pop(name)), halves.items()):
                format = "int8" if (e, p) == (2, "up_proj") else "int4_g32"
                items[f"{owner}.{e}.{p}.weight"] = qkernels.quantize(w.chunk(len(halves))[i], format)
            rows = [torch.cat([reference.decode(items[f"{owner}.{e}.{p}.weight"]) for p in halves]) for e in range(4)]
            dense[name] = torch.stack(rows)
    got = load(written(items, tmp_path / "m"))
    assert_same_model(got, of_transformers(tmp_path / "m", dense, VL))
    kinds = [type(layer) for layer in got.model.language_model.layers[1].mlp.experts.gate_up_proj]
    assert kinds == [QuantLinear, QuantLinear, JoinedLinear, QuantLinear]  # one of two formats
    moved = {n.replace(".experts.3.", ".experts.7."): v for n, v in items.items()}
    with pytest.raises(CheckpointError, match=r"experts\.\w+': the checkpoint has its experts 0, 1, 2, 7; 0 to 3 are needed"):
        load(rewritten(moved, tmp_path))


def test_experts_the_other_way_round(tmp_path):
    """Qwen3-VL's in FP8 lie as [E, in, out], with their scales; those of the activations of a stack are left out."""
    save_dense("qwen3 vl", tmp_path / "m", config=qwen3_vl_moe(), auto=VL)
    tensors, dense = {}, {}
    for name, t in io.read(tmp_path / "m"):
        tensors[name] = dense[name] = t
        if name.endswith(".experts.down_proj"):
            lying = [qkernels.quantize(w.T.contiguous(), "e4m3_g32x32_sf32") for w in t]
            tensors[name] = torch.stack([q.codes for q in lying]).view(torch.float8_e4m3fn)
            tensors |= {f"{name}_scale_inv": torch.stack([q.scales for q in lying]), f"{name}_activation_scale": torch.ones(4)}
            dense[name] = torch.stack([reference.decode(q).T for q in lying])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    path = saved(tmp_path / "fp8", tensors, config=config | {"quantization_config": said})
    got = load(path)
    assert got.model.language_model.layers[0].mlp.experts.down_proj[3].format.name == "e4m3_g32x32_sf32"
    assert_same_model(got, of_transformers(tmp_path / "m", dense, VL))


def test_gpt_oss_of_unsloth(tmp_path):
    """In NF4, its experts in lists of linears, its router in a module of its own. Built from the names in its files."""
    save_dense("gpt-oss", tmp_path / "m", config=gpt_oss())
    items, dense = {}, {}
    for name, t in io.read(tmp_path / "m"):
        dense[name] = t
        owner, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj"):
            quantised = [qkernels.quantize(w.T.contiguous(), "nf4") for w in t]
            items |= {f"{owner}.{leaf}s.{e}.weight": q for e, q in enumerate(quantised)}
            dense[name] = torch.stack([reference.decode(q).T for q in quantised])
        elif leaf in ("gate_up_proj_bias", "down_proj_bias"):
            items |= {f"{owner}.{leaf.removesuffix('_bias')}s.{e}.bias": b for e, b in enumerate(t)}
        else:
            items[name.replace(".router.", ".router.linear.")] = t
    got = load(written(items, tmp_path / "m", "bitsandbytes"))
    assert sum(isinstance(m, QuantLinear) for m in got.modules()) == 16
    assert_same_model(got, of_transformers(tmp_path / "m", dense))


def test_experts_of_two_formats(tmp_path):
    """What cannot lie in one weight is two layers."""
    save_dense("mixtral", tmp_path / "m")
    items, _ = quantized(tmp_path / "m")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    items[name] = qkernels.quantize(reference.decode(items[name]), "int8")
    dense = of_transformers(tmp_path / "m", {n: v if isinstance(v, torch.Tensor) else reference.decode(v) for n, v in items.items()})
    got = load(written(items, tmp_path / "m"))
    assert_same_model(got, dense)
    gate_up = got.model.layers[1].mlp.experts.gate_up_proj
    assert [isinstance(layer, JoinedLinear) for layer in gate_up] == [False, False, True]
    assert gate_up[2].parts[1].quant_tensor().equal(items[name])


def test_experts_that_cannot_be_fused(tmp_path):
    save_dense("mixtral", tmp_path / "m")
    items, _ = quantized(tmp_path / "m")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    items[name] = reference.decode(items[name])
    with pytest.raises(UnsupportedError, match=r"gate_up_proj.*some are quantised"):
        load(written(items, tmp_path / "m"))
    del items[name]
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        load(rewritten(items, tmp_path))


def test_rules_that_do_more_than_move_rows():
    class Doubled:
        """As a rule that changes numbers."""

    q = qkernels.quantize(torch.randn(8, 32), "int4_g32")
    rule = SimpleNamespace(operations=[Doubled()], source_patterns=["a"], target_patterns=["b"])
    with pytest.raises(UnsupportedError, match=r"Doubled.*move rows only"):
        conversion.convert(rule, "b", [("a", "a", q)], None)


# -- damage ------------------------------------------------------------------------------------------------------------------------


DAMAGE = {
    "a weight is missing": (lambda i, c: i.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "a bias is missing": (lambda i, c: i.pop("model.layers.0.self_attn.k_proj.bias"), r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
    "many are missing": (lambda i, c: [i.pop(n) for n in list(i) if "layers.1" in n], r"lacks .*… \(12 in all\)"),
    "another one": (lambda i, c: i.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3)}), r"layers\.7.*does not know"),
    "of another shape": (lambda i, c: c.update(intermediate_size=100), r"_proj\.weight.*96.*100"),
    "a plain one of another shape": (lambda i, c: i.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight.*\[3\].*\[64\]"),
    "integers": (lambda i, c: i.update({"model.norm.weight": torch.ones(64).int()}), r"model\.norm\.weight.*int32"),
    "no such model": (lambda i, c: c.update(model_type="nothing"), "describes no model"),
    "no such architecture": (lambda i, c: c.update(architectures=["Nothing"]), "Nothing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(tmp_path, case):
    save_dense("qwen2, with biases", tmp_path / "m")
    items, _ = quantized(tmp_path / "m")
    change, message = DAMAGE[case]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    change(items, config)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(written(items, tmp_path / "m"))


def test_layers_that_predict_more_tokens_are_left_out(tmp_path):
    """As DeepSeek-V3 has them behind its last layer; transformers' models do not."""
    save_dense("llama", tmp_path / "m", config=transformers.LlamaConfig(**LLAMA, num_nextn_predict_layers=1))
    items, dense = quantized(tmp_path / "m")
    items |= {n.replace("layers.1", "layers.2"): copy.deepcopy(v) for n, v in items.items() if "layers.1" in n}
    items["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    assert_same_model(load(written(items, tmp_path / "m")), dense)
    items["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    with pytest.raises(CheckpointError, match=r"has model\.layers\.3\.eh_proj\.weight, which"):
        load(rewritten(items, tmp_path))


def test_zero_biases_that_the_model_has_not_are_left_out(tmp_path):
    """As some writers of GPTQ checkpoints add to every layer."""
    save_dense("llama", tmp_path / "m")
    items, dense = quantized(tmp_path / "m")
    items["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    assert_same_model(load(written(items, tmp_path / "m")), dense)
    items["model.layers.0.mlp.up_proj.bias"][1] = 1
    with pytest.raises(CheckpointError, match=r"up_proj\.bias"):
        load(rewritten(items, tmp_path))


def test_no_directory_no_config_no_transformers(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"nothing does not exist$"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"owner/model does not exist; a model of the hub .* hf download owner/model"):
        load("owner/model")
    save_dense("llama", tmp_path / "m")
    with pytest.raises(CheckpointError, match="name its directory"):
        load(tmp_path / "m" / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(qkernels.QKernelsError, match=r"qkernels\[transformers\]"):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path / "m")
