"""The packed layout that both CPU kernels share, and its inverse.

Panels of 16 output rows; in a panel, tiles of 16 rows x 8 k; every group of K padded to a multiple of 8 with code 0. Four panels are a
strip, which holds its tiles, scales and zeros in order of k, then of panels; the panels that remain follow one by one.

    (n, k) of a tile -> code c = 64 (k // 4) + 4n + k % 4, in planes of 8 bits or of 4, 2 and 1 whose sum is the width, lowest bits first
    a plane of b     -> 16 b bytes: byte c % 16b, from bit b (c // 16b) on

Nested blocks (ggml's) come apart into the same: codes of one width, and numbers of the groups that share the finest scale. Where scales
have a scale themselves, that of every block lies in strips as they do. Vector codebooks (IQ1, IQ2, IQ3) and TQ1_0, whose codes would take
more than their blocks, are kept as they lie, row by row, and come apart a few columns at a time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Codebook, Float, Int, QuantFormat, QuantTensor, nested
from qkernels.formats.format import SCALE_DTYPES, Code
from qkernels.formats.ggml_grids import grid
from qkernels.formats.packing import in_order, pack, unpack
from qkernels.kernels.cpu import memory
from qkernels.kernels.registry import Problem

PANEL, TILE_K, STRIP, MAX_BLOCK = 16, 8, 4, 256


class Packed(NamedTuple):
    """A weight as the CPU kernels read it.

    Shapes, with P = ceil(N / 16) panels, G groups and B nested blocks along K:
        weight        [P * padded K * 2 * bits]   uint8; blocks that are kept: [N * B * bytes of one], and then nothing else but perm
        scales        [P * G * 16]                scale type (e8m0: uint8); [P * G] where a scale serves whole panels
        zeros         [P * G * 16]                uint8 or scale type; minima as well
        tensor_scale  [1]                         float32; or what multiplies the scales of a nested block, and then the minima:
                      [P * B * (1 or 2) * 16]     float16, with scales and zeros of one byte
        perm          [K]                         int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def prepare(q: QuantTensor) -> Packed:
    """Re-lay a canonical weight in panels and tiles."""
    (n, k), bits = q.shape, q.format.bits
    if nested.is_kept(q.format):
        return Packed(q.format, q.shape, memory.empty(q.codes.numel()).copy_(q.codes.flatten()), None, None, None, q.perm)
    codes, scales, zeros, tensor_scale = _apart(q)
    codes = F.pad(_pad_groups(codes, q.format, n, k), (0, 0, 0, -n % PANEL))
    tiles = codes.view(-1, PANEL, codes.shape[1] // TILE_K, 2, 4).permute(0, 2, 3, 1, 4).flatten(2)  # panel, tile, (half, row, k)
    weight = torch.cat([_plane(tiles >> below & (1 << b) - 1, b) for b, below in _planes(bits)], -1)
    scales = _panel_rows(scales, q.format, n, k, _scale_lanes(q.format, n, k))
    zeros = None if zeros is None else _panel_rows(zeros, q.format, n, k, PANEL)
    if tensor_scale is not None and q.format.block is not None:
        tensor_scale = _panel_rows(tensor_scale, q.format, n, k, PANEL)
    if scales.dtype == torch.float8_e8m0fnu:  # a dtype that the stable ABI does not carry yet
        scales = scales.view(torch.uint8)
    return Packed(q.format, q.shape, _strips(weight), scales, zeros, tensor_scale, q.perm)


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    (n, k), format = packed.shape, packed.format
    if nested.is_kept(format):
        return QuantTensor(format, packed.shape, packed.weight.clone().view(n, -1), perm=packed.perm)
    panels = -(-n // PANEL)
    tiles = _codes(_panels(packed.weight.view(panels, -1, PANEL * format.bits)), format.bits)
    codes = tiles.unflatten(-1, (2, PANEL, 4)).permute(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)[:n]
    numbers = (None if t is None else _canonical_rows(t, format, n, k, lanes) for t, lanes in _numbers(packed))
    return _canonical(packed, codes, *numbers)


def rows(packed: Packed, index: Tensor) -> QuantTensor:
    """Take rows out, canonical: `take(restore(packed), index)` of a format whose rows have scales of their own, without the other panels.

    index   [R] int64, below N
    """
    if nested.is_kept(packed.format):
        return QuantTensor(packed.format, (len(index), packed.shape[1]), packed.weight.view(packed.shape[0], -1)[index], perm=packed.perm)
    bits, panels, panel, lane = packed.format.bits, -(-packed.shape[0] // PANEL), index // PANEL, index % PANEL
    strips = packed.weight.view(panels, -1, PANEL * bits)
    codes = torch.zeros(len(index), strips.shape[1], 2, 4, dtype=torch.uint8, device=index.device)
    for b, below in _planes(bits):
        plane, rows_apart = strips[..., PANEL * below : PANEL * (below + b)], min(4 * b, PANEL)  # a row's 4 bytes serve others, too
        taken = _units(plane, (2 if b == 8 else 1, rows_apart, 4), panel, lane % rows_apart)
        at = (b * (lane // rows_apart))[:, None, None].to(torch.uint8)
        for half in range(2):
            found = taken[:, :, half] if b == 8 else taken[:, :, 0] >> at + 4 * half & (1 << b) - 1
            codes[:, :, half] |= found << below
    numbers = (None if t is None else _lanes(t, panels, panel, lane) for t, _ in _numbers(packed))
    return _canonical(packed, codes.flatten(1), *numbers)


def _lanes(t: Tensor, panels: int, panel: Tensor, lane: Tensor) -> Tensor:
    """Scales or zeros [R, G] of rows."""
    raw = t.view(_BYTES[t.element_size()]).view(panels, -1, PANEL)
    return _units(raw, (1, PANEL, 1), panel, lane).flatten(1).view(t.dtype)


def _units(strips: Tensor, units: tuple[int, int, int], panel: Tensor, unit: Tensor) -> Tensor:
    """Parts of panels that lie as `_strips` lays them [panels, tiles or groups, elements of one], one a panel: [R, tiles, a, c].

    units   [a, b, c] = elements of one; unit [R] says which of b
    """
    whole = strips.shape[0] // STRIP * STRIP
    if whole == strips.shape[0]:
        return _in_strips(strips).unflatten(-1, units)[panel // STRIP, :, panel % STRIP, :, unit]
    alone = strips.unflatten(-1, units)[panel, :, :, unit]
    within = panel < whole
    if bool(within.any()):
        alone[within] = _units(strips[:whole], units, panel[within], unit[within])
    return alone


def _planes(bits: int) -> list[tuple[int, int]]:
    """Bits of each plane, and how many of a code lie in those before it."""
    return [(b, bits & -2 * b) for b in (8, 4, 2, 1) if bits & b]


def _plane(codes: Tensor, b: int) -> Tensor:
    """A tile's codes of b bits [..., 128] -> [..., 16 b]."""
    parts = codes.unflatten(-1, (8 // b, PANEL * b)).unbind(-2)
    return functools.reduce(torch.bitwise_or, (part << b * i for i, part in enumerate(parts)))


def _codes(tiles: Tensor, bits: int) -> Tensor:
    """Codes [..., 128] of tiles [..., 16 * bits]."""
    out = torch.zeros(*tiles.shape[:-1], 128, dtype=torch.uint8, device=tiles.device)
    for b, below in _planes(bits):
        plane = tiles[..., PANEL * below : PANEL * (below + b)]
        out |= torch.cat([plane >> b * i & (1 << b) - 1 for i in range(8 // b)], -1) << below
    return out


def _numbers(packed: Packed) -> tuple[tuple[Tensor | None, int], ...]:
    """Scales, zeros and the scales of scales, where panels have them; and how many there are of a group in a panel."""
    outer = packed.tensor_scale if packed.format.block is not None else None
    return (packed.scales, _scale_lanes(packed.format, *packed.shape)), (packed.zeros, PANEL), (outer, PANEL)


def _canonical(packed: Packed, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, outer: Tensor | None) -> QuantTensor:
    """The weight of these codes [R, padded K] and numbers [R, G]."""
    (n, k), format = packed.shape, packed.format
    assert scales is not None
    codes = _crop_groups(codes, format, n, k)
    shape = len(codes), k
    if format.block is not None:
        blocks = nested.joined(format, nested.Apart(codes, scales, zeros, outer))
        return QuantTensor(format, shape, blocks, perm=packed.perm)
    scales = scales.view(SCALE_DTYPES[format.scale])
    return QuantTensor(format, shape, pack(codes, format.bits), scales, zeros, packed.tensor_scale, packed.perm)


def _apart(q: QuantTensor) -> nested.Apart:
    """Codes [N, K]; scales and zeros [N / group_n, G]; the scale of all, or what multiplies those of nested blocks."""
    if q.format.block is not None:
        return nested.apart(q)
    assert q.scales is not None
    return nested.Apart(unpack(q.codes, q.format.bits, q.shape[1]), q.scales, q.zeros, q.tensor_scale)


def _strips(panels: Tensor) -> Tensor:
    """[panels, tiles or groups, elements of one] -> [elements], as they lie in memory."""
    out, whole = memory.empty(panels.nbytes).view(panels.dtype).view(panels.shape), panels.shape[0] // STRIP * STRIP
    _in_strips(out[:whole]).copy_(panels[:whole].unflatten(0, (-1, STRIP)).transpose(1, 2))
    out[whole:] = panels[whole:]
    return out.view(-1)


def _panels(strips: Tensor) -> Tensor:
    """Invert `_strips`; it gets its [panels, tiles or groups, elements of one], in the order of memory."""
    whole = strips.shape[0] // STRIP * STRIP
    return torch.cat([_in_strips(strips[:whole]).transpose(1, 2).reshape(strips[:whole].shape), strips[whole:]])


def _in_strips(t: Tensor) -> Tensor:
    return t.view(t.shape[0] // STRIP, t.shape[1], STRIP, t.shape[2])


def _pad_groups(codes: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    _, group = format.group_extent(n, k)
    if group % TILE_K == 0 or group == k:
        return F.pad(codes, (0, -k % TILE_K))
    whole = k // group * group
    padded = F.pad(codes[:, :whole].unflatten(1, (-1, group)), (0, -group % TILE_K)).flatten(1)
    rest = F.pad(codes[:, whole:], (0, -(k - whole) % TILE_K))
    return torch.cat([padded, rest], 1)


def _crop_groups(codes: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    _, group = format.group_extent(n, k)
    if group % TILE_K == 0 or group == k:
        return codes[:, :k]
    padded_group, whole = group + -group % TILE_K, k // group
    inner = codes[:, : whole * padded_group].unflatten(1, (whole, padded_group))[..., :group].flatten(1)
    return torch.cat([inner, codes[:, whole * padded_group :][:, : k - whole * group]], 1)


def _scale_lanes(format: QuantFormat, n: int, k: int) -> int:
    """1 where all rows of a panel share their scale, so that it need not be repeated."""
    group_n, _ = format.group_extent(n, k)
    return 1 if format.zero == "none" and group_n != 1 and (group_n % PANEL == 0 or group_n == n) else PANEL


def _panel_rows(per_group: Tensor, format: QuantFormat, n: int, k: int, lanes: int) -> Tensor:
    """[N / group_n, G] -> [panels * G * lanes], in strips; rows beyond N get the bytes 0."""
    group_n, _ = format.group_extent(n, k)
    panels, raw = -(-n // PANEL), per_group.view(_BYTES[per_group.element_size()])
    if lanes == 1:
        rows = torch.arange(panels, device=raw.device) * PANEL // group_n
        return _strips(raw[rows].unsqueeze(-1)).view(per_group.dtype)
    rows = torch.arange(n, device=raw.device) // group_n
    padded = F.pad(raw[rows], (0, 0, 0, -n % PANEL))
    return _strips(padded.view(panels, PANEL, -1).transpose(1, 2)).view(per_group.dtype)


def _canonical_rows(packed: Tensor, format: QuantFormat, n: int, k: int, lanes: int) -> Tensor:
    group_n, _ = format.group_extent(n, k)
    panels = _panels(packed.view(_BYTES[packed.element_size()]).view(-(-n // PANEL), -1, lanes))
    rows = panels.transpose(1, 2).reshape(-1, panels.shape[1])
    step = group_n if lanes == PANEL else max(1, group_n // PANEL) if group_n % PANEL == 0 else rows.shape[0]
    return in_order(rows[: n if lanes == PANEL else None : step]).view(packed.dtype)


_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # indexing and padding work for these, not for every 8-bit float


# -- what the ops want to know of a format -------------------------------------------------------------------------------------------


Described = tuple[Tensor | None, tuple[int, int, str, int, bool]]
_DESCRIBED: dict[tuple[QuantFormat, int, int], Described] = {}  # torch.compile warns of functools caches


def describe(format: QuantFormat, n: int, k: int) -> Described:
    """table and (bits, group, code, offset, minima) for the ops."""
    found = _DESCRIBED.get((format, n, k))
    if found is None:
        table, bits, code, offset = _describe_kept(format) if nested.is_kept(format) else _describe_code(format.code)
        minima = format.zero == "min" if format.block is None else nested.parts_of(format).m is not None
        found = _DESCRIBED[format, n, k] = table, (bits, format.group_extent(n, k)[1], code, offset, minima)
    return found


# Blocks that are kept as they lie: what their indices name, see formats/ggml_grids.py.
_GRIDS = {name: name for name in ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")} | {"iq1_m": "iq1_s", "tq1_0": None}


def _describe_kept(format: QuantFormat) -> tuple[Tensor | None, int, str, int]:
    name = _GRIDS[format.name]
    return None if name is None else grid(name), 8, format.name, 128


def _describe_code(code: Code) -> tuple[Tensor | None, int, str, int]:
    if isinstance(code, Int):
        return None, code.bits, "int", code.bias
    if isinstance(code, Float) and code.bits == 8:
        return None, 8, code.name, 0
    table = (*code.values, *[0.0] * (16 - len(code.values)))
    return torch.tensor(table, dtype=torch.float32, device="cpu"), code.bits, "table", 0


def _why_not_blocks(format: QuantFormat) -> str | None:
    if nested.is_kept(format):
        return None if format.name in _GRIDS else f"{format.name} does not come apart into codes of one width and scales of groups"
    return nested.why_not(format)


def why_not(p: Problem) -> str | None:
    """What neither CPU kernel can hold."""
    if p.device.type != "cpu":
        return f"runs on cpu, not {p.device.type}"
    if p.device.isa == "none":
        from qkernels.kernels.cpu import library

        return library.why_missing() or "the compiled library is missing"
    if p.format.block is not None and (reason := _why_not_blocks(p.format)):
        return reason
    code = p.format.code
    if isinstance(code, Codebook | Float) and code.bits > 4 and code.name not in ("e4m3", "e5m2"):
        return f"code {code.name} has {code.bits} bits; tables of up to 4 bits, e4m3 and e5m2 are held"
    return None
