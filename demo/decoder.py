"""A Llama-shaped decoder of about 1 B parameters with random weights: tokens a second and memory, bf16 against int8 and int4."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import qkernels

PROMPT, DECODED = 128, 32


def build() -> nn.Module:
    """Random bf16 weights, made in place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for p in track(list(model.parameters()), "random weights", transient=True):
        p.data.normal_(std=0.02)
        p.requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not random
    return model


def resident_mb() -> float:
    """Memory of this process now, where the system tells it; else the most that it ever took."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def speeds(model: nn.Module, what: str) -> tuple[float, float]:
    """(prompt, decoding) tokens a second: greedy, batch of one; decoding by the median token, as the machine may have other work."""
    ids = torch.randint(32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:, :8])  # warm-up
        start = time.perf_counter()
        out = model(ids, use_cache=True)
        prompt = PROMPT / (time.perf_counter() - start)
        times = []
        for _ in track(range(DECODED), f"{what}: decoding", transient=True):
            start = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - start)
    return prompt, 1 / statistics.median(times)


def main(console: Console) -> None:
    table = Table("weights", "MB of parameters", "MB resident", f"prompt of {PROMPT}, tokens / s", "decoding, tokens / s")
    for format in ("bf16", "int8", "int4"):
        gc.collect()
        model = build()
        if format != "bf16":
            qkernels.replace_linear(model, format, quantizer="absmax")
            gc.collect()
        megabytes = sum(p.nbytes for p in model.parameters()) / 1e6
        prompt, decoding = speeds(model, format)
        table.add_row(format, f"{megabytes:.0f}", f"{resident_mb():.0f}", f"{prompt:.0f}", f"{decoding:.1f}")
        del model
    console.print(f"{torch.get_num_threads()} threads; lm_head and embeddings stay in bf16")
    console.print(table)
