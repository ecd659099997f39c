"""csrc/cuda/w4_mma.cu on a processor that tests/cuda_emulation makes of the host: against fp64, and the faults that this sees."""

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import random_quant
from emulated_cuda import build, compile_begin, late, why_not

from qkernels import UnsupportedError, explain, formats, reference
from qkernels.kernels.cuda import f16_w4_mma, library, w4_gemv
from qkernels.kernels.cuda.f16_w4_mma import numbers
from qkernels.kernels.device import Device
from qkernels.kernels.triton import launch, layout
from qkernels.testing import assert_matmul_close

reason = why_not()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.usefixtures("one_thread")]
ROWS = 128
FORMATS = [
    "u4b8_g128_sf16", "u4b8_g32_sf16", "u4b8_g64_sbf16", "u4b8_g16_sf32", "u4b8_g256_sf16", "u4b8_g-1_sf32",
    "u4_g128_zi_sf16", "u4_g32_zi_sbf16", "u4_g-1_zi_sf16", "u4_g64_zf_sf16", "u4_g128_zf_sbf16", "nf4", "fp4", "mxfp4", "nvfp4",
    "int8", "int8_g32", "u8_g16_zi_sf16", "u8_g64_zf_sf16", "u8_g-1_zi_sf32", "u4_g32x4_zi_sf16", "u8b128_g128x128_sf32", "nf4_g-1x-1_sf32",
]  # fmt: skip
SHAPES = [(16, 264), (144, 136), (129, 520), (200, 1032), (7, 392), (257, 128)]
COUNTS = (1, 8, 16, 17, 64, 129)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated_mma")
    compile_begin(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(folder):
    return build("w4_mma", folder)


def problem(name, n, m, k, dtype, bias=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, x = random_quant(formats.get(name), n, k, seed), torch.randn(m, k, generator=g).to(dtype)
    return q, x, None if bias is None else torch.randn(n, generator=g).to(bias)


def call(emulated, q, x, bias, tokens, blocks, whole=False, alike=False, raster=2):
    """Launch between canaries, and return what it gives; parts are garbage, flags have to be 0 again."""
    (m, k), n = x.shape, q.shape[0]
    grids = -(-m // tokens) if alike else 1
    around = torch.full((3, m, n), torch.nan, dtype=x.dtype)
    parts = None if whole else torch.full((grids * blocks * ROWS * tokens,), torch.nan)
    flags = torch.zeros(grids * blocks, dtype=torch.int32)
    packed = layout.prepare(q)
    written = F.pad(x, (0, 8), value=torch.nan)
    operands = (late(emulated, written)[:, :k], packed.weight, packed.scales, packed.zeros, packed.tensor_scale)
    table = torch.tensor(q.format.code.values, dtype=torch.float32) if layout.is_table(q.format.code) else None
    emulated.ops.w4_mma(
        *operands, table, bias, around[1], parts, flags, *numbers(q.format, n, k), tokens, blocks, raster, whole, alike, True, 0
    )
    assert not flags.any(), "flags are left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def check(emulated, q, x, bias, seeds, **how):
    """Against fp64, and the same bits with every seed."""
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        y = call(emulated, q, x, bias, **how)
        if first is None:
            assert_matmul_close(y, x, reference.decode(q, torch.float64), bias)
            first = y
        assert torch.equal(y, first), f"other bits with seed {seed}"


def tiles(q):
    return (16, 32, 64, 128) if q.format.bits == 4 and not layout.is_table(q.format.code) else (16, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_against_fp64(compiled, name):
    for i, dtype in itertools.product(range(3), (torch.bfloat16, torch.float16)):
        turn = FORMATS.index(name) + 7 * i + 3 * (dtype == torch.float16)
        (n, k), m = SHAPES[turn % len(SHAPES)], COUNTS[(turn + i) % len(COUNTS)]
        q, x, bias = problem(name, n, m, k, dtype, (None, torch.float32, dtype)[turn % 3], seed=turn)
        tokens, ways = tiles(q)[turn % len(tiles(q))], {"whole": turn % 5 == 0, "alike": turn % 3 == 0}
        check(compiled, q, x, bias, (turn, turn + 1), tokens=tokens, blocks=1 + turn % 7, raster=1 + turn % 3, **ways)


@pytest.mark.parametrize(("name", "tokens"), [("u4_g32_zi_sf16", 16), ("u4_g64_zf_sbf16", 64), ("nvfp4", 64), ("u8_g16_zi_sf16", 16)])
def test_any_order_of_threads_gives_the_same_bits(compiled, name, tokens):
    q, x, bias = problem(name, 144, 20, 776, torch.float16, torch.float32)
    check(compiled, q, x, bias, range(6), tokens=tokens, blocks=7)


@pytest.mark.parametrize("name", ["u4b8_g128_sf16", "nf4", "u8_g-1_zi_sf32"])
def test_rows_do_not_depend_on_the_batch(compiled, name):
    """Where all tiles of tokens are cut alike, whatever their size, a row is what it would be alone."""
    q, x, _ = problem(name, 136, 70, 520, torch.bfloat16)
    first = None
    for (start, m), tokens in zip(((0, 70), (0, 70), (69, 1), (3, 40), (17, 16)), itertools.cycle(tiles(q))):
        for whole in (False, True):
            y = call(compiled, q, x[start : start + m], None, tokens, 5, whole, alike=True)
            first = {whole: y} | (first or {}) if start == 0 and tokens == 16 else first
            assert torch.equal(y, first[whole][start : start + m]), (start, m, tokens, whole)


def test_what_does_not_fit_is_refused(compiled):
    q, x, _ = problem("u4b8_g128_sf16", 16, 3, 136, torch.float16)
    with pytest.raises(RuntimeError, match="no tile of 48 tokens for 4 bits"):
        call(compiled, q, x, None, 48, 1)
    with pytest.raises(RuntimeError, match="does not fit x"):
        call(compiled, q, torch.zeros(3, 264, dtype=torch.float16), None, 16, 1)
    with pytest.raises(RuntimeError, match="in pieces of 16 bytes"):
        call(compiled, q, x[:, 1:], None, 16, 1)


# -- the kernel as users have it, over the emulated operator -------------------------------------------------------------------------------


@pytest.fixture
def emulated(compiled, monkeypatch):
    compiled.set_seed(1)
    monkeypatch.setattr(torch.ops.qkernels, "w4_mma", compiled.ops.w4_mma, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(f16_w4_mma, "begins_early", lambda device: False)


@pytest.mark.parametrize(("name", "k"), [("int4", 128), ("int4_g32", 300), ("u4_g64_zi_sbf16", 131), ("nf4", 264), ("int8", 200)])
@pytest.mark.usefixtures("emulated")
def test_run(name, k):
    """K that is no multiple of 8, x that is not dense, a permutation, no rows."""
    for m, kernel in itertools.product((0, 5, 20), (f16_w4_mma.KERNEL, f16_w4_mma.INVARIANT)):
        q, x, bias = random_quant(formats.get(name), 70, k, perm=m == 20), torch.randn(2, m, 2 * k).bfloat16(), torch.randn(70).bfloat16()
        y = kernel.run(x[..., ::2], kernel.prepare(q), bias)
        assert_matmul_close(y, x[..., ::2], reference.decode(q, torch.float64), bias)


def test_a_few_rows_go_to_their_own_kernel(monkeypatch):
    """But not where a row's result must not depend on the others: its sums have another order there."""
    seen = []
    monkeypatch.setattr(w4_gemv, "multiply", lambda x, *rest: seen.append(("gemv", len(x))))
    monkeypatch.setattr(f16_w4_mma, "tiled", lambda x, *rest: seen.append(("tiled", len(x))))
    q = random_quant(formats.get("int4"), 70, 128)
    for m, kernel in itertools.product((8, 9), (f16_w4_mma.KERNEL, f16_w4_mma.INVARIANT)):
        kernel.run(torch.randn(m, 128).half(), kernel.prepare(q), None)
    assert seen == [("gemv", 8), ("tiled", 8), ("tiled", 9), ("tiled", 9)]


@pytest.mark.usefixtures("emulated")
def test_a_row_of_many_is_as_if_it_were_alone():
    q, x, _ = problem("int4", 136, 300, 520, torch.float16)
    kernel = f16_w4_mma.INVARIANT
    packed = kernel.prepare(q)
    y = kernel.run(x, packed, None)
    for row in (0, 17, 255, 256, 299):
        assert torch.equal(kernel.run(x[row : row + 1], packed, None)[0], y[row])
    with pytest.raises(UnsupportedError, match="float32 activations batch-invariantly"):
        kernel.run(x.float(), packed, None)


def test_without_triton(monkeypatch):
    """float32 activations, the weight itself and gradients need neither Triton nor the library."""
    monkeypatch.setattr(f16_w4_mma, "HAS_TRITON", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.triton_version.__wrapped__() == (0, 0)
    kernel = f16_w4_mma.KERNEL
    q, x, bias = problem("int4_asym", 48, 5, 200, torch.float32, torch.float32)
    packed, weight = kernel.prepare(q), reference.decode(q, torch.float64)
    assert_matmul_close(kernel.run(x, packed, bias), x, weight, bias)
    assert torch.equal(kernel.dequantize(packed), reference.decode(q))
    grad = torch.randn(5, 48)
    assert_matmul_close(kernel.backward(grad, packed), grad, weight.t())


def test_who_serves(monkeypatch):
    """Triton's kernels where they are, this one where they are not; and a reason where it cannot."""
    monkeypatch.setattr(library, "architectures", lambda source: None)
    assert explain("int4", m=64, device="cuda:sm80").kernel.name == "triton_f16_wN_gemm"
    assert explain("int4", m=64, device=Device("cuda", sm=89, triton=False)).kernel.name == "cuda_f16_w4_mma"
    alone = explain("int4", device=Device("cuda", sm=80, triton=False), batch_invariant=True)
    assert alone.kernel.name == "cuda_f16_w4_mma_invariant"
    for name, nk, reason in (
        ("int3", (64, 64), "integers of 4 and 8 bits and tables of 4 bits are taken"),
        ("fp8", (64, 64), "code e4m3"),
        ("int4_g12", (64, 64), "groups of 12"),
    ):
        assert reason in explain(name, nk, device="cuda:sm80").rejected["cuda_f16_w4_mma"]
    assert "needs sm80" in explain("int4", device="cuda:sm75").rejected["cuda_f16_w4_mma"]


def test_the_plan():
    """One wave that is nearly full stays whole, one and a half are cut; where batches must not matter, m changes only the tile."""
    plan, launches = f16_w4_mma.plan, f16_w4_mma.OF_INTEGERS
    assert plan(launches, 128 * 132 * 2, 32, 32, 132) == (32, 264, True)
    assert plan(launches, 128 * 132 * 3, 32, 32, 132) == (32, 264, False)
    assert plan(launches, 128, 1, 32, 132) == (16, 8, False) and plan(launches, 128, 1, 1, 132) == (16, 1, False)
    assert len({plan(launches, 4096, m, 32, 132, invariant=True)[1:] for m in (1, 16, 17, 64, 256)}) == 1


# -- the emulation sees faults -----------------------------------------------------------------------------------------------------------

# Of a kernel that is broken one variant is enough, and compiled sooner.
FEWER = [
    ("w4_mma.cu", "launch_of<bf16>(bits, bool(table), tokens)", "launch_of<f16>(bits, bool(table), tokens)"),
    ("w4_mma.cu", "if (table) return tokens == 16 ? launch<T, Table<T>, 16> : launch<T, Table<T>, 64>;", ""),
    ("w4_mma.cu", "if (bits == 8) return tokens == 16 ? launch<T, Int8<T>, 16> : launch<T, Int8<T>, 64>;", ""),
    ("w4_mma.cu", "    case 32: return launch<T, Int4<T>, 32>;\n", ""),
    ("w4_mma.cu", "    case 64: return launch<T, Int4<T>, 64>;\n", ""),
    ("w4_mma.cu", "    default: return launch<T, Int4<T>, 128>;\n", "    default: return nullptr;\n"),
]
MMA, TILE = "w4_mma.cu", "tile.cuh"
FAULTS = {
    "fragments in another order": (MMA, "left[i / 2][2 * h + i % 2] =", "left[i / 2][2 * (i % 2) + h] ="),
    "pieces that are not swizzled back": (MMA, "(piece ^ lane % 8) * 16", "piece * 16"),
    "one copy too few waited for": (MMA, "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
    "a stage that others still fill": (MMA, "__syncthreads();  // the stage", "// the stage"),
    "a stage that others still read": (MMA, "i < STAGES - 1; ++i) begin_stage", "i < STAGES; ++i) begin_stage"),
    "the wrong stage": (MMA, "(left, shared + uint32_t(stage) %", "(left, shared + uint32_t(stage + 1) %"),
    "numbers of the step before": (MMA, "store_numbers(raw, step + 1);", "store_numbers(raw, step);"),
    "a tile begun while others still read": (MMA, "copy_async_wait<0>();\n    __syncthreads();", "copy_async_wait<0>();"),
    "columns beyond the last": (MMA, "token + i / 8 < a.m && at < a.k", "token + i / 8 < a.m"),
    "rows of the weight beyond the last": (MMA, "if (m < a.m && n < a.n)", "if (m < a.m)"),
    "the kernel before not waited for": (MMA, "    wait_for_previous();\n", ""),
    "parts added in the order in which they come": (TILE, "helper * part, thread", "(last - 1 - (helper - first)) * part, thread"),
}  # fmt: skip


@pytest.fixture(scope="module")
def right(compiled):
    """What a kernel without a fault makes of `cut`, cut or whole."""
    compiled.set_seed(0)
    return [call(compiled, *cut(), **way) for way in WAYS]


def cut():
    """A product whose tiles end beside the matrix; the bias takes almost all of it away, so that the last bits of sums are seen."""
    q, x, _ = problem("u4_g64_zi_sf16", 200, 20, 1048, torch.float16)
    return q, x[:1] + x / 64, -(reference.decode(q) @ x[0].float())


# Some tiles are cut in three or more; one block works at a tile after the other. Either way it has more steps than stages.
WAYS = ({"tokens": 16, "blocks": 12}, {"tokens": 16, "blocks": 1, "whole": True})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(folder, right, fault):
    broken = build("w4_mma", folder, [*FEWER, FAULTS[fault]])
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(30):
            broken.set_seed(seed)
            assert torch.equal(call(broken, *cut(), **WAYS[seed % 2]), right[seed % 2])
