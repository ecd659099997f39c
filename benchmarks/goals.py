"""The goals, each judged from a record: a number, the bound, met or not. They are stated for two Zen4 cores, N = K = 4096."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SHAPE = "4096x4096"
TORCH, ATEN_INT4, ZENTORCH = "torch F.linear bf16", "aten int4pack", "zentorch W8A8"
INT4, INT4_FLOAT, INT8 = "qkernels int4 int8", "qkernels int4 float", "qkernels int8 int8"
Value = Callable[[dict], float | None]  # from a record; None: not measured


@dataclass(frozen=True)
class Goal:
    """`value(record)` has to be at least (or at most) `bound`."""

    text: str
    bound: float
    value: Value
    at_least: bool = True
    unit: str = "×"

    def judge(self, record: dict) -> dict:
        """Return text, bound, value and met (None: not measured) as plain data."""
        value = self.value(record)
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        sign = "≥" if self.at_least else "≤"
        return {"goal": self.text, "bound": f"{sign} {show(self.bound, self.unit)}", "value": show(value, self.unit), "met": met}


def show(value: float | None, unit: str) -> str:
    """A number with its unit: `0.9` is `90 %` or `0.90 ×` or `0.9 µs`."""
    if value is None:
        return "not measured"
    return {"%": f"{100 * value:.0f} %", "×": f"{value:.2f} ×", "µs": f"{value:.1f} µs"}[unit]


def find(record: dict, contestant: str, m: int, shape: str = SHAPE) -> dict | None:
    """The good result of one contestant, or None."""
    rows = (r for r in record["results"] if r["contestant"] == contestant and r["m"] == m and r["shape"] == shape and r["ok"])
    return next(rows, None)


def read_share(contestant: str, weights: str = "") -> Value:
    """Weight bytes per second at M = 1 as a share of what reading memory alone reached in the turns beside.

    Not measured where anybody read faster than that by over 10 %, which is more than a better order of reading gives (7 %, NOTES.md):
    neighbours took memory during the turns of reading. Of those with `weights`, where they alone were measured in turn.
    """

    def value(record: dict) -> float | None:
        rows = (r for r in record["results"] if r["m"] == 1 and r["shape"] == SHAPE and r["ok"] and weights in ("", r.get("weights")))
        disturbed = any((r.get("read_share") or 0) > 1.1 for r in rows)
        return None if disturbed else (find(record, contestant, 1) or {}).get("read_share")

    return value


def faster(contestant: str, other: str, m: int) -> Value:
    """How many times faster than another one at one M."""
    return lambda record: (find(record, contestant, m) or {"times_over": {}})["times_over"].get(other)


def over_best(contestant: str, others: str, m: int, shape: str = SHAPE) -> Value:
    """How many times faster than the fastest of those whose names begin with `others`."""

    def value(record: dict) -> float | None:
        times_over = (find(record, contestant, m, shape) or {"times_over": {}})["times_over"]
        return min((times for other, times in times_over.items() if other.startswith(others)), default=None)

    return value


def worst(contestant: str, other: str, least_m: int = 1) -> Value:
    """The lowest `faster` over all M from `least_m` on."""

    def value(record: dict) -> float | None:
        rows = [r for r in record["results"] if (r["contestant"], r["shape"]) == (contestant, SHAPE) and r["ok"] and r["m"] >= least_m]
        return min((r["times_over"][other] for r in rows if other in r["times_over"]), default=None)

    return value


def inverse(of: Value) -> Value:
    """Time ratios from speed ratios."""

    def value(record: dict) -> float | None:
        speed = of(record)
        return None if speed is None else 1 / speed

    return value


def largest(section: str, key: str) -> Value:
    """The largest number of one kind in a list of the record."""
    return lambda record: max((entry[key] for entry in record.get(section, [])), default=None)


GOALS: tuple[Goal, ...] = (
    Goal("int4 M=1: share of the read bandwidth", 0.88, read_share(INT4), unit="%"),
    Goal("int4 M=16: over bf16 F.linear", 2.5, faster(INT4, TORCH, 16)),
    Goal("int4 M=128: over bf16 F.linear", 2.2, faster(INT4, TORCH, 128)),
    Goal("int4 M=512: over bf16 F.linear", 1.8, faster(INT4, TORCH, 512)),
    *(Goal(f"int8 M={m}: time over zentorch W8A8", 1.1, inverse(faster(INT8, ZENTORCH, m)), at_least=False) for m in (1, 16, 128, 512)),
    Goal("int4 float: over aten int4pack, worst case", 1.0, worst(INT4_FLOAT, ATEN_INT4)),
    Goal("int4 float M≥128: time over bf16 F.linear, worst case", 1.1, inverse(worst(INT4_FLOAT, TORCH, 128)), at_least=False),
    Goal("largest t(M+1)/t(M), M = 1…64", 1.25, largest("cliff", "worst_ratio"), at_least=False),
    Goal("bytes held over the format's bytes", 1.03, largest("memory", "ratio"), at_least=False),
    Goal("call overhead over F.linear, 64×64", 15, largest("overhead", "extra_us"), at_least=False, unit="µs"),
)


# of `python -m benchmarks ggml`: the types that llama.cpp's files are made of, and int4 as GPTQ and AWQ leave it
GGML_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")
LIKE_INT4 = {"int4_asym": "int4 with zero points", "int4 perm": "int4 with a permutation"}
GGML_GOALS: tuple[Goal, ...] = (
    *(Goal(f"{type} M=1: share of the read bandwidth", 0.85, read_share(f"qkernels {type} int8", type), unit="%") for type in GGML_TYPES),
    *(Goal(f"{type} M=512: over ggml", 1.8, over_best(f"qkernels {type} int8", f"ggml {type} ", 512)) for type in GGML_TYPES),
    *(
        Goal(f"{text} M={m}: time over symmetric int4", 1.1, inverse(faster(f"qkernels {weights} int8", INT4, m)), at_least=False)
        for weights, text in LIKE_INT4.items()
        for m in (1, 16, 128, 512)
    ),
)


def judge_all(record: dict, goals: tuple[Goal, ...] = GOALS) -> list[dict]:
    return [goal.judge(record) for goal in goals]
