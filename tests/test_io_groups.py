"""Scales of groups that are no runs along K, against what they mean, element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.errors import CheckpointError
from qkernels.io import groups

KINDS = st.sampled_from(["plain", "shuffled", "any", "sorted"])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 7), st.integers(1, 200), st.sampled_from([1, 8, 32, 48, 64, 100]))
def test_flat_blocks(n, k, block):
    numbers = torch.rand(-(-n * k // block))
    spread, group = groups.of_flat_blocks(numbers, n, k, block)
    of_element = spread.repeat_interleave(group, 1)[:, :k]
    assert torch.equal(of_element.flatten(), numbers[torch.arange(n * k) // block])
    assert torch.equal(groups.to_flat_blocks(spread, n, k, group, block), numbers)


def test_flat_blocks_refuse_what_differs_within_one():
    numbers = torch.arange(4.0).view(2, 2)  # K = 2 groups of 4 in blocks of 16: one number for all
    assert groups.to_flat_blocks(numbers, 2, 8, 4, 16) is None
    with pytest.raises(CheckpointError, match="3 scales"):
        groups.of_flat_blocks(torch.ones(3), 2, 8, 8)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 120), st.sampled_from([4, 8, 32, 200]), st.integers(0, 10**6), st.sampled_from(["plain", "shuffled", "any", "sorted"])
)
def test_index(k, group_size, seed, kind):
    g = torch.Generator().manual_seed(seed)
    count = -(-k // group_size)
    g_idx = torch.arange(k) // group_size
    if kind == "shuffled":
        g_idx = g_idx[torch.randperm(k, generator=g)]
    elif kind != "plain":
        g_idx = torch.randint(count, (k,), generator=g)
        g_idx = g_idx.sort().values if kind == "sorted" else g_idx
    perm, group, order = groups.of_index(g_idx.int(), group_size, count)
    columns = torch.arange(k) if perm is None else perm.long()
    assert torch.equal(order.repeat_interleave(group)[:k], g_idx[columns])
    assert torch.equal(columns.sort().values, torch.arange(k)) and len(order) == -(-k // group)
    if kind in ("plain", "shuffled"):
        assert group == group_size
    if kind == "plain":
        assert perm is None


def test_index_beyond_the_groups():
    with pytest.raises(CheckpointError, match=r"g_idx\[2\] is 4; there are 4 groups"):
        groups.of_index(torch.tensor([0, 1, 4, 2]), 1, 4)
