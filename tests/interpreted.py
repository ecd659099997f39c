"""The Triton kernels under the interpreter. `test_triton.py` runs this in its own process: TRITON_INTERPRET is read at import."""

import itertools

import interpreter  # noqa: F401  for what it changes
import pytest
import torch
from cases import SWEEP, assert_rows, random_quant, whole, with_parts

from qkernels import UnsupportedError, formats, reference
from qkernels.kernels import registry
from qkernels.kernels.device import Device
from qkernels.kernels.triton import f16_backward, f16_dequantize, f16_gemm, layout, s8_gemm
from qkernels.kernels.triton.f16_backward import Tile as GradTile
from qkernels.kernels.triton.f16_format import Stored
from qkernels.kernels.triton.f16_gemm import Tile
from qkernels.kernels.triton.launch import Gpu
from qkernels.testing import assert_matmul_close

pytestmark = pytest.mark.usefixtures("one_thread")
H100 = Device("cuda", sm=90)
BIASED = ("u4b8_g64_zf_sf16", "u8b128_g64_zf_sf16", "u4b8_g-1_zf_sf16", "u5b16_g64_zf_sbf16")  # float zeros of codes that have a bias
PLANES = ("int3_g256", "int5_g16", "int6_g-1")  # codes of two planes
MINIMA = ("u8_g-1_zm_sf32", "u5b3_g64_zm_sbf16", "u4b3_g-1_sf16")  # and a bias that is not in the middle
MORE = [
    formats.get(n)
    for n in (
        "int4_g32", "int4_g-1", "int4_g256", "int8_g32", "u8_g16_zi_sf16", "u4_g64_zi_sbf16", "u2b2_g512_sf32", *BIASED, *PLANES, *MINIMA,
    )
]  # fmt: skip


def held(format):
    return layout.why_not(registry.Problem(format, 64, 1024, device=H100)) is None


ALL = [f for f in (*formats.all_formats(), *MORE) if held(f)]
NEWER = [f for f in ALL if f.block is not None or f.zero == "min"]
FORMATS = ALL if SWEEP else [f for f in ALL if f not in NEWER]
# scale alone, minimum, byte x scale signed and not, with minimum and without; bias, one bit, several float8 a block
FEW = ("q4_0", "q5_1", "q2_k", "q3_k", "q4_k", "q6_k", "q1_0", "q2_0", "ggml_mxfp4", "ggml_nvfp4", "u4_g32_zm_sf16", "u5b3_g64_zm_sbf16")
ROWS = (0, 1, 3, 8, 16, 17, 33, 130, 300)
SHAPES = ((1, 8), (17, 40), (70, 300), (130, 515), (64, 1024))
BLOCK_SHAPES = ((1, 256), (17, 256), (70, 512), (130, 768), (64, 1024))
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
some_formats = pytest.mark.parametrize("format", FORMATS if SWEEP else FORMATS[::3], ids=lambda f: f.name)


def shapes(format):
    return SHAPES if format.block is None else BLOCK_SHAPES


def able(format, n, k):
    return f16_gemm.KERNEL.why_not(registry.Problem(format, n, k, device=H100)) is None


def test_formats():
    assert {f.bits for f in FORMATS} >= {2, 3, 4, 5, 6, 8} and len(FORMATS) >= 40
    assert {f.zero for f in ALL} == {"none", "int", "float", "min"} and {f.scale for f in FORMATS} == {"f32", "f16", "bf16", "e4m3", "e8m0"}
    few = [f for f in NEWER if f.name in FEW]
    kinds = [{(layout.held(f).scale, layout.held(f).zero) for f in some if f.block is not None} for some in (NEWER, few)]
    assert len(few) == len(FEW) and kinds[0] == kinds[1]


@pytest.mark.parametrize("name", FEW)
def test_blocks_and_minima(name):
    """A part of what `make sweep` does with them as with all others, which follows."""
    n, k = 70 if name in ("q3_k", "q4_k") else 17, 512
    q = random_quant(formats.get(name), n, k, perm=True)
    packed, weight = f16_gemm.prepare(q), reference.decode(q, torch.float64)
    assert f16_gemm.restore(packed).equal(q)
    torch.testing.assert_close(f16_gemm.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)
    x, grad, bias = torch.randn(17, k).bfloat16(), torch.randn(3, n).half(), torch.randn(n).bfloat16()
    assert_matmul_close(f16_gemm.run(x, packed, bias), x, weight, bias)
    assert_matmul_close(f16_gemm.KERNEL.backward(grad, packed), grad, weight.t())


