"""Layer shapes as GPUs serve them: q, k and v in one product, gate and up in another; and their classes by size."""

from __future__ import annotations

from .. import shapes
from ..shapes import LayerShape


def fused(model: str, qkv: tuple[int, int], o: tuple[int, int], gate_up: tuple[int, int], down: tuple[int, int]) -> tuple[LayerShape, ...]:
    """The four products of one decoder block."""
    parts = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}
    return tuple(LayerShape(n, k, f"{model} {part}") for part, (n, k) in parts.items())


MODELS: dict[str, tuple[LayerShape, ...]] = {
    "8b": fused("8b", (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": fused("70b", (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "70b-tp8": fused("70b-tp8", (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)),
    "8b-head": (LayerShape(128256, 4096, "8b lm_head"),),
}
CLASSES = ("<10 MB", "10–30 MB", "≥30 MB")  # of int4 weight: what a launch costs beside reading it differs between them


def parse_shapes(text: str) -> list[LayerShape]:
    """Turn `"8b,4096x4096"` into shapes, each (n, k) once; the CPU benchmark's models count as well.

    Raises: ValueError naming the part that is neither a model nor `NxK`.
    """
    found: dict[tuple[int, int], LayerShape] = {}
    for part in (p.strip() for p in text.split(",")):
        for shape in MODELS.get(part) or _others(part):
            found.setdefault((shape.n, shape.k), shape)
    return list(found.values())


def _others(part: str) -> list[LayerShape]:
    try:
        return shapes.parse_shapes(part)
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(MODELS)}") from error


def int4_bytes(n: int, k: int) -> int:
    """Bytes of a weight [n, k] in int4 with one 16-bit scale per 128."""
    return n * k // 2 + n * k // 128 * 2


def class_of(n: int, k: int) -> str:
    """Which of CLASSES a weight [n, k] belongs to."""
    megabytes = int4_bytes(n, k) / 1e6
    return CLASSES[(megabytes >= 10) + (megabytes >= 30)]
