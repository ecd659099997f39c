"""from_pretrained: every kind of checkpoint gives what transformers gives of the same numbers, dequantised."""

import copy
import gc
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_cli import Watch
from torch import nn

import qkernels
from qkernels import CheckpointError, FormatError, QuantLinear, UnsupportedError, io, reference
from qkernels.embedding import QuantEmbedding
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import join, take
from qkernels.integrations import conversion
from qkernels.integrations.experts import JoinedLinear, QuantExperts, linear
from qkernels.integrations.loader import Loader
from qkernels.io import shards
from qkernels.scaled import ScaledLinear

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = SMALL | {"num_key_value_heads": 2}
IDS = torch.arange(2, 10)[None]
LINEARS = r"(proj|fc\d?|c_\w+|w[123]|query_key_value|dense\w*)\.weight$"
EVERYTHING = rf"{LINEARS}|(embed_tokens|lm_head|wte|word_embeddings|gate)\.weight$"


def qwen3_moe(**changes):
    return transformers.Qwen3MoeConfig(**LLAMA, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **changes)


def gpt_oss():
    return transformers.GptOssConfig(**LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2, with biases": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen2, tied": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "gemma3, tied, scaled embeddings": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=16, pad_token_id=49),
    "gpt2, Conv1D": lambda: transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=50, n_positions=32),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3),
    "qwen3 moe": qwen3_moe,
}


# -- making checkpoints ------------------------------------------------------------------------------------------------------------


def save_dense(name, path, dtype=torch.float32, config=None):
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config or CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.1)
            elif p.dim() > 1:
                p.normal_(std=0.1)  # so that the greedy tokens are no matter of chance
    model.save_pretrained(path)
    return model


def quantized(path, pattern=LINEARS, format="int4_g32"):
    """Items of a dense directory, those whose names fit quantised, and what transformers makes of their values (of_transformers)."""
    items, dense, config = {}, {}, json.loads((path / "config.json").read_text())
    for name, t in io.read(path):
        items[name] = dense[name] = t
        if t.dim() == 2 and re.search(pattern, name):
            turned = config["model_type"] == "gpt2" and "wte" not in name
            items[name] = qkernels.quantize(t.T.contiguous() if turned else t, format)
            dense[name] = reference.decode(items[name])
            dense[name] = dense[name].T if turned else dense[name]
    return items, of_transformers(path, dense)


def of_transformers(path, dense):
    """A function: dtype -> the model that transformers loads of plain tensors."""
    plain = path.with_name(path.name + "-dense")
    plain.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in dense.items()}, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text((path / "config.json").read_text())
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda dtype=torch.float32: load(plain, dtype=dtype, experts_implementation="eager").eval()


def written(items, path, layout="qkernels", **options):
    """The items as a checkpoint, with the config of `path`."""
    out = path.with_name(path.name + "-" + layout)
    config = json.loads((path / "config.json").read_text())
    io.write(items.items(), out, layout, config=config, **options)
    if layout == "qkernels":
        (out / "config.json").write_text(json.dumps(config))
    return out


def load(path, **options):
    return qkernels.from_pretrained(path, **{"compute": "float", "progress": False} | options)


def assert_same_model(got, dense, ids=IDS):
    """At most twice the error of torch's own in the same dtype, against the same model in float64, and an ulp."""
    with torch.no_grad():
        ours = got(ids).logits
        torchs, exact = dense(ours.dtype)(ids).logits, dense(torch.float64)(ids).logits
    allowed = 2 * (torchs - exact).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed
    assert not any(t.is_meta for t in (*got.parameters(), *got.buffers()))
    assert not got.training and not any(m.training for m in got.modules())


