"""The search for tiles, with a fake GPU and a kernel that is plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from qkernels import formats, reference
from qkernels.kernels.triton import f16_gemm, int8, launch, s8_gemm, s8_w4_gemm, tables

from .__main__ import app
from .base import CheckFailed
from .gpu import compilers, tune
from .test_gpu_harness import FakeGpu


class Tile(NamedTuple):
    block_n: int = 64
    block_m: int = 16
    num_warps: int = 4
    split_k: int = 1
    early: bool = False


OPTIONS = {"block_n": (64, 128), "block_m": (16, 32), "num_warps": (4, 8), "split_k": (1, 2, 4), "early": (False, True)}
BEST = Tile(block_n=128, num_warps=8, split_k=2)


class Timed(FakeGpu):
    """A call takes as many µs as its tile has fields that are not the best's, and one."""

    def times_us(self, calls):
        for call in calls:
            call()
        return [float(RAN[-1])] * len(calls)

    def capture(self, calls):
        made = super().capture(calls)
        return type(made)(calls[-1], made.output)


RAN: list[float] = []


def run(x, packed, out, tile):
    if tile.block_m == 32:
        raise RuntimeError("out of resources: shared memory")
    torch.mm(x.float(), packed.float().t(), out=out) if out.dtype == torch.float32 else out.copy_(x.float() @ packed.float().t())
    RAN.append((1 + sum(a != b for a, b in zip(tile, BEST))) * 40)


def what(run=run):
    kernel = f16_gemm.KERNEL.__class__(**{**f16_gemm.KERNEL.__dict__, "prepare": reference.decode})
    return tune.Tunable(kernel, OPTIONS, lambda *_: Tile(), run)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.timing.LEAST_ROTATION_BYTES", 1000)
    monkeypatch.setattr(launch, "gpu_of", lambda device: launch.Gpu(132, 227 << 10, early=True, name="Fake"))
    RAN.clear()
    return Timed()


def test_search_follows_what_helps():
    asked = []

    def time_us(tile):
        asked.append(tile)
        return 1.0 + sum(a != b for a, b in zip(tile, BEST))

    assert tune.search(Tile(), OPTIONS, time_us) == BEST
    assert len(asked) == len(set(asked)) < 30
    assert tune.search(BEST, OPTIONS, time_us) == BEST
    assert tune.search(Tile(), OPTIONS, lambda tile: 10.0 - 0.1 * (tile == BEST)) == Tile(), "what gains one per cent is noise"
    assert tune.search(Tile(), OPTIONS, lambda tile: 1.0 if tile == Tile() else math.inf) == Tile()


def test_what_may_come_next_is_told_beforehand():
    told, asked = [], []

    def time_us(tile):
        assert tile == Tile() or any(tile in tiles for tiles in told)
        asked.append(tile)
        return 1.0 + sum(a != b for a, b in zip(tile, BEST))

    assert tune.search(Tile(), OPTIONS, time_us, told.append) == BEST
    assert len(told) == 4, "at the start, and after each of three gains"
    assert not any(tile in tiles for i, tiles in enumerate(told[1:]) for tile in asked[:i]), "what was timed is not told again"


def test_tiles_are_compiled_by_others(gpu, monkeypatch):
    seen = []

    class Pool:
        def map(self, call, cases, tiles):
            assert call is compilers.compile_one
            seen.extend(zip(cases, tiles))
            if len(seen) > 10:
                raise compilers.BrokenProcessPool
            return []

        def shutdown(self, cancel_futures):
            seen.append("closed")

    trial = tune.Trial(gpu, what(), formats.get("int4"), 64, 1024, 30, torch.bfloat16, compilers.Compilers(lambda count: Pool(), cpus=16))
    assert trial.row()["tile"] == BEST._asdict()
    assert {case for case, _ in seen} == {compilers.Case("triton_f16_wN_gemm", "u4b8_g128_sf16", 64, 1024, 30, torch.bfloat16)}
    assert all(tile.block_m < 60 and tile.split_k <= 4 for _, tile in seen), "those that fit alone"
    assert compilers.Compilers(cpus=1)._pool is None and compilers.Compilers(cpus=2)._pool is None
    one = compilers.Compilers(lambda count: Pool(), cpus=3)
    one.close()
    assert seen[-1] == "closed"
    assert "CUDA" in compilers.compile_one(seen[0][0], f16_gemm.Tile(64, 16, 4)) or torch.cuda.is_available()


