"""from_pretrained of GGUF files: written by gguf-py, as llama.cpp's converters would; the same numbers in transformers are the judge."""

import gc
import math
import re

import numpy as np
import pytest
import torch
import transformers
from pretrained import IDS, LLAMA, assert_same_model, greedy, load, of_transformers, qwen3_moe, save_dense
from test_cli import Watch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import qkernels
from qkernels import CheckpointError, QuantLinear, UnsupportedError, io
from qkernels.embedding import QuantEmbedding
from qkernels.integrations.loader import Loader

gguf = pytest.importorskip("gguf", reason="needs gguf-py, which writes the files")

pytestmark = pytest.mark.usefixtures("one_thread")
NUMBERS = {  # the key's last part -> field of the config
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
FLOATS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
LLAMA_SIZES = LLAMA | {"head_dim": 16}
MODELS = {
    "llama": ("llama", lambda: transformers.LlamaConfig(**LLAMA_SIZES)),
    "llama tied": ("llama", lambda: transformers.LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True)),
    "llama with biases": ("llama", lambda: transformers.LlamaConfig(**LLAMA_SIZES, attention_bias=True)),
    "mixtral": ("llama", lambda: transformers.MixtralConfig(**LLAMA_SIZES, num_local_experts=3, sliding_window=None)),
    "qwen2": ("qwen2", lambda: transformers.Qwen2Config(**LLAMA)),
    "qwen3": ("qwen3", lambda: transformers.Qwen3Config(**LLAMA, head_dim=32)),
    "qwen2moe": (
        "qwen2moe",
        lambda: transformers.Qwen2MoeConfig(
            **LLAMA, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=4, num_experts_per_tok=2
        ),
    ),
    "qwen3moe": ("qwen3moe", lambda: qwen3_moe(norm_topk_prob=True)),
    "gemma2": ("gemma2", lambda: transformers.Gemma2Config(**LLAMA_SIZES, query_pre_attn_scalar=16, sliding_window=4)),
    "gemma3": ("gemma3", lambda: transformers.Gemma3TextConfig(**LLAMA_SIZES, query_pre_attn_scalar=16, sliding_window=4)),
    "phi3": ("phi3", lambda: transformers.Phi3Config(**LLAMA, sliding_window=5, pad_token_id=0)),
}
TYPE = {"default": "Q8_0", "down": "Q4_0", "embd": "Q5_0", "attn_v": "Q4_1"}  # a file has several


