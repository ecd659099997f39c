"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and optimum write them: codes in words down K, zero points in words along N.

Tensors of a module, whose weight is W [N, K] in G = ceil(K / group_size) groups:

    qweight    [ceil(K * bits / 32), N]    int32     codes of W transposed, one little-endian bit stream a column
    qzeros     [G, ceil(N * bits / 32)]    int32     zero points, one stream a row; "gptq" (v1): less one, "gptq_v2": as they are
    scales     [G, N]                      float16, bfloat16 or float32
    g_idx      [K]                         int32     group of every column of W; absent: k // group_size

    W[n, k] = (code[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import scale_type
from qkernels.formats.packing import pack, unpack
from qkernels.io import groups, layers
from qkernels.io.gptq_settings import BITS, Scheme, SchemeOf, scheme_of_weight, schemes, stated
from qkernels.io.planes import from_planes, to_planes

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
_REMADE = LEAVES[1:]  # may be stored in more than one way; the words of the codes may not
# one in every field of a word: v1 subtracts it from whole words, so that a zero point of 0 borrows from its neighbour
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Yield every weight and every other tensor of a GPTQ checkpoint. Raises CheckpointError, UnsupportedError."""
    return read_modules(tensors, schemes(settings))


def read_modules(tensors: Mapping[str, Tensor], scheme_of: SchemeOf) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """The same, of checkpoints that say otherwise how their modules are stored."""
    for name, held in layers.walk(tensors, LEAVES):
        if held is None:
            yield name, tensors[name]
            continue
        with layers.naming(name):
            scheme = scheme_of(name)
            if scheme is None:
                raise CheckpointError("qweight is there, but the settings say that this module is not quantised")
            q = _unpacked(held, scheme)
            _warn(name, q, held["qzeros"], scheme)
            q = replace(q, origin=layers.beyond(_numbers(q, scheme), held, _REMADE))
        yield f"{name}.weight", q


def write(
    items: Iterable[tuple[str, layers.Value]], settings: Mapping[str, Any] | None, add: Callable[[str, Tensor], None]
) -> Mapping[str, Any]:
    """Store weights as GPTQ has them, by the settings of a checkpoint that was read, or anew as "gptq" (v1); returns the settings.

    Raises UnsupportedError for a weight that the layout, or the settings, cannot hold exactly: the message says which limit.
    """
    scheme_of = None if settings is None else schemes(settings)
    made: dict[str, Scheme] = {}
    dense, order = [], False
    for name, value in items:
        if isinstance(value, Tensor):
            add(name, value)
            dense += [name.removesuffix(".weight")] if layers.stays_dense(name, value) else []
            continue
        q = layers.plain_weight(name, value, BITS if scheme_of is None else range(2, 9), ("f16", "bf16", "f32"), ("none", "int"))
        module = name.removesuffix(".weight")
        with layers.naming(module):
            made[module] = scheme_of_weight(q)
            held = _anew(q, made[module]) if scheme_of is None else _by_settings(q, scheme_of(module))
        order |= q.perm is not None
        for leaf, t in held.items():
            add(f"{module}.{leaf}", t)
    return settings if settings is not None else stated(made, dense, order)


# -- tensors ----------------------------------------------------------------------------------------------------------------------


def _unpacked(held: Mapping[str, Tensor], scheme: Scheme) -> QuantTensor:
    """The weight of a module's tensors."""
    n, k = _shape(held, scheme.bits)
    _check_planes(n, k, scheme)
    size = k if scheme.group_size == -1 else scheme.group_size
    count = -(-k // size)
    scales = layers.check(held, "scales", (count, n), layers.FLOATS)
    qzeros = layers.check(held, "qzeros", (count, -(-n * scheme.bits // 32)), [torch.int32])
    perm, group, order = groups.of_index(held.get("g_idx", torch.arange(k) // size), size, count)
    zeros = layers.in_order(_zeros(qzeros, n, scheme).t()[:, order])
    middle = 2 ** (scheme.bits - 1)
    symmetric = bool((zeros == middle).all())
    code = Int(scheme.bits, middle if symmetric else 0)
    stated = -1 if scheme.group_size == -1 and group == k else group
    format = QuantFormat(code, (1, stated), scale_type(scales.dtype), "none" if symmetric else "int")
    codes, numbers = _codes(held["qweight"], k, perm, scheme), layers.in_order(scales.t()[:, order])
    return QuantTensor(format, (n, k), codes, numbers, None if symmetric else zeros, perm=perm)


def _shape(held: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    qweight = layers.check(held, "qweight", (-1, -1), [torch.int32])
    rows, n = qweight.shape
    k = rows * 32 // bits
    if "g_idx" in held:
        k = layers.check(held, "g_idx", (-1,), [torch.int32, torch.int64]).numel()
        if rows != -(-k * bits // 32):
            raise CheckpointError(f"qweight has {rows} rows; {k} columns, as g_idx has, of {bits} bits take {-(-k * bits // 32)}")
    if n == 0 or k == 0:
        raise CheckpointError(f"qweight is empty: {list(qweight.shape)}")
    return n, k


def _check_planes(n: int, k: int, scheme: Scheme) -> None:
    if scheme.planar and (n % 32 or k % 32):
        raise UnsupportedError(f"[N, K] = [{n}, {k}]; 'gptq_p' takes multiples of 32")


def _fields(words: Tensor, count: int, scheme: Scheme) -> Tensor:
    """Codes (or zero points) of words that run along the last axis, as uint8."""
    if scheme.planar:
        return from_planes(words, scheme.bits, count)
    return unpack(layers.to_stream(words, scheme.bits, count), scheme.bits, count)


def _words(fields: Tensor, scheme: Scheme) -> Tensor:
    """Invert `_fields`."""
    return to_planes(fields, scheme.bits) if scheme.planar else layers.to_words(pack(fields, scheme.bits))


def _codes(qweight: Tensor, k: int, perm: Tensor | None, scheme: Scheme) -> Tensor:
    """Canonical codes; where words are filled and nothing is permuted they are those of the file."""
    if k * scheme.bits % 32 == 0 and perm is None and not scheme.planar:
        return layers.to_stream(qweight.t(), scheme.bits, k)
    codes = _fields(qweight.t(), k, scheme)
    if not torch.equal(_words(codes, scheme), qweight.t()):
        raise CheckpointError(f"qweight has bits set beyond the {k} columns of the weight")
    return pack(codes if perm is None else codes[:, perm.long()], scheme.bits)


def _code_words(q: QuantTensor, scheme: Scheme) -> Tensor:
    """Invert `_codes`."""
    if q.perm is None and not scheme.planar:
        return layers.in_order(layers.to_words(q.codes).t())
    codes = unpack(q.codes, q.format.bits, q.shape[1])
    codes = codes if q.perm is None else codes[:, torch.argsort(q.perm.long())]
    return layers.in_order(_words(codes, scheme).t())


def _zeros(qzeros: Tensor, n: int, scheme: Scheme) -> Tensor:
    """Zero points [G, N] uint8 of their words."""
    bits, exact, middle = scheme.bits, scheme.exact, 2 ** (scheme.bits - 1)
    stored = _fields(qzeros, n, scheme)
    first = int(stored[0, 0])
    if scheme.sym and first in (middle, middle - 1) and bool((stored == first).all()):
        exact = first == middle  # whatever the label says: files of both kinds exist under both
    if exact:
        return stored
    if bits not in _ONES:
        return (stored + 1) & (2**bits - 1)
    return _fields(qzeros + _ONES[bits], n, scheme)


def _numbers(q: QuantTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a weight other than its codes, made anew."""
    assert q.scales is not None and isinstance(q.format.code, Int)
    k, bits = q.shape[1], q.format.bits
    g_idx = (torch.arange(k) // q.format.group_extent(*q.shape)[1]).to(torch.int32)
    if q.perm is not None:
        g_idx = g_idx[torch.argsort(q.perm.long())]
    zeros = torch.full(q.scales.shape, q.format.code.bias, dtype=torch.uint8) if q.zeros is None else q.zeros
    if int(zeros.max()) >= 2**bits:
        raise UnsupportedError(f"a zero point of {int(zeros.max())}; those of {bits} bits end at {2**bits - 1}")
    minus = not scheme.exact
    words = _words((zeros.t() - 1) & (2**bits - 1) if minus and bits not in _ONES else zeros.t(), scheme)
    if minus and bits in _ONES:
        words = words - _ONES[bits]
    return {"qzeros": words, "scales": layers.in_order(q.scales.t()), "g_idx": g_idx}


def _warn(module: str, q: QuantTensor, qzeros: Tensor, scheme: Scheme) -> None:
    """Report what is sound, but known of files that are not."""
    bits, top = scheme.bits, 2**scheme.bits - 1
    if not q.codes.any():
        layers.LOG.warning("%s: all codes are 0, as where a release of GPTQModel lost them: expect wrong outputs", module)
    if scheme.exact or bits < 4 or q.zeros is None:
        return
    stored, per_word = _fields(qzeros, q.shape[0], scheme), 32 // bits
    last = stored[:, per_word - 1 :: per_word] == top
    lost = int((last & (stored[:, per_word - 2 :: per_word][:, : last.shape[1]] == top)).sum())
    if lost:
        what = "%s: %d words of qzeros end in fields of %d, as where AutoGPTQ stored a zero point of 0 and lost those after it"
        layers.LOG.warning(what, module, lost, top)


def _by_settings(q: QuantTensor, scheme: Scheme | None) -> dict[str, Tensor]:
    """The tensors of a weight as a checkpoint that was read had them, or as it would have."""
    if scheme is None:
        raise UnsupportedError("the settings say that this module is not quantised")
    k, bits, group = q.shape[1], q.format.bits, q.format.group_extent(*q.shape)[1]
    size = k if scheme.group_size == -1 else scheme.group_size
    other = f"{bits} bits in groups of {group}, where the settings say {scheme.bits} in groups of {size}; settings=None makes new ones"
    if bits != scheme.bits:
        raise UnsupportedError(other)
    _check_planes(*q.shape, scheme)
    made = {"qweight": _code_words(q, scheme), **_numbers(q, scheme)}
    if held := layers.as_held(made, q, _REMADE, lambda held: _unpacked(held, scheme)):
        return held
    if group != min(size, k):
        raise UnsupportedError(other)
    zeros = _zeros(made["qzeros"], q.shape[0], scheme).t()
    if not (zeros == (q.format.code.bias if q.zeros is None else q.zeros)).all():  # type: ignore[union-attr]  # an Int, as was checked
        raise UnsupportedError("zero points that would be taken for symmetric ones; settings=None makes new settings")
    return made


def _anew(q: QuantTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a weight, if other programs read them: those want whole words."""
    per_word = 32 if q.format.bits == 3 else 32 // q.format.bits
    for axis, extent in zip("NK", q.shape):
        if extent % per_word:
            raise UnsupportedError(f"{axis} = {extent}; codes of {q.format.bits} bits fill words where it is a multiple of {per_word}")
    return {"qweight": _code_words(q, scheme), **_numbers(q, scheme)}
