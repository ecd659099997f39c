"""Make the golden GGUF files with gguf-py, and gguf.json, which tells what was put in. No test runs this; tests/test_io_gguf.py reads.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 tqdm==4.70.1 && pip install --no-deps gguf==0.19.0
    python tests/golden/make_gguf.py

    gguf_types.gguf        every type of key-value and array; tensors of every plain type and of blocks, experts in three axes, one axis
    gguf_big_endian.gguf   the same in big-endian, of blocks those that gguf-py converts
    gguf_aligned.gguf      alignment 64
    gguf_split-0000?-of-00003.gguf
    gguf_names.json        architecture -> {name in a Hugging Face checkpoint: name in a GGUF file}

Nothing of qkernels is imported.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import transformers
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf.quants import quantize
from gguf.scripts.gguf_convert_endian import byteswap_tensors

HERE = Path(__file__).parent
SCALARS = {
    V.UINT8: 255, V.INT8: -128, V.UINT16: 65535, V.INT16: -32768, V.UINT32: 4294967295, V.INT32: -7, V.FLOAT32: 0.5,
    V.BOOL: True, V.STRING: "Grüße", V.UINT64: 2**64 - 1, V.INT64: -(2**63), V.FLOAT64: 0.1,
}  # fmt: skip
PUT_IN = {}


def key_values(writer):
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    for type, value in SCALARS.items():
        writer.add_key_value(f"of.{type.name.lower()}", value, type)
        writer.add_key_value(f"list.{type.name.lower()}", [value, value], V.ARRAY, type)
    writer.add_token_list(["<s>", "a", "", "é", b"\xff\xfe"])  # tokens may be no UTF-8
    writer.add_token_scores([0.0, -1.5, 3.25, 1e-30, -0.0])
    writer.add_chat_template("{{ messages }}\n" * 3)


def tensors(blocks):
    random = np.random.default_rng(3)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        yield np.dtype(dtype).name, (random.standard_normal((3, 5)) * 20).astype(dtype), None
    yield "blk.0.attn_norm.weight", random.standard_normal(7).astype(np.float32), None
    yield "four.axes", random.standard_normal((1, 2, 3, 1)).astype(np.float16), None
    yield "bf16", quantize(random.standard_normal((3, 6)).astype(np.float32), T.BF16), T.BF16
    for type in blocks:
        block, nbytes = gguf.GGML_QUANT_SIZES[type]
        if block < 256:
            yield f"{type.name}.weight", quantize(random.standard_normal((3, 64)).astype(np.float32), type), type
        else:  # gguf-py encodes none of these
            yield f"{type.name}.weight", random.integers(256, size=(2, nbytes), dtype=np.uint8), type
    yield "one_axis", quantize(random.standard_normal(96).astype(np.float32), T.Q8_0), T.Q8_0
    yield "blk.0.ffn_up_exps.weight", quantize(random.standard_normal((4, 2, 32)).astype(np.float32), T.Q4_0), T.Q4_0


def swapped(array, type):
    """In big-endian order, blocks as gguf-py converts them."""
    if type == T.BF16:
        return array.view(np.uint16).byteswap().view(np.uint8)
    if type is None:
        return array.byteswap()
    flat = array.flatten()
    for block in range(0, flat.size, gguf.GGML_QUANT_SIZES[type][1]):
        byteswap_tensors[type](SimpleNamespace(data=flat), block)
    return flat.reshape(array.shape)


def make(name, blocks, keys=key_values, big_endian=False, **options):
    writer = gguf.GGUFWriter(HERE / name, "llama", endianess=gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE, **options)
    keys(writer)
    made = PUT_IN[name] = {}
    for tensor, array, type in tensors(blocks):
        made[tensor] = [str(type.name) if type else array.dtype.name, list(array.shape), array.tobytes().hex()]
        # raw bytes are written as they are; gguf-py itself would turn round what it is told to be of the other order
        stored = swapped(array, type) if big_endian else array
        writer.add_tensor(tensor, stored, raw_dtype=type, tensor_endianess=writer.endianess)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ALL = (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.MXFP4, T.Q4_K, T.Q6_K)
make("gguf_types.gguf", ALL)
make("gguf_big_endian.gguf", (T.Q4_0, T.Q8_0, T.MXFP4, T.Q4_K, T.Q6_K), big_endian=True)
make("gguf_aligned.gguf", (T.Q4_0,), lambda writer: writer.add_custom_alignment(64))
make("gguf_split.gguf", (T.Q8_0,), split_max_tensors=5)
MODELS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3", "phi3": "Phi3"}
MOE = {
    "llama": ("block_sparse_moe", "gate", "experts.w1", "experts.w2", "experts.w3"),
    "qwen3moe": ("mlp", "gate", "experts.gate_proj", "experts.up_proj", "experts.down_proj"),
}
MOE["qwen2moe"] = (*MOE["qwen3moe"], "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate")


def hf_names(arch):
    """Of a model with two layers, as transformers builds it; of experts as they are called on the Hub, where each has a number."""
    model = MODELS.get(arch.removesuffix("moe"))
    config = dict(num_hidden_layers=2, vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    config = getattr(transformers, f"{model}{'Text' * (model == 'Gemma3')}Config")(**config, head_dim=4, pad_token_id=0)
    names = set(getattr(transformers, f"{model}ForCausalLM")(config).state_dict()) | {"lm_head.weight"}
    if arch.endswith("moe"):
        names = {name for name in names if ".mlp." not in name}
    folder, *modules = MOE.get(arch, [""])
    return sorted(names | {f"model.layers.1.{folder}.{module}.weight" for module in modules})


def name_map(arch):
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 2)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in hf_names(arch)}
    return {name.replace(".experts.", ".experts.5."): gguf_name for name, gguf_name in found.items() if gguf_name}


NAMES = {arch: name_map(arch) for arch in (*MODELS, "qwen2moe", "qwen3moe")}
(HERE / "gguf_names.json").write_text(json.dumps(NAMES, indent=1) + "\n")
(HERE / "gguf.json").write_text(json.dumps(PUT_IN, separators=(",", ":")) + "\n")
