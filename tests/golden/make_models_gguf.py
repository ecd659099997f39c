"""Make models/gguf-k/ and models/gguf-split/: a small random Llama as GGUF files, in the types that llama.cpp mixes. No test runs this.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 tqdm
    pip install --no-deps gguf==0.19.0 xllamacpp==2026.10.11549
    python tests/golden/make_models_gguf.py

gguf-k has Q4_K and Q6_K as a Q4_K_M file, and what llama.cpp takes in their place where rows are no multiple of 256: Q5_0 and Q8_0.
gguf-split is two files of Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL and Q8_0. Blocks are made and decoded by ggml's C code (make_ggml.py); files,
names and keys are gguf-py's; rows of attn_q and attn_k are in the order that llama.cpp wants. expected.npz is that of make_models.py;
llama.cpp loads the files and is asked for the same logits. Nothing of qkernels is imported.
"""

import ctypes
import shutil
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p

import gguf
import make_ggml
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from make_models import IDS, MODELS, expect, random_model

# part of a GGUF name -> type, the first that fits
K_TYPES = {
    "token_embd": T.Q4_K,
    "attn_output": T.Q5_0,
    "output": T.Q6_K,
    "attn_v": T.Q6_K,
    "blk.0.ffn_down": T.Q8_0,
    "ffn_down": T.Q5_0,
}
OLD_TYPES = {
    "token_embd": T.Q8_0,
    "attn_output": T.Q4_0,
    "output": T.Q8_0,
    "attn_v": T.Q5_1,
    "attn_q": T.Q4_1,
    "ffn_up": T.IQ4_NL,
    "ffn_down": T.Q5_0,
}


def permuted(w, heads):
    """Rotary pairs side by side, where transformers has halves."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def restored(w, heads):
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


class Parameters(ctypes.Structure):
    """More than llama.cpp's own, which are passed by value and made by it."""

    _fields_ = (("opaque", c_int64 * 128),)


class Batch(ctypes.Structure):
    _fields_ = (("opaque", c_int64 * 7),)


def function(name, result, *arguments):
    found = make_ggml.GGML[name]
    found.restype, found.argtypes = result, arguments
    return found


def by_llama_cpp(path, vocab):
    """Logits of the last of IDS."""
    function("llama_backend_init", None)()
    parameters = function("llama_model_default_params", Parameters)()
    model = function("llama_model_load_from_file", c_void_p, c_char_p, Parameters)(str(path).encode(), parameters)
    parameters = function("llama_context_default_params", Parameters)()
    context = function("llama_init_from_model", c_void_p, c_void_p, Parameters)(model, parameters)
    tokens = (c_int32 * IDS.numel())(*IDS[0].tolist())  # which the batch points to
    batch = function("llama_batch_get_one", Batch, POINTER(c_int32), c_int32)(tokens, len(tokens))
    assert function("llama_decode", c_int32, c_void_p, Batch)(context, batch) == 0
    logits = function("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)(context, -1)
    return np.ctypeslib.as_array(logits, (vocab,)).copy()


def check_by_llama_cpp(directory):
    """Within what its int8 activations and float16 cache cost."""
    exact = np.load(directory / "expected.npz")["logits"][-1]
    theirs = by_llama_cpp(min(directory.glob("*.gguf")), len(exact))
    assert np.abs(theirs - exact).max() < 0.04 * np.abs(exact).max()


def add_keys(writer, config, file_type):
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def make(producer, model, types, default, file_type, **options):
    directory, config = MODELS / producer, model.config
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama", **options)
    add_keys(writer, config, file_type)
    names, decoded = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers), {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, t in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight",))
        turned = next((heads[part] for part in heads if f".{part}." in target), None)
        w = permuted(t.numpy(), turned) if turned else t.numpy()
        if w.ndim == 1:
            writer.add_tensor(target, w)
            continue
        type = next((types[part] for part in types if part in target), default)
        raw = make_ggml.encode(type, np.ascontiguousarray(w))
        values = make_ggml.decode(type, raw)
        decoded[name] = torch.from_numpy(np.ascontiguousarray(restored(values, turned) if turned else values))
        writer.add_tensor(target, raw, raw_dtype=type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expect(directory, model, decoded)
    check_by_llama_cpp(directory)


if __name__ == "__main__":
    wide = dict(hidden_size=256, intermediate_size=32, head_dim=8)
    make("gguf-k", random_model(**wide), K_TYPES, T.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M)
    make("gguf-split", random_model(), OLD_TYPES, T.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0, split_max_tensors=11)
