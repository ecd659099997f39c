"""from_pretrained: layers that are more than a QuantLinear in a Linear's place, and what is saved of them."""

import copy
import json

import pytest
import torch
import transformers
from pretrained import EVERYTHING, IDS, assert_same_model, gpt_oss, load, of_transformers, quantized, rewritten, save_dense, store, written
from torch import nn

import qkernels
from qkernels import CheckpointError, FormatError, QuantLinear, UnsupportedError, io, reference
from qkernels.embedding import QuantEmbedding
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import join, take, transposed
from qkernels.integrations.experts import linear
from qkernels.integrations.loader import Loader
from qkernels.io import native, shards
from qkernels.scaled import ScaledLinear

pytestmark = pytest.mark.usefixtures("one_thread")


# -- weights of two names ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("wrong", [None, "rows of nothing", "rows of a linear", "rows of another shape"])
def test_a_tied_embedding_is_saved_once(tmp_path, wrong):
    """And holds nothing where it is loaded again, either way; what a manifest must not say of it is named."""
    save_dense("llama tied", tmp_path / "m")
    items, _ = quantized(tmp_path / "m", EVERYTHING)
    got = load(written(items, tmp_path / "m"))
    qkernels.save(got, tmp_path / "q", progress=False)
    got.config.save_pretrained(tmp_path / "q")
    with torch.device("meta"):
        skeleton = type(got)(got.config).eval()
    if wrong:
        owners = {"rows of nothing": "lm_heads", "rows of a linear": "model.norm", "rows of another shape": "model.layers.0.mlp.up_proj"}
        edit(tmp_path / "q", "model.embed_tokens", rows_of=owners[wrong])
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens"):
            qkernels.load(skeleton, tmp_path / "q", progress=False)
        return
    stored = [name for name in shards.open_directory(tmp_path / "q") if "embed_tokens" in name or "lm_head" in name]
    assert stored and all(name.startswith("lm_head") for name in stored)
    assert dict(io.read(tmp_path / "q"))["model.embed_tokens.weight"].equal(items["model.embed_tokens.weight"])
    io.write(io.read(tmp_path / "q"), tmp_path / "twice", "qkernels")  # where nothing is tied
    assert dict(io.read(tmp_path / "twice")).keys() == dict(io.read(tmp_path / "q")).keys()
    for again in (qkernels.load(skeleton, tmp_path / "q", progress=False), load(tmp_path / "q")):
        assert again.model.embed_tokens.head is again.lm_head and not sum(t.numel() for t in again.model.embed_tokens.parameters())
        assert torch.equal(again(IDS).logits, got(IDS).logits)


def edit(path, layer, **changes):
    """Change what a saved directory says of a layer, its digest too."""
    manifest = json.loads((path / native.MANIFEST).read_text())
    manifest["layers"][layer] |= changes
    manifest["digest"] = native._manifest_digest(manifest)
    (path / native.MANIFEST).write_text(json.dumps(manifest))


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


@pytest.mark.parametrize("format", ["int4_g32", "u4_g32_zi_sf16", "e4m3_g16x32_sf32", "e4m3_g-1x-1_sf32", "nvfp4", "int8"])
def test_columns_as_rows(format):
    q = qkernels.quantize(torch.randn(40, 64), format)
    assert torch.equal(reference.decode(transposed(q)), reference.decode(q).T) and transposed(transposed(q)).equal(q)
    with pytest.raises(UnsupportedError, match="columns of q8_0 cannot become rows"):
        transposed(qkernels.quantize(torch.randn(40, 64), "q8_0"))


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
