"""The block types of ggml and its GGUF files, by ggml's names and type ids.

A weight is held as its raw blocks, as they lie in the file, so that writing gives the same bytes; `Block.split` tells what they say.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qkernels.errors import FormatError
from qkernels.formats import ggml_blocks as blocks
from qkernels.formats import ggml_encode as encode
from qkernels.formats import ggml_iq as iq
from qkernels.formats.catalogue import register
from qkernels.formats.format import Block, Code, Codebook, Float, Int, Parts, QuantFormat
from qkernels.formats.ggml_encode import Encoder

Split = Callable[[Tensor], Parts]
Join = Callable[[Parts], Tensor]
Encode = Callable[[Tensor], Parts]

SIGN = Codebook("sign", (-1.0, 1.0))
E2M1 = Float(2, 1)  # ggml doubles the table and halves the scale; the numbers are the same


def _made(
    name: str, code: Code, group: int, shape: tuple[int, int], split: Split, join: Join, encode: Encode, *, inverts: bool = True
) -> QuantFormat:
    """A type that can be made too; `join` may give ggml's bytes where others mean the same, so that it does not invert `split`."""
    block = Block(*shape, split, join if inverts else None, Encoder(encode, join))
    return QuantFormat(code, (1, group), block=block, name=name)


def _read(name: str, group: int, shape: tuple[int, int], split: Split) -> QuantFormat:
    """A type that is only read."""
    return QuantFormat(Int(8, 128), (1, group), block=Block(*shape, split), name=name)


# Elements that share the finest scale; elements and bytes of a block.
TYPES: dict[int, QuantFormat] = {
    2: _made("q4_0", Int(4, 8), 32, (32, 18), blocks.split_q4_0, blocks.join_q4_0, encode.encode_q4_0),
    3: _made("q4_1", Int(4), 32, (32, 20), blocks.split_q4_1, blocks.join_q4_1, encode.encode_q4_1),
    6: _made("q5_0", Int(5, 16), 32, (32, 22), blocks.split_q5_0, blocks.join_q5_0, encode.encode_q5_0),
    7: _made("q5_1", Int(5), 32, (32, 24), blocks.split_q5_1, blocks.join_q5_1, encode.encode_q5_1),
    8: _made("q8_0", Int(8, 128), 32, (32, 34), blocks.split_q8_0, blocks.join_q8_0, encode.encode_q8_0),
    10: _made("q2_k", Int(2), 16, (256, 84), blocks.split_q2_k, blocks.join_q2_k, encode.encode_q2_k),
    11: _made("q3_k", Int(3, 4), 16, (256, 110), blocks.split_q3_k, blocks.join_q3_k, encode.encode_q3_k),
    12: _made("q4_k", Int(4), 32, (256, 144), blocks.split_q4_k, blocks.join_q4_k, encode.encode_q4_k),
    13: _made("q5_k", Int(5), 32, (256, 176), blocks.split_q5_k, blocks.join_q5_k, encode.encode_q5_k),
    14: _made("q6_k", Int(6, 32), 16, (256, 210), blocks.split_q6_k, blocks.join_q6_k, encode.encode_q6_k),
    16: _read("iq2_xxs", 32, (256, 66), iq.split_iq2_xxs),
    17: _read("iq2_xs", 16, (256, 74), iq.split_iq2_xs),
    18: _read("iq3_xxs", 32, (256, 98), iq.split_iq3_xxs),
    19: _read("iq1_s", 32, (256, 50), iq.split_iq1_s),
    20: _made("iq4_nl", blocks.IQ4, 32, (32, 18), blocks.split_q4_0, blocks.join_q4_0, encode.encode_iq4_nl),
    21: _read("iq3_s", 32, (256, 110), iq.split_iq3_s),
    22: _read("iq2_s", 16, (256, 82), iq.split_iq2_s),
    23: _made("iq4_xs", blocks.IQ4, 32, (256, 136), blocks.split_iq4_xs, blocks.join_iq4_xs, encode.encode_iq4_xs),
    29: _read("iq1_m", 16, (256, 56), iq.split_iq1_m),
    34: _made("tq1_0", Int(2, 1), 256, (256, 54), blocks.split_tq1_0, blocks.join_tq1_0, encode.encode_ternary, inverts=False),
    35: _made("tq2_0", Int(2, 1), 256, (256, 66), blocks.split_tq2_0, blocks.join_tq2_0, encode.encode_ternary),
    39: _made("ggml_mxfp4", E2M1, 32, (32, 17), blocks.split_mxfp4, blocks.join_mxfp4, encode.encode_mxfp4),
    40: _made("ggml_nvfp4", E2M1, 16, (64, 36), blocks.split_nvfp4, blocks.join_nvfp4, encode.encode_nvfp4),
    41: _made("q1_0", SIGN, 128, (128, 18), blocks.split_q1_0, blocks.join_q1_0, encode.encode_q1_0),
    42: _made("q2_0", Int(2, 1), 64, (64, 18), blocks.split_q2_0, blocks.join_q2_0, encode.encode_ternary),
}

for _format in TYPES.values():
    register(_format)


def type_id(format: QuantFormat) -> int:
    """ggml's id of a format; FormatError for one that is none of its types."""
    for id, known in TYPES.items():
        if known == format:
            return id
    raise FormatError(f"{format.name} is no ggml type; {', '.join(f.name for f in TYPES.values())} are")
