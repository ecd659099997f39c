"""Rows of quantised weights, taken and joined: codes, scales and zeros move together, and no number changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qkernels.errors import UnsupportedError
from qkernels.formats.packing import in_order, pack, unpack
from qkernels.formats.tensor import QuantTensor


def take(q: QuantTensor, rows: Tensor) -> QuantTensor:
    """Return the weight whose row i is row rows[i] of `q`; a run of rows is a view.

    Where the rows do not keep the groups along N together, the result has a scale for every row.

    Shapes:
        rows   [N'] int64
    """
    first, count = int(rows[0]), rows.numel()
    run = torch.equal(rows, torch.arange(first, first + count, device=rows.device))
    if run and count == q.shape[0]:
        return q
    extent = 1 if q.format.block else q.format.group_extent(*q.shape)[0]
    groups = rows[::extent] // extent
    if extent > 1 and not torch.equal(groups.repeat_interleave(extent)[:count], rows // extent):
        return take(per_row(q), rows)
    tensors = q.tensors()
    for field in ("codes", "scales", "zeros"):
        if field in tensors:
            index = rows if field == "codes" else groups
            lo = int(index[0])
            tensors[field] = tensors[field][lo : lo + index.numel()] if run else tensors[field][index.to(tensors[field].device)]
    return QuantTensor.from_tensors(q.format, (count, q.shape[1]), tensors)


def join(weights: Sequence[QuantTensor]) -> QuantTensor:
    """Put weights of one format below each other. Raises UnsupportedError where they differ in what all rows of a weight share."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    extent = 1 if first.format.block else first.format.group_extent(*first.shape)[0]
    if any(q.format == first.format and q.shape[0] % extent for q in weights[:-1]) or (first.format.group[0] == -1):
        weights = [per_row(q) for q in weights]
        first = weights[0]
    for q in weights[1:]:
        if (q.format, q.shape[1]) != (first.format, first.shape[1]):
            kinds = [f"{w.format.name} with {w.shape[1]} columns" for w in (first, q)]
            raise UnsupportedError(f"rows of {kinds[0]} and of {kinds[1]} make no one weight")
        for field in ("tensor_scale", "perm"):
            a, b = getattr(first, field), getattr(q, field)
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                raise UnsupportedError(f"rows of weights that differ in {field} make no one weight")
    tensors = first.tensors()
    for field in ("codes", "scales", "zeros"):
        if field in tensors:
            tensors[field] = torch.cat([q.tensors()[field] for q in weights])
    return QuantTensor.from_tensors(first.format, (sum(q.shape[0] for q in weights), first.shape[1]), tensors)


def transposed(q: QuantTensor) -> QuantTensor:
    """Return the weight with its columns as rows, number for number: groups become as many columns high as they were rows wide.

    Raises UnsupportedError for blocks that nest and permuted columns, which have no such form.
    """
    if q.format.block is not None or q.perm is not None:
        raise UnsupportedError(f"columns of {q.format.name} cannot become rows")
    n, k = q.shape
    tensors = {field: t if field == "tensor_scale" else in_order(t.t()) for field, t in q.tensors().items() if field != "codes"}
    tensors["codes"] = pack(in_order(unpack(q.codes, q.format.bits, k).t()), q.format.bits)
    return QuantTensor.from_tensors(replace(q.format, group=q.format.group[::-1], name=""), (k, n), tensors)


def per_row(q: QuantTensor) -> QuantTensor:
    """Return the same weight with a scale for every row, where a group has several rows."""
    if q.format.block or q.format.group[0] == 1:
        return q
    n, k = q.shape
    extent = q.format.group_extent(n, k)[0]
    tensors = q.tensors()
    for field in ("scales", "zeros"):
        if field in tensors:
            tensors[field] = tensors[field].repeat_interleave(extent, 0)[:n]
    return QuantTensor.from_tensors(replace(q.format, group=(1, q.format.group[1]), name=""), (n, k), tensors)
