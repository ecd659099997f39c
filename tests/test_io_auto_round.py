"""AutoRound checkpoints: its own packings and values, and which reader each packing_format goes to."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values
from safetensors.torch import save_file
from words import equal_tensors, gptq, numbers, words

from qkernels import formats, io, reference
from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io import auto_round as layout

FILE = np.load(Path(__file__).parent / "golden" / "auto_round.npz")
CASES = [key.removesuffix(".dense") for key in FILE if key.endswith(".dense")]
STATED = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int", "packing_format": "auto_round"}


def read(tensors, **stated):
    return dict(layout.read(tensors, {**STATED, **stated}))


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    """Zero points stored as they are or less one, 2 to 8 bits, no g_idx; the values are AutoRound's, rounded to float16 once there."""
    packing, bits, group, kind, _ = case.replace("less_one", "less").split("_")
    held = {f"m.fc.{leaf}": torch.from_numpy(FILE[f"{case}.{leaf}"]) for leaf in ("qweight", "qzeros", "scales")}
    stated = {"bits": int(bits[0]), "group_size": int(group[1:]), "sym": kind == "sym"}
    for name in ("auto_round", "auto_round:gptqmodel") if packing == "exact" else ("auto_round:auto_gptq", "auto_round:gptq", None):
        q = read(held, **stated, packing_format=name)["m.fc.weight"]
        equal_values(reference.decode(q).half(), torch.from_numpy(FILE[f"{case}.dense"]))
        assert (q.zeros is None) == (kind == "sym") and bool((q.scales < 0).any())


def module(bits, size, path, n=32, k=32):
    codes, zeros, scales = numbers(n, k, bits, k // size)
    held, weight = gptq(codes, zeros, scales, np.arange(k) // size, bits, exact=True)
    return {name.replace("m.fc", path): t for name, t in held.items()}, weight


def test_extra_config(tmp_path):
    """Of a layer by its name before all patterns; 16 bits: not quantised. Through a directory."""
    held, expected = {}, {}
    for path, bits, size in (("a.0.q", 4, 16), ("a.0.gate", 8, 16), ("a.1.q", 2, 32), ("a.2.q", 3, 16)):
        more, expected[f"{path}.weight"] = module(bits, size, path)
        held |= more
    plain = {"lm_head.weight": torch.ones(4, 8), "a.0.q.bias": torch.ones(32)}
    extra = {".*gate.*": {"bits": 8}, "a.1.q": {"bits": 2, "group_size": 32}, r"a\.[12]\.q": {"bits": 3}}
    extra["lm_head"] = {"bits": 16, "data_type": "float"}
    stated = {**STATED, "extra_config": extra, "iters": 200, "autoround_version": "0.13.0", "block_name_to_quantize": "a"}
    save_file(held | plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    items = dict(io.read(tmp_path))
    for name, weight in expected.items():
        equal_values(reference.decode(items.pop(name)), weight)
    equal_tensors(items, plain)


def test_awq():
    codes, zeros, scales = numbers(8, 32, 4, 2)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    held = {"m.fc.qweight": words(codes.T[:, order], 4), "m.fc.qzeros": words(zeros[:, order], 4), "m.fc.scales": scales}
    for name in ("auto_round:auto_awq", "auto_round:awq"):
        q = read(held, packing_format=name)["m.fc.weight"]
        equal_values(reference.decode(q), gptq(codes, zeros, scales, np.arange(32) // 16, 4)[1])
        assert q.format == formats.get("u4_g16_zi_sf16")
    with pytest.raises(UnsupportedError, match=r"m\.fc: 8 bits in the packing of AWQ, which has 4"):
        read(held, packing_format="auto_round:awq", bits=8)


def test_compressed_tensors(monkeypatch):
    """Those go to another reader, whose settings they are."""
    seen = {}
    fake = types.ModuleType("compressed_tensors")
    fake.read = lambda tensors, settings: seen.update(settings) or iter(tensors.items())
    monkeypatch.setitem(sys.modules, "qkernels.io.compressed_tensors", fake)
    stated = {"packing_format": "auto_round:llm_compressor", "iters": 7, "config_groups": {"group_0": {}}, "format": "pack-quantized"}
    assert list(read({"a": 1}, **stated)) == ["a"]
    assert seen == {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}, "format": "pack-quantized"}
    with pytest.raises(UnsupportedError, match=r"lack config_groups \(4 bits of mx_fp\)"):
        read({"a": 1}, packing_format="auto_round:llm_compressor", data_type="mx_fp")


@pytest.mark.parametrize(
    ("stated", "kind", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, UnsupportedError, "packing_format is 'auto_round:fp8_static'; auto_round:auto_gptq"),
        ({"packing_format": 3}, CheckpointError, "packing_format is 3, not str"),
        ({"bits": 1}, UnsupportedError, "m.fc: 1 bits; 2 to 8 are read"),
        ({"bits": "4"}, CheckpointError, "bits is '4', not int"),
        ({"group_size": 0}, CheckpointError, "4 bits in groups of 0"),
        ({"bits": None}, CheckpointError, "lacks bits"),
        ({"data_type": "mx_fp"}, CheckpointError, "data_type is 'mx_fp'; 'int'"),
        ({"rotation_configs": [{"kind": "hadamard"}]}, CheckpointError, "rotation_configs = .* which is unknown"),
        ({"extra_config": {"m.fc": {"bits": 16}}}, CheckpointError, "m.fc: qweight is there, but the settings say that this module is not"),
        ({"extra_config": {"m(": {"bits": 4}}}, CheckpointError, r"'m\(' is no regular expression"),
        ({"extra_config": {"m.fc": {"bit": 4}}}, CheckpointError, "extra_config: m.fc has bit = 4, which is unknown"),
        ({"extra_config": {"m.fc": {"group_size": 32}}}, CheckpointError, r"m\.fc: scales is \[2, 32\] torch.float16, not \[1, 32\]"),
    ],
)
def test_wrong_settings(stated, kind, message):
    with pytest.raises(kind, match=message):
        read(module(4, 16, "m.fc")[0], **stated)
