"""The judge, against independent judges."""

import pytest
import torch
from cases import plain, random_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import formats, reference, rtn
from qkernels.formats import Float
from qkernels.formats.packing import unpack

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
    ops = pytest.importorskip("bitsandbytes.backends.default.ops")
    decode = getattr(ops, "_dequantize_4bit_compute", None) or pytest.skip("this bitsandbytes has no pure-torch decoder")
    q = random_quant(formats.get(name), 6, 128)
    swapped = ((q.codes & 15) << 4 | q.codes >> 4).reshape(-1, 1)
    theirs = decode(swapped, q.scales.reshape(-1), 64, name, (6, 128), torch.float32)
    torch.testing.assert_close(reference.decode(q), theirs, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 150), st.integers(0, 10**6))
def test_encoding_what_was_decoded_changes_nothing(format, n, k, seed):
    q = random_quant(format, n, k, seed)
    again = reference.encode(reference.decode(q), format, q.scales.float(), None if q.zeros is None else q.zeros.float(), q.tensor_scale)
    tolerance = {"rtol": 1e-6, "atol": 0.0} if format.zero != "float" else {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(reference.decode(again), reference.decode(q), **tolerance)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 150), st.integers(0, 10**6))
def test_rtn_picks_the_nearest_value(format, n, k, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    q = rtn(weight, format)
    scale = reference.spread(q.scales.double(), format, n, k) * (1.0 if q.tensor_scale is None else q.tensor_scale.double())
    zero = 0.0 if q.zeros is None else reference.spread(q.zeros.double(), format, n, k)
    values = reference.code_values(format.code, torch.float64)
    values = values[torch.isfinite(values)]
    zero = zero.expand(n, k)[..., None] if isinstance(zero, torch.Tensor) else zero
    choices = (values - zero) * scale.expand(n, k)[..., None]
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
