"""The int8 kernels of csrc/cuda/s8_mma.cu, s8_gemv.cu and s8_quantize.cu on a processor that tests/cuda_emulation makes of the host:
against fp64 and torch, and the faults that this sees."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import SWEEP, equal_values, random_quant
from emulated_cuda import build, compile_begin, late, quantize, why_not

from qkernels import formats, kernels, reference
from qkernels.kernels.cuda import s8_mma
from qkernels.kernels.triton import s8_gemm, s8_w4_gemm
from qkernels.testing import assert_matmul_close

reason = why_not()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.usefixtures("one_thread")]
FORMATS = [
    "u8b128_g-1_sf32", "u8b128_g-1_sf16", "u8_g-1_zi_sbf16", "u8_g-1_zi_sf32",
    "u4b8_g-1_sf32", "u4_g-1_zi_sf16", "u4b8_g128_sf16", "u4_g128_zi_sbf16", "u4b8_g256_sf32", "u4_g256_zi_sf32",
    "u4b8_g64_sf16", "u4_g64_zi_sf32", "u4_g192_zi_sbf16", "u4b8_g32_sbf16", "u4_g32_zi_sf16", "u4b8_g96_sf32",
]  # fmt: skip
EXACT = ["u8b128_g-1_sf32", "u8_g-1_zi_sbf16", "u4b8_g-1_sf32", "u4_g-1_zi_sf16"]  # sums are int32
ROWS = (1, 8, 16, 17, 64, 129)
SHAPES = ((1, 8), (70, 300), (131, 515), (64, 128), (129, 260))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIASES = (None, torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """How a launch cuts a product."""

    rows: int
    tokens: int
    whole: bool
    blocks: int
    raster: int = 2


def tiles(q):
    """Those that there are: with scales of groups, 64 tokens at most."""
    by_tile = q.format.bits == 4 and (q.scales.shape[1] > 1 or s8_w4_gemm.tile_columns(q.format, *q.shape) < 128)
    return ((64, 16), (64, 32), (64, 64), (128, 64 if by_tile else 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    compile_begin(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(folder):
    return build("s8_mma", folder)


@pytest.fixture(scope="module")
def few(folder):
    return build("s8_gemv", folder)


@pytest.fixture(scope="module")
def quantizer(folder):
    return build("s8_quantize", folder)


def call(emulated, q, x, bias, case):
    """Launch an operator between canaries, and return what it gives; parts are garbage, flags have to be 0 again."""
    m, (n, k) = len(x), q.shape
    packed = (s8_gemm if q.format.bits == 8 else s8_w4_gemm).prepare(q)
    around = torch.full((3, m, n), torch.nan, dtype=x.dtype)
    parts = None if case.whole else torch.full((case.blocks * case.rows * case.tokens,), torch.nan)
    flags = torch.zeros(case.blocks, dtype=torch.int32)
    written = quantize(x, -(-k // 128) * 128)
    inputs = [late(emulated, tensor) for tensor in written]
    how = (case.rows, case.tokens, case.blocks, case.raster, case.whole, True, 0)
    op, more = emulated.ops.s8_w8_mma, ()
    if q.format.bits == 4:
        tile = 2 * packed.weight.shape[2]
        op, more = emulated.ops.s8_w4_mma, (max(1, q.format.group_extent(n, k)[1] // tile),)
    op(*inputs, packed.weight, packed.scales, packed.zeros, bias, around[1], parts, flags, *more, *how)
    assert not flags.any(), "flags are left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def call_few(emulated, q, x, bias, run):
    """Likewise an operator for few rows, with `run` tiles of K for a block."""
    m, (n, k), w8 = len(x), q.shape, q.format.bits == 8
    packed = (s8_gemm if w8 else s8_w4_gemm).prepare(q)
    tile = 128 if w8 else 2 * packed.weight.shape[2]
    blocks_k, rows = -(-k // (tile * run)), s8_mma.rows_of_a_block(128 if w8 else 64, tile)
    around = torch.full((3, m, n), torch.nan, dtype=x.dtype)
    parts = torch.full((blocks_k + 1, m, n), torch.nan) if blocks_k > 1 else None  # one more, for kernels that are broken
    counters = torch.zeros(-(-n // rows), dtype=torch.int32) if blocks_k > 1 else None
    written = quantize(x, -(-k // 128) * 128)
    inputs = [late(emulated, tensor) for tensor in written]
    op, more = (emulated.ops.s8_w8_gemv, ()) if w8 else (emulated.ops.s8_w4_gemv, (max(1, q.format.group_extent(n, k)[1] // tile),))
    op(*inputs, packed.weight, packed.scales, packed.zeros, bias, around[1], parts, counters, *more, run, True, 0)
    assert counters is None or not counters.any(), "a counter is left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def problem(name, n, m, k, dtype, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, x = random_quant(formats.get(name), n, k, seed), torch.randn(m, k, generator=g).to(dtype)
    return q, x, None if bias is None else torch.randn(n, generator=g).to(bias)


def check(emulated, q, x, bias, case, seeds, call=call):
    """Against fp64, and the same bits with every seed."""
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        y = call(emulated, q, x, bias, case)
        if first is None:
            assert_matmul_close(y, x, reference.decode(q, torch.float64), bias, int8=q, act_group=None)
            first = y
        assert torch.equal(y, first), f"other bits with seed {seed}"


@pytest.mark.parametrize("name", FORMATS)
def test_against_fp64(compiled, name):
    for i, m in enumerate(ROWS):
        turn = i + len(name) + FORMATS.index(name)
        n, k = SHAPES[turn % len(SHAPES)]
        q, x, bias = problem(name, n, m, k, DTYPES[turn % 3], BIASES[turn % 4], seed=turn)
        for j in range(2):
            case = Case(*tiles(q)[(i + 2 * j) % 4], whole=(turn + j) % 2 == 0, blocks=1 + (turn + j) % 7, raster=1 + turn % 3)
            check(compiled, q, x, bias, case, seeds=(turn + j,))


def cut(name):
    """A product whose tiles end beside the matrix; some are cut in three, and every block has more steps than stages."""
    q, x, bias = problem(name, 70, 40, 2090, torch.float16, torch.float16)
    return q, x, bias, Case(64, 32, False, 7)


@pytest.mark.parametrize("name", ["u8_g-1_zi_sbf16", "u4_g-1_zi_sf16", "u4_g128_zi_sbf16", "u4_g32_zi_sf16"])
def test_any_order_of_threads_gives_the_same_bits(compiled, name):
    check(compiled, *cut(name), seeds=range(4))


@pytest.mark.parametrize("name", EXACT)
def test_rows_do_not_depend_on_the_batch(compiled, name):
    q, x, bias = problem(name, 70, 129, 700, torch.bfloat16, torch.float32)
    y = call(compiled, q, x, bias, Case(128, 128, True, 3))
    for case, first, m in (
        ((64, 16, False, 5), 128, 1),
        ((64, 16, True, 1), 3, 16),
        ((64, 32, False, 7), 40, 17),
        ((64, 64, False, 3), 9, 64),
    ):
        assert torch.equal(call(compiled, q, x[first : first + m], bias, Case(*case)), y[first : first + m])


# -- few rows ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_few_rows_against_fp64(few, name):
    for i, m in enumerate((1, 2, 8)):
        turn = i + len(name) + FORMATS.index(name)
        n, k = (*SHAPES, (40, 1187))[turn % 6]
        q, x, bias = problem(name, n, m, k, DTYPES[turn % 3], BIASES[turn % 4], seed=turn)
        check(few, q, x, bias, (24, 8, 3)[turn % 3], (turn,), call_few)


def cut_few(name, m=5):
    """Rows beside a block, columns beside a tile; blocks of K whose warps have from three tiles down to none."""
    q, x, bias = problem(name, 70, m, 4504 if name.startswith("u8") or "g128" in name else 2216, torch.float16, torch.float16)
    return q, x, bias, 17


def cancelling(name="u4_g64_zi_sf32"):
    """The first two blocks of K cancel each other, and of the third, far smaller, more bits are seen: the order of sums, too."""
    q, x, _, run = cut_few(name)
    half = run * 64
    x[:, half : 2 * half], x[:, 2 * half :] = -x[:, :half], x[:, 2 * half :] / 64
    for stored, columns in ((q.codes, 2), (q.scales, 64), (q.zeros, 64)):
        stored[:, half // columns : 2 * half // columns] = stored[:, : half // columns]
    return q, x.float(), None, run


@pytest.mark.parametrize("name", ["u8_g-1_zi_sbf16", "u4_g128_zi_sbf16", "u4_g32_zi_sf16"])
def test_few_rows_in_any_order_of_threads(few, name):
    check(few, *cut_few(name), range(4), call_few)


def test_blocks_are_added_in_their_order(few):
    check(few, *cancelling(), range(8), call_few)


@pytest.mark.parametrize("name", [*EXACT, "u4b8_g128_sf16", "u4_g64_zi_sf32"])
def test_few_rows_do_not_depend_on_the_batch(few, name):
    q, x, bias = problem(name, 70, 8, 1300, torch.bfloat16, torch.float32)
    y = call_few(few, q, x, bias, 8)
    for first, m in ((0, 1), (7, 1), (2, 2), (3, 4)):
        assert torch.equal(call_few(few, q, x[first : first + m], bias, 8), y[first : first + m])


@pytest.mark.parametrize("name", EXACT)
def test_few_rows_have_the_bits_of_many(few, compiled, name):
    q, x, bias = problem(name, 70, 7, 1300, torch.float32, torch.float32)
    assert torch.equal(call_few(few, q, x, bias, 3), call(compiled, q, x, bias, Case(64, 16, False, 5)))


def test_how_few_rows_are_cut():
    """Every row has its place in shared memory; parts of K are alike; and where K allows it, all processors are busy."""
    for n, k, columns in ((4096, 4096, 128), (28672, 4096, 64), (512, 8192, 32), (1, 8, 128), (128256, 8192, 32), (17, 100000, 64)):
        for row_bytes in (64, 128)[: 2 if columns == 128 else 1]:
            rows, tiles = s8_mma.rows_of_a_block(row_bytes, columns), -(-k // columns)
            run = s8_mma.tiles_of_a_block(rows, columns, n, tiles, 132)
            assert run % s8_mma.WARPS == 0 and 0 < run * columns <= s8_mma.MOST_COLUMNS
            parts = -(-tiles // run)
            assert parts * run - tiles < s8_mma.WARPS * parts and (run == s8_mma.WARPS or -(-n // rows) * (tiles / run + 1) >= 264)


# -- scales, and rows of x that are not finite ---------------------------------------------------------------------------------------------


def test_scales_decide_the_kind_of_sums_alone(compiled):
    """One scale for all columns and many equal ones: the same numbers, but for the order of float32 sums."""
    one, x, _ = problem("u4_g-1_zi_sf32", 33, 9, 512, torch.float32, None)
    many = random_quant(formats.get("u4_g64_zi_sf32"), 33, 512)
    many.codes[:], many.scales[:], many.zeros[:] = one.codes, one.scales, one.zeros
    torch.testing.assert_close(*(call(compiled, q, x, None, Case(64, 16, True, 2)) for q in (one, many)), rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_finite(compiled):
    """They are NaN, the others what they were."""
    q, x, bias = problem("u8b128_g-1_sf32", 70, 5, 300, torch.bfloat16, None)
    y = call(compiled, q, x, bias, Case(64, 16, True, 1))
    x[1, 7], x[3, 299], x[4] = torch.nan, -torch.inf, 0
    found = call(compiled, q, x, bias, Case(64, 16, True, 1))
    assert found[[1, 3]].isnan().all() and torch.equal(found[[0, 2]], y[[0, 2]]) and not found[4].any()


@pytest.mark.parametrize("mma", [True, False], ids=["Ampere", "Turing"])
@pytest.mark.parametrize("name", ["u8_g-1_zi_sf16", "u4b8_g-1_sf32", "u4_g128_zi_sf16", "u4b8_g64_sbf16", "u4_g32_zi_sf16"])
def test_from_layer_to_result(compiled, few, quantizer, monkeypatch, name, mma):
    """The Python side on the emulated GPU, which has 3 processors: how it cuts products, and what it hands to the operators."""
    ops = {f"s8_{kind}_mma": getattr(compiled.ops, f"s8_{kind}_mma") for kind in ("w8", "w4") if mma}
    ops |= {f"s8_{kind}_gemv": getattr(few.ops, f"s8_{kind}_gemv") for kind in ("w8", "w4")}
    monkeypatch.setattr(s8_mma, "OPS", SimpleNamespace(**ops, s8_quantize=quantizer.ops.s8_quantize))
    monkeypatch.setattr(s8_mma, "gpu_of", lambda device: s8_mma.Gpu(3, 100 << 10, early=True, mma=mma))
    monkeypatch.setattr(s8_mma, "stream_of", lambda device: 0)
    flags = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(s8_mma, "counters_of", lambda device, stream: flags)
    kernel = kernels.get("cuda_s8_w8_mma" if name.startswith("u8") else "cuda_s8_w4_mma")
    for i, (m, n, k) in enumerate(((1, 130, 1030), (9, 70, 515), (33, 17, 300), (150, 70, 515), (0, 17, 64))[: None if mma else 3]):
        q = random_quant(formats.get(name), n, k, seed=i, perm=i % 2 == 1)
        x = torch.randn(m, 2 * k).to(DTYPES[i % 3])
        x = (x[:, :k], x[:, ::2], x[:, :k].reshape(1, m, k))[i % 3]
        bias = torch.randn(n) if i % 2 else None
        y = kernel.run(x, kernel.prepare(q), bias)
        assert_matmul_close(y, x, reference.decode(q, torch.float64), bias, int8=q, act_group=None)


def test_few_rows_refuse_what_does_not_fit(few):
    q, x, bias = problem("u4b8_g128_sf16", 70, 5, 300, torch.bfloat16, torch.float32)
    s = s8_w4_gemm.prepare(q)

    def refused(match, rows=x, padded=384, out=None, weight=s.weight, per_run=1, run=1):
        out = torch.empty(len(rows), 70) if out is None else out
        with pytest.raises(RuntimeError, match=match):
            few.ops.s8_w4_gemv(*quantize(rows, padded), weight, s.scales, s.zeros, bias, out, None, None, per_run, run, True, 0)

    refused("3 blocks of K want parts of as many results, and 3 counters")
    refused("x has 9 rows", rows=x[:1].repeat(9, 1))
    refused("a block 0 tiles", run=0)
    refused("want 98304 bytes of shared memory; a block may have 49152", padded=12288, weight=s.weight.repeat(32, 1, 1), run=96)
    refused("does not fit", padded=512)
    refused("biases 71", out=torch.empty(5, 71))
    refused("does not fit", per_run=0)
    refused("tiles have 32, 64 or 128 columns, not 96", weight=s.weight[..., :48].contiguous())


def test_refuses_what_does_not_fit(compiled, quantizer):
    q, x, bias = problem("u4b8_g128_sf16", 70, 5, 300, torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match="tiles have 64 rows and 16, 32 or 64 tokens, or 128 and 64, not 128 and 128"):
        call(compiled, q, x, bias, Case(128, 128, True, 1))
    with pytest.raises(RuntimeError, match="biases 70"):
        call(compiled, q, x, bias[:69], Case(64, 16, True, 1))
    s = s8_w4_gemm.prepare(q)
    given = (*quantize(x, 384), s.weight, s.scales, s.zeros, bias, torch.empty(5, 70), None)
    with pytest.raises(RuntimeError, match="parts hold 0 sums; 3072 are wanted"):
        compiled.ops.s8_w4_mma(*given, torch.zeros(3, dtype=torch.int32), 1, 64, 16, 3, 1, False, True, 0)
    with pytest.raises(RuntimeError, match="there are 1 flags for 2 blocks"):
        compiled.ops.s8_w4_mma(*given, torch.zeros(1, dtype=torch.int32), 1, 64, 16, 2, 1, True, True, 0)
    with pytest.raises(RuntimeError, match=r"weight .* does not fit"):
        compiled.ops.s8_w4_mma(*quantize(x, 512), *given[2:], torch.zeros(3, dtype=torch.int32), 1, 64, 16, 2, 1, True, True, 0)
    with pytest.raises(RuntimeError, match=r"codes \[5, 296\] and 10 numbers do not fit x \[5, 300\]"):
        quantizer.ops.s8_quantize(x, torch.empty(5, 296, dtype=torch.int8), torch.empty(2, 5), True, 0)


# -- quantising ------------------------------------------------------------------------------------------------------------------------


def rows_to_quantize(m, k, dtype):
    x = torch.randn(m, k)
    x *= torch.logspace(-4, 4, m)[:, None]
    if m > 8:
        x[1], x[2, -1], x[3, 0], x[4, k // 2], x[5], x[6] = 0, torch.inf, torch.nan, -torch.inf, 2e-36, -4e-36
        x[7] = torch.arange(k) % 255 - 127.0  # codes as they are
        x[8] = (torch.arange(k) % 253 - 126.0) / 2 + 63.5 * (torch.arange(k) % 253 == 252)  # and halves of them, which are ties
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "padded"), [(9, 300, 384), (17, 4104, 4224), (1, 1, 128), (12, 515, 640), (9, 128, 128)])
def test_quantizes_as_torch_does(quantizer, dtype, m, k, padded):
    x = rows_to_quantize(m, k, dtype)
    wide = torch.full((m, k + 8), torch.nan, dtype=dtype)
    wide[:, :k] = x
    odd = torch.full((m * k + 1,), torch.nan, dtype=dtype)
    odd[1:] = x.flatten()
    want_codes, want_rows = quantize(x, padded)
    for seed, given in enumerate((x, wide[:, :k], odd[1:].view(m, k))):
        quantizer.set_seed(seed)
        codes, rows = torch.full((m + 2, padded), 55, dtype=torch.int8), torch.full((2, m), 55.0)
        quantizer.ops.s8_quantize(given, codes[1:-1], rows, True, 0)
        assert torch.equal(codes[1:-1], want_codes) and codes[[0, -1]].eq(55).all()
        equal_values(rows, want_rows)


def test_quantizing_waits_for_the_kernel_before(quantizer):
    x = rows_to_quantize(9, 300, torch.bfloat16)
    codes, rows = torch.empty(9, 384, dtype=torch.int8), torch.empty(2, 9)
    quantizer.ops.s8_quantize(late(quantizer, x), codes, rows, True, 0)
    assert torch.equal(codes, quantize(x, 384)[0])


# -- the emulation sees faults -----------------------------------------------------------------------------------------------------------

MMA, TILE = "s8_mma.cu", "tile.cuh"
FEWER = [  # of a kernel that is broken one tile is enough, and compiled sooner; and of weights one kind
    (MMA, "  if (is(64, 16)) return launch<W, Tile<64, 16, 4, 1>>(a, room, flags, how);\n", ""),
    (MMA, "  if (is(64, 64)) return launch<W, Tile<64, 64, 2, 2>>(a, room, flags, how);\n", ""),
    (MMA, "  if (is(128, MOST)) return launch<W, Tile<128, MOST, 4, 2>>(a, room, flags, how);\n", ""),
]
LAUNCHED = ("W8", "W4<4, false>", "W4<4, true>", "W4<2, true>", "W4<1, true>")
W8, W4 = ("W8", "u8_g-1_zi_sbf16"), ("W4<4, true>", "u4_g128_zi_sbf16")
WAIT = "copy_async_wait<STAGES - 2>();"
FAULTS = {
    "tokens in another order": (
        W8,
        MMA,
        "{{pieces[0], pieces[1]}, {pieces[2], pieces[3]}}",
        "{{pieces[0], pieces[2]}, {pieces[1], pieces[3]}}",
    ),
    "a stage too few waited for": (W8, MMA, WAIT, WAIT.replace("2", "1")),
    "a stage that others have not copied": (W8, MMA, "__syncthreads();  // all", "// all"),
    "a stage filled while it is read": (W4, MMA, "stage == 0 ? STAGES - 1 : stage - 1;", "stage;"),
    "rows beyond the last": (W8, MMA, "m + e >= a.m || n >= a.n", "n >= a.n"),
    "a subtraction that borrows": (W4, MMA, "(groups ? HIGHEST : 0)", "(groups ? 0x00808080 : 0)"),
    "parts not yet seen by others": (W8, TILE, "__threadfence();\n    sync_warps", "sync_warps"),
    "weights in another order": (W8, MMA, "lane % 16, 2 * span + lane / 16", "lane % 8 + lane / 16 * 8, 2 * span + lane / 8 % 2"),
    "a stage not waited for": (W8, MMA, WAIT, ""),
    "codes in another order": (W4, MMA, "words[s] >> 4,", "words[s ^ 1] >> 4,"),
    "the kernel before not waited for": (W8, MMA, "wait_for_previous();", ""),
    "columns beyond the last": (W8, MMA, "m + e >= a.m || n >= a.n", "m + e >= a.m"),
    "scales of another step": (W4, MMA, "next.load(a, n, step + 1);", "next.load(a, n, step);"),
    "zero points left out": (W8, MMA, "sum -= rows[i].zero * total;", ";"),
    "a part left out": (W8, TILE, "schedule.first_helper(work), last", "schedule.block() - 1, last"),
    "parts not waited for": (W8, TILE, "wait_for_flag(flags + helper);", ""),
    "parts of another tile": (W4, MMA, "[T::I * T::J * 4]>(sums)", "[T::I * T::J * 2]>(sums)"),
}


@pytest.mark.parametrize("fault", [*FAULTS][: None if SWEEP else 7])
def test_a_fault_is_seen(folder, fault):
    (kind, name), *change = FAULTS[fault]
    kinds = [(MMA, f"launch_for<{other}>(a,", f"launch_for<{kind}>(a,") for other in LAUNCHED if other != kind]
    broken = build("s8_mma", folder, [*FEWER, *kinds, change])
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, *cut(name), seeds=range(30))


GEMV = "s8_gemv.cu"
FEWER_OF_FEW = [  # for five rows of x, and "u4_g64_zi_sf32" alone
    (GEMV, "(a.m == 1 ? launch<W, 1> : launch<W, TOKENS_MOST>)", "launch<W, TOKENS_MOST>"),
    (GEMV, "launch_for<W8>(a,", "launch_for<W4<2, true>>(a,"),
    *((GEMV, f"launch_for<W4<{other}>>", "launch_for<W4<2, true>>") for other in ("4, true", "4, false", "1, true")),
]
OTHERS = "for (int b = 0; b < a.blocks_k; ++b)"
FAULTS_OF_FEW = {
    "codes in another order": ("words[chunk / 2 + e * WORDS]", "words[chunk / 2 * SPAN + e]"),
    "x used before all of it is there": ("copy_async_wait<0>();\n  __syncthreads();", "copy_async_wait<0>();"),
    "a block's own part before the others": (
        f"Sum sum = 0;\n    {OTHERS}",
        f"Sum sum = __ldcg(place(block_k, token, r));\n    {OTHERS} if (b != block_k)",
    ),
    "scales of another tile": ("to.load(a, from, rows, tile);", "to.load(a, from, rows, begin + warp);"),
    "the kernel before not waited for": ("  wait_for_previous();\n", ""),
    "copies not waited for": ("copy_async_wait<0>();", ""),
    "sums over what others still read": ("  __syncthreads();  // nobody reads x any more\n", ""),
    "sums of warps not yet there": ("leave<W, TOKENS>(sums, shared);\n  __syncthreads();", "leave<W, TOKENS>(sums, shared);"),
    "rows beyond the last": ("if (first + i % ROWS<W> < a.n) f(", "f("),
    "lanes that are left out": ("lanes < W::PIECES;", "lanes < W::PIECES / 2;"),
    "zero points left out": ("(int(part.zeros[i]) - 8)", "(int(part.zeros[i]) * 0)"),
    "parts not yet seen by others": ("__threadfence();\n  __syncthreads();", "__syncthreads();", TILE),
    "a counter left raised": ("if (threadIdx.x == 0) *counter = 0;", "", TILE),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS_OF_FEW][: None if SWEEP else 1])
def test_a_fault_of_few_rows_is_seen(folder, fault):
    old, new, *file = FAULTS_OF_FEW[fault]
    broken = build("s8_gemv", folder, [*FEWER_OF_FEW, (*(file or [GEMV]), old, new)])
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, *cut_few("u4_g64_zi_sf32"), range(20), call_few)
        check(broken, *cancelling(), range(20), call_few)


FAULTS_OF_QUANTIZING = {
    "a warp's value not waited for": ("__syncthreads();", ""),
    "columns beyond the last": ("first + EACH <= a.k", "first < a.k"),
    "the kernel before not waited for": ("wait_for_previous();", ""),
    "sums where others read magnitudes": ("shared + 4 * WARPS, [](", "shared, []("),
    "columns of the padding": ("first < a.padded;", "first < a.k;"),
}


@pytest.mark.parametrize("fault", [*FAULTS_OF_QUANTIZING][: None if SWEEP else 2])
def test_a_fault_of_quantizing_is_seen(folder, fault):
    broken = build("s8_quantize", folder, [("s8_quantize.cu", *FAULTS_OF_QUANTIZING[fault])])
    x = rows_to_quantize(9, 2060, torch.bfloat16)
    wide = torch.full((9, 2080), 100.0, dtype=torch.bfloat16)
    wide[:, :2060] = x
    want = [tensor.nan_to_num() for tensor in quantize(x, 2176)]

    def differs(seed):
        broken.set_seed(seed)
        found = torch.full((9, 2176), 55, dtype=torch.int8), torch.empty(2, 9)
        broken.ops.s8_quantize(late(broken, wide)[:, :2060], *found, True, 0)
        return any(not torch.equal(tensor.nan_to_num(), wanted) for tensor, wanted in zip(found, want))

    assert any(map(differs, range(30)))