def greedy(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


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


def stored(items, config, layout):
    """Items as layouts store them that are only read; by their specifications."""
    tensors = {}
    for name, value in items.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif layout == "fp8":
            tensors |= {name: value.codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": value.scales}
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
        elif layout == "modelopt":
            tensors |= {name: value.codes, f"{name}_scale": value.scales, f"{name}_scale_2": value.tensor_scale[0]}
        elif layout == "mxfp4":
            codes, scales = value.tensors["codes"], value.tensors["scales"].view(torch.uint8)
            tensors |= {f"{name}_blocks": codes.view(*scales.shape, 16), f"{name}_scales": scales}
    said = {"quant_method": layout} | {
        "fp8": {"weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"},
        "modelopt": {"quant_algo": "NVFP4", "group_size": 16},
        "mxfp4": {"modules_to_not_convert": ["lm_head"]},
    }[layout]
    return tensors, config | {"quantization_config": said}


def store(items, path, layout):
    tensors, config = stored(items, json.loads((path / "config.json").read_text()), layout)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


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


def test_tied_and_quantised(tmp_path):
    """The head is a QuantLinear, the embedding decodes rows; neither takes the other's place later."""
    save_dense("llama tied", tmp_path / "m")
    items, _ = quantized(tmp_path / "m", "embed_tokens")
    got = load(written(items, tmp_path / "m"))
    q = items["model.embed_tokens.weight"]
    assert isinstance(got.lm_head, QuantLinear) and got.lm_head.quant_tensor().equal(q)
    assert isinstance(got.model.embed_tokens, QuantEmbedding) and got.model.embed_tokens.quant_tensor().equal(q)
    before = got(IDS).logits
    got.tie_weights()
    assert torch.equal(got(IDS).logits, before)


def test_a_tied_embedding_holds_nothing(tmp_path):
    """Its rows come out of the head's form, wherever that goes; its part of the state_dict is there as ever."""
    save_dense("llama tied", tmp_path / "m")
    items, _ = quantized(tmp_path / "m", "embed_tokens")
    got, q = load(written(items, tmp_path / "m")), items["model.embed_tokens.weight"]
    embedding, ids = got.model.embed_tokens, torch.randint(50, (2, 200))
    assert sum(t.numel() for t in embedding.parameters()) == 0
    assert torch.equal(embedding(ids), reference.decode(q)[ids].to(embedding.dtype))
    two, state = copy.deepcopy(got), got.state_dict()
    assert two.model.embed_tokens._head[0] is two.lm_head
    for name, t in q.tensors().items():
        leaf = {"codes": "weight"}.get(name, name)
        assert torch.equal(state[f"model.embed_tokens.{leaf}"], t) and torch.equal(state[f"lm_head.{leaf}"], t)
    half = two.half().model.embed_tokens
    assert half(ids).dtype == torch.float16 and half.quant_tensor().equal(q)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] ^ 1  # another weight: it is tied no more
    two.load_state_dict(state)
    assert two.lm_head.quant_tensor().equal(q) and torch.equal(half.quant_tensor().codes, q.codes ^ 1)
    with pytest.raises(FormatError, match=r"the head's weight is u4b8_g32_sf32 \[64, 64\], the embedding's .* \[50, 64\]"):
        half.share(QuantLinear(64, 64, format="u4b8_g32_sf32"))


def test_tied_and_plain(tmp_path):
    save_dense("llama tied", tmp_path / "m")
    items, dense = quantized(tmp_path / "m")
    got = load(written(items, tmp_path / "m"))
    assert got.lm_head.weight is got.model.embed_tokens.weight
    items["lm_head.weight"] = qkernels.quantize(items["model.embed_tokens.weight"], "int8")  # a quantised head beside it
    got = load(rewritten(items, tmp_path))
    assert isinstance(got.lm_head, QuantLinear) and type(got.model.embed_tokens) is nn.Embedding
    model = dense()
    model.lm_head.weight = nn.Parameter(reference.decode(items["lm_head.weight"]))
    torch.testing.assert_close(got(IDS).logits, model(IDS).logits)
    items["lm_head.weight"] = items["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match="tied"):
        load(rewritten(items, tmp_path))


def rewritten(items, tmp_path):
    """Write the items in place of those of tmp_path / "m-qkernels"."""
    for file in (tmp_path / "m-qkernels").glob("*"):
        file.unlink()
    (tmp_path / "m-qkernels").rmdir()
    return written(items, tmp_path / "m")


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


def test_modules_of_two_names(tmp_path):
    """A layer that the model holds twice, and one whose parent it does, are one QuantLinear."""
    model = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=50, embedding_size=32)
    )
    group = model.albert.encoder.albert_layer_groups[0].albert_layers
    skeleton = model.to("meta")
    group.append(group[0])  # so that every name of the layer has a second one
    loader = Loader(skeleton, torch.device("cpu"), "float")
    q, name = qkernels.quantize(torch.randn(96, 64), "int4_g32"), "albert.encoder.albert_layer_groups.0.albert_layers.{}.ffn.weight"
    for i in range(2):
        loader._put(name.format(i), q)
    assert isinstance(group[0].ffn, QuantLinear) and group[1].ffn is group[0].ffn and group[0].ffn.quant_tensor().equal(q)


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
    assert "gate.weight is decoded" in caplog.text
    assert_same_model(got, dense)


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


