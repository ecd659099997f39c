"""The CUDA kernels without a GPU: a look at their machine code, and at how blocks share the tiles of a product."""

import dataclasses
import importlib.util
import itertools
import random
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import setuptools
import torch

from benchmarks.gpu import static_cuda
from qkernels import formats
from qkernels.kernels import compiled as compiled_libraries
from qkernels.kernels import registry
from qkernels.kernels.cuda import f16_w4_gemm, library, s8_mma, s8_w4_gemm, s8_w8_gemm, wgmma
from qkernels.kernels.device import Device
from qkernels.kernels.registry import Problem

CSRC = Path(__file__).parents[1] / "csrc"
OPS = (
    "s8_quantize", "s8_w4_gemv", "s8_w4_mma", "s8_w4_wgmma", "s8_w8_gemv", "s8_w8_mma", "s8_w8_wgmma",
    "w4_gemv", "w4_mma", "w4_swiglu", "w4_wgmma",
)  # fmt: skip

# -- machine code ------------------------------------------------------------------------------------------------------------------

VARIANTS = [
    *(("w4_wgmma", ("W4", dtype, tokens)) for dtype in ("bf16", "f16") for tokens in ("128", "256")),
    *(("s8_wgmma", ("W8", wide, tokens)) for wide in "01" for tokens in ("128", "256")),
    *(("s8_wgmma", ("W4", wide, tokens, "0")) for wide in "01" for tokens in ("128", "256")),
    *(("s8_wgmma", ("W4", wide, "128", "1")) for wide in "01"),
]


@pytest.fixture(scope="module")
def compiled():
    """(source, template arguments) -> architecture -> kernel."""
    if reason := library.why_missing():
        pytest.skip(reason)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton brings the tools that read machine code")
    found = defaultdict(dict)
    for kernel in static_cuda.kernels():
        found[kernel.source, kernel.arguments][kernel.architecture] = kernel
    return found


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


def test_every_kernel_is_there_for_every_gpu(compiled):
    """And nothing of the library goes unlooked at: what is not for Hopper alone is looked at below."""
    of_hopper = [variant for variant in compiled if variant[0].endswith("_wgmma")]
    assert sorted(of_hopper) == sorted(VARIANTS)
    for (source, _), kernels in compiled.items():
        assert set(kernels) == {one.removesuffix("+PTX") for one in library.architectures(source)}, source


def test_copies_have_an_address(compiled):
    """A copy whose address is in uniform registers: those that ptxas 13.0 then names are not the ones it wrote."""
    for (source, arguments), kernels in compiled.items():
        for kernel in kernels.values():
            assert not [one for one in kernel.all_of("LDGSTS") if "+UR" in one], (source, arguments, kernel.architecture)


@pytest.mark.parametrize(("source", "arguments"), VARIANTS)
def test_machine_code_for_hopper(compiled, source, arguments):
    kernel, tokens, by_step = compiled[source, arguments]["9.0a"], arguments[2], arguments[3:] == ("1",)
    loop = kernel.loop()
    product, products = (f"HGMMA.64x{tokens}x16.F32", 8) if source == "w4_wgmma" else (f"IGMMA.64x{tokens}x32.S8.S8", 4)
    assert static_cuda.count(loop, product) == len(kernel.all_of("HGMMA", "IGMMA")) == products
    at = [i for i, instruction in enumerate(loop) if instruction.startswith(product)]
    assert not static_cuda.count(loop, "STL") and not static_cuda.count(loop[at[0] : at[-1]], "LDL"), "registers are spilled"
    from_registers = [loop[i] for i in at if loop[i].split(", ")[1].startswith("R")]
    assert len(from_registers) == (0 if arguments[0] == "W8" else products), "weights come from where they should not"
    # A compiler that sees registers of a running product touched waits after every one; it says so, but only while compiling.
    waits = [f.split()[-1] for f in loop if f.startswith("WARPGROUP.DEPBAR")]
    assert waits == (["0x0"] if by_step else ["0x1"] if arguments[0] == "W8" else ["0x1", "0x1"])
    roles = kernel.all_of("USETMAXREG")
    assert len(roles) == 2 and "TRY_ALLOC" in roles[0] + roles[1] and "DEALLOC" in roles[0] + roles[1]


