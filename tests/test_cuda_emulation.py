"""The Hopper kernels on a processor that tests/cuda_emulation makes of the host: against fp64, and the faults that this sees."""

import itertools

import pytest
import torch
from cases import random_quant
from emulated_cuda import ROOT, Case, build, check, compile_begin, why_not

from qkernels import formats

reason = why_not()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.usefixtures("one_thread")]
SOURCES = {"w4": "w4_wgmma", "s8_w8": "s8_wgmma", "s8_w4": "s8_wgmma"}
FORMATS = {
    "w4": [
        "u4b8_g128_sf16", "u4b8_g32_sf16", "u4b8_g64_sbf16", "u4b8_g256_sf16", "u4b8_g-1_sbf16",
        "u4_g128_zi_sf16", "u4_g32_zi_sbf16", "u4_g64_zi_sf16", "u4_g256_zi_sbf16", "u4_g-1_zi_sf16",
    ],
    "s8_w8": ["u8b128_g-1_sf32", "u8b128_g-1_sf16", "u8_g-1_zi_sbf16", "u8_g-1_zi_sf32"],
    "s8_w4": [
        "u4b8_g-1_sf32", "u4_g-1_zi_sf16", "u4b8_g128_sf16", "u4_g128_zi_sbf16", "u4b8_g256_sf32", "u4_g256_zi_sf32",
    ],
}  # fmt: skip
FORMATS_WITH_ZEROS = {"w4": "u4_g64_zi_sf16", "s8_w8": "u8_g-1_zi_sbf16", "s8_w4": "u4_g-1_zi_sf16"}
SHAPES = [(16, 1, 128), (144, 131, 264), (272, 260, 136), (48, 37, 512), (256, 129, 392), (272, 5, 256)]
BIASES = (None, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    compile_begin(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(folder):
    return {source: build(source, folder) for source in set(SOURCES.values())}


def problem(name, n, m, k, dtype, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, x = random_quant(formats.get(name), n, k, seed), torch.randn(m, k, generator=g).to(dtype)
    return q, x, None if bias is None else torch.randn(n, generator=g).to(bias)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in FORMATS for name in FORMATS[kind]])
def test_against_fp64(compiled, kind, name):
    by_step = kind == "s8_w4" and "g-1" not in name
    ways = itertools.product((torch.bfloat16, torch.float16), (128,) if by_step else (128, 256), (True, False))
    for i, (dtype, tokens, whole) in enumerate(ways):
        if kind == "w4" and dtype == torch.float16 and name.endswith("bf16"):
            continue  # left to the Triton kernel
        for j in range(2):
            turn = 2 * i + j + len(name)
            n, m, k = SHAPES[turn % len(SHAPES)]
            q, x, bias = problem(name, n, m, k, dtype, BIASES[turn % 4], seed=turn)
            case = Case(n, m, k, tokens, whole, blocks=1 + turn % 7, raster=1 + turn % 3)
            check(compiled[SOURCES[kind]], kind, q, x, bias, case, seeds=(turn, turn + 1))


def cut(kind):
    """A product whose tiles end beside the matrix; some are cut in three, and every block has more steps than stages."""
    case = Case(144, 150, 2056, 128, False, blocks=7)
    q, x, bias = problem(FORMATS_WITH_ZEROS[kind], case.n, case.m, case.k, torch.float16, torch.float16)
    return kind, q, x, bias, case


@pytest.mark.parametrize("kind", SOURCES)
def test_any_order_of_threads_gives_the_same_bits(compiled, kind):
    check(compiled[SOURCES[kind]], *cut(kind), seeds=range(8))


def test_all_of_ptx_is_in_one_file():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        assert path.name == "hopper.cuh" or "asm" not in path.read_text(), path.name


# -- the emulation sees faults -------------------------------------------------------------------------------------------------------

# Of a kernel that is broken one variant is enough, and compiled sooner.
FEWER = {
    "w4": [
        ("w4_wgmma.cu", "x.scalar_type() == ScalarType::BFloat16 ? launch_for<bf16> : launch_for<f16>", "launch_for<f16>"),
        ("w4_wgmma.cu", "  launch<W4<T, 256>>(a, {boxes(x, 256), {}}, out, parts, flags, how);\n", ""),
    ],
    "s8": [
        ("s8_wgmma.cu", "ScalarType::BFloat16 ? launch_w8<true> :", "ScalarType::Half ? launch_w8<false> :"),
        ("s8_wgmma.cu", "ScalarType::BFloat16 ? launch_w4<true> :", "ScalarType::Half ? launch_w4<false> :"),
        ("s8_wgmma.cu", "  launch<W8<WIDE, 256>>(a, {boxes(x, 256), boxes(weight, 128)}, out, parts, flags, how);\n", ""),
        ("s8_wgmma.cu", "  launch<W4<WIDE, 256, false>>(a, maps, out, parts, flags, how);\n", ""),
    ],
}
SHARED, TILE, W4, S8 = "persistent.cuh", "tile.cuh", "w4_wgmma.cu", "s8_wgmma.cu"
TOKENS_OF_A_STAGE = "P::copy_tokens(maps, work.m * P::TOKENS, step, stage,"
WAITING = "product_commit();\n    product_wait<1>();\n    released();"
FAULTS = {
    "fragments in another order": ("w4", W4, "left[i / 2][i % 2 * 2 + h] =", "left[i / 2][h * 2 + i % 2] ="),
    "registers written that products still read": ("w4", W4, "WORDS = 2;", "WORDS = 4;"),
    "products not waited for": ("w4", W4, "product_wait<1>();", ""),
    "sums read before the last product": ("w4", SHARED, "product_wait<0>();\n    release", "release"),
    "a full stage not waited for": ("w4", SHARED, "barrier_wait(full + 8 * ring.stage, ring.parity);", ""),
    "an empty stage not waited for": ("w4", SHARED, "barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);", ""),
    "the stage after released": ("w4", SHARED, "barrier_wait(full", "held = ring.stage, barrier_wait(full"),
    "a stage released while products read it": ("s8_w8", S8, WAITING, "product_commit(), released(), product_wait<1>();"),
    "the wrong stage": ("w4", SHARED, TOKENS_OF_A_STAGE, TOKENS_OF_A_STAGE.replace("stage,", "base,")),
    "bytes that nobody expects": ("w4", W4, "numbers * (a.zeros ? 3 : 2));", "numbers * 2);"),
    "barriers used before they are made": ("w4", SHARED, "__syncthreads();", ""),
    "the kernel before not waited for": ("w4", SHARED, "wait_for_previous();\n  Ring", "Ring"),
    "rows beyond the last": ("w4", SHARED, "m < a.m && n < a.n", "n < a.n"),
    "columns beyond the last": ("w4", SHARED, "m < a.m && n < a.n", "m < a.m"),
    "results turned while others still read": ("w4", SHARED, "store_turned(to, pairs);\n    __syncwarp();", "store_turned(to, pairs);"),
    "parts of another block": ("w4", TILE, "helper * part", "(helper + 1) * part"),
    "a part left out": ("w4", TILE, "schedule.first_helper(work), last", "schedule.block() - 1, last"),
    "parts not waited for": ("w4", TILE, "wait_for_flag(flags + helper);", ""),
    "parts not yet seen by others": ("w4", TILE, "__threadfence();\n    sync_warps", "sync_warps"),
    "a flag before all have left their sums": ("w4", TILE, "sync_warps(1, threads);\n    if", "if"),
    "flags left raised": ("w4", TILE, "flags[helper] = 0;", ""),
    "zero points left out": ("s8_w8", S8, "sum -= zero[h] * token.sum;", ";"),
    "a subtraction that borrows": ("s8_w4", S8, "lower_halves(word, HIGHEST)", "lower_halves(word, 0)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(folder, fault):
    kind, *change = FAULTS[fault]
    broken = build(SOURCES[kind], folder, [*FEWER[kind[:2]], change])
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, *cut(kind), seeds=range(30))
