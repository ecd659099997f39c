"""qkernels: low-bit matmul behind drop-in `QuantLinear` torch modules.

>>> import qkernels
>>> print(qkernels.replace_linear(model, "int4"))
"""

from qkernels import formats, io, kernels
from qkernels.checkpoint import load, save
from qkernels.convert import Report, replace_linear, restore_linear
from qkernels.errors import BackendUnavailable, CheckpointError, FormatError, QKernelsError, UnsupportedError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.kernels.registry import explain
from qkernels.linear import QuantLinear
from qkernels.quantizers import rtn
from qkernels.swiglu import swiglu
from qkernels.warmup import warmup

__version__ = "0.1.0"


def quantize(weight, format="int4", *, quantizer="rtn"):  # type: ignore[no-untyped-def]
    """Quantise one weight [N, K] to a QuantTensor; `format` and `quantizer` as in `replace_linear`."""
    from qkernels import quantizers

    return quantizers.get(quantizer)(weight, formats.get(format))


def from_pretrained(path, **options):  # type: ignore[no-untyped-def]
    """Load a quantised transformers model in its own format; see `qkernels.integrations.pretrained.from_pretrained`."""
    from qkernels.integrations import pretrained

    return pretrained.from_pretrained(path, **options)


__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "FormatError",
    "QKernelsError",
    "QuantFormat",
    "QuantLinear",
    "QuantTensor",
    "Report",
    "UnsupportedError",
    "explain",
    "formats",
    "from_pretrained",
    "io",
    "kernels",
    "load",
    "quantize",
    "replace_linear",
    "restore_linear",
    "rtn",
    "save",
    "swiglu",
    "warmup",
]
