"""from_pretrained of whole models that other libraries quantised and saved (tests/golden/make_models*.py say who)."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qkernels
from qkernels import CheckpointError, QuantLinear, io, reference
from qkernels.embedding import QuantEmbedding
from qkernels.formats import QuantTensor

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = Path(__file__).parent / "golden" / "models"
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
# producer -> layout, and how many weights each format has; blocks of 64 straddle the rows of down_proj
MADE = {
    "auto-round": ("auto-round", {"u4_g32_zi_sf16": 14}),
    "awq": ("awq", {"u4_g32_zi_sf16": 14}),
    "bitsandbytes-int8": ("bitsandbytes", {"u8b128_g-1_sf32": 14}),
    "bitsandbytes-nf4": ("bitsandbytes", {"nf4_g64_sf32": 12, "nf4_g32_sf32": 2}),
    "compressed-tensors": ("compressed-tensors", {"u4b8_g32_sbf16": 14}),
    "fp8": ("fp8", {"e4m3_g32x32_sf32": 14}),
    "gguf-k": ("gguf", {"q4_k": 9, "q6_k": 3, "q5_0": 3, "q8_0": 1}),
    "gguf-split": ("gguf", {"q4_0": 6, "q4_1": 2, "q5_0": 2, "q5_1": 2, "iq4_nl": 2, "q8_0": 2}),
    "gptq-4bit": ("gptq", {"u4b8_g32_sf16": 14}),
    "gptq-8bit": ("gptq", {"u8b128_g-1_sf16": 14}),
    "hqq": ("hqq", {"u4_g-1_zf_sf32": 12, "u4_g32_zf_sf32": 2}),
    "torchao-int4": ("torchao", {"u4b8_g32_sbf16": 15}),
    "torchao-int8": ("torchao", {"u8b128_g-1_sf32": 14}),
}


def path_of(producer):
    return next(iter(sorted((MODELS / producer).glob("*.gguf"))), MODELS / producer)


def load(producer, **options):
    return qkernels.from_pretrained(path_of(producer), compute="float", progress=False, **options)


def quantized(model):
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}


def decoded(module):
    return reference.decode(module.quant_tensor())


def dense(model, dtype):
    """The same numbers without a line of ours in the forward pass: a new model of transformers."""
    new = type(model)(copy.deepcopy(model.config)).eval()
    plain = {name: t for name, t in model.state_dict().items() if name in new.state_dict()}
    new.load_state_dict(plain | {name: decoded(m) for name, m in quantized(model).items()})
    return new.to(dtype)


@pytest.fixture(scope="module", params=MADE)
def made(request):
    """(producer, its model in float32, what it expects)"""
    with np.load(MODELS / request.param / "expected.npz") as expected:
        yield request.param, load(request.param, dtype=torch.float32), dict(expected)


def test_what_it_is(made):
    producer = made[0]
    layout, formats = MADE[producer]
    info = io.detect(path_of(producer))
    assert info.layout == layout and len(info.files) == (2 if producer == "gguf-split" else 1)
    found = [v.format.name for _, v in io.read(info) if isinstance(v, QuantTensor)]
    assert {name: found.count(name) for name in found} == formats


def test_numbers(made):
    """Every quantised weight is held as it is, and means exactly what the producer decodes it to."""
    producer, model, expected = made
    held = quantized(model)
    assert sorted(held) == sorted(expected["names"])
    for name, digest in zip(expected["names"], expected["digests"], strict=True):
        values = decoded(held[name])
        if producer == "bitsandbytes-int8":  # which rounds twice in float32, and both times otherwise
            values = values.bfloat16().float()
        assert hashlib.sha256(values.contiguous().numpy().tobytes()).digest() == digest.tobytes(), name
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} <= {"lm_head"}
    permuted = {m.quant_tensor().perm is not None for m in held.values()}
    assert permuted == {producer == "gptq-4bit"}  # which is act-order


def assert_same_logits(model, expected):
    """At most twice what torch loses in the same dtype, and an ulp, from what the producer's numbers give in float64."""
    with torch.no_grad():
        ours = model(IDS).logits[0]
        torchs, wide = (dense(model, dtype)(IDS).logits[0] for dtype in (model.dtype, torch.float64))
    exact = torch.from_numpy(expected["logits"])
    allowed = 2 * (torchs - wide).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


def test_logits_and_tokens(made):
    _, model, expected = made
    assert_same_logits(model, expected)
    tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens[0, IDS.shape[1] :].tolist() == expected["tokens"].tolist()


def test_in_its_own_dtype(made):
    producer, _, expected = made
    model = load(producer)
    info = io.detect(path_of(producer))
    assert model.dtype == getattr(torch, info.config.get("dtype", "bfloat16"))
    assert_same_logits(model, expected)


def test_split_files_lack_a_part(tmp_path):
    """The whole model is in both files; the first one alone is refused."""
    first, second = sorted((MODELS / "gguf-split").glob("*.gguf"))
    shutil.copy(first, tmp_path)
    with pytest.raises(CheckpointError, match=second.name):
        qkernels.from_pretrained(tmp_path / first.name, progress=False)


def test_files_of_another_name(tmp_path):
    """The only one is taken; of two, or of one shard, nobody knows."""
    file = next((MODELS / "gptq-4bit").glob("*.safetensors"))
    assert file.name == "gptq_model-4bit-32g.safetensors"
    for names in ([f"a{file.name}", file.name], ["model-00001-of-00002.safetensors"]):
        directory = tmp_path / names[0]
        directory.mkdir()
        for name in names:
            shutil.copy(file, directory / name)
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
            io.detect(directory)
    index = tmp_path / "model-00001-of-00002.safetensors" / f"{file.name}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(file), "model-00001-of-00002.safetensors")}))
    assert io.detect(index.parent).files == (index.parent / "model-00001-of-00002.safetensors",)