@every_format
def test_against_fp64(format):
    ran = 0
    for i, ((n, k), m) in enumerate(itertools.product(shapes(format), ROWS)):
        if not able(format, n, k) or (m > 100 and n > 20) or (i + len(format.name)) % (2 if SWEEP else 3):  # slow here: a part of the cases
            continue
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i // 3 % 3]  # one case in three is taken: each dtype has some
        q = random_quant(format, n, k, seed=i, perm=i % 4 == 1)
        x = torch.randn(m, 2 * k).to(dtype)
        x = (x[:, :k], x[:, ::2], x[:, :k].reshape(1, m, k), x[:, :k].contiguous())[i // 2 % 4]
        bias = torch.randn(n).to(dtype) if i % 5 < 2 else None
        y = f16_gemm.run(x, f16_gemm.prepare(q), bias)
        assert_matmul_close(y, x, reference.decode(q, torch.float64), bias)
        ran += m > 0
    assert ran > 5


@every_format
def test_restore_inverts_prepare(format):
    for (n, k), perm in itertools.product(shapes(format), (False, True)):
        if able(format, n, k):
            q = random_quant(format, n, k, perm=perm)
            packed = f16_gemm.prepare(q)
            assert f16_gemm.restore(packed).equal(q)
            assert_rows(f16_gemm.KERNEL, packed, q)
            torch.testing.assert_close(f16_gemm.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)


@some_formats
def test_nan_and_inf_stay_in_their_row_and_column(format):
    k = whole(format, 300)
    q = random_quant(format, 48, k)
    if not able(format, 48, k):
        pytest.skip("not at this K")
    x = torch.randn(20, k, dtype=torch.float16)
    x[7, 5] = float("inf")
    x[9, k - 1] = float("nan")
    y = f16_gemm.run(x, f16_gemm.prepare(q), None)
    assert not y[7].isfinite().all() and y[9].isnan().all()
    assert y[[i for i in range(20) if i not in (7, 9)]].isfinite().all()
    if format.group[0] != 1:
        return

    def with_nan(scales):
        scales[3, -1] = torch.nan
        return scales

    if format.block is None:
        with_nan(q.scales)
    else:
        q = with_parts(q, d=lambda d: with_nan(d.clone()))
    y = f16_gemm.run(torch.randn(5, k, dtype=torch.float16), f16_gemm.prepare(q), None)
    assert y[:, 3].isnan().all() and int(y.isfinite().sum()) == 5 * 47


CUT = ("int4", "int4_g32", "hqq4", "nvfp4", "int8", "fp8_block", "int2", "int3", "int5")


@pytest.mark.parametrize(("name", "sums"), [*itertools.product(CUT, (False, True)), ("q4_k", False)])
def test_every_way_of_cutting(name, sums):
    """Tiles, splits (more than there are tiles of K, too), steps: the sums differ by their order alone."""
    format, n = formats.get(name), 70
    k = whole(format, 400)
    q = random_quant(format, n, k)
    packed, weight = f16_gemm.prepare(q), reference.decode(q, torch.float64)
    cases = ((5, (64, 16), 1, 8, 2), (20, (128, 16), 3, 1, 1), (17, (64, 32), 16, 2, 2))
    for m, (block_n, block_m), split, raster, step in cases[: 1 if format.block and not SWEEP else None]:
        x, out = torch.randn(m, k).to(torch.float16), torch.empty(m, n, dtype=torch.float16)
        tile = Tile(block_n, block_m, 4, split_k=split, sums=sums, raster=raster, step=step)
        f16_gemm.fused(x, Stored(*packed[2:6]), None, format, out, tile)
        assert_matmul_close(out, x, weight)
        again = torch.empty_like(out)
        f16_gemm.fused(x, Stored(*packed[2:6]), None, format, again, tile)  # counters were left as they were found
        assert torch.equal(out, again)


@pytest.mark.parametrize("name", ["int4_g32", "q6_k", "q4_k", "q2_k", "q5_1", "u5b3_g64_zm_sbf16"])
def test_weights_are_rounded_once(name, monkeypatch):
    """In the products' own type, fp16, as on a GPU. Activations are positive: what scales and minima lose shows for all of a group."""
    import triton.language as tl

    monkeypatch.setattr(f16_gemm, "arithmetic", lambda *args: {"ASM": None, "DTYPE": tl.float16})
    q, x = random_quant(formats.get(name), 17, 512), torch.rand(17, 512).half()
    weight, y = reference.decode(q, torch.float64), unrounded(f16_gemm.fused, x, q)
    lost, of_one = (y - x.double() @ weight.t()).norm(), (x.double() @ (weight.half().double() - weight).t()).norm()
    assert 0.95 * of_one < lost < 1.05 * of_one


@every_format
def test_gradients_against_fp64(format):
    ran = 0
    for i, ((n, k), m) in enumerate(itertools.product(shapes(format), (0, 1, 3, 17, 33, 70))):
        if not able(format, n, k) or (m and (i + len(format.name)) % (2 if SWEEP else 4)):
            continue
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        q, grad = random_quant(format, n, k, seed=i, perm=i % 4 == 1), torch.randn(m, 2 * n).to(dtype)
        grad = (grad[:, :n], grad[:, ::2], grad[:, :n].reshape(1, m, n), grad[:, :n].contiguous())[i // 2 % 4]
        got = f16_gemm.KERNEL.backward(grad, f16_gemm.prepare(q))
        assert_matmul_close(got, grad, reference.decode(q, torch.float64).t())
        ran += m > 0
    assert ran > 2


@pytest.mark.parametrize("name", ["int4_g32", "hqq4", "int8"])
def test_every_way_of_cutting_gradients(name):
    """Splits of N, more than there are blocks of it, too; counters are left as they were found."""
    format, n, k = formats.get(name), 200, 300
    q = random_quant(format, n, k)
    stored, weight = Stored(*f16_gemm.prepare(q)[2:6]), reference.decode(q, torch.float64)
    for m, tile in ((5, GradTile(16, 64, split_n=3)), (20, GradTile(32, 64, raster=1, split_n=6)), (70, GradTile(64, 128))):
        grad = torch.randn(m, n).to(torch.float16)
        out, again = torch.empty(2, m, k, dtype=torch.float16)
        for result in (out, again):
            f16_backward.fused(grad, stored, format, result, tile)
        assert_matmul_close(out, grad, weight.t())
        assert torch.equal(out, again)


def test_many_rows_of_gradients_go_by_slices(monkeypatch):
    monkeypatch.setattr(f16_backward, "TOKENS_FUSED", 8)
    monkeypatch.setattr(f16_dequantize, "SLICE_BYTES", 1)  # a tile of columns at a time
    for name in ("int4", "int4_g-1", "int2", "int8_g32", "fp8_block"):
        q = random_quant(formats.get(name), 70, 600)
        for dtype in (torch.float16, torch.float32):
            grad = torch.randn(9, 70).to(dtype)
            got = f16_gemm.KERNEL.backward(grad, f16_gemm.prepare(q))
            assert_matmul_close(got, grad, reference.decode(q, torch.float64).t())


@some_formats
def test_nan_and_inf_stay_in_their_row_of_gradients(format):
    k = whole(format, 300)
    q = random_quant(format, 70, k)
    if not able(format, 70, k):
        pytest.skip("not at this K")
    grad = torch.randn(20, 70, dtype=torch.float16)
    grad[7, 5], grad[9, 69] = float("inf"), float("nan")
    got = f16_gemm.KERNEL.backward(grad, f16_gemm.prepare(q))
    assert not got[7].isfinite().all() and got[9].isnan().all()
    assert got[[i for i in range(20) if i not in (7, 9)]].isfinite().all()


def test_many_rows_go_by_slices(monkeypatch):
    monkeypatch.setattr(f16_gemm, "TOKENS_FUSED", 8)
    monkeypatch.setattr(f16_dequantize, "SLICE_BYTES", 64)  # 128 rows of the weight at a time
    q = random_quant(formats.get("int4"), 300, 256)
    for dtype in (torch.float16, torch.float32):
        x, bias = torch.randn(9, 256).to(dtype), torch.randn(300).to(dtype)
        assert_matmul_close(f16_gemm.run(x, f16_gemm.prepare(q), bias), x, reference.decode(q, torch.float64), bias)


@pytest.mark.parametrize(("name", "k"), [("u4b8_g128_sf32", 1024), ("u4_g128_zi_sf32", 700), ("int4_g-1", 700), ("u8b128_g128_sf32", 600)])
def test_rows_do_not_depend_on_the_batch(name, k, monkeypatch):
    monkeypatch.setattr(f16_gemm, "ROWS_INVARIANT", 50)
    monkeypatch.setattr(f16_gemm, "gpu_of", lambda device: Gpu(4, 227 << 10, early=False))  # so small that K is cut by the number of rows
    q, x = random_quant(formats.get(name), 70, k), whole_numbers(140, k)
    y = unrounded(f16_gemm._invariant, x, q)
    assert_matmul_close(f16_gemm.INVARIANT.run(x, f16_gemm.prepare(q), None), x, reference.decode(q, torch.float64))
    for first, m in ((0, 1), (50, 1), (139, 1), (7, 16), (40, 17), (90, 33), (1, 139)):
        rows = slice(first, first + m)
        assert torch.equal(unrounded(f16_gemm._invariant, x[rows], q), y[rows]), (first, m)
    if k == 1024:  # where it may, the batch shows
        assert not torch.equal(unrounded(f16_gemm.fused, x[:1], q), unrounded(f16_gemm.fused, x, q)[:1])


def whole_numbers(m, k):
    """x of which the products with codes are summed exactly within a tile: the last bits tell in what order tiles are scaled and summed."""
    return torch.randint(-3, 4, (m, k), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def unrounded(multiply, x, q):
    """The float32 sums, before they are rounded to the type of x."""
    out = torch.empty(len(x), q.shape[0])
    multiply(x, Stored(*f16_gemm.prepare(q)[2:6]), None, q.format, out)
    return out


@pytest.mark.parametrize("name", ["int4", "int4_g32", "int4_g-1", "int4_asym", "nf4", "int8", "int2", "fp8_block", "q2_k", "q4_k"])
def test_invariant_tiles(name):
    """One split of K and one place of scales for all m; and they fit every GPU."""
    format = formats.get(name)
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (1024, 8192), (70, 300)):
        for gpu in (Gpu(132, 227 << 10, True), Gpu(84, 99 << 10, False)):
            tiles = [f16_gemm.choose_invariant(format, n, k, m, gpu) for m in (*range(1, 300), 512, 1024, 2048, 100000)]
            assert len({(t.split_k, t.sums) for t in tiles}) == 1
            assert tiles[0].split_k == f16_gemm.choose_for(format, n, k, 1, gpu).split_k
            assert all(t.num_stages * f16_gemm.stage_bytes(t, layout.tile_columns(format)) <= gpu.shared_bytes for t in tiles)


def test_invariant_says_why_not():
    problem = registry.Problem(formats.get("int4"), 64, 512, dtype=torch.float32, device=H100, batch_invariant=True)
    assert "float32" in f16_gemm.INVARIANT.why_not(problem)
    assert "batch_invariant=True" in registry.why_not(f16_gemm.KERNEL, problem)
    packed = f16_gemm.prepare(random_quant(formats.get("int4"), 64, 512))
    with pytest.raises(UnsupportedError, match="float32"):
        f16_gemm.INVARIANT.run(torch.randn(2, 512), packed, None)


def test_opcheck():
    q = random_quant(formats.get("int4_asym"), 48, 256)
    packed, x, bias = f16_gemm.prepare(q), torch.randn(3, 256), torch.randn(48)
    ops = torch.ops.qkernels
    for op, args in (
        (ops.triton_f16_gemm.default, (x, *packed[2:6], bias, q.format.name, 48)),
        (ops.triton_f16_gemm.default, (x.half(), *packed[2:6], None, q.format.name, 48, True)),
        (ops.triton_dequantize.default, (*packed[2:6], q.format.name, 48, 256)),
        (ops.triton_f16_backward.default, (torch.randn(3, 48).half(), *packed[2:6], q.format.name, 48, 256)),
    ):
        torch.library.opcheck(op, args)


# -- int8 activations -----------------------------------------------------------------------------------------------------------------

INT8 = [formats.get(n) for n in ("int8", "int8_asym", "u8b128_g-1_sf16", "u8_g-1_zi_sbf16", "u8b128_g512_sf32")]
every_int8_format = pytest.mark.parametrize("format", INT8, ids=lambda f: f.name)


def why_not_s8(name, n=48, k=300, device=H100):
    return s8_gemm.KERNEL.why_not(registry.Problem(formats.get(name), n, k, device=device))


def assert_s8_close(y, x, q, bias=None):
    assert_matmul_close(y, x, reference.decode(q, torch.float64), bias, int8=q, act_group=None)


def s8_case(format, i, m, n, k):
    """The i-th of many cases: a weight, activations of a type and of strides, a bias or none."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
    q = random_quant(format, n, k, seed=i, perm=i % 4 == 1)
    x = torch.randn(m, 2 * k).to(dtype)
    x = (x[:, :k], x[:, ::2], x[:, :k].reshape(1, m, k), x[:, :k].contiguous())[i // 2 % 4]
    return q, x, torch.randn(n).to(dtype) if i % 5 < 2 else None


def assert_s8_exact(gemm, format):
    """Activations that int8 holds exactly, with the bound of float kernels; a row of zeros stays one."""
    for n, k in ((33, 511), (5, 40)):
        q, x = random_quant(format, n, k), torch.randn(18, k).sign() * 0.75
        assert_matmul_close(gemm.run(x, gemm.prepare(q), None), x, reference.decode(q, torch.float64))
        x[3], x[4, 1:], x[5] = 0, 0, -0.75
        y = gemm.run(x, gemm.prepare(q), None)
        assert_matmul_close(y, x, reference.decode(q, torch.float64))
        assert not y[3].any()


def s8_product(x, q, tile):
    out = torch.empty(len(x), q.shape[0], dtype=x.dtype)
    s8_gemm.multiply(x, *s8_gemm.prepare(q)[2:5], None, out, tile)
    return out


@every_int8_format
def test_s8_against_fp64(format):
    for i, ((n, k), m) in enumerate(itertools.product(((1, 8), (17, 40), (70, 300), (131, 511)), (0, 1, 3, 16, 17, 33))):
        q, x, bias = s8_case(format, i, m, n, k)
        assert_s8_close(s8_gemm.run(x, s8_gemm.prepare(q), bias), x, q, bias)


@every_int8_format
def test_s8_is_exact_where_int8_holds_the_activations(format):
    """Sums so large that float32 would round them, in any order."""
    assert_s8_exact(s8_gemm, format)


def test_s8_rounds_to_nearest():
    """A weight of one column a row shows the codes: x · 127 / largest, ties to even."""
    k = 16
    q = random_quant(formats.get("int8"), k, k)
    q.codes[:], q.scales[:] = 128 + torch.eye(k, dtype=torch.uint8), 1
    x = torch.cat([torch.full((68, 1), 127.0), torch.linspace(-127, 127, 68 * 15).view(15, 68).t()], 1)
    x[0, 1:4] = torch.tensor([0.5, 1.5, -2.5])
    assert torch.equal(s8_gemm.run(x, s8_gemm.prepare(q), None), x.round())


@every_int8_format
def test_s8_restore_inverts_prepare(format):
    for (n, k), perm in itertools.product(((1, 8), (17, 40), (70, 300), (64, 384)), (False, True)):
        q = random_quant(format, n, k, perm=perm)
        packed = s8_gemm.prepare(q)
        assert s8_gemm.restore(packed).equal(q)
        assert_rows(s8_gemm.KERNEL, packed, q)
        assert packed.weight.dtype == torch.int8 and packed.weight.shape == (n, -(-k // 128) * 128)
        assert int(packed.weight[0, k - 1]) == int(q.codes[0, k - 1]) - 128 and not packed.weight[:, k:].any()
        torch.testing.assert_close(s8_gemm.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)


@every_int8_format
def test_s8_nan_and_inf_stay_in_their_row_and_column(format):
    q, x = random_quant(format, 48, 300), torch.randn(20, 300, dtype=torch.float16)
    x[7, 5], x[8, 0], x[9, 299] = float("inf"), -float("inf"), float("nan")
    y = s8_gemm.run(x, s8_gemm.prepare(q), None)
    assert y[7:10].isnan().all()
    good = [i for i in range(20) if i not in (7, 8, 9)]
    assert torch.equal(y[good], s8_gemm.run(x[good], s8_gemm.prepare(q), None))
    q.scales[3] = torch.nan
    y = s8_gemm.run(x[good], s8_gemm.prepare(q), None)
    assert y[:, 3].isnan().all() and int(y.isfinite().sum()) == 17 * 47


def test_s8_extremes():
    """The largest and smallest rows; such as are too small for a scale count as zeros."""
    q = random_quant(formats.get("int8"), 20, 300)
    for size in (1e37, 1e-30, 1e-40):
        x = torch.randn(3, 300).clamp(-3, 3) * size
        y = s8_gemm.run(x, s8_gemm.prepare(q), None)
        if size > 1e-38:
            assert_s8_close(y, x, q)
        else:
            assert not y.any()


@pytest.mark.parametrize("name", ["int8", "int8_asym"])
def test_s8_every_way_of_cutting(name):
    """Tiles, splits (more than there are tiles of K, too): the same bits."""
    q, x = random_quant(formats.get(name), 140, 1100), torch.randn(33, 1100, dtype=torch.float16)
    want = s8_product(x, q, s8_gemm.Tile(64, 16, 4))
    assert_s8_close(want, x, q)
    for block_n, block_m, split, raster in ((64, 16, 16, 1), (128, 32, 3, 8), (128, 256, 1, 2)):
        tile = s8_gemm.Tile(block_n, block_m, 4, split_k=split, raster=raster)
        for _ in range(2):  # counters were left as they were found
            assert torch.equal(s8_product(x, q, tile), want)
    assert torch.equal(s8_product(x[5:6], q, s8_gemm.Tile(64, 16, 4, split_k=4)), want[5:6])


def test_s8_says_why_not():
    assert all(why_not_s8(f.name) is None for f in INT8)
    for name, reason in {
        "int4": "u4b8", "int8_g32": "groups of 1 x 32", "hqq8": "float", "e4m3_g-1_sf32": "e4m3", "u8b128_g-1_se8m0": "e8m0",
        "u8_g-1_sf32": "u8", "u8b128_g-1_sf32_t": "one of the tensor", "u8b128_g-1x16_sf32": "groups of 16 x",
    }.items():  # fmt: skip
        assert reason in why_not_s8(name), name
    assert "sm75" in why_not_s8("int8", device=Device("cuda", sm=75)) and "cpu" in why_not_s8("int8", device=Device("cpu"))
    assert why_not_s8("int8", k=132104) is None and "K = 132105" in why_not_s8("int8", k=132105)
    assert why_not_s8("int8_asym", k=66311) is None and "66311" in why_not_s8("int8_asym", k=66312)


@pytest.mark.parametrize("name", ["int8", "int8_asym"])
def test_s8_the_largest_sums(name):
    """The longest rows of the largest codes: int32 holds them."""
    k = 132104 if name == "int8" else 66311
    q = random_quant(formats.get(name), 2, k)
    q.codes[0], q.codes[1] = 0, 255
    if q.zeros is not None:
        q.zeros[0], q.zeros[1] = 255, 0
    for sign in (1.0, -1.0):
        x = torch.full((1, k), sign)
        assert_matmul_close(s8_gemm.run(x, s8_gemm.prepare(q), None), x, reference.decode(q, torch.float64))


def test_s8_opcheck():
    for name in ("int8", "int8_asym"):
        packed = s8_gemm.prepare(random_quant(formats.get(name), 48, 256))
        for x, bias in ((torch.randn(3, 256), torch.randn(48)), (torch.randn(2, 1, 256, dtype=torch.float16), None)):
            torch.library.opcheck(torch.ops.qkernels.triton_s8_gemm.default, (x, *packed[2:5], bias))
