"""Shapes of the linear layers that are measured: those of well-known models, or any `NxK`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """A weight `[n, k]`: out features, in features."""

    n: int
    k: int
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}"

    def ops(self, m: int) -> int:
        """Operations of one call on M rows; a multiply-add counts as two."""
        return 2 * m * self.n * self.k


def decoder(hidden: int, ffn: int, kv: int) -> tuple[LayerShape, ...]:
    """The linear layers of one Llama-like block; `kv` = key/value heads times head size."""
    return (
        LayerShape(hidden, hidden, "q, o"),
        LayerShape(kv, hidden, "k, v"),
        LayerShape(ffn, hidden, "gate, up"),
        LayerShape(hidden, ffn, "down"),
    )


MODELS: dict[str, tuple[LayerShape, ...]] = {
    "llama3.2-1b": decoder(2048, 8192, 512),
    "llama3-8b": decoder(4096, 14336, 1024),
    "llama3-70b": decoder(8192, 28672, 1024),
    "mistral-7b": decoder(4096, 14336, 1024),
    "qwen3-4b": (LayerShape(4096, 2560, "q"), LayerShape(2560, 4096, "o"), *decoder(2560, 9728, 1024)[1:]),
}


def parse_shapes(text: str) -> list[LayerShape]:
    """Turn `"llama3-8b,4096x4096"` into shapes, each (n, k) once, in the order of first mention.

    Raises: ValueError naming the part that is neither a model nor `NxK`.
    """
    found: dict[tuple[int, int], LayerShape] = {}
    for part in (p.strip() for p in text.split(",")):
        for shape in _shapes_of(part):
            found.setdefault((shape.n, shape.k), shape)
    return list(found.values())


def _shapes_of(part: str) -> tuple[LayerShape, ...]:
    if part in MODELS:
        return MODELS[part]
    match = re.fullmatch(r"(\d+)x(\d+)", part)
    if match is None:
        raise ValueError(f"unknown shape {part!r}: write NxK, as in 4096x4096, or one of {', '.join(MODELS)}")
    return (LayerShape(int(match[1]), int(match[2])),)
