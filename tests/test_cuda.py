"""The CUDA kernels without a GPU: a look at their machine code, and at how blocks share the tiles of a product."""

import importlib.util
import random
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import static_cuda
from qkernels.kernels import compiled as compiled_libraries
from qkernels.kernels.cuda import f16_w4_gemm, library, s8_w4_gemm, s8_w8_gemm, wgmma

CSRC = Path(__file__).parents[1] / "csrc"
OPS = ("s8_w4_wgmma", "s8_w8_wgmma", "w4_wgmma")

# -- machine code ------------------------------------------------------------------------------------------------------------------

VARIANTS = [
    *(("w4_wgmma", dtype, False, tokens) for dtype in ("bf16", "fp16") for tokens in (128, 256)),
    *(("s8_w8_wgmma", dtype, False, tokens) for dtype in ("bf16", "fp16") for tokens in (128, 256)),
    *(("s8_w4_wgmma", dtype, False, tokens) for dtype in ("bf16", "fp16") for tokens in (128, 256)),
    *(("s8_w4_wgmma", dtype, True, 128) for dtype in ("bf16", "fp16")),
]


@pytest.fixture(scope="module")
def compiled():
    """Variant -> kernel."""
    if reason := library.why_missing():
        pytest.skip(reason)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton brings the tools that read machine code")
    return {(kernel.name, kernel.dtype, kernel.by_step, kernel.tokens): kernel for kernel in static_cuda.kernels()}


def test_the_library_registers_its_operators():
    if reason := library.why_missing():
        pytest.skip(reason)
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", "CUDA")


def test_a_missing_library_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_libraries, "_PACKAGE", tmp_path)
    assert "installed without building it" in compiled_libraries.load("_CUDA", "cuda_reason")
    (tmp_path / "_build_info.json").write_text('{"reason": "no c++", "cuda_reason": "no nvcc"}')
    assert compiled_libraries.load("_CUDA", "cuda_reason") == "the compiled library is missing: no nvcc"
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"not a library")
    assert compiled_libraries.load("_CUDA", "cuda_reason").startswith("the compiled library does not load: ")


def test_no_kernel_goes_unlooked_at(compiled):
    assert set(compiled) == set(VARIANTS)


@pytest.mark.parametrize(("name", "dtype", "by_step", "tokens"), VARIANTS)
def test_machine_code(compiled, name, dtype, by_step, tokens):
    kernel = compiled[name, dtype, by_step, tokens]
    loop = kernel.loop()
    product, products = (f"HGMMA.64x{tokens}x16.F32", 8) if name == "w4_wgmma" else (f"IGMMA.64x{tokens}x32.S8.S8", 4)
    assert static_cuda.count(loop, product) == len(kernel.all_of("HGMMA", "IGMMA")) == products
    at = [i for i, instruction in enumerate(loop) if instruction.startswith(product)]
    assert not static_cuda.count(loop, "STL") and not static_cuda.count(loop[at[0] : at[-1]], "LDL"), "registers are spilled"
    from_registers = [loop[i] for i in at if loop[i].split(", ")[1].startswith("R")]
    assert len(from_registers) == (0 if name == "s8_w8_wgmma" else products), "weights come from where they should not"
    # A compiler that sees registers of a running product touched waits after every one; it says so, but only while compiling.
    waits = [f.split()[-1] for f in loop if f.startswith("WARPGROUP.DEPBAR")]
    assert waits == (["0x0"] if by_step else ["0x1"] if name == "s8_w8_wgmma" else ["0x1", "0x1"])
    roles = kernel.all_of("USETMAXREG")
    assert len(roles) == 2 and "TRY_ALLOC" in roles[0] + roles[1] and "DEALLOC" in roles[0] + roles[1]


# -- how blocks share the tiles: csrc/cuda/stream_k.h is plain C++ -----------------------------------------------------------------

PROGRAM = """
#include "cuda/stream_k.h"
#include <cstdio>
int main() {
  int n, m, steps, raster, whole, blocks;
  while (std::scanf("%d %d %d %d %d %d", &n, &m, &steps, &raster, &whole, &blocks) == 6) {
    for (int block = 0; block < blocks; ++block) {
      qk::StreamK schedule(n, m, steps, raster, whole != 0, block, blocks);
      for (qk::Work w; schedule.next(w);) {
        const int helper = w.end == steps && w.begin > 0 ? schedule.first_helper(w) : -1;
        std::printf("%d %d %d %d %d %d %d\\n", block, w.tile, w.n, w.m, w.begin, w.end, helper);
      }
    }
    std::puts("-");
  }
}
"""


