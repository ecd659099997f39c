"""qkernels' own contestants. The only file here that touches the library's interface, but for the roofline in machine.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Arithmetic, CheckFailed, Contestant, Prepared

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def float_linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """nn.Linear without bias around a copy of a weight [N, K]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def quant_linear(weight: Tensor, format: str, compute: str, dtype: torch.dtype, kernel: str | None = None) -> nn.Module:
    """The layer as users get it, or with a kernel that they ask for."""
    import qkernels

    return qkernels.QuantLinear.from_linear(float_linear(weight, dtype), format, compute=compute, kernel=kernel)


def contestant(format: str, compute: str, dtype: str, kernel: str | None = None) -> Contestant:
    """One of our formats with one kind of arithmetic, as users get it: a layer quantised from a float one."""
    return of_weight(format, lambda weight: quant_linear(weight, format, compute, DTYPES[dtype], kernel), compute, dtype, kernel)


def of_weight(weights: str, layer_of: Callable[[Tensor], nn.Module], compute: str, dtype: str, kernel: str | None = None) -> Contestant:
    """A contestant called after its weights, from a function that makes a QuantLinear of a weight [N, K] float32."""

    def prepare(weight: Tensor, threads: int) -> Prepared:
        import qkernels

        layer = layer_of(weight)
        kind = arithmetic_of(layer, dtype)

        def check(x: Tensor, y: Tensor) -> None:
            assert_close(layer, kind, x, y)

        q = layer.quant_tensor()

        def make() -> nn.Module:  # not copy.deepcopy: a copied weight lies in other memory than the one that a layer makes itself
            return qkernels.QuantLinear.from_quant_tensor(q, compute=compute, kernel=kernel, dtype=DTYPES[dtype])

        return Prepared(layer.dequantize(), layer.nbytes, make, layer.kernel, kind, check)

    short = {"bfloat16": "", "float16": " fp16", "float32": " fp32"}[dtype]
    kind: Arithmetic = "int8" if compute == "int8" else _float_arithmetic(dtype)
    forced = "" if kernel is None else f" {kernel}"
    return Contestant(f"qkernels {weights} {compute}{short}{forced}", "qkernels", weights, kind, DTYPES[dtype], prepare)


def contestants(formats: list[str], computes: list[str], dtype: str) -> list[Contestant]:
    """Every format with every kind of arithmetic."""
    return [contestant(format, compute, dtype) for format, compute in itertools.product(formats, computes)]


def arithmetic_of(layer: nn.Module, dtype: str) -> Arithmetic:
    """Which peak bounds the kernel that serves the layer."""
    from qkernels.kernels import registry

    return "int8" if registry.get(layer.kernel).compute == "int8" else _float_arithmetic(dtype)


def _float_arithmetic(dtype: str) -> Arithmetic:
    return "fp32" if dtype == "float32" else "bf16"


def assert_close(layer: nn.Module, arithmetic: Arithmetic, x: Tensor, y: Tensor) -> None:
    """Hold our result against the library's own derived tolerance, which is far narrower than the one for peers.

    Raises: CheckFailed with the first line of what the library says.
    """
    from qkernels.kernels import registry
    from qkernels.testing import ACT_GROUP, assert_matmul_close

    from .check import rows_to_check

    rows, q = rows_to_check(len(x)), layer.quant_tensor()
    run = None if registry.serves(layer.kernel, "cuda") else ACT_GROUP  # that one scale of the activations covers
    try:
        assert_matmul_close(y[rows], x[rows], layer.dequantize(torch.float64), int8=q if arithmetic == "int8" else None, act_group=run)
    except AssertionError as error:
        raise CheckFailed(str(error).strip().splitlines()[0]) from error
