"""Checkpoints as other checkpoints: numbers carried exactly, refusals by weight, rounding when asked for, GGUF files of whole models."""

import json
from pathlib import Path

import pytest
import torch
from cases import random_blocks, random_quant
from checkpoints import saved
from typer.testing import CliRunner

from qkernels import cli, formats, io, reference
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.ggml import TYPES
from qkernels.io import gguf_config, gguf_model
from qkernels.io.convert import NO_CONFIG, NO_TOKENIZER, convert
from qkernels.io.forms import code_bits, few_rows, forms
from qkernels.quantizers.rtn import rtn

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 256, 256, 4, 2, 2
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
    "vocab_size": 64,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def model():
    """Tensors of a small Llama, by name."""
    torch.manual_seed(0)
    made = {"model.embed_tokens.weight": torch.randn(64, HIDDEN), "lm_head.weight": torch.randn(64, HIDDEN)}
    made["model.norm.weight"] = torch.rand(HIDDEN)
    for i in range(LAYERS):
        made |= {f"model.layers.{i}.{name}.weight": torch.randn(shape) for name, shape in SHAPES.items()}
        made |= {f"model.layers.{i}.{norm}.weight": torch.rand(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
    return {name: t.half() for name, t in made.items()}


def quantised(format):
    """The model with its projections quantised."""
    return {name: rtn(t.float(), formats.get(format)) if "_proj" in name else t for name, t in model().items()}


def written(path, items, layout, config=CONFIG):
    io.write(items.items(), path, layout, config=config)
    (path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')  # which GGUF files do not have
    return path


def meanings(path):
    """What a checkpoint says, by name, in float64."""
    return {name: v.double() if isinstance(v, torch.Tensor) else reference.decode(v, torch.float64) for name, v in io.read(path)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


LAYOUTS = {"gptq": "gptq", "awq": "awq", "awq:gemv": "awq", "compressed-tensors": "compressed-tensors", "qkernels": "qkernels"}


@pytest.mark.parametrize("format", ["int4_g32", "int4_asym_g64"])
@pytest.mark.parametrize("source", ["gptq", "awq", "compressed-tensors"])
def test_integers_go_from_layout_to_layout(tmp_path, format, source):
    start = written(tmp_path / "start", quantised(format), source)
    expected = meanings(start)
    for to, layout in LAYOUTS.items():
        done = tmp_path / to.replace(":", "-")
        report = convert(start, done, to)
        assert len(report.exact) == LAYERS * len(SHAPES) and not report.requantised
        assert report.dense == len(expected) - len(report.exact)
        info = io.detect(done)
        assert info.layout == layout and (done / "tokenizer.json").exists()
        assert json.loads((done / "config.json").read_text())["model_type"] == "llama"
        assert_same(meanings(done), expected)
    assert io.detect(tmp_path / "awq-gemv").settings["version"] == "gemv"


@pytest.mark.parametrize(("format", "type"), [("int4_g32", "q4_0"), ("int8_g32", "q8_0"), ("mxfp4", "ggml_mxfp4"), ("int5_g32", "q5_0")])
def test_a_model_becomes_a_gguf_file_and_back(tmp_path, format, type):
    target = formats.get(format)
    scale = "f16" if target.scale == "f32" else target.scale
    named = target.name.replace("sf32", f"s{scale}")
    start = written(tmp_path / "start", quantised(named), "compressed-tensors")
    report = convert(start, tmp_path / "model.gguf", "gguf")
    assert report.notes == [NO_TOKENIZER] and len(report.exact) == LAYERS * len(SHAPES)
    held = dict(io.read(tmp_path / "model.gguf"))
    assert held["blk.1.attn_q.weight"].format == formats.get(type) and held["output_norm.weight"].dtype == torch.float32
    settings = io.detect(tmp_path / "model.gguf").settings
    assert settings["general.architecture"] == "llama" and settings["llama.rope.freq_base"] == 10000.0
    assert settings["llama.attention.head_count_kv"] == KV_HEADS and settings["llama.block_count"] == LAYERS
    report = convert(tmp_path / "model.gguf", tmp_path / "back", "compressed-tensors")
    assert report.notes == [NO_CONFIG] and len(report.exact) == LAYERS * len(SHAPES)
    assert_same(meanings(tmp_path / "back"), meanings(start))


def test_rows_of_q_and_k_lie_as_llama_cpp_turns_them(tmp_path):
    """Row i of a head in Hugging Face's order is row 2i, or 2(i - half)+1, of the file: source llama.cpp's `permute`."""
    start = written(tmp_path / "start", quantised("int4_g32"), "compressed-tensors")
    convert(start, tmp_path / "model.gguf", "gguf")
    found, expected = meanings(tmp_path / "model.gguf"), meanings(start)
    for ours, theirs, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
        was = expected[f"model.layers.0.self_attn.{theirs}.weight"]
        half = len(was) // heads // 2
        moved = torch.cat([was[2 * half * h :][[i // 2 + half * (i % 2) for i in range(2 * half)]] for h in range(heads)])
        assert torch.equal(found[f"blk.0.{ours}.weight"], moved)
    assert torch.equal(found["blk.0.attn_v.weight"], expected["model.layers.0.self_attn.v_proj.weight"])


def test_what_cannot_be_held_is_refused_by_weight(tmp_path):
    start = written(tmp_path / "start", quantised("nf4"), "bitsandbytes")
    with pytest.raises(UnsupportedError, match="gptq cannot hold 14 weights exactly; --requantize") as refused:
        convert(start, tmp_path / "out", "gptq")
    assert "nf4" in refused.value.reasons["model.layers.1.mlp.up_proj.weight"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "format"),
    [
        ("gptq", "u4b8_g64_sf16"),
        ("awq", "u4_g128_zi_sf16"),
        ("awq:gemv_fast", "u4_g128_zm_sf16"),
        ("compressed-tensors", "u4b8_g64_sf16"),
        ("gguf", "q4_k"),
    ],
)
def test_what_is_refused_can_be_rounded(tmp_path, to, format):
    start = written(tmp_path / "start", quantised("nf4"), "bitsandbytes")
    report = convert(start, tmp_path / "out", to, requantize=True)
    assert len(report.requantised) == LAYERS * len(SHAPES) and not report.exact
    assert {now for _, now, _ in report.requantised.values()} == {format}
    name = "model.layers.0.self_attn.v_proj.weight" if to != "gguf" else "blk.0.attn_v.weight"
    was, _, error = report.requantised[name]
    expected, found = meanings(start)["model.layers.0.self_attn.v_proj.weight"], meanings(tmp_path / "out")[name]
    assert was == "nf4_g64_sf32" and error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-3)
    assert 0.02 < error < 0.2 and f"{name}: nf4_g64_sf32 -> {format}, relative error {error:.4f}" in str(report)


def test_only_what_does_not_fit_is_rounded(tmp_path):
    items = quantised("int4_g32")
    odd = "model.layers.1.mlp.up_proj.weight"
    items[odd] = rtn(model()[odd].float(), formats.get("int4_g128"))
    start = written(tmp_path / "start", items, "compressed-tensors")
    with pytest.raises(UnsupportedError, match="groups of 128, where others have 32"):
        convert(start, tmp_path / "out", "awq")
    report = convert(start, tmp_path / "out", "awq", requantize=True)
    assert list(report.requantised) == [odd] and report.requantised[odd][1] == "u4_g32_zi_sf16"
    expected, found = meanings(start), meanings(tmp_path / "out")
    assert all(torch.equal(found[name], t) for name, t in expected.items() if name != odd)


def test_what_is_rounded_for_awq_is_like_what_is_carried(tmp_path):
    """Weights with minima are carried as gemv_fast, which is then the packing of all."""
    items = quantised("int5_g32")
    name = "model.layers.0.mlp.up_proj.weight"
    items[name] = rtn(model()[name].float(), formats.get("u4_g32_zm_sf16"))
    io.write(items.items(), tmp_path / "start", "qkernels")
    report = convert(tmp_path / "start", tmp_path / "awq", "awq", requantize=True)
    assert report.exact == [name] and io.detect(tmp_path / "awq").settings["version"] == "gemv_fast"
    assert torch.equal(meanings(tmp_path / "awq")[name], reference.decode(items[name], torch.float64))


def test_bitsandbytes_holds_its_own_alone(tmp_path):
    start = written(tmp_path / "start", quantised("nf4"), "bitsandbytes")
    assert len(convert(start, tmp_path / "same", "bitsandbytes").exact) == LAYERS * len(SHAPES)
    assert_same(meanings(tmp_path / "same"), meanings(start))
    eight = written(tmp_path / "eight", quantised("int8_g128"), "compressed-tensors")
    report = convert(eight, tmp_path / "int8", "bitsandbytes", requantize=True)
    assert {now for _, now, _ in report.requantised.values()} == {"u8b128_g-1_sf32"}


def test_a_mix_of_llama_cpp(tmp_path):
    start = tmp_path / "start"
    with io.directory.Writer(start) as writer:
        for name, t in model().items():
            writer.add(name, t)
        writer.config = CONFIG
    report = convert(start, tmp_path / "m.gguf", "gguf:Q4_K_M")
    held = dict(io.read(tmp_path / "m.gguf"))
    named = {name: value.format.name for name, value in held.items() if isinstance(value, QuantTensor)}
    assert named["blk.0.attn_q.weight"] == "q4_k" and named["token_embd.weight"] == "q4_k" and named["output.weight"] == "q6_k"
    assert named["blk.1.ffn_down.weight"] == "q6_k" and isinstance(held["blk.0.attn_norm.weight"], torch.Tensor)
    assert io.detect(tmp_path / "m.gguf").settings["general.file_type"] == 15
    assert report.requantised["blk.0.attn_q.weight"][:2] == ("float16", "q4_k") and report.requantised["blk.0.attn_q.weight"][2] < 0.1
    with pytest.raises(UnsupportedError, match="Q8_0 stores q8_0"):
        convert(tmp_path / "m.gguf", tmp_path / "other.gguf", "gguf:Q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf:Q4_K_M")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.parametrize(
    ("name", "k", "tied", "type"),
    [
        ("blk.0.attn_v.weight", 4096, False, "q6_k"),
        ("blk.4.attn_v.weight", 4096, False, "q4_k"),
        ("blk.6.ffn_down.weight", 4096, False, "q6_k"),
        ("blk.28.ffn_down_exps.weight", 4096, False, "q6_k"),
        ("blk.4.ffn_down.weight", 4128, False, "q5_0"),
        ("token_embd.weight", 4096, True, "q6_k"),
        ("blk.4.attn_norm.weight", 4096, False, None),
        ("blk.4.ffn_gate_inp.weight", 4096, False, None),
        ("blk.4.ffn_up.weight", 4100, False, None),
    ],
)
def test_types_of_a_mix(name, k, tied, type):
    found = gguf_model.type_of("Q4_K_M", name, k, 32, tied)
    assert (found and found.name) == type


def test_experts_are_stacked(tmp_path):
    config = CONFIG | {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 32, "head_dim": 64, "norm_topk_prob": True}
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": random_quant(formats.get("int4_g32"), 32, 64) for e in (2, 0, 1)}
    start = written(tmp_path / "start", experts, "compressed-tensors", config)
    convert(start, tmp_path / "m.gguf", "gguf")
    (name, stack), *others = io.read(tmp_path / "m.gguf")
    assert name == "blk.0.ffn_up_exps.weight" and isinstance(stack, QuantStack) and not others
    for e in range(3):
        was = experts[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]
        assert torch.equal(reference.decode(stack[e]), reference.decode(was))
    convert(tmp_path / "m.gguf", tmp_path / "back", "compressed-tensors")
    assert_same(meanings(tmp_path / "back"), meanings(start))
    experts.popitem()
    with pytest.raises(CheckpointError, match="2 of 3 experts"):
        convert(written(tmp_path / "few", experts, "compressed-tensors", config), tmp_path / "few.gguf", "gguf")


@pytest.mark.parametrize("format", list(TYPES.values()), ids=lambda f: f.name)
def test_forms_say_the_same(format):
    q = random_blocks(format, 8, 512)
    for form in forms(q):
        assert torch.equal(reference.decode(form, torch.float64), reference.decode(q, torch.float64))


@pytest.mark.parametrize("format", ["u4b8_g32_sbf16", "e2m1_g16_se4m3_t"])
def test_what_llm_compressor_has_of_bfloat16_models(tmp_path, format):
    """Scales in bfloat16 that are fp16 numbers, and NVFP4 with a scale of the tensor, are carried to GGUF exactly, experts too."""
    config = CONFIG | {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 64}
    config |= {"norm_topk_prob": True, "sliding_window": 32}
    shape, layer = (64, HIDDEN), "model.layers.0"
    names = [f"{layer}.self_attn.q_proj.weight", *(f"{layer}.mlp.experts.{e}.{p}_proj.weight" for p in ("up", "gate") for e in range(2))]
    items = {name: random_quant(formats.get(format), *shape, seed) for seed, name in enumerate(names)}
    start = written(tmp_path / "start", items, "compressed-tensors", config)
    report = convert(start, tmp_path / "m.gguf", "gguf")
    assert len(report.exact) == 3 and report.notes == [NO_TOKENIZER]
    convert(tmp_path / "m.gguf", tmp_path / "back", "qkernels")
    assert_same(meanings(tmp_path / "back"), meanings(start))
    windowed = CONFIG | {"model_type": "mistral", "sliding_window": 32}
    mistral = written(tmp_path / "mistral", quantised("int4_g32"), "compressed-tensors", windowed)
    assert "sliding_window = 32, and llama.cpp has no window in llama" in convert(mistral, tmp_path / "w.gguf", "gguf").notes[0]


def test_frequencies_of_llama_3():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=256)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(gguf_config.derived(config.to_dict()), {"rope_freqs.weight": plain / scaled})
    assert gguf_config.derived(CONFIG) == {}
    with pytest.raises(UnsupportedError, match=r"of such a model is not written"):
        gguf_config.key_values(CONFIG | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})


def test_forms_of_integers():
    q = random_quant(formats.get("u4_g32_zi_sf32"), 8, 64)
    assert len(list(forms(q))) == 1
    plain = QuantTensor(q.format, q.shape, q.codes, q.scales.half().float(), torch.full_like(q.zeros, 8))
    names = [form.format.name for form in forms(plain)]
    assert names == ["u4_g32_zi_sf32", "u4b8_g32_sf32", "u4b8_g32_sf16"]
    assert torch.equal(reference.decode(list(forms(plain))[-1]), reference.decode(plain))
    scales = q.scales.half()
    minima = QuantTensor(formats.get("u4_g32_zm_sf16"), q.shape, q.codes, scales, -4 * scales)
    assert [form.format.name for form in forms(minima)][-1] == "u4_g32_zi_sf16" and bool((list(forms(minima))[-1].zeros == 4).all())
    assert few_rows(random_quant(formats.get("int4"), 300, 256)).shape == (64, 256)


def test_bits_without_scales():
    said = {"q2_k": 2, "iq3_s": 3, "int4": 4, "q4_1": 4, "nf4": 4, "q5_1": 5, "q6_k": 6, "int8": 8, "iq1_s": 2}
    assert {name: code_bits(formats.get(name)) for name in said} == said


def test_refusals(tmp_path):
    start = written(tmp_path / "start", quantised("int4_g32"), "gptq")
    with pytest.raises(FormatError, match=r"unknown target 'ggu'.*nearest: gguf"):
        convert(start, tmp_path / "x", "ggu")
    with pytest.raises(CheckpointError, match="exists"):
        convert(start, start, "awq")
    strange = written(tmp_path / "strange", quantised("int4_g32"), "gptq", CONFIG | {"model_type": "t5"})
    with pytest.raises(UnsupportedError, match="model_type 't5'"):
        convert(strange, tmp_path / "x", "gguf")
    with pytest.raises(CheckpointError, match=r"no number hidden_size|no number num_hidden_layers"):
        gguf_config.key_values({"model_type": "llama"})


@pytest.mark.parametrize("format", ["e4m3_g128x128_sf32", "e4m3_g-1x-1_sf32", "nvfp4"])
def test_scales_of_many_rows_and_of_activations(tmp_path, format):
    """FP8 whose rows share scales, and NVFP4, with static scales of activations: rows of q and k are reordered all the same."""
    tensors = {}
    for name, value in quantised(format).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            continue
        fp8 = format != "nvfp4"
        tensors |= {name: value.codes.view(torch.float8_e4m3fn if fp8 else torch.uint8), f"{name}_scale": value.scales}
        tensors |= {name.replace("weight", "input_scale"): torch.ones(())} | ({} if fp8 else {f"{name}_scale_2": value.tensor_scale[0]})
    said = {"quant_algo": {"e4m3_g-1x-1_sf32": "FP8", "nvfp4": "NVFP4"}.get(format, "FP8_PB_WO")}
    start = saved(tmp_path / "start", tensors, config=CONFIG, hf_quant_config={"quantization": said})
    report = convert(start, tmp_path / "m.gguf", "gguf:Q8_0", requantize=True)
    assert "14 scales of activations and caches are left out: model.layers.0.mlp.down_proj.input_scale …" in report.notes
    convert(tmp_path / "m.gguf", tmp_path / "back", "qkernels")
    found, expected = meanings(tmp_path / "back"), {n: t for n, t in meanings(start).items() if not n.endswith("input_scale")}
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert (found[name] - t).abs().max() <= t.abs().max() / 127, name


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_commands(run, tmp_path):
    start = written(tmp_path / "start", quantised("int4_g32"), "gptq")
    done = run("convert", start, tmp_path / "m.gguf", "--to", "gguf")
    assert done.exit_code == 0, done.output
    assert "14 weights carried exactly" in done.output and "no tokenizer" in done.output
    shown = run("inspect", tmp_path / "m.gguf").output
    for part in (
        "layout gguf",
        "general.architecture: llama",
        "blk.1.ffn_up.weight",
        "q4_0",
        "4.500",
        "256 x 256",
        "14 weights",
        "7 tensors",
    ):
        assert part in shown, part
    shown = run("inspect", start).output
    assert "layout gptq" in shown and "bits: 4" in shown and "u4b8_g32_sf16" in shown and "cpu_" in shown
    nf4 = written(tmp_path / "nf4", quantised("nf4"), "bitsandbytes")
    refused = run("convert", nf4, tmp_path / "out", "--to", "awq")
    assert refused.exit_code == 1
    assert run("convert", nf4, tmp_path / "out", "--to", "awq", "--requantize").exit_code == 0


def test_inspect_names_what_is_not_read(run, monkeypatch):
    golden = Path(__file__).parent / "golden" / "gguf_types.gguf"
    shown = run("inspect", golden).output
    weights = [name for name, value in io.read(golden) if not isinstance(value, torch.Tensor)]
    assert weights and all(name in shown for name in weights)
    monkeypatch.setattr(io.gguf, "_why_not", lambda t, _: "it is strange" if t.name == weights[0] else None)
    shown = run("inspect", golden).output
    assert f"it is strange: {weights[0]}" in shown and weights[1] in shown
