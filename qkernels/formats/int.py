"""Integer formats of 2 to 8 bits. The short names are what other libraries call them."""

from qkernels.formats.catalogue import register
from qkernels.formats.format import Int, QuantFormat

# Narrow codes need small groups; 8 bits need only one scale per row. fp16 scales: 11 bits of precision, and the fewest bytes.
register(QuantFormat(Int(8, 128), (1, -1), "f32"), "int8")
register(QuantFormat(Int(6, 32), (1, 128), "f16"), "int6")
register(QuantFormat(Int(5, 16), (1, 128), "f16"), "int5")
register(QuantFormat(Int(4, 8), (1, 128), "f16"), "int4")
register(QuantFormat(Int(3, 4), (1, 64), "f16"), "int3")
register(QuantFormat(Int(2, 2), (1, 32), "f16"), "int2")

register(QuantFormat(Int(8), (1, -1), "f32", "int"), "int8_asym")
register(QuantFormat(Int(6), (1, 128), "f16", "int"), "int6_asym")
register(QuantFormat(Int(5), (1, 128), "f16", "int"), "int5_asym")
register(QuantFormat(Int(4), (1, 128), "f16", "int"), "int4_asym")
register(QuantFormat(Int(3), (1, 64), "f16", "int"), "int3_asym")
register(QuantFormat(Int(2), (1, 32), "f16", "int"), "int2_asym")

# HQQ's form: the zero point is a float and may lie outside the codes' range.
register(QuantFormat(Int(8), (1, 128), "f16", "float"), "hqq8")
register(QuantFormat(Int(4), (1, 64), "f16", "float"), "hqq4")
register(QuantFormat(Int(3), (1, 64), "f16", "float"), "hqq3")
register(QuantFormat(Int(2), (1, 32), "f16", "float"), "hqq2")

# A minimum in place of the zero point, as ggml's Q4_1 and torchao's int4 have it: it is added as it is stored.
register(QuantFormat(Int(4), (1, 32), "f16", "min"), "int4_min")