# -- rows --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int4_g32", "u4_g32_zi_sf16", "e4m3_g16x16_sf32", "e4m3_g-1x-1_sf32", "nvfp4", "int8"])
def test_rows_keep_their_numbers(format):
    a, b = (qkernels.quantize(torch.randn(n, 64), format) for n in (40, 17))
    weights = [reference.decode(q) for q in (a, b)]
    for rows in (torch.arange(40), torch.arange(5, 30), torch.arange(16, 40), torch.randperm(40), torch.tensor([3, 3, 39])):
        assert torch.equal(reference.decode(take(a, rows)), weights[0][rows])
    if a.tensor_scale is not None:
        with pytest.raises(UnsupportedError, match="tensor_scale"):
            join([a, b])
        b = QuantTensor.from_tensors(b.format, b.shape, b.tensors() | {"tensor_scale": a.tensor_scale})
        weights[1] = reference.decode(b)
    for parts, expected in (([a, b], weights), ([b, a], weights[::-1])):
        assert torch.equal(reference.decode(join(parts)), torch.cat(expected))


def test_a_run_of_rows_is_a_view():
    q = qkernels.quantize(torch.randn(64, 64), "int4_g32")
    part = take(q, torch.arange(16, 48))
    assert part.codes.untyped_storage().data_ptr() == q.codes.untyped_storage().data_ptr()
    assert take(q, torch.arange(64)) is q


# -- inputs that are multiplied by scales ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A model of ModelOpt's AWQ: (directory, what transformers makes of the same numbers)."""
    path = tmp_path_factory.mktemp("scaled")
    save_dense("llama", path / "m")
    items, _ = quantized(path / "m", format="nvfp4")
    dense = {n: v if isinstance(v, torch.Tensor) else reference.decode(v) for n, v in items.items()}
    for name in [n for n, v in items.items() if isinstance(v, QuantTensor)]:
        items[name.replace(".weight", ".pre_quant_scale")] = scale = torch.rand(items[name].shape[1]) + 0.5
        dense[name] = dense[name] * scale
    return store(items, path / "m", "modelopt"), of_transformers(path / "m", dense)


def test_inputs_are_multiplied(scaled, tmp_path):
    """As transformers does it in float32, where the scales are of the weights; saved, and loaded either way, they are still there."""
    path, dense = scaled
    got = load(path)
    assert isinstance(got.model.layers[0].mlp.up_proj, ScaledLinear)
    assert_same_model(got, dense)
    before = got(IDS).logits
    qkernels.save(got, tmp_path / "q", progress=False)
    got.config.save_pretrained(tmp_path / "q")
    with torch.device("meta"):
        skeleton = type(got)(got.config).eval()
    for again in (load(tmp_path / "q"), qkernels.load(skeleton, tmp_path / "q", progress=False), copy.deepcopy(got)):
        assert isinstance(again.model.layers[1].self_attn.q_proj, ScaledLinear) and torch.equal(again(IDS).logits, before)
    state = got.state_dict()
    state["model.layers.0.mlp.up_proj.pre_quant_scale"] = torch.zeros(64)
    got.load_state_dict(state)
    assert not bool(got.model.layers[0].mlp.up_proj(torch.ones(1, 64)).any())
    qkernels.restore_linear(again)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(again(IDS).logits, before)


