"""Codebook formats: bitsandbytes' NF4 and FP4.

Sources: NF4 is the QLoRA paper's table (arXiv:2305.14314); FP4 is bitsandbytes' own bit pattern, neither E2M1 nor monotone.
"""

from qkernels.formats.catalogue import register
from qkernels.formats.format import Codebook, QuantFormat

NF4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Codebook("fp4", tuple(sign * v / 12.0 for sign in (1.0, -1.0) for v in _FP4_TWELFTHS))

register(QuantFormat(NF4, (1, 64), "f32"), "nf4")
register(QuantFormat(FP4, (1, 64), "f32"), "fp4")
register(QuantFormat(NF4, (1, 64), "f16"))
register(QuantFormat(NF4, (1, 64), "bf16"))
register(QuantFormat(FP4, (1, 64), "f16"))
register(QuantFormat(FP4, (1, 64), "bf16"))
