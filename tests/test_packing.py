"""The canonical bit stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.formats.packing import pack, swap_nibbles, unpack


@st.composite
def rows_of_codes(draw):
    bits, n, k = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    seed = draw(st.integers(0, 2**31))
    return bits, torch.randint(2**bits, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@settings(deadline=None, max_examples=150)
@given(rows_of_codes())
def test_unpack_inverts_pack(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@settings(deadline=None, max_examples=60)
@given(rows_of_codes())
def test_code_k_lies_at_bit_k_times_bits(case):
    bits, codes = case
    for row, stream in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        whole = sum(byte << (8 * i) for i, byte in enumerate(stream))
        assert [(whole >> (k * bits)) % 2**bits for k in range(len(row))] == row
        assert whole >> (len(row) * bits) == 0


def test_even_k_in_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_swapped_nibbles():
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert swap_nibbles(every).tolist() == [[b % 16 * 16 + b // 16 for b in row] for row in every.tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_axes_and_strides(bits):
    codes = torch.randint(2**bits, (2, 3, 26)).to(torch.uint8)[..., ::2]
    assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)
