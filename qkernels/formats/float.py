"""Small-float formats: FP8, MXFP4 and NVFP4."""

from qkernels.formats.catalogue import register
from qkernels.formats.format import Float, QuantFormat

E4M3, E5M2, E2M1 = Float(4, 3), Float(5, 2), Float(2, 1)

register(QuantFormat(E4M3, (1, -1), "f32"), "fp8", "fp8_e4m3")
register(QuantFormat(E5M2, (1, -1), "f32"), "fp8_e5m2")
register(QuantFormat(E4M3, (-1, -1), "f32"), "fp8_tensor")
register(QuantFormat(E5M2, (-1, -1), "f32"), "fp8_e5m2_tensor")
register(QuantFormat(E4M3, (128, 128), "f32"), "fp8_block")  # DeepSeek's
register(QuantFormat(E2M1, (1, 32), "e8m0"), "mxfp4")
register(QuantFormat(E2M1, (1, 16), "e4m3", tensor_scale=True), "nvfp4")
