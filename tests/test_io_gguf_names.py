"""Names of GGUF tensors against gguf-py's table, and the order of the rows of q and k against RoPE itself."""

import json
from pathlib import Path

import pytest
import torch

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantTensor, get
from qkernels.formats.rows import take
from qkernels.io import gguf_names
from qkernels.io.gguf_names import rotated_heads, rows_to_gguf, rows_to_hf, to_gguf, to_hf

NAMES = json.loads((Path(__file__).parent / "golden" / "gguf_names.json").read_text())


@pytest.mark.parametrize("arch", NAMES)
def test_names_there_and_back(arch):
    assert NAMES[arch]["model.norm.weight"] == "output_norm.weight"
    for hf, gguf in NAMES[arch].items():
        expert = 5 if ".experts." in hf else None
        assert to_gguf(arch, hf) == (gguf, expert)
        assert to_hf(arch, gguf) == hf.replace(".experts.5.", ".experts.*.")


def test_no_name_more_than_gguf_py_has():
    for arch, block in gguf_names._BLOCK.items():
        stems = {gguf.split(".")[2] for gguf in NAMES[arch].values() if gguf.startswith("blk.1.")}
        assert set(block) == stems
    assert set(gguf_names.ARCHITECTURES.values()) == set(NAMES)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "blk.0.attn_q", "attn_q.weight", "blk.0.output.weight", ""]
)
def test_names_that_are_not_known(name):
    with pytest.raises(UnsupportedError, match="is not known in models of architecture 'llama'"):
        to_hf("llama", name)
    with pytest.raises(UnsupportedError, match="is not known in models of architecture 'llama'"):
        to_gguf("llama", f"model.layers.0.{name}")


def test_what_is_no_weight_and_no_architecture():
    assert to_hf("llama", "rope_freqs.weight") is None
    with pytest.raises(UnsupportedError, match=r"'falcon' are not known; those of llama"):
        to_hf("falcon", "output.weight")


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (4, 6), (3, 8)])
def test_rows_as_the_converter_orders_them(heads, size):
    weight = torch.randn(heads * size, 5)
    converted = weight.numpy().reshape(heads, 2, size // 2, 5).swapaxes(1, 2).reshape(-1, 5)
    assert torch.equal(weight[rows_to_gguf(len(weight), heads)], torch.from_numpy(converted.copy()))
    assert torch.equal(torch.from_numpy(converted.copy())[rows_to_hf(len(weight), heads)], weight)


def test_attention_is_the_same_in_both_orders():
    """Four heads of queries, two of keys: RoPE on halves of HF rows scores as RoPE on neighbours of GGUF rows."""
    size, at, hidden = 8, 3.0, torch.randn(5, dtype=torch.float64)
    q, k = torch.randn(4 * size, 5, dtype=torch.float64), torch.randn(2 * size, 5, dtype=torch.float64)
    turn = torch.polar(torch.ones(size // 2, dtype=torch.float64), at * 10.0 ** -torch.arange(size // 2, dtype=torch.float64))

    def halves(weight):
        first, second = (weight @ hidden).view(-1, 2, size // 2).unbind(1)
        return torch.complex(first, second) * turn

    def neighbours(weight):
        return torch.view_as_complex((weight @ hidden).view(-1, size // 2, 2)) * turn

    assert torch.equal(neighbours(q[rows_to_gguf(len(q), 4)]), halves(q))
    assert torch.equal(neighbours(k[rows_to_gguf(len(k), 2)]), halves(k))


def test_rows_are_taken_as_they_are_packed():
    format = get("q8_0")
    q = QuantTensor(format, (12, 64), torch.randint(256, format.codes_shape(12, 64), dtype=torch.uint8))
    taken = take(q, rows_to_gguf(12, 3))
    assert torch.equal(taken.codes[1], q.codes[2]) and not taken.equal(q)
    assert take(taken, rows_to_hf(12, 3)).equal(q)
    assert rows_to_gguf(12, 3)[:4].tolist() == [0, 2, 1, 3]
    with pytest.raises(CheckpointError, match="12 rows are not 4 heads"):
        rows_to_hf(12, 4)


def test_which_rows_are_in_another_order():
    settings = {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 2}
    assert rotated_heads("llama", "blk.3.attn_q.weight", settings) == 8
    assert rotated_heads("llama", "blk.3.attn_k.bias", settings) == 2
    assert rotated_heads("llama", "blk.3.attn_k.weight", {"llama.attention.head_count": 8}) == 8
    assert rotated_heads("llama", "blk.3.attn_v.weight", settings) is None
    assert rotated_heads("qwen2", "blk.3.attn_q.weight", settings) is None
    for heads in (None, 0, [8, 8], "8"):
        with pytest.raises(CheckpointError, match=r"blk.3.attn_q.weight is stored in the order of RoPE"):
            rotated_heads("llama", "blk.3.attn_q.weight", {"llama.attention.head_count": heads})


def test_norms_of_gemma():
    assert gguf_names.norm_offset("gemma3", "blk.0.attn_k_norm.weight") == 1
    assert gguf_names.norm_offset("gemma2", "output_norm.weight") == 1
    assert gguf_names.norm_offset("gemma2", "output.weight") == gguf_names.norm_offset("llama", "output_norm.weight") == 0


def test_the_table_is_gguf_py_s():
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed: pip install --no-deps gguf==0.19.0")
    for id, arch in gguf.MODEL_ARCH_NAMES.items():
        if arch in NAMES:
            names = gguf.get_tensor_name_map(id, 2)
            for stem, hf in gguf_names._BLOCK[arch].items():
                assert names.get_name(f"model.layers.1.{hf.replace('.*', '')}") == f"blk.1.{stem}"
