"""The block types of ggml and its GGUF files, by ggml's names and type ids.

A weight is held as its raw blocks, as they lie in the file, so that writing gives the same bytes; `Block.split` tells what they say.
"""

from __future__ import annotations

from qkernels.errors import FormatError
from qkernels.formats import ggml_blocks as blocks
from qkernels.formats import ggml_iq as iq
from qkernels.formats.catalogue import register
from qkernels.formats.format import Block, Codebook, Float, Int, QuantFormat

SIGN = Codebook("sign", (-1.0, 1.0))
E2M1 = Float(2, 1)  # ggml doubles the table and halves the scale; the numbers are the same

# `group` is the extent that shares the finest scale.
TYPES: dict[int, QuantFormat] = {
    2: QuantFormat(Int(4, 8), (1, 32), block=Block(32, 18, blocks.split_q4_0, blocks.join_q4_0), name="q4_0"),
    3: QuantFormat(Int(4), (1, 32), block=Block(32, 20, blocks.split_q4_1, blocks.join_q4_1), name="q4_1"),
    6: QuantFormat(Int(5, 16), (1, 32), block=Block(32, 22, blocks.split_q5_0, blocks.join_q5_0), name="q5_0"),
    7: QuantFormat(Int(5), (1, 32), block=Block(32, 24, blocks.split_q5_1, blocks.join_q5_1), name="q5_1"),
    8: QuantFormat(Int(8, 128), (1, 32), block=Block(32, 34, blocks.split_q8_0, blocks.join_q8_0), name="q8_0"),
    10: QuantFormat(Int(2), (1, 16), block=Block(256, 84, blocks.split_q2_k, blocks.join_q2_k), name="q2_k"),
    11: QuantFormat(Int(3, 4), (1, 16), block=Block(256, 110, blocks.split_q3_k, blocks.join_q3_k), name="q3_k"),
    12: QuantFormat(Int(4), (1, 32), block=Block(256, 144, blocks.split_q4_k, blocks.join_q4_k), name="q4_k"),
    13: QuantFormat(Int(5), (1, 32), block=Block(256, 176, blocks.split_q5_k, blocks.join_q5_k), name="q5_k"),
    14: QuantFormat(Int(6, 32), (1, 16), block=Block(256, 210, blocks.split_q6_k, blocks.join_q6_k), name="q6_k"),
    16: QuantFormat(Int(8, 128), (1, 32), block=Block(256, 66, iq.split_iq2_xxs), name="iq2_xxs"),
    17: QuantFormat(Int(8, 128), (1, 16), block=Block(256, 74, iq.split_iq2_xs), name="iq2_xs"),
    18: QuantFormat(Int(8, 128), (1, 32), block=Block(256, 98, iq.split_iq3_xxs), name="iq3_xxs"),
    19: QuantFormat(Int(8, 128), (1, 32), block=Block(256, 50, iq.split_iq1_s), name="iq1_s"),
    20: QuantFormat(blocks.IQ4, (1, 32), block=Block(32, 18, blocks.split_q4_0, blocks.join_q4_0), name="iq4_nl"),
    21: QuantFormat(Int(8, 128), (1, 32), block=Block(256, 110, iq.split_iq3_s), name="iq3_s"),
    22: QuantFormat(Int(8, 128), (1, 16), block=Block(256, 82, iq.split_iq2_s), name="iq2_s"),
    23: QuantFormat(blocks.IQ4, (1, 32), block=Block(256, 136, blocks.split_iq4_xs, blocks.join_iq4_xs), name="iq4_xs"),
    29: QuantFormat(Int(8, 128), (1, 16), block=Block(256, 56, iq.split_iq1_m), name="iq1_m"),
    34: QuantFormat(Int(2, 1), (1, 256), block=Block(256, 54, blocks.split_tq1_0), name="tq1_0"),
    35: QuantFormat(Int(2, 1), (1, 256), block=Block(256, 66, blocks.split_tq2_0, blocks.join_tq2_0), name="tq2_0"),
    39: QuantFormat(E2M1, (1, 32), block=Block(32, 17, blocks.split_mxfp4, blocks.join_mxfp4), name="ggml_mxfp4"),
    40: QuantFormat(E2M1, (1, 16), block=Block(64, 36, blocks.split_nvfp4, blocks.join_nvfp4), name="ggml_nvfp4"),
    41: QuantFormat(SIGN, (1, 128), block=Block(128, 18, blocks.split_q1_0, blocks.join_q1_0), name="q1_0"),
    42: QuantFormat(Int(2, 1), (1, 64), block=Block(64, 18, blocks.split_q2_0, blocks.join_q2_0), name="q2_0"),
}

for _format in TYPES.values():
    register(_format)


def type_id(format: QuantFormat) -> int:
    """ggml's id of a format; FormatError for one that is none of its types."""
    for id, known in TYPES.items():
        if known == format:
            return id
    raise FormatError(f"{format.name} is no ggml type; {', '.join(f.name for f in TYPES.values())} are")
