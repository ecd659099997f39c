"""Scales of checkpoints whose groups are not runs of one length along K, as those of canonical weights are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.formats.tensor import same_bits


def of_flat_blocks(numbers: Tensor, n: int, k: int, block: int) -> tuple[Tensor, int]:
    """Numbers of blocks that follow each other through the flattened [N, K] weight, as groups along K; returns (numbers, group).

    Blocks that straddle rows (K no multiple of `block`) become several groups of gcd(block, K), which carry the same number.

    Shapes:
        numbers   [ceil(N * K / block)]
        returns   [N, K / group]
    """
    if numbers.numel() != -(-n * k // block):
        raise CheckpointError(f"{numbers.numel()} scales for {n} x {k} weights in blocks of {block}; {-(-n * k // block)} are needed")
    group = math.gcd(k, block) if n > 1 else min(k, block)
    if n == 1 or block == group:
        return numbers.reshape(n, -1), group
    first = torch.arange(n * k // group, device=numbers.device) * group
    return numbers.reshape(-1)[first // block].view(n, k // group), group


def to_flat_blocks(numbers: Tensor, n: int, k: int, group: int, block: int) -> Tensor | None:
    """Invert `of_flat_blocks`: [N, K / group] -> [ceil(N * K / block)]; None where a block's groups differ."""
    if n == 1 and min(k, block) == group:
        return numbers.reshape(-1)
    if k % group or block % group:
        return None
    flat = numbers.reshape(-1)
    owner = torch.arange(flat.numel(), device=flat.device) * group // block
    blocks = flat[:: block // group] if block % group == 0 else flat
    return blocks if same_bits(blocks[owner], flat) else None


def of_index(g_idx: Tensor, group_size: int, groups: int) -> tuple[Tensor | None, int, Tensor]:
    """GPTQ's `g_idx` as a permutation: returns (perm, group, order).

    perm    [K] int32 or None   column j of the canonical codes is column perm[j] of the weight; None where groups follow each other
    group   columns that share a scale: group_size, or less where the groups are not of that length (then it divides all their lengths)
    order   [ceil(K / group)] int64   which of the checkpoint's groups each canonical one is

    Shapes:
        g_idx   [K] integers, 0 … groups - 1, in any order
    Raises      CheckpointError for an index beyond the groups
    """
    k = g_idx.numel()
    g_idx = g_idx.long()
    if k and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        bad = int(((g_idx < 0) | (g_idx >= groups)).nonzero()[0])
        raise CheckpointError(f"g_idx[{bad}] is {int(g_idx[bad])}; there are {groups} groups")
    plain = torch.arange(k, device=g_idx.device) // group_size
    if torch.equal(g_idx, plain):
        return None, group_size, torch.arange(-(-k // group_size), device=g_idx.device)
    counts = torch.bincount(g_idx, minlength=groups)
    used = counts[counts > 0]
    short = (used != group_size).sum().item()
    if short <= 1 and int(used.max()) == group_size:  # one may be shorter: it comes last
        rank = torch.where(counts == group_size, 0, groups) + torch.arange(groups, device=g_idx.device)
        group = group_size
    else:
        rank = torch.arange(groups, device=g_idx.device)
        group = math.gcd(*used.tolist())
    perm = torch.argsort(rank[g_idx], stable=True)
    order = g_idx[perm[::group]]
    identity = torch.equal(perm, torch.arange(k, device=g_idx.device))
    return (None if identity else perm.to(torch.int32)), group, order
