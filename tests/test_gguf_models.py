"""Models of every architecture as GGUF files: llama.cpp has said what they compute; read again they are what they were in transformers.

gguf_written.npz was made by llama.cpp: tests/golden/make_gguf_written.py.
"""

import contextlib
import hashlib
import itertools
import json
from pathlib import Path

import gguf_models
import numpy as np
import pytest
import torch
from pretrained import assert_same_model, load, of_transformers
from safetensors.torch import save_file
from test_convert_checkpoint import assert_same, meanings

import qkernels
from qkernels import CheckpointError, UnsupportedError, io, reference
from qkernels.formats import QuantStack
from qkernels.io import gguf_config, gguf_file
from qkernels.io.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = np.load(Path(__file__).parent / "golden" / "gguf_written.npz")


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_llama_cpp_computes_the_same(tmp_path, name):
    """Of float32 weights; its cache is float16, which makes a thousandth."""
    model = gguf_models.save(name, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    assert hashlib.sha256((tmp_path / "m.gguf").read_bytes()).digest() == GOLDEN[f"{name}.sha256"].tobytes(), (
        "llama.cpp has not seen this file"
    )
    got = load(tmp_path / "m.gguf", dtype=torch.float32)
    assert type(got) is type(model)
    expected = model(gguf_models.IDS).logits.detach()
    torch.testing.assert_close(got(gguf_models.IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(GOLDEN[name] - expected[0, -1].numpy()).max() < 2e-3 * float(expected[0, -1].abs().max())


@pytest.mark.parametrize("name", [name for name in gguf_models.CONFIGS if "," not in name])
def test_there_and_back(tmp_path, name):
    """Quantised weights are carried as they are, and a file that is read and written is the same, byte for byte."""
    gguf_models.save(name, tmp_path / "m")
    items = {n: qkernels.quantize(t, "u8b128_g32_sf16") if n.endswith("proj.weight") else t for n, t in io.read(tmp_path / "m")}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    io.write(items.items(), tmp_path / "q", "compressed-tensors", config=config)
    report = convert(tmp_path / "q", tmp_path / "m.gguf", "gguf")
    assert len(report.exact) >= 8 and not report.requantised
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    convert(tmp_path / "m.gguf", tmp_path / "back", "qkernels")
    expected = {n: reference.decode(v, torch.float64) if isinstance(v, qkernels.QuantTensor) else v.double() for n, v in items.items()}
    found = meanings(tmp_path / "back")
    for norm in [n for n in expected if "norm" in n and "gemma" in config["model_type"]]:
        expected[norm] = (expected[norm].float() + 1 - 1).double()  # which is what the file can hold
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen2moe", "phi3"])
def test_a_mix_runs_quantised(tmp_path, name):
    gguf_models.save(name, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf:Q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "back", "qkernels")
    dense = of_transformers(tmp_path / "m", {n: t.float() for n, t in meanings(tmp_path / "back").items()})
    assert_same_model(load(tmp_path / "m.gguf", dtype=torch.float32), dense, gguf_models.IDS)


def test_the_head_of_gemma_is_its_embedding(tmp_path):
    """Also where a checkpoint has it a second time: llama.cpp would stop at such a file."""
    gguf_models.save("gemma2", tmp_path / "m")
    items, config = dict(io.read(tmp_path / "m")), json.loads((tmp_path / "m" / "config.json").read_text())
    items["lm_head.weight"] = items["model.embed_tokens.weight"].clone()
    save_file(items, tmp_path / "m" / "model.safetensors")
    del config["tie_word_embeddings"]  # transformers 4 left it out
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf:Q4_K_M")
    held = dict(io.read(tmp_path / "m.gguf"))
    assert "output.weight" not in held and held["token_embd.weight"].format.name == "q8_0"  # what is Q6_K in a mix, of 64 columns


def config_of(name, **changes):
    made = gguf_models.CONFIGS[name]().to_dict()
    return {key: value for key, value in (made | changes).items() if value != "nothing"}


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 100}, UnsupportedError, "query_pre_attn_scalar = 100.*it is 32"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, UnsupportedError, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, CheckpointError, "no number final_logit_softcapping"),
        ("gemma2", {"head_dim": "nothing"}, CheckpointError, "no number head_dim"),
        ("gemma2", {"tie_word_embeddings": False}, UnsupportedError, "tie_word_embeddings = False"),
        ("gemma3", {"hidden_activation": "gelu"}, UnsupportedError, "hidden_activation = 'gelu'"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapping"),
        ("gemma3", {"sliding_window_pattern": 2}, UnsupportedError, "sliding_window_pattern = 2"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}, "full_attention": {"rope_theta": 1e6}}},
         UnsupportedError, "rope_type 'yarn'"),
        ("qwen2moe", {"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob = True"),
        ("qwen2moe", {"mlp_only_layers": [0]}, UnsupportedError, "mlp_only_layers"),
        ("qwen2moe", {"shared_expert_intermediate_size": None}, CheckpointError, "shared_expert_intermediate_size"),
        ("phi3", {"num_attention_heads": 0}, CheckpointError, "num_attention_heads = 0"),
        ("phi3", {"rope_parameters": gguf_models.LONG | {"long_factor": [1.0]}}, CheckpointError, "long_factor = .*not 8 positive numbers"),
        ("phi3", {"rope_parameters": gguf_models.LONG | {"attention_factor": "x"}}, CheckpointError, "attention_factor = 'x'"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, UnsupportedError, "rope_type 'linear'"),
        ("phi3", {"hidden_act": "relu"}, UnsupportedError, "hidden_act = 'relu'"),
        ("llama", {"rope_parameters": 5}, CheckpointError, "no JSON object"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, CheckpointError, "factor = '4'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, UnsupportedError, "rope_type 'dynamic'"),
        ("llama", {"rope_parameters": gguf_models.YARN | {"truncate": False}}, UnsupportedError, "truncate = False"),
        ("llama", {"rope_parameters": gguf_models.YARN | {"beta_slow": -1}}, CheckpointError, "beta_slow = -1"),
        ("gemma3", {"rope_parameters": {"full_attention": gguf_models.YARN}}, UnsupportedError, "rope_type 'yarn'"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(name, changes, error, message):
    with pytest.raises(error, match=message):
        config = config_of(name, **changes)
        gguf_config.key_values(config)
        gguf_config.derived(config)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "config",
    [
        config_of("llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
        config_of("gemma3"),
        config_of("phi3, longrope"),
        config_of("qwen2moe"),
    ],
    ids=lambda config: config["model_type"],
)
@pytest.mark.parametrize("strange", [None, "x", [1], {"a": 1}, -1, 0, 2**70, float("nan"), True])
def test_a_strange_config_is_a_typed_error(config, strange):
    """One value after the other, also within, is something else: what comes out can be packed, or the error is one of ours."""
    places = [(config, key) for key in config]
    for inner in [v for v in config.values() if isinstance(v, dict)]:
        places += [(inner, key) for key in inner] + [(v, key) for v in inner.values() if isinstance(v, dict) for key in v]
    for holder, key in places:
        was, holder[key] = holder[key], strange
        with contextlib.suppress(qkernels.QKernelsError):
            gguf_file.pack(gguf_config.key_values(config))
            assert all(t.isfinite().all() for t in gguf_config.derived(config).values())
        holder[key] = was


def test_keys_of_before():
    """config.json of Gemma 3 as transformers 4 wrote it."""
    old = {"rope_theta": 5e4, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": None}
    found = gguf_config.key_values(config_of("gemma3", **old, layer_types="nothing", sliding_window_pattern=6))
    assert {key: found[f"gemma3.rope.{key}"] for key in ("freq_base", "freq_base_swa", "scaling.type", "scaling.factor")} == {
        "freq_base": 5e4, "freq_base_swa": 2e4, "scaling.type": "linear", "scaling.factor": 8.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"rope_factors_long.weight": torch.ones(5)}, {}, r"rope_factors_long.weight is \[5\]; 8 positive numbers"),
        ({"rope_factors_short.weight": torch.zeros(8)}, {}, "rope_factors_short.weight is .* 8 positive numbers"),
        ({"rope_factors_short.weight": None}, {}, "rope_factors_short.weight is missing"),
        ({"rope_factors_short.weight": None, "rope_factors_long.weight": None}, {}, "attn_factor = .*lacks rope_factors_long.weight"),
        ({}, {"phi3.rope.scaling.original_context_length": None}, "original_context_length = None"),
        ({}, {"phi3.block_count": 2**31}, "block_count = 2147483648, and has 1[0-9] tensors"),
        ({}, {"phi3.embedding_length": 1}, "a head has 0 channels"),
        ({}, {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 2.0}, "'yarn'"),
    ],
)
def test_damaged_factors(longrope, tmp_path, tensors, settings, message):
    info = io.detect(longrope)
    items = {name: t for name, t in (dict(io.read(info)) | tensors).items() if t is not None}
    stated = gguf_file.KeyValues({k: v for k, v in (info.settings | settings).items() if v is not None}, info.settings.types)
    io.write(items.items(), tmp_path / "x.gguf", "gguf", settings=stated)
    with pytest.raises(qkernels.QKernelsError, match=message):
        load(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longrope")
    gguf_models.save("phi3, longrope", folder / "m")
    convert(folder / "m", folder / "m.gguf", "gguf")
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory):
    """A file with NVFP4 weights, one of them a stack of experts; and what they mean without their scales, by name."""
    folder = tmp_path_factory.mktemp("nvfp4")
    gguf_models.save("qwen2moe", folder / "m")
    convert(folder / "m", folder / "plain.gguf", "gguf")
    info = io.detect(folder / "plain.gguf")
    items = dict(io.read(info))
    items["blk.1.attn_q.weight"] = qkernels.quantize(items["blk.1.attn_q.weight"], "ggml_nvfp4")
    for part, format in (("gate", "q8_0"), ("up", "ggml_nvfp4"), ("down", "q8_0")):
        name = f"blk.0.ffn_{part}_exps.weight"
        items[name] = QuantStack.of([qkernels.quantize(w, format) for w in items[name]])
    return folder, info, items


def test_scales_beside_nvfp4(nvfp4, tmp_path):
    """As llama.cpp has it, what a weight makes is multiplied by them: so is the weight. Built from the specification."""
    folder, info, items = nvfp4
    scales = {"blk.1.attn_q": torch.tensor([0.75]), "blk.0.ffn_up_exps": torch.tensor([0.5, 1.5, 1.0, 3.0])}
    extra = {f"{stem}.scale": t for stem, t in scales.items()} | {"blk.1.attn_q.input_scale": torch.ones(1)}
    io.write((extra | items).items(), tmp_path / "m.gguf", "gguf", settings=info.settings)
    dense = {n: t.float() for n, t in io.read(folder / "m")}
    dense["model.layers.1.self_attn.q_proj.weight"] = 0.75 * reference.decode(items["blk.1.attn_q.weight"])
    for part, e in itertools.product(("gate", "up", "down"), range(4)):
        scale = scales["blk.0.ffn_up_exps"][e] if part == "up" else 1
        dense[f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"] = scale * reference.decode(items[f"blk.0.ffn_{part}_exps.weight"][e])
    got = load(tmp_path / "m.gguf", dtype=torch.float32)
    assert got.model.layers[1].self_attn.q_proj.format.name == "e2m1_g16_se4m3_t"
    assert_same_model(got, of_transformers(folder / "m", dense), gguf_models.IDS)
    convert(tmp_path / "m.gguf", tmp_path / "back", "qkernels")
    found = meanings(tmp_path / "back")
    assert all(torch.equal(found[n].float(), t) for n, t in dense.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.1.attn_q.scale": torch.ones(2)}, r"blk.1.attn_q.scale is \[2\]; 1 numbers of float32"),
        ({"blk.0.ffn_up_exps.scale": torch.ones(1)}, r"ffn_up_exps.scale is \[1\]; 4 numbers"),
        ({"blk.1.attn_q.scale": torch.ones(1).half()}, "float32"),
        ({"blk.1.attn_x.scale": torch.ones(1)}, "attn_x.scale, and no blk.1.attn_x.weight"),
        ({"blk.1.attn_k.scale": torch.full((1,), 2.0)}, "beside a weight of torch.float32; it is held of ggml_nvfp4 alone"),
    ],
)
def test_damaged_scales(nvfp4, tmp_path, extra, message):
    _, info, items = nvfp4
    io.write((items | extra).items(), tmp_path / "m.gguf", "gguf", settings=info.settings)
    with pytest.raises(qkernels.QKernelsError, match=message):
        load(tmp_path / "m.gguf")