@pytest.fixture(scope="module")
def schedules(tmp_path_factory):
    """A function: cases (tiles_n, tiles_m, steps, raster, whole, blocks) -> of each the works, (block, tile, n, m, begin, end, helper)."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("stream_k")
    (folder / "schedule.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, "schedule.cpp", "-o", "schedule"], cwd=folder, check=True)

    def run(cases):
        text = "".join(" ".join(map(str, map(int, case))) + "\n" for case in cases)
        done = subprocess.run([folder / "schedule"], input=text, capture_output=True, text=True, check=True, timeout=60)
        works = [[tuple(map(int, line.split())) for line in part.splitlines()] for part in done.stdout.split("-\n")[:-1]]
        assert len(works) == len(cases)
        return works

    return run


def some_cases():
    """Edges, then draws, with as many blocks as `launch` gives: at most one for every tile, or every step where tiles are cut."""
    cases = [
        (1, 1, 1),
        (1, 1, 40),
        (3, 5, 1),
        (132, 1, 7),
        (33, 4, 32),
        (133, 1, 2),
        (44, 6, 3),
        (131, 2, 40),
        (500, 1, 40),
        (1, 500, 1),
        (7, 19, 11),
    ]
    edges = [
        (*case, raster, whole, blocks) for case in cases for raster in (1, 8) for whole in (False, True) for blocks in (1, 2, 131, 132, 140)
    ]
    draw = random.Random(0)
    for _ in range(400):
        n = draw.choice((1, draw.randint(1, 40), draw.randint(1, 500)))
        m = draw.randint(1, 500 // n)
        edges.append((n, m, draw.randint(1, 40), draw.randint(1, 16), draw.random() < 0.3, draw.randint(1, 140)))
    return [(*case[:5], min(case[5], case[0] * case[1] * (1 if case[4] else case[2]))) for case in edges]


def check(case, works):
    """Every step of every tile once; and what a kernel relies on where blocks share a tile."""
    tiles_n, tiles_m, steps, _, whole, blocks = case
    parts, of_block, places = defaultdict(list), defaultdict(list), {}
    for block, tile, n, m, begin, end, helper in works:
        assert 0 <= begin < end <= steps, "an empty run"
        parts[tile].append((begin, end, block, helper))
        of_block[block].append((begin, end))
        assert places.setdefault(tile, (n, m)) == (n, m)
    assert set(parts) == set(range(tiles_n * tiles_m))
    assert set(places.values()) == {(n, m) for n in range(tiles_n) for m in range(tiles_m)}, "two tiles in one place"
    for tile_parts in parts.values():
        tile_parts.sort()
        assert [0, *(end for _, end, *_ in tile_parts)] == [*(begin for begin, *_ in tile_parts), steps], (
            "a step is left out, or done twice"
        )
        *helpers, (_, _, last, first) = tile_parts
        assert [block for _, _, block, _ in helpers] == (list(range(first, last)) if helpers else [])
        assert not (whole and helpers)
    for block in range(blocks):
        mine = of_block[block]
        left, completed = [[i for i, w in enumerate(mine) if w[side] != edge] for side, edge in ((1, steps), (0, 0))]
        assert left in ([], [0]), "there is room for the sums of one part, and others wait for it"
        assert [i for i in completed if i not in left] in ([], [len(mine) - 1]), "it waits for others before it has done its own work"
        amount = sum(end - begin for begin, end in mine)
        assert mine and (whole or abs(amount - tiles_n * tiles_m * steps / blocks) < 1), "work is not shared evenly"


def test_blocks_share_the_tiles(schedules):
    cases = some_cases()
    for case, works in zip(cases, schedules(cases)):
        try:
            check(case, works)
        except AssertionError as error:
            raise AssertionError(f"(tiles_n, tiles_m, steps, raster, whole, blocks) = {case}: {error}") from error
    assert any(work[6] >= 0 for works in schedules(cases[:100]) for work in works), "no case has a tile that is shared"


# -- tiles -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [f16_w4_gemm.TILES, s8_w8_gemm.TILES, s8_w4_gemm.TILES, s8_w4_gemm.TILES_OF_GROUPS])
def test_the_plan_is_the_cheapest(tiles):
    """One wave that is nearly full stays whole, one and a half are cut, and few rows take the narrow tile."""
    assert wgmma.plan(tiles, 4096, 65, 32, 132) == (128, False)
    assert wgmma.plan(tiles[-1:], 4096, 4 * tiles[-1].tokens, 32, 132).whole
    assert not wgmma.plan(tiles[-1:], 6144, 4 * tiles[-1].tokens, 32, 132).whole
    assert wgmma.plan(tiles, 28672, 8192, 32, 132).tokens == tiles[-1].tokens


@pytest.mark.parametrize("whole", [False, True])
def test_a_launch_passes_what_the_op_takes(monkeypatch, whole):
    """Room for the parts only where there are some, for a tile of every block."""
    found, flags = [], torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(wgmma, "counters_of", lambda device, stream: flags)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    x, out = torch.zeros(3, 128), torch.zeros(3, 16)
    wgmma.launch(lambda *given: found.extend(given), wgmma.Plan(256, whole), (x, None), out, 8, 9)
    assert found[0] is x and found[2] is out and found[4] is flags
    assert found[3] is None if whole else found[3].shape == (132 * 128 * 256,)
    assert found[5:] == [8, 9, 256, 132, 4, whole, True, 7]
