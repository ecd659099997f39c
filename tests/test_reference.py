"""The judge, against independent judges."""

import pytest
import torch
from cases import plain, random_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import FormatError, formats, reference, rtn
from qkernels.formats import Float
from qkernels.formats.packing import unpack
from qkernels.testing import assert_matmul_close

ALL = plain(formats.all_formats())


@pytest.mark.parametrize(("code", "dtype"), [(Float(4, 3), torch.float8_e4m3fn), (Float(5, 2), torch.float8_e5m2)])
def test_fp8_values_are_torchs(code, dtype):
    theirs = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).double()
    torch.testing.assert_close(reference.code_values(code, torch.float64), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("code", "dtype"), [(Float(4, 3), torch.float8_e4m3fn), (Float(5, 2), torch.float8_e5m2)])
def test_fp8_rounds_as_torchs(code, dtype):
    values = torch.cat([torch.randn(20000) * 10, torch.randn(20000) * 1e-2, torch.tensor([0.0, -0.0])])
    grid = torch.tensor([v for v in code.values if v == v and abs(v) != float("inf")]).sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([values, ties, grid]).clamp(grid[0], grid[-1])
    assert torch.equal(reference.nearest_code(values, code), values.to(dtype).view(torch.uint8))


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    values = reference.code_values(Float(2, 1))
    for sign in (1.0, -1.0):
        assert values[reference.nearest_code(sign * ties, Float(2, 1)).int()].tolist() == [sign * v for v in expected]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_codebooks_are_those_of_bitsandbytes(name):
    from bitsandbytes import functional as bnb

    q = random_quant(formats.get(name), 6, 128)
    swapped = ((q.codes & 15) << 4 | q.codes >> 4).reshape(-1, 1)
    code, shape = bnb.get_4bit_type(name, device="cpu"), torch.Size((6, 128))
    state = bnb.QuantState(q.scales.float().reshape(-1), shape=shape, code=code, blocksize=64, quant_type=name, dtype=torch.float32)
    torch.testing.assert_close(reference.decode(q), bnb.dequantize_4bit(swapped, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_int4_is_torchs(group):
    """torch's packed int4: (code - 8) * scale + zero in bf16; with x = 1 its product is the weight."""
    q = random_quant(formats.get(f"u4b8_g{group}_sbf16"), 32, 256)
    codes, scales = unpack(q.codes, 4, 256), q.scales.t().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1)
    theirs = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(256, dtype=torch.bfloat16), packed, group, scales_and_zeros).t()
    assert torch.equal(reference.decode(q).bfloat16(), theirs)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 150), st.integers(0, 10**6))
def test_encoding_what_was_decoded_changes_nothing(format, n, k, seed):
    q = random_quant(format, n, k, seed)
    again = reference.encode(reference.decode(q), format, q.scales.float(), None if q.zeros is None else q.zeros.float(), q.tensor_scale)
    tolerance = {"rtol": 1e-6, "atol": 0.0} if format.zero != "float" else {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(reference.decode(again), reference.decode(q), **tolerance)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 150), st.integers(0, 10**6), st.integers(-30, 30))
def test_rtn_picks_the_nearest_value(format, n, k, seed, exponent):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    try:
        q = rtn(weight, format)
    except FormatError as error:
        assert format.scale in ("f16", "e4m3") and "use a format with sf32 scales" in str(error)
        return
    scale = reference.spread(q.scales.double(), format, n, k) * (1.0 if q.tensor_scale is None else q.tensor_scale.double())
    zero = 0.0 if q.zeros is None else reference.spread(q.zeros.double(), format, n, k)
    values = reference.code_values(format.code, torch.float64)
    values = values[torch.isfinite(values)]
    zero = zero.expand(n, k)[..., None] if isinstance(zero, torch.Tensor) else zero
    scale_of = scale.expand(n, k)[..., None]
    choices = values * scale_of + zero if format.zero == "min" else (values - zero) * scale_of
    best = (choices - weight[..., None].double()).abs().amin(-1)
    mine = (reference.decode(q, torch.float64) - weight.double()).abs()
    assert bool((mine <= best * (1 + 1e-5) + 1e-6 * scale.abs()).all())


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_perm_moves_columns(format):
    q = random_quant(format, 6, 130)
    perm = torch.randperm(130)
    assert torch.equal(reference.decode(reference.permuted(q, perm))[:, perm], reference.decode(q))
    x = torch.randn(3, 130)
    torch.testing.assert_close(reference.matmul(x, reference.permuted(q, perm)), reference.matmul(x[:, perm], q))


def test_decode_matches_a_loop():
    q = random_quant(formats.get("int4_asym_g32"), 3, 40)
    codes, weight = unpack(q.codes, 4, 40).tolist(), reference.decode(q, torch.float64)
    for n in range(3):
        for k in range(40):
            expected = (codes[n][k] - int(q.zeros[n, k // 32])) * float(q.scales[n, k // 32])
            assert float(weight[n, k]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bound_of_a_product_finds_small_errors(dtype):
    x, weight, bias = torch.randn(3, 300).to(dtype), torch.randn(40, 300, dtype=torch.float64), torch.randn(40).to(dtype)
    y = torch.nn.functional.linear(x.double(), weight, bias.double()).to(dtype)
    assert_matmul_close(y, x, weight, bias)
    missing = x.clone()
    missing[1, 200] = 0.0  # one product of 300 is forgotten
    for wrong in (torch.nn.functional.linear(missing.double(), weight, bias.double()).to(dtype), y * 1.01, y - bias):
        with pytest.raises(AssertionError, match=r"max error .* first at \[\d, \d+\]: got"):
            assert_matmul_close(wrong, x, weight, bias)
    for place, bad in ((0, 0), torch.nan), ((2, 39), torch.inf):
        wrong = y.clone()
        wrong[place] = bad
        with pytest.raises(AssertionError, match=rf"1 of 120 .* first at \[{place[0]}, {place[1]}\]"):
            assert_matmul_close(wrong, x, weight, bias)
    for wrong in (y.double(), y[:2]):
        with pytest.raises(AssertionError, match="want"):
            assert_matmul_close(wrong, x, weight, bias)