OF_K = {"w4_mma": "HMMA.16816.F32", "s8_mma": "IMMA.16832.S8.S8", "s8_gemv": "IDP.4A.S8.S8"}


def test_machine_code_for_all_gpus(compiled):
    """The products that a kernel is written for, if it has any, and no others; and no register of its loop is spilled."""
    seen = 0
    for (source, arguments), kernels in compiled.items():
        if source.endswith("_wgmma") or source == "w4_gemv":
            continue
        for architecture, kernel in kernels.items():
            where, loop, products = (source, arguments, architecture), kernel.loop(), kernel.all_of(*static_cuda.PRODUCTS)
            assert bool(loop) == (source in OF_K) and all(i.startswith(OF_K[source]) for i in products), where
            assert not static_cuda.count(loop or [i for _, i in kernel.code], "LDL", "STL"), f"{where}: registers are spilled"
            seen += 1
    assert seen


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_machine_code_of_w4_mma(compiled, tokens):
    """A turn of the loop is a step: its products, tokens that are copied past registers, weights that are loaded as 16 bytes."""
    for dtype, architecture in itertools.product(("bf16", "f16"), ("8.0", "9.0", "12.0")):
        loop = compiled["w4_mma", (dtype, "Int4", str(tokens))][architecture].loop()
        blocks = 2 if tokens >= 64 else 1
        assert static_cuda.count(loop, "HMMA") == 8 * blocks * tokens // 8
        assert static_cuda.count(loop, "LDSM.16.M88.4") == 8 * tokens // 16
        assert static_cuda.count(loop, "LDGSTS.E.BYPASS") == 2 * max(1, tokens * 8 // (256 // blocks))
        assert sum(".128" in i for i in loop if i.startswith("LDG.")) == 2 * blocks


S8_WEIGHTS = [("W8",), ("W4", "4", "0"), ("W4", "4", "1"), ("W4", "2", "1"), ("W4", "1", "1")]
S8_VARIANTS = [
    (*weights, "Tile", *tile.split())
    for weights in S8_WEIGHTS
    for tile in ("64 16 4 1", "64 32 4 1", "64 64 2 2", "128 64 4 2" if weights[2:] == ("1",) else "128 128 4 2")
]


def test_every_kernel_of_s8_mma_is_looked_at(compiled):
    assert sorted(arguments for source, arguments in compiled if source == "s8_mma") == sorted(S8_VARIANTS)


@pytest.mark.parametrize("arguments", S8_VARIANTS)
def test_machine_code_of_s8_mma(compiled, arguments):
    """For every GPU: products of 16 x 8 x 32, as many as a warp has in a step, and copies past registers."""
    rows, tokens, *warps = map(int, arguments[-4:])
    count = warps[0] * warps[1]
    products = rows * tokens * 128 // (16 * 8 * 32) // count
    copies = (rows * (128 if arguments[0] == "W8" else 64) + tokens * 128) // 16 // (32 * count)
    for architecture, kernel in compiled["s8_mma", arguments].items():
        loop = kernel.loop()
        assert static_cuda.count(loop, "IMMA.16832.S8.S8") == products, architecture
        assert static_cuda.count(loop, "LDGSTS") == copies, architecture


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("weights", S8_WEIGHTS, ids="-".join)
def test_machine_code_of_s8_gemv(compiled, weights, tokens):
    """For every GPU: dp4a for all that a lane has of a tile; 16 bytes of four rows are on their way before the first of them, and
    before the loop those of the first tile. For Blackwell nvcc moves them behind the products here and there: only other warps hide it."""
    kernels = compiled["s8_gemv", (*weights, str(tokens))]
    assert kernels
    chunks = (1 if weights[0] == "W8" else 2) * 4 * tokens  # of four codes, for a row
    for architecture, kernel in kernels.items():
        loop, code = kernel.loop(), [instruction for _, instruction in kernel.code]
        of_x = chunks if weights[2:] == ("1",) else 0  # sums of x, for zero points
        assert static_cuda.count(loop, "IDP.4A.S8.S8") == len(kernel.all_of("IDP")) == 4 * chunks + of_x, architecture
        first = next(i for i, instruction in enumerate(loop) if instruction.startswith("IDP"))
        ahead, before = (
            [i for i in part if i.startswith("LDG.E") and ".128.CONSTANT" in i]  # Turing loads x likewise, but not as a constant
            for part in (loop if float(architecture) >= 10 else loop[:first], code[: len(code) - code[::-1].index(loop[-1])])
        )
        assert len(ahead) == 4 and len(before) == 8, architecture


def test_every_kernel_of_s8_gemv_is_looked_at(compiled):
    found = sorted(arguments for source, arguments in compiled if source == "s8_gemv")
    assert found == sorted((*weights, tokens) for weights in S8_WEIGHTS for tokens in "18")


GEMV = [
    *(("Int4", parts, zeros) for parts in "148" for zeros in "01"),
    *(("Int8", parts, zeros) for parts in "14" for zeros in "01"),
    *(("Table", mirrored, parts, "0") for mirrored in "01" for parts in "148"),
]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("arguments", GEMV, ids="-".join)
def test_machine_code_of_few_rows(compiled, dtype, arguments):
    """Loads of two or three tiles are on their way before the first product, and all of the loop's weights while another is multiplied."""
    kernels = compiled["w4_gemv", (dtype, *arguments)]
    assert kernels
    float_zero, tiles = arguments[-1] == "1", 3 if arguments[0] != "Table" and arguments[1:] == ("1", "0") else 2
    bits, products = (8, 8 * tiles) if arguments[0] == "Int8" else (4, 16 * tiles)
    weights = 8 * products
    budget = 4.3 if arguments[:2] == ("Table", "0") else 0.9 * bits  # instructions a weight: what there is time for; a codebook wants more
    for architecture, kernel in kernels.items():
        if (architecture, dtype) == ("7.5", "bf16"):
            continue  # Turing has no such products
        loop, code = kernel.loop(), [instruction for _, instruction in kernel.code]
        count = products * (3 if float_zero else 2) // 2 * (2 if architecture == "7.5" else 1)
        assert static_cuda.count(loop, "HMMA.16816.F32", "HMMA.1688.F32") == len(kernel.all_of("HMMA")) == count
        assert not static_cuda.count(loop, "STL", "LDL"), "registers are spilled"
        first = next(i for i, instruction in enumerate(code) if instruction.startswith("HMMA"))
        before, inside = ({i.split()[1] for i in part if i.startswith("LDG.E") and ".128" in i} for part in (code[:first], loop))
        assert len(inside) == 4 * tiles and inside <= before, "16 bytes of four rows, of every tile"
        print(f"{architecture}, {dtype}, {', '.join(arguments)}: {len(loop) / weights:.2f} instructions a weight")
        assert len(loop) / weights <= budget


# -- which GPUs: setup.py and library.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    """setup.py, without its call of setuptools."""
    spec = importlib.util.spec_from_file_location("setup_of_qkernels", CSRC.parent / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(module)
    return module


KNOWN = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n"


@pytest.mark.parametrize(
    ("asked", "known", "found"),
    [
        (None, KNOWN, ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]),
        ("", KNOWN.replace("sm_100\nsm_120\n", ""), ["7.5", "8.0", "9.0+PTX"]),
        ("12.0+PTX;8.6", KNOWN, ["8.6", "12.0+PTX"]),
        (" 9.0a 8.0 ", KNOWN, ["8.0", "9.0"]),
    ],
)
def test_architectures(setup, monkeypatch, asked, known, found):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup.architectures(known) == found


@pytest.mark.parametrize("asked", ["Hopper", "90", "8.0,9.0", "5.0", "9.0+ptx"])
def test_architectures_that_nobody_can_read(setup, monkeypatch, asked):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST has "):
        setup.architectures(KNOWN)


def test_architectures_of_a_source(setup):
    wanted = ["7.5", "8.0", "12.0+PTX"]
    assert setup.for_source("w4_wgmma", wanted) == ["9.0a"]
    assert setup.for_source("w4_gemv", wanted) == setup.for_source("s8_gemv", wanted) == wanted
    assert setup.for_source("w4_mma", wanted) == wanted[1:]
    assert setup.for_source("w4_mma", ["7.5"]) == []
    assert setup.gencodes(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("built", "sm", "reason"),
    [
        (["8.0", "9.0"], 80, None),
        (["8.0", "9.0"], 89, None),
        (["8.6"], 80, "is compiled for 8.6 (TORCH_CUDA_ARCH_LIST), not sm80"),
        (["8.0", "9.0"], 120, "is compiled for 8.0, 9.0 (TORCH_CUDA_ARCH_LIST), not sm120"),
        (["8.0+PTX"], 120, None),
        (["12.0+PTX"], 90, "is compiled for 12.0+PTX (TORCH_CUDA_ARCH_LIST), not sm90"),
        (None, 90, None),
        (["8.0"], 75, "needs sm80, not sm75"),
        ([], 80, "is compiled for no GPU that it could run on (TORCH_CUDA_ARCH_LIST), not sm80"),
    ],
)
def test_a_gpu_that_was_not_compiled_for_has_a_reason(monkeypatch, built, sm, reason):
    monkeypatch.setattr(library, "architectures", lambda source: built)
    assert library.why_not(Problem(formats.get("int4"), 64, 64, device=Device("cuda", sm=sm)), "w4_mma", 80) == reason


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


AMPERE = s8_mma.Gpu(108, 164 << 10, early=False)


@pytest.mark.parametrize("tiles", [s8_mma.TILES, s8_mma.TILES_OF_GROUPS])
def test_a_plan_for_int8(tiles):
    """Few tokens take the narrowest tile that holds them, many the largest where it keeps the GPU busy; a wave that is not full is cut."""
    for m, t in ((1, tiles[0]), (16, tiles[0]), (17, tiles[1]), (64, tiles[2]), (65, tiles[2]), (8192, tiles[3])):
        assert s8_mma.plan(tiles, 4096, m, 32, 64, AMPERE).tile == t
    few = s8_mma.plan(tiles, 4096, 1, 32, 64, AMPERE)
    assert not few.whole and few.blocks == 108 * 4 < s8_mma.count(few.tile, 4096, 1) * 32 // s8_mma.SHORTEST
    assert s8_mma.plan(tiles, 64, 1, 32, 64, AMPERE).blocks == 32 // s8_mma.SHORTEST
    assert s8_mma.plan(tiles, 64 * 108 * 4, 1, 32, 64, AMPERE).whole
    assert not s8_mma.plan(tiles, 64 * 108 * 6, 1, 32, 64, AMPERE).whole


@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
def test_blocks_of_a_processor_fit_into_its_memory(row_bytes, shared):
    for m in (1, 17, 33, 4096):
        p = s8_mma.plan(s8_mma.TILES, 28672, m, 32, row_bytes, s8_mma.Gpu(100, shared, early=True))
        assert p.blocks // 100 * s8_mma.shared_bytes(p.tile, row_bytes) <= shared


@pytest.mark.parametrize(("name", "kernel"), [("int8", "cuda_s8_w8_mma"), ("int4", "cuda_s8_w4_mma"), ("int4_g32", "cuda_s8_w4_mma")])
def test_int8_without_triton(name, kernel):
    """There it is chosen; where Triton is, it has to be asked for."""
    for sm in (80, 86, 89, 90, 120):
        there, missing = (
            Problem(formats.get(name), 4100, 4100, device=Device("cuda", sm=sm, triton=t), compute="int8") for t in (True, False)
        )
        assert registry.plan(missing).kernel.name == kernel
        assert registry.plan(there).kernel.backend == "triton" and registry.plan(there, kernel).kernel.name == kernel
    turing = Problem(formats.get(name), 4100, 4100, dtype=torch.float16, device=Device("cuda", sm=75), compute="int8")
    assert registry.plan(turing).kernel.name == kernel  # by dp4a
    assert registry.plan(dataclasses.replace(turing, compute="auto")).kernel.name != kernel
    old = dataclasses.replace(turing, device=Device("cuda", sm=70))
    assert registry.plan(old).rejected[kernel] == "needs sm75, not sm70"
