"""csrc/cuda/w4_gemv.cu on the processor that tests/cuda_emulation makes of the host: against fp64, any order of threads, any other rows of
x, the gated form, and the faults that this sees."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import SWEEP, random_quant
from emulated_cuda import build, compile_begin, late, why_not

import qkernels
from qkernels import QuantLinear, explain, formats, reference
from qkernels.kernels import device as devices
from qkernels.kernels.cuda import w4_gemv
from qkernels.kernels.device import Device
from qkernels.kernels.registry import Problem
from qkernels.kernels.registry import why_not as why_not_of
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.f16_format import table
from qkernels.kernels.triton.launch import Gpu
from qkernels.testing import assert_matmul_close, assert_swiglu_close

reason = why_not()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.usefixtures("one_thread")]
FORMATS = [
    "u4b8_g128_sf16", "u4b8_g32_sbf16", "u4b8_g16_sf32", "u4b8_g384_sf16", "u4b8_g-1_sf16", "u4b8_g-1x-1_sf32", "u4b8_g64x4_sf16",
    "u4_g128_zi_sf16", "u4_g64_zi_sbf16", "u4_g16_zi_sf16", "u4_g-1_zi_sf32", "u4_g64_zf_sf16", "u4_g16_zf_sbf16", "u4_g256_zf_sf32",
    "nf4_g64_sf32", "fp4_g64_sbf16", "nf4_g16_sf16", "e2m1_g32_se8m0", "e2m1_g16_se4m3_t", "nf4_g128_sf16",
    "u8b128_g-1_sf32", "u8b128_g32_sf16", "u8b128_g64_sbf16", "u8_g16_zi_sf16", "u8_g-1_zi_sbf16", "u8_g128_zf_sf16", "u8_g32_zf_sbf16",
]  # fmt: skip
SHAPES = [(1, 8), (33, 128), (70, 300), (40, 1187), (64, 1560), (130, 515)]
BIASES = (None, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.bfloat16, torch.float16)
PROCESSORS = 2  # of the GPU: so few that most blocks have several turns of rows


class Case(NamedTuple):
    """A product, and how many tiles of K a block has."""

    n: int
    k: int
    m: int
    run: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    compile_begin(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(folder):
    return build("w4_gemv", folder)


def problem(name, case, dtype, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, x = random_quant(formats.get(name), case.n, case.k, seed), torch.randn(case.m, case.k, generator=g).to(dtype)
    return q, x, None if bias is None else torch.randn(case.n, generator=g).to(bias)


def call(emulated, q, x, bias, run, processors=PROCESSORS):
    """Launch the operator between canaries, and return what it gives; parts are garbage, counters have to be 0 again."""
    (m, k), n = x.shape, q.shape[0]
    packed = layout.prepare(q)
    blocks_k, around = -(-packed.weight.shape[0] // run), torch.full((3, m, n), torch.nan, dtype=x.dtype)
    parts = torch.full((blocks_k + 1, m, n), torch.nan) if blocks_k > 1 else None  # one more, for kernels that are broken
    counters = torch.zeros(-(-n // w4_gemv.ROWS), dtype=torch.int32) if blocks_k > 1 else None
    written = F.pad(x, (0, 8), value=torch.nan)
    operands = (
        late(emulated, written)[:, :k],
        packed.weight,
        packed.scales,
        packed.zeros,
        packed.tensor_scale,
        table(q.format.code, x.device),
        bias,
    )
    how = (run, processors, 227 << 10, True, 0)
    emulated.ops.w4_gemv(*operands, around[1], parts, counters, *w4_gemv.numbers(q.format, n, k), *how)
    assert counters is None or not counters.any(), "a counter is left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def check(emulated, q, x, bias, run, seeds):
    """Against fp64, and the same bits with every seed."""
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        y = call(emulated, q, x, bias, run)
        if first is None:
            assert_matmul_close(y, x, reference.decode(q, torch.float64), bias)
            first = y
        assert torch.equal(y, first), f"other bits with seed {seed}"


@pytest.mark.parametrize("name", FORMATS)
def test_against_fp64(compiled, name):
    for i, m in enumerate((1, 2, 3, 8)):
        turn = i + len(name) + FORMATS.index(name)
        n, k = SHAPES[turn % len(SHAPES)]
        case = Case(n, k, m, run=(32, 8, 3)[turn % 3])
        check(compiled, *problem(name, case, DTYPES[turn % 2], BIASES[turn // 2 % 4], seed=turn), case.run, seeds=(turn,))


def cut(name="u4_g64_zi_sf16", m=5):
    """Rows of the weight beside a block, columns beside a tile, blocks of K whose warps have from three tiles down to none."""
    case = Case(70, 4504, m, run=17)
    return *problem(name, case, torch.float16, torch.float16), case.run


def cancelling():
    """The first two blocks of K cancel each other, and of the third, far smaller, more bits are seen: the order of sums, too."""
    q, x, _, run = cut()
    half = run * 128
    x[:, half : 2 * half], x[:, 2 * half :] = -x[:, :half], x[:, 2 * half :] / 4096
    for stored, columns in ((q.codes, 2), (q.scales, 64), (q.zeros, 64)):
        stored[:, half // columns : 2 * half // columns] = stored[:, : half // columns]
    return q, x, None, run


@pytest.mark.parametrize("name", ["u4_g64_zi_sf16", "nf4_g64_sf16", "u8_g128_zf_sf16"])
def test_any_order_of_threads_gives_the_same_bits(compiled, name):
    check(compiled, *cut(name), seeds=range(6))


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_rows_that_a_block_has_at_a_time_change_no_bits(compiled, processors):
    """All in turns, some, and each by a block of its own."""
    q, x, bias, run = cut("u8_g128_zf_sf16")
    assert torch.equal(call(compiled, q, x, bias, run, processors), call(compiled, q, x, bias, run))


def test_blocks_are_added_in_their_order(compiled):
    check(compiled, *cancelling(), seeds=range(12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(compiled, dtype):
    q, x, bias = problem("u4b8_g128_sf16", Case(70, 2700, 8, 9), dtype, torch.float32)
    y = call(compiled, q, x, bias, 9)
    for first, m in ((0, 1), (7, 1), (2, 2), (3, 3), (1, 7)):
        assert torch.equal(call(compiled, q, x[first : first + m], bias, 9), y[first : first + m])


def test_what_does_not_fit_is_refused(compiled):
    """Instead of reading and writing where nothing is."""
    q, x, _ = problem("u4b8_g128_sf16", Case(70, 600, 3, 2), torch.float16, None)
    packed, out = layout.prepare(q), torch.empty(3, 70, dtype=torch.float16)
    weight = packed[2:6]

    def refused(match, x=x, out=out, weight=weight, bits=4, run=8, shared=227 << 10):
        with pytest.raises(RuntimeError, match=match):
            compiled.ops.w4_gemv(
                x, *weight, None, None, out, None, None, bits, *w4_gemv.numbers(q.format, 70, 600)[1:], run, 132, shared, True, 0
            )

    refused("x has 9 rows", x=x.repeat(3, 1), out=torch.empty(9, 70, dtype=torch.float16))
    refused("does not fit x .3, 100.", x=x[:, :100])
    refused("does not fit x .3, 600. and out .3, 60.", out=torch.empty(3, 60, dtype=torch.float16))
    refused("3 blocks of K want parts of as many results, and 3 counters", run=2)
    refused("a block may have 4096", shared=4096)
    refused("codes have 4 or 8 bits", bits=2)
    refused("x and out are float16, or bfloat16", x=x.float())
    refused("x and out are float16, or bfloat16", out=out.bfloat16())
    refused("rows of x and out have to be dense", x=x.t().contiguous().t())


# -- the gated form ----------------------------------------------------------------------------------------------------------------------


def call_gated(emulated, gate, up, x, biases, run):
    """Likewise, of two weights."""
    (m, k), n = x.shape, gate.shape[0]
    of_gate, of_up = layout.prepare(gate)[2:6], layout.prepare(up)[2:6]
    blocks_k, around = -(-of_gate[0].shape[0] // run), torch.full((3, m, n), torch.nan, dtype=x.dtype)
    parts = torch.full((blocks_k + 1, m, 2 * n), torch.nan) if blocks_k > 1 else None
    counters = torch.zeros(-(-2 * n // w4_gemv.ROWS), dtype=torch.int32) if blocks_k > 1 else None
    written = F.pad(x, (0, 8), value=torch.nan)
    operands = (late(emulated, written)[:, :k], *of_gate, biases[0], *of_up, biases[1], table(gate.format.code, x.device))
    emulated.ops.w4_swiglu(*operands, around[1], parts, counters, *w4_gemv.numbers(gate.format, n, k), run, PROCESSORS, 227 << 10, True, 0)
    assert counters is None or not counters.any(), "a counter is left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def check_gated(emulated, gate, up, x, biases, run, seeds):
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        y = call_gated(emulated, gate, up, x, biases, run)
        if first is None:
            assert_swiglu_close(y, x, *(reference.decode(q, torch.float64) for q in (gate, up)), *biases)
            first = y
        assert torch.equal(y, first), f"other bits with seed {seed}"


def pair(name, case, dtype, biases, seed=0):
    """Two weights of a format, x that keeps silu where it bends, and biases of a type or none."""
    gate, x, bias = problem(name, case, dtype, biases[0], seed)
    up = random_quant(gate.format, case.n, case.k, seed + 100)
    scale = reference.decode(gate, torch.float64).square().sum(1).mean().sqrt()
    return gate, up, (x / scale).to(dtype), (bias, None if biases[1] is None else torch.randn(case.n).to(biases[1])), case.run


@pytest.mark.parametrize("name", FORMATS)
def test_gated_against_fp64(compiled, name):
    for m in (1, 2, 8) if SWEEP else ((1, 2, 8)[FORMATS.index(name) % 3],):
        turn = m + FORMATS.index(name)
        n, k = ((16, 8), (48, 300), (144, 515), (64, 1560))[turn % 4]
        kind = BIASES[turn % 4]
        biases = ((kind, kind), (None, kind), (kind, None))[turn % 3]
        check_gated(compiled, *pair(name, Case(n, k, m, (32, 8, 3)[turn % 3]), DTYPES[turn % 2], biases, turn), (turn,))


def cut_pair():
    return pair("u4_g64_zi_sf16", Case(80, 2456, 5, 7), torch.float16, (torch.float16, torch.float16))


def test_gated_in_any_order_of_threads(compiled):
    check_gated(compiled, *cut_pair(), range(4))


def test_gated_rows_do_not_depend_on_the_others(compiled):
    gate, up, x, biases, run = cut_pair()
    y = call_gated(compiled, gate, up, x, biases, run)
    for first, m in ((0, 1), (3, 2)):
        assert torch.equal(call_gated(compiled, gate, up, x[first : first + m], biases, run), y[first : first + m])


def test_a_pair_that_does_not_fit_is_refused(compiled):
    gate, up, x, biases, run = cut_pair()

    def refused(match, gate=gate, up=up, biases=biases):
        with pytest.raises(RuntimeError, match=match):
            call_gated(compiled, gate, up, x, biases, run)

    refused("N = 72 is no multiple of 16", *(random_quant(gate.format, 72, 2456) for _ in range(2)), biases=(None, None))
    refused("weight .20, 1024. does not fit", up=random_quant(gate.format, 64, 2456))
    refused("scales and zero points of one type and shape", up=random_quant(formats.get("u4_g128_zi_sf16"), 80, 2456))
    refused("scales and zero points of one type and shape", up=random_quant(formats.get("u4b8_g64_sf16"), 80, 2456))
    refused("biases are of one type", biases=(biases[0], biases[1].float()))


def layer(q, bias, kernel):
    """A layer that is packed for a kernel, which no plan would choose on a CPU."""
    made = QuantLinear(q.shape[1], q.shape[0], False, q.format, device="meta")
    made._kernel, made.bias = kernel, None if bias is None else torch.nn.Parameter(bias)
    made._hold(dict(zip(("codes", "scales", "zeros", "tensor_scale", "perm"), layout.prepare(q)[2:])))
    return made


@pytest.fixture
def on_the_gpu(compiled, monkeypatch):
    compiled.set_seed(1)  # forgets what a refused launch was given
    for op in ("w4_gemv", "w4_swiglu"):
        monkeypatch.setattr(torch.ops.qkernels, op, getattr(compiled.ops, op), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(devices, "current", lambda device: Device("cuda", sm=90))


@pytest.mark.parametrize("name", ["u4b8_g128_sf16", "nf4_g64_sf32"])
def test_swiglu_takes_one_launch_where_it_can(on_the_gpu, monkeypatch, name):
    """And computes the same where it cannot."""
    launches = []
    monkeypatch.setattr(w4_gemv, "multiply_gated", lambda *given, of=w4_gemv.multiply_gated: (launches.append(len(given[0])), of(*given)))
    gate, up, x, (bias, other), _ = pair(name, Case(48, 515, 11, 8), torch.bfloat16, (torch.float32, torch.float32))
    weights = [reference.decode(q, torch.float64) for q in (gate, up)]

    def taken(kernel, x, gate=gate, up=up, bias=bias, other=other):
        launches.clear()
        layers = layer(gate, bias, kernel), layer(up, other, kernel)
        y = qkernels.swiglu(x, *layers)
        assert_swiglu_close(y.flatten(0, -2), x.flatten(0, -2), *weights, bias, other)
        return launches.copy()

    with torch.no_grad():
        assert taken("cuda_f16_wN_gemv", x.view(1, 11, 515)) == [8, 3]
        assert taken("cuda_f16_w4_mma", x[:8]) == [8] and taken("cuda_f16_w4_mma", x[:0]) == []
        assert taken("cuda_f16_w4_mma", x[:1], bias=None) == [1]
        assert taken("cuda_f16_wN_gemv", x[:2], other=other.half()) == []
        layers = layer(gate, bias, "cuda_f16_w4_mma"), layer(up, other, "cuda_f16_w4_mma")
        compiled = torch.compile(lambda x: qkernels.swiglu(x, *layers), fullgraph=True, backend="eager")
        launches.clear()
        assert torch.equal(compiled(x[:3]), qkernels.swiglu(x[:3], *layers)) and launches == [3, 3]
    assert taken("cuda_f16_wN_gemv", x[:2], bias=None, other=None) == [2]
    assert taken("cuda_f16_wN_gemv", x[:2]) == []  # the biases want gradients


def test_swiglu_where_there_is_no_such_kernel():
    gate, up = (QuantLinear.from_linear(torch.nn.Linear(64, 40), "int4") for _ in range(2))
    dense, x = torch.nn.Linear(64, 40), torch.randn(2, 3, 64)
    for first, second in ((gate, up), (gate, dense), (dense, dense)):
        assert torch.equal(qkernels.swiglu(x, first, second), F.silu(first(x)) * second(x))
    with pytest.raises(qkernels.FormatError, match="in_features = 64"):
        qkernels.swiglu(torch.randn(2, 65), gate, up)


def test_opcheck_of_swiglu(on_the_gpu):
    gate, up, x, biases, _ = pair("u4_g64_zi_sf16", Case(48, 300, 2, 8), torch.float16, (None, torch.float32))
    operands = (*layout.prepare(gate)[2:6], biases[0], *layout.prepare(up)[2:6], biases[1])
    torch.library.opcheck(torch.ops.qkernels.cuda_f16_wN_swiglu.default, (x, *operands, gate.format.name, 48))


# -- what Python chooses ---------------------------------------------------------------------------------------------------------------

GPUS = {"H200": Gpu(132, 227 << 10, True), "A10": Gpu(72, 99 << 10, False), "T4": Gpu(40, 64 << 10, False)}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_blocks_fill_the_gpu_and_its_shared_memory_holds_them(gpu):
    for name in ("int4", "int8", "u4_g16_zf_sf16", "e2m1_g16_se4m3_t"):
        format = formats.get(name)
        for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (512, 8192), (1, 8), (128256, 8192)):
            columns = layout.tile_columns(format)
            run, tiles = w4_gemv.tiles_of_a_block(format, n, k, gpu), -(-k // columns)
            assert run % w4_gemv.WARPS == 0 and 0 < run <= w4_gemv.MOST_TILES
            numbers = 2 * 128 * w4_gemv.scales_of_a_tile(format, n, k) * (1 if format.zero == "none" else 2)
            room = min(run, tiles) * (16 * columns + numbers) + 8 * 8 * 36 * 4 + 128
            assert room <= gpu.shared_bytes / (1 if run == w4_gemv.WARPS else 2) - 1024
            assert run == w4_gemv.WARPS or -(-n // 32) * -(-tiles // (run - w4_gemv.WARPS)) >= w4_gemv.BUSY * gpu.processors
    int4 = formats.get("int4")
    runs = {(4096, 4096): 16, (6144, 4096): 32, (4096, 14336): 32, (28672, 4096): 32}  # the fastest of 8, 16, 24, 32 on an H200
    assert {shape: w4_gemv.tiles_of_a_block(int4, *shape, GPUS["H200"]) for shape in runs} == runs


def test_reasons():
    def reason(name, dtype=torch.bfloat16, sm=90):
        return why_not_of(w4_gemv.KERNEL, Problem(formats.get(name), 512, 1024, dtype=dtype, device=Device("cuda", sm=sm)))

    taken = [("int4", 90), ("nf4", 80), ("int8_asym", 120)]
    assert not any(reason(name, sm=sm) for name, sm in taken) and not reason("int4", torch.float16, sm=75)
    assert "bfloat16 activations on sm75" in reason("int4", sm=75) and "float32 activations" in reason("int4", torch.float32)
    assert "needs sm75" in reason("int4", torch.float16, sm=70)
    assert "u3b4" in reason("int3") and "e4m3" in reason("fp8") and "groups of 8" in reason("u4b8_g8_sf16")


def test_it_is_taken_where_nothing_else_runs_until_it_is_measured():
    def chosen(**more):
        return explain("int4", (4096, 4096), **more).kernel.name

    assert chosen(device="cuda:sm75", dtype=torch.float16) == w4_gemv.KERNEL.name
    assert chosen(device="cuda:sm80", m=1) != w4_gemv.KERNEL.name != chosen(device="cuda:sm90", m=8, batch_invariant=True)


def test_more_rows_are_multiplied_eight_by_eight(compiled, monkeypatch):
    """The launcher, whole, on the CPU: every launch gets what the op takes."""
    monkeypatch.setattr(torch.ops.qkernels, "w4_gemv", compiled.ops.w4_gemv, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(devices, "current", lambda device: Device("cuda", sm=90))
    for name, k in (("u4b8_g128_sf16", 4504), ("u8_g128_zf_sf16", 515)):
        q, x, bias = problem(name, Case(70, k, 19, 8), torch.bfloat16, torch.float32)
        y = w4_gemv.run(x.view(1, 19, k), layout.prepare(q), bias)
        assert y.shape == (1, 19, 70)
        assert_matmul_close(y[0], x, reference.decode(q, torch.float64), bias)


# -- the emulation sees faults -------------------------------------------------------------------------------------------------------

SOURCE, TILE = "w4_gemv.cu", "tile.cuh"
FEWER = [  # of a kernel that is broken one variant is enough, and compiled sooner
    (SOURCE, "x.scalar_type() == ScalarType::BFloat16 ? launch_codes<bf16> : launch_codes<f16>", "launch_codes<f16>"),
    (SOURCE, "if (a.table && mirrored) return launch_parts<T, Table<T, true>, false>(a, how);", ""),
    (SOURCE, "if (a.table) return launch_parts<T, Table<T>, false>(a, how);", ""),
    (SOURCE, "float_zero ? launch_parts<T, Int4<T>, true> : launch_parts<T, Int4<T>, false>;", "launch_parts<T, Int4<T>, false>;"),
    (SOURCE, "(bits == 4 ? of_4 : of_8)(a, how);", "of_4(a, how);"),
    (SOURCE, "const auto of_8 = float_zero ? launch_parts<T, Int8<T>, true> : launch_parts<T, Int8<T>, false>;", ""),
    (SOURCE, "if (a.per_tile == 1) return launch<T, Codes, 1, FLOAT_ZERO>(a, how);", ""),
    (SOURCE, "if (a.per_tile == 8) return launch<T, Codes, 8, FLOAT_ZERO>(a, how);", ""),
]
OTHERS_THEN = "for (int i = 0; inside && i < a.blocks_k; ++i) if (i != block_k)"
FAULTS = {
    "fragments in another order": ("{upper[s], lower[s], upper[s + 1], lower[s + 1]}", "{upper[s], upper[s + 1], lower[s], lower[s + 1]}"),
    "sums of the wrong half": ("multiply(parts[half], left", "multiply(parts[0], left"),
    "scales of the wrong part": ("scales + j / EACH * NUMBERS", "scales"),
    "zero points of the wrong part": ("load_shared(zero_of, zeros + j / EACH * NUMBERS)", "load_shared(zero_of, zeros)"),
    "sums of one part run into the next": ("if (j % EACH == 0) {", "if (j == 0) {"),
    "the wrong tile": ("? from : after", "? from - turn : after"),
    "words of the same rows again": ("here ? from : after", "here ? from : words_of(block_n)"),
    "numbers of the next rows over those of these": ("2 * room.numbers + room.set_bytes - set;", "set;"),
    "no numbers of the next rows": ("    if (more) numbers_of(next, next_set).copy();\n", ""),
    "the kernel before not waited for": ("  wait_for_previous();\n", ""),
    "copies not waited for": ("    copy_async_wait<0>();\n", ""),
    "x used before all of it is there": ("    __syncthreads();  // x and numbers are there", "    // x and numbers are there"),
    "sums of warps not yet there": ("    __syncthreads();\n    finish", "    finish"),
    "columns beyond the last": ("const int there = a.k - begin - i;", "const int there = a.k - begin - i + 8;"),
    "rows beyond the last": ("place < a.rows && token", "token"),
    "tokens beyond the last": (" && token < a.m;", ";"),
    "parts not yet seen by others": ("__threadfence();\n  __syncthreads();", "__syncthreads();", TILE),
    "a block's own part before the others": ("sum = 0;\n  for (int i = 0; inside && i < a.blocks_k; ++i)", OTHERS_THEN),
    "a counter left raised": ("if (threadIdx.x == 0) *counter = 0;", "", TILE),
}  # fmt: skip


FAULTS_OF_PAIRS = {
    "scales of the first weight for both": ("a.weight(threadIdx.x % 32).scales", "a.of[0].scales"),
    "words of the first weight for both": ("a.half = a.gated ? a.of[1].codes - a.of[0].codes :", "a.half ="),
    "zero points of the other weight": ("a.weight(threadIdx.x % 32).zeros", "a.of[a.gated && threadIdx.x % 32 < 16].zeros"),
    "rows of another block": ("block * (ROWS / 2) + r", "(block ^ 1) * (ROWS / 2) + r"),
    "the other sum of another row": ("__shfl_xor_sync(~0u, sum, ROWS / 2)", "__shfl_xor_sync(~0u, sum, ROWS / 4)"),
    "both halves are stored": ("(!a.gated || lane < ROWS / 2)", "true"),
    "parts of two tokens in one place": ("int64_t(token) * a.rows + place", "int64_t(token) * a.n + place"),
    "no bias for the second": ("inside && of.bias)", "inside && of.bias && lane < 16)"),
}


@pytest.mark.parametrize("fault", [*FAULTS_OF_PAIRS][: None if SWEEP else 1])
def test_a_fault_of_the_gated_form_is_seen(folder, fault):
    broken = build("w4_gemv", folder, [*FEWER, (SOURCE, *FAULTS_OF_PAIRS[fault])])
    with pytest.raises((AssertionError, RuntimeError)):
        check_gated(broken, *cut_pair(), range(10))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(folder, fault):
    old, new, *file = FAULTS[fault]
    broken = build("w4_gemv", folder, [*FEWER, (*(file or [SOURCE]), old, new)])
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, *cut(), seeds=range(20))
        check(broken, *cancelling(), seeds=range(20))