def test_a_trial_finds_the_best(gpu):
    trial = tune.Trial(gpu, what(), formats.get("int4"), 64, 1024, 30, torch.bfloat16)
    row = trial.row()
    assert row["tile"] == BEST._asdict() and row["us"] < row["chosen_us"]
    assert {row[key] for key in ("kernel", "format", "n", "k", "m")} == {"triton_f16_wN_gemm", "u4b8_g128_sf16", 64, 1024, 30}
    assert trial.time_us(Tile(block_m=32)) == math.inf, "does not fit the GPU"
    assert trial.time_us(Tile(split_k=16)) == math.inf, "does not fit the problem"


def test_what_computes_something_else_is_no_candidate(gpu):
    def wrong(x, packed, out, tile):
        run(x, packed, out, tile)
        if tile.split_k == 2:
            out[-1, -1] = float("nan")

    trial = tune.Trial(gpu, what(wrong), formats.get("int4"), 64, 1024, 3, torch.bfloat16)
    with pytest.raises(CheckFailed, match="computes something else than "):
        trial.time_us(Tile(split_k=2))
    [(said, row)] = tune.tune(gpu, what(wrong), "int4", [(64, 1024, 3)], torch.bfloat16, 1)
    assert row is None and "not tuned: " in said and "computes something else" in said

    def all_wrong(x, packed, out, tile):
        out.fill_(7.0)

    [(said, row)] = tune.tune(gpu, what(all_wrong), "int4", [(64, 1024, 3)], torch.bfloat16, 1)
    assert row is None and "beyond the bound" in said


def test_cases_end_with_the_time_and_with_the_gpu(gpu):
    cases = [(64, 1024, 1), (64, 1024, 2)]
    assert ["minutes are over" in said for said, _ in tune.tune(gpu, what(), "int4", cases, torch.bfloat16, -1)] == [True, True]

    def breaks(x, packed, out, tile):
        run(x, packed, out, tile)
        if tile.early:
            gpu.broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = list(tune.tune(gpu, what(breaks), "int4", cases, torch.bfloat16, 1))
    assert len(found) == 1 and "illegal memory access" in found[0][0]


def test_rows_reach_the_kernels(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("QKERNELS_TABLES", str(tmp_path))
    monkeypatch.setattr(tables, "triton_version", lambda: (3, 6))
    path = tune.table_path(gpu, None)
    assert path.name == "nvidia-fake-80gb-triton3.6.json"
    here = launch.Gpu(132, 227 << 10, early=True, name=gpu.properties()["name"])
    for kernel, options, choose, format in (
        (f16_gemm.KERNEL, f16_gemm.OPTIONS, lambda m: f16_gemm.choose_for(formats.get("int4"), 512, 1024, m, here), "u4b8_g128_sf16"),
        (s8_w4_gemm.KERNEL, int8.OPTIONS, lambda m: s8_w4_gemm.choose_for(formats.get("int4"), 512, 1024, m, here), "u4b8_g128_sf16"),
        (s8_gemm.KERNEL, int8.OPTIONS, lambda m: s8_gemm.choose_for(512, 1024, m, here), ""),
    ):
        before = choose(40)
        tile = before._replace(num_stages=5, raster=16)
        row = {"kernel": kernel.name, "format": format, "n": 512, "k": 1024, "m": 64, "tile": tile._asdict(), "us": 1.0, "chosen_us": 2.0}
        tune.keep(path, row, gpu)
        assert before != tile == choose(40) == choose(64) and choose(32) != tile != choose(65)
        assert set(options) == set(tile._fields)


def test_cases():
    cases, what, dtype = tune.cases("8b", ["1", "16"], "int4", "float", "bfloat16")
    assert len(cases) == 8 and what.kernel is f16_gemm.KERNEL and dtype == torch.bfloat16
    assert tune.cases("64x128", ["1"], "int4", "int8", "float16")[1].kernel is s8_w4_gemm.KERNEL
    assert tune.cases("64x128", ["1"], "int8", "int8", "float16")[1].kernel is s8_gemm.KERNEL
    for arguments, text in (
        (("8b", ["1"], "int4", "auto", "bfloat16"), "compute='auto' takes int4: float and int8 are known"),
        (("8b", ["1"], "int4_g12", "float", "bfloat16"), "groups of 12"),
        (("8b", ["0"], "int4", "float", "bfloat16"), "at least 1, not 0"),
        (("8b", ["1"], "int4", "float", "float32"), "unknown dtype 'float32'"),
        (("zzz", ["1"], "int4", "float", "float16"), "zzz"),
    ):
        with pytest.raises(ValueError, match=text):
            tune.cases(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_command_without_a_gpu():
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 1 and "no CUDA device" in done.output
    assert "at least 1, not 0" in CliRunner().invoke(app, ["tune", "--m", "0"]).output
