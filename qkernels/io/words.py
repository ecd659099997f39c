"""Little-endian int32 words of codes, as the canonical bit stream, which they are where they run along a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats.packing import in_order


def octets(words: Tensor) -> Tensor:
    """The bytes of words that run along the last axis."""
    return in_order(words).view(torch.uint8)


def to_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Words as the canonical bit stream of `count` codes.

    Shapes:
        words      [..., ceil(count * bits / 32)]    int32
        returns    [..., ceil(count * bits / 8)]     uint8
    """
    return octets(words)[..., : -(-count * bits // 8)].contiguous()


def to_words(stream: Tensor) -> Tensor:
    """Invert `to_stream`; what fills the last word is 0."""
    return in_order(F.pad(stream, (0, -stream.shape[-1] % 4))).view(torch.int32)