def gguf_name(name, arch, layers):
    """gguf-py's name of a tensor of a transformers checkpoint, with the expert's number where there is one."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], layers)
    generic = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    return table.get_name(generic, try_suffixes=(".weight", ".bias")), expert and int(expert[1])


def permuted(w, heads):
    """Rows as llama.cpp's converter of Llama models turns them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, name, extra=(), drop=(), freqs=None):
    """A GGUF file of a random model; returns it, and the same numbers in transformers."""
    arch, make = MODELS[name]
    save_dense(name, path / "m", config=make())
    config = transformers.AutoConfig.from_pretrained(path / "m")
    writer = gguf.GGUFWriter(path / "m.gguf", arch)
    for key, field in NUMBERS.items():
        if getattr(config, field, None) is not None:
            writer.add_uint32(f"{arch}.{key}", getattr(config, field))
    for key, field in FLOATS.items():
        if getattr(config, field, None) is not None:
            writer.add_float32(f"{arch}.{key}", getattr(config, field))
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_uint32(f"{arch}.expert_count", experts)
    rope = config.rope_parameters
    writer.add_float32(f"{arch}.rope.freq_base", rope.get("full_attention", rope)["rope_theta"])
    for add, key, value in extra:
        getattr(writer, add)(f"{arch}.{key}", value)
    stacks, dense = {}, {}
    for hf, t in io.read(path / "m"):
        target, expert = gguf_name(hf, arch, config.num_hidden_layers)
        assert target, hf
        w = t.numpy()
        if w.ndim == 2 and "ffn_gate_inp" not in target:
            kind = next((TYPE[part] for part in TYPE if part in target), TYPE["default"])
            w = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
            dense[hf] = torch.from_numpy(gguf.quants.dequantize(w, gguf.GGMLQuantizationType[kind]))
        else:
            kind, dense[hf] = None, t
            w = w + 1 if "gemma" in arch and "norm" in target else w
        if arch == "llama" and ("attn_q." in target or "attn_k." in target):
            w = permuted(w, config.num_attention_heads if "attn_q" in target else config.num_key_value_heads)
        if "shexp" in target and "inp" in target:
            w, kind, dense[hf] = t.numpy()[0], None, t
        stacks.setdefault((target, kind), []).append((expert, w))
    for (target, kind), parts in stacks.items():
        if target not in drop:
            w = parts[0][1] if parts[0][0] is None else np.stack([w for _, w in sorted(parts, key=lambda part: part[0])])
            writer.add_tensor(target, np.ascontiguousarray(w), raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path / "m.gguf", of_transformers(path / "m", dense)


@pytest.mark.parametrize("name", MODELS)
def test_same_as_transformers(tmp_path, name):
    path, dense = write(tmp_path, name)
    got = load(path, dtype=torch.float32)
    assert type(got) is type(dense())
    assert_same_model(got, dense)
    assert torch.equal(greedy(got), greedy(dense()))
    assert isinstance(got.model.embed_tokens, QuantEmbedding) and isinstance(got.lm_head, QuantLinear)
    stored = {n: v for n, v in io.read(path) if "attn_v." in n or "attn_output" in n}
    assert got.model.layers[1].self_attn.o_proj.quant_tensor().equal(stored["blk.1.attn_output.weight"])


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_same_as_transformers_own_reader(tmp_path, name):
    """Which dequantises the whole model, and knows of fewer architectures what makes their config."""
    path, dense = write(tmp_path, name)
    model = dense()
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "intermediate_size"):
        assert found["config"][key] == getattr(load(path).config, key)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(found["tensors"][n])
    torch.testing.assert_close(load(path, dtype=torch.float32)(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_dtype_is_bfloat16_where_nobody_says_another(tmp_path):
    path, dense = write(tmp_path, "llama")
    got = load(path)
    assert got.config.dtype == torch.bfloat16
    assert_same_model(got, dense)


def test_rope(tmp_path):
    """Llama 3's factors are as good as its config; linear and yarn are the config's own."""
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path, dense = write(tmp_path, "llama", freqs=factors)
    model = dense()
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    ids = torch.arange(2, 40)[None] % 50
    torch.testing.assert_close(load(path, dtype=torch.float32)(ids).logits, model(ids).logits)
    (tmp_path / "b").mkdir()
    scaling = [("add_string", "rope.scaling.type", "yarn"), ("add_float32", "rope.scaling.factor", 4.0)]
    path, _ = write(tmp_path / "b", "llama", [*scaling, ("add_uint32", "rope.scaling.original_context_length", 512)])
    rope = load(path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 512)
    assert not {"beta_fast", "beta_slow", "attention_factor"} & rope.keys()


def test_yarn(tmp_path):
    """What newer converters say of it."""

    def written(folder, *more):
        (tmp_path / folder).mkdir()
        scaling = [("add_string", "rope.scaling.type", "yarn"), ("add_float32", "rope.scaling.factor", 4.0)]
        keys = [("add_float32", f"rope.scaling.{key}", value) for key, value in more]
        return write(tmp_path / folder, "llama", [*scaling, ("add_uint32", "rope.scaling.original_context_length", 512), *keys])[0]

    usual = {"yarn_ext_factor": 1.0, "yarn_beta_slow": 1.0, "yarn_attn_factor": 1.0}
    rope = load(written("a", *usual.items(), ("yarn_beta_fast", 64.0))).config.rope_parameters
    assert rope["beta_fast"] == 64 and not {"beta_slow", "attention_factor"} & rope.keys()
    rope = load(written("b", ("attn_factor", 0.5))).config.rope_parameters
    assert rope["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    for i, (key, value, message) in enumerate(
        [("yarn_ext_factor", 0.5, "yarn_ext_factor is 0.5"), ("yarn_beta_fast", math.inf, "beta_fast = inf"), ("attn_factor", 0.0, "= 0.0")]
    ):
        with pytest.raises(qkernels.QKernelsError, match=message):
            load(written(f"wrong {i}", (key, value)))


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_memory(tmp_path, monkeypatch, name):
    """Not much more than the file holds, also where the head is tied to the embedding, a quarter of the file: they have one form."""
    monkeypatch.setitem(LLAMA_SIZES, "num_hidden_layers", 6)
    monkeypatch.setitem(LLAMA_SIZES, "vocab_size", 800)
    path, _ = write(tmp_path, name)
    watch = Watch()
    for function in ("add", "finish"):
        monkeypatch.setattr(Loader, function, watch.around(getattr(Loader, function)))
    try:
        got = load(path)
        assert 0.5 * path.stat().st_size < watch.peak <= 1.3 * path.stat().st_size
        assert got(IDS).logits.isfinite().all()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("extra", "drop", "error", "message"),
    [
        ([("add_uint32", "rope.strange", 1)], (), CheckpointError, r"rope\.strange"),
        ([("add_uint32", "rope.dimension_count", 8)], (), UnsupportedError, r"rope\.dimension_count is 8"),
        ([("add_string", "rope.scaling.type", "longrope")], (), CheckpointError, r"rope\.scaling\.type"),
        ((), ("token_embd.weight",), CheckpointError, "token_embd"),
        ((), ("blk.1.ffn_up.weight",), CheckpointError, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, extra, drop, error, message):
    path, _ = write(tmp_path, "llama", extra, drop)
    with pytest.raises(error, match=message):
        load(path)


def test_unknown_architectures_and_tensors(tmp_path):
    path, _ = write(tmp_path, "llama")
    info, items = io.detect(path), dict(io.read(path))
    settings = info.settings | {"general.architecture": "mamba9"}
    io.write(items.items(), tmp_path / "x.gguf", "gguf", settings=settings)
    with pytest.raises(UnsupportedError, match=r"mamba9.*qwen3moe.*qkernels\.io\.read"):
        load(tmp_path / "x.gguf")
    for name, t in (("blk.0.strange.weight", torch.ones(3)), ("blk.0.attn_q.scale", torch.full((1,), 0.5))):
        io.write((items | {name: t}).items(), tmp_path / f"{name}.gguf", "gguf", settings=info.settings)
        with pytest.raises(qkernels.QKernelsError, match=re.escape(name)):
            load(tmp_path / f"{name}.gguf")