def test_scaled_linears_of_other_dtypes_and_wrong_scales():
    q = qkernels.quantize(torch.randn(8, 32), "int4_g32")
    scale, x = torch.rand(32), torch.randn(3, 32)
    layer = ScaledLinear.of(QuantLinear.from_quant_tensor(q), scale)
    assert torch.equal(layer(x), QuantLinear.from_quant_tensor(q)(x * scale))
    half = layer.bfloat16()
    assert half.pre_quant_scale.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(FormatError, match="in_features = 32"):
        layer(torch.ones(3, 31))
    for wrong in (torch.ones(31), torch.ones(32).int(), torch.full((32,), float("nan"))):
        with pytest.raises(FormatError, match="32 finite floats are needed"):
            ScaledLinear.of(layer, wrong)


def test_a_scale_of_the_input_of_something_else(scaled, tmp_path):
    path, _ = scaled
    items = dict(io.read(path))
    config = json.loads((path / "config.json").read_text())
    for extra, message in (
        ({"lm_head.pre_quant_scale": torch.ones(64)}, "lm_head.pre_quant_scale multiplies the input of a Linear"),
        ({"model.layers.0.mlp.up_proj.pre_quant_scale": torch.full((64,), float("inf"))}, "finite floats are needed"),
        ({"model.strange.pre_quant_scale": torch.ones(64)}, "model.strange.pre_quant_scale"),
    ):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        io.write((items | extra).items(), target, "qkernels")
        (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
        with pytest.raises(qkernels.QKernelsError, match=message):
            load(target)


# -- embeddings --------------------------------------------------------------------------------------------------------------------


def test_embedding_follows_dtype_and_device_and_copies():
    q = qkernels.quantize(torch.randn(20, 64), "int4_g32")
    layer = QuantEmbedding(nn.Embedding(20, 64, padding_idx=3, device="meta"), q, torch.float32)
    ids = torch.tensor([[1, 19, 3], [0, 1, 1]])
    assert torch.equal(layer(ids), reference.decode(q)[ids])
    half = layer.half()
    assert half(ids).dtype == torch.float16 and half.quant_tensor().equal(q)
    assert torch.equal(half(ids), reference.decode(q)[ids].half())
    assert half(ids[:, :0]).shape == (2, 0, 64)


@pytest.mark.parametrize("name", ["gemma3, tied, scaled embeddings", "llama"])
def test_saved_again(tmp_path, name):
    """What was loaded can be saved: for `load`, and for from_pretrained."""
    save_dense(name, tmp_path / "m")
    items, _ = quantized(tmp_path / "m", EVERYTHING)
    got = load(written(items, tmp_path / "m"))
    qkernels.save(got, tmp_path / "q", progress=False)
    got.config.save_pretrained(tmp_path / "q")
    with torch.device("meta"):
        skeleton = type(got)(transformers.AutoConfig.from_pretrained(tmp_path / "q")).eval()
    before = skeleton.model.embed_tokens
    for again in (load(tmp_path / "q"), qkernels.load(skeleton, tmp_path / "q", progress=False)):
        assert isinstance(again.model.embed_tokens, QuantEmbedding) and isinstance(again.lm_head, QuantLinear)
        assert torch.equal(again(IDS).logits, got(IDS).logits)
    assert before.weight.is_meta  # the skeleton's own, whose place it took, is as it was


def test_saved_experts_load_again(tmp_path):
    """With biases, and one of two parts."""
    save_dense("gpt-oss", tmp_path / "m", config=gpt_oss())
    items = dict(io.read(tmp_path / "m"))
    for name, t in items.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            items[name] = QuantStack.of([qkernels.quantize(w.T.contiguous(), "mxfp4") for w in t])
    got = load(store(items, tmp_path / "m", "mxfp4"))
    experts = got.model.layers[0].mlp.experts
    q = experts.down_proj[1].quant_tensor()
    parts = take(q, torch.arange(10)), qkernels.quantize(reference.decode(q)[10:], "int8")
    experts.down_proj[1] = linear(parts, experts.down_proj[1].bias, "float", torch.float32)
    qkernels.save(got, tmp_path / "q", progress=False)
    got.config.save_pretrained(tmp_path / "q")
    assert torch.equal(load(tmp_path / "q")(IDS).logits, got(IDS).logits)


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
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    save_dense("llama", tmp_path / "m")
    with pytest.raises(CheckpointError, match="name its directory"):
        load(tmp_path / "m" / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(qkernels.QKernelsError, match=r"qkernels\[transformers\]"):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path / "m")
