"""triton_s8_w4_gemm under the interpreter. `test_triton.py` runs this in its own process: TRITON_INTERPRET is read at import."""

import itertools

import pytest
import torch
from cases import assert_rows, random_quant
from interpreted import H100, assert_s8_close, assert_s8_exact, s8_case

from qkernels import FormatError, formats, reference
from qkernels.formats.packing import unpack
from qkernels.kernels import registry
from qkernels.kernels.device import Device
from qkernels.kernels.triton import s8_w4_gemm
from qkernels.kernels.triton.int8 import Stored, Tile
from qkernels.kernels.triton.launch import SPLITS
from qkernels.testing import assert_matmul_close

pytestmark = pytest.mark.usefixtures("one_thread")
ODD = ("u4_g-1_zi_sbf16", "u4b8_g96_sf32", "u4_g32_zi_sf16", "u4_g64_zi_sf32", "u4b8_g384_sbf16", "u4_g256_zi_sbf16")
FORMATS = [formats.get(n) for n in ("int4", "int4_asym", "int4_g32", "int4_g64", "int4_g256", "int4_g-1", *ODD)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def why_not(name, n=48, k=300, device=H100):
    return s8_w4_gemm.KERNEL.why_not(registry.Problem(formats.get(name), n, k, device=device))


def product(x, q, tile, bias=None):
    out = torch.empty(len(x), q.shape[0], dtype=x.dtype)
    s8_w4_gemm.multiply(x, Stored(*s8_w4_gemm.prepare(q)[2:5]), bias, q.format, out, tile)
    return out


@every_format
def test_against_fp64(format):
    for i, ((n, k), m) in enumerate(itertools.product(((1, 8), (17, 40), (70, 300), (131, 511)), (0, 1, 3, 8, 16, 17, 33, 130))):
        if (i + i // 8 + len(format.name)) % 2 or (m == 130 and n > 20):  # slow here: each format half of the cases
            continue
        q, x, bias = s8_case(format, i, m, n, k)
        assert_s8_close(s8_w4_gemm.run(x, s8_w4_gemm.prepare(q), bias), x, q, bias)


@every_format
def test_is_exact_where_int8_holds_the_activations(format):
    assert_s8_exact(s8_w4_gemm, format)


@every_format
def test_at_both_ends_of_its_range(format):
    """All codes, and zeros, lowest or highest."""
    q, x = random_quant(format, 12, 300), torch.randn(5, 300).sign()
    for code, zero in itertools.product((0, 15), (0, 15) if q.zeros is not None else (8,)):
        q.codes[:] = code * 17
        if q.zeros is not None:
            q.zeros[:] = zero
        assert_matmul_close(s8_w4_gemm.run(x, s8_w4_gemm.prepare(q), None), x, reference.decode(q, torch.float64))


@every_format
def test_layout_is_as_documented(format):
    """The docstring of s8_w4_gemm.py, as a function: where the code of (n, k) lies."""
    n, k = 5, 768
    q = random_quant(format, n, k)
    weight = s8_w4_gemm.prepare(q).weight
    tile = next(t for t in (128, 64, 32) if format.group_extent(n, k)[1] % t == 0)
    assert weight.shape == (k // tile, n, tile // 2)
    codes = [[code_at(weight, format, tile, row, column) for column in range(k)] for row in range(n)]
    assert torch.equal(torch.tensor(codes, dtype=torch.uint8), unpack(q.codes, 4, k))


def code_at(weight, format, tile, n, k):
    within = k % tile
    s, h, c, e = within // 32, within % 32 // 16, within % 16 // 4, within % 4
    nibble = int(weight[k // tile, n, tile // 8 * c + 4 * s + e]) >> 4 * h & 15
    return nibble if format.zero == "int" else nibble ^ 8


@every_format
def test_restore_inverts_prepare(format):
    for (n, k), perm in itertools.product(((1, 8), (17, 40), (70, 300), (64, 384)), (False, True)):
        q = random_quant(format, n, k, perm=perm)
        packed = s8_w4_gemm.prepare(q)
        assert s8_w4_gemm.restore(packed).equal(q)
        assert_rows(s8_w4_gemm.KERNEL, packed, q)
        torch.testing.assert_close(s8_w4_gemm.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)
    for t in (packed.weight, packed.scales, packed.zeros):
        assert t is None or t.is_contiguous()


@every_format
def test_nan_and_inf_stay_in_their_row_and_column(format):
    q, x = random_quant(format, 48, 300), torch.randn(20, 300, dtype=torch.float16)
    x[7, 5], x[8, 0], x[9, 299] = float("inf"), -float("inf"), float("nan")
    y = s8_w4_gemm.run(x, s8_w4_gemm.prepare(q), None)
    assert y[7:10].isnan().all()
    good = [i for i in range(20) if i not in (7, 8, 9)]
    assert_s8_close(y[good], x[good], q)
    q.scales[3, -1] = torch.nan
    y = s8_w4_gemm.run(x[good], s8_w4_gemm.prepare(q), None)
    assert y[:, 3].isnan().all() and int(y.isfinite().sum()) == 17 * 47


@pytest.mark.parametrize("name", ["int4", "int4_asym", "int4_g-1", "u4_g-1_zi_sbf16"])
def test_every_way_of_cutting(name):
    """Every split (more than there are tiles of K, too): the same bits again, and where sums are exact the same as of any other."""
    format = formats.get(name)
    q, x = random_quant(format, 70, 600), torch.randn(17, 600, dtype=torch.float16)
    want = product(x, q, Tile(64, 16, 4))
    assert_s8_close(want, x, q)
    for block_n, block_m, split, raster in [(128, 16, s, 1) for s in SPLITS[1:]] + [(64, 32, 3, 1), (64, 256, 1, 2)]:
        tile = Tile(block_n, block_m, 4, split_k=split, raster=raster)
        y = product(x, q, tile)
        assert_s8_close(y, x, q)
        assert torch.equal(product(x, q, tile), y)  # counters were left as they were found
        assert torch.equal(product(x[5:6], q, tile), y[5:6]), "a row depends on the others"
        if format.group[1] == -1 or split == 1:
            assert torch.equal(y, want)


def test_longest_rows():
    """int32 holds the sums of the longest rows of the largest codes, where one scale covers them; of groups any length is taken."""
    for name, k in (("int4_g-1", 132104), ("u4_g-1_zi_sbf16", 1127288)):
        assert why_not(name, k=k) is None and f"K = {k + 1}" in why_not(name, k=k + 1)
    assert why_not("int4", k=2_000_000) is None
    k = 132104  # with zeros it would take minutes
    q = random_quant(formats.get("int4_g-1"), 2, k)
    q.codes[0], q.codes[1] = 0, 255
    x = torch.tensor([[1.0], [-1.0]]).expand(2, k)
    assert_matmul_close(s8_w4_gemm.run(x, s8_w4_gemm.prepare(q), None), x, reference.decode(q, torch.float64))


def test_says_why_not():
    assert all(why_not(f.name) is None for f in FORMATS)
    for name, reason in {
        "int8": "u8b128", "hqq4": "float", "nf4": "nf4", "int2": "u2b2", "int4_g16": "groups of 1 x 16", "int4_g80": "groups of 1 x 80",
        "u4_g64_sf16": "u4", "u4b8_g64_se8m0": "e8m0", "u4b8_g64_sf32_t": "one of the tensor", "u4b8_g64x16_sf32": "groups of 16 x 64",
    }.items():  # fmt: skip
        assert reason in why_not(name), name
    assert "sm75" in why_not("int4", device=Device("cuda", sm=75)) and "cpu" in why_not("int4", device=Device("cpu"))


def test_refuses_what_does_not_fit():
    packed = s8_w4_gemm.prepare(random_quant(formats.get("int4"), 8, 300))
    with pytest.raises(FormatError, match="385 columns; the weight has room for 384"):
        s8_w4_gemm.run(torch.randn(2, 385), packed, None)
    with pytest.raises(FormatError, match="0 columns"):
        s8_w4_gemm.run(torch.randn(2, 0), packed, None)


def test_opcheck():
    for name in ("int4", "int4_asym", "int4_g-1"):
        format = formats.get(name)
        packed = s8_w4_gemm.prepare(random_quant(format, 48, 256))
        for x, bias in ((torch.randn(3, 256), torch.randn(48)), (torch.randn(2, 1, 256, dtype=torch.float16), None)):
            torch.library.opcheck(torch.ops.qkernels.triton_s8_w4_gemm.default, (x, *packed[2:5], bias, format.name))
