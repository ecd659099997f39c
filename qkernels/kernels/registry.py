"""The registry of kernels: describe a problem as data, ask every kernel, take the cheapest that can run it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.kernels.device import Device

Compute = Literal["auto", "float", "int8"]
COMPUTES = ("auto", "float", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Packed = Any  # a NamedTuple in the kernel's own file: format, shape, tensors
Matmul = Callable[..., Tensor]  # (x [..., K], weight, scales, zeros, tensor_scale, perm, bias) -> [..., N]


@dataclass(frozen=True)
class Problem:
    """One matmul: x [m, k] of `dtype` times a weight [n, k] in `format`.

    m        rows of x; None: not known yet (a layer that is being loaded)
    compute  "float": the exact dequantise-multiply; "int8": activations quantised on the fly; "auto": whichever is faster
    batch_invariant   a row of the result has to have the same bits whatever other rows there are
    """

    format: QuantFormat
    n: int
    k: int
    m: int | None = None
    dtype: torch.dtype = torch.bfloat16
    compute: Compute = "auto"
    bias: bool = False
    perm: bool = False
    device: Device = field(default_factory=lambda: Device("cpu"))
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise FormatError(f"a weight is at least 1 x 1, not {self.n} x {self.k}")
        if self.compute not in COMPUTES:
            near = difflib.get_close_matches(str(self.compute), COMPUTES, n=1, cutoff=0.0)[0]
            raise FormatError(f"compute={self.compute!r} is not one of {', '.join(COMPUTES)}; nearest: {near}")
        if self.dtype not in DTYPES:
            raise FormatError(f"dtype={self.dtype!r} of the activations is not one of {', '.join(map(str, DTYPES))}")

    @property
    def rows(self) -> int:
        """m, or 1 (decoding) while it is unknown."""
        return 1 if self.m is None else max(self.m, 1)


@dataclass(frozen=True)
class Kernel:
    """One packed layout and everything that runs on it.

    why_not   None when the kernel can run the problem, else the reason, with the value that is in the way
    cost      estimated microseconds
    prepare   canonical -> packed; restore is its exact inverse
    run       (x [..., K], packed, bias [N] or None) -> [..., N]
    bind      optional, for `matmul`: what is known of a format and shape [N, K] is worked out beforehand
    dequantize  optional: packed -> [N, K] float32
    rows      optional: (packed, [R] int64) -> these rows, canonical, of a format whose rows have scales of their own
    backward  optional: (gradient of the result [..., N], packed) -> that of x [..., K]; without it, `dequantize` and a matmul
    swiglu    optional: (x, packed, bias, packed, bias) of two weights of one format and shape -> silu of the first result times the second,
              in one launch; or None where that cannot be, or is not better
    batch_invariant   whether a row of the result has the same bits whatever other rows there are
    """

    name: str
    backend: str
    source: str
    compute: Literal["float", "int8"]
    why_not: Callable[[Problem], str | None]
    cost: Callable[[Problem], float]
    prepare: Callable[[QuantTensor], Packed]
    restore: Callable[[Packed], QuantTensor]
    run: Callable[[Tensor, Packed, Tensor | None], Tensor]
    packed_type: type
    dequantize: Callable[[Packed], Tensor] | None = None
    rows: Callable[[Packed, Tensor], QuantTensor] | None = None
    backward: Callable[[Tensor, Packed], Tensor] | None = None
    bind: Callable[[QuantFormat, tuple[int, int]], Matmul] | None = None
    swiglu: Callable[[Tensor, Packed, Tensor | None, Packed, Tensor | None], Tensor | None] | None = None
    batch_invariant: bool = False

    def matmul(self, format: QuantFormat, shape: tuple[int, int]) -> Matmul:
        """`run` for weights [N, K] of one format, which takes the tensors of a packed weight one by one."""
        if self.bind is not None:
            return self.bind(format, shape)
        return lambda x, *tensors: self.run(x, self.packed_type(format, shape, *tensors[:-1]), tensors[-1])


@dataclass(frozen=True)
class Plan:
    """The kernel that was chosen, what each candidate would cost (µs), and why the others cannot run."""

    problem: Problem
    kernel: Kernel
    costs: dict[str, float]
    rejected: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        shape = f"{'?' if p.m is None else p.m} x {p.n} x {p.k}"
        activations = f"{str(p.dtype).removeprefix('torch.')}, compute={p.compute}{', batch invariant' if p.batch_invariant else ''}"
        head = f"{p.format.name}, M x N x K = {shape}, {activations}, {p.device}: {self.kernel.name}"
        ranked = sorted(self.costs.items(), key=lambda item: (item[1], item[0]))
        rows = [f"  {'->' if name == self.kernel.name else '  '} {name}: {cost:.1f} us estimated" for name, cost in ranked]
        return "\n".join([head, *rows, *(f"     {name}: {why}" for name, why in sorted(self.rejected.items()))])


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; a name that is taken or longer than 40 characters raises FormatError."""
    if kernel.name in _KERNELS or len(kernel.name) > 40:
        raise FormatError(f"the kernel name {kernel.name!r} is taken or longer than 40 characters")
    _KERNELS[kernel.name] = kernel
    return kernel


def all_kernels() -> list[Kernel]:
    return list(_KERNELS.values())


def get(name: str) -> Kernel:
    if name not in _KERNELS:
        near = difflib.get_close_matches(name, _KERNELS, n=3, cutoff=0.0)
        raise FormatError(f"unknown kernel {name!r}; nearest: {', '.join(near)}")
    return _KERNELS[name]


def serves(name: str, device_type: str) -> bool:
    """Whether a kernel of that name runs on that type of device, as far as its backend tells; unknown ones do."""
    backend = _KERNELS[name].backend if name in _KERNELS else ""
    return {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device_type) == device_type


def why_not(kernel: Kernel, p: Problem) -> str | None:
    """The kernel's own reason, between those that all share: the way of computing that was asked for."""
    if p.compute == "float" and kernel.compute == "int8":
        return "computes with int8 activations; compute='float' was asked for"
    if reason := kernel.why_not(p):
        return reason
    if p.batch_invariant and not kernel.batch_invariant:
        return "a row's last bits depend on how many rows there are; batch_invariant=True was asked for"
    return None


def plan(p: Problem, kernel: str | None = None) -> Plan:
    """Choose a kernel for a problem; with `kernel`, that one or an error.

    compute="int8" is met by an int8 kernel where one can run, else by an exact one.
    Raises UnsupportedError with every kernel's reason when none can run it, or the forced one cannot.
    """
    candidates = all_kernels() if kernel is None else [get(kernel)]
    reasons = {c.name: why_not(c, p) for c in candidates}
    able = [c for c in candidates if reasons[c.name] is None]
    rejected = {name: reason for name, reason in reasons.items() if reason is not None}
    if not able:
        raise UnsupportedError(f"no kernel can run {p.format.name} [{p.n}, {p.k}] on {p.device}", rejected)
    costs = {c.name: c.cost(p) for c in able}
    preferred = [c for c in able if c.compute == p.compute] or able
    best = min(preferred, key=lambda c: (costs[c.name], c.name))
    return Plan(p, best, costs, rejected)


def explain(
    format: str | QuantFormat = "int4",
    nk: tuple[int, int] = (4096, 4096),
    m: int | None = None,
    *,
    device: str | torch.device | Device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute: Compute = "auto",
    batch_invariant: bool = False,
) -> Plan:
    """Say which kernel would run a matmul and why; needs no such device. `print` the result.

    >>> print(qkernels.explain("int4", (4096, 4096), 16, device="cpu:avx2"))
    """
    from qkernels import formats
    from qkernels.kernels import device as devices

    where = device if isinstance(device, Device) else devices.parse(str(device))
    return plan(Problem(formats.get(format), *nk, m=m, dtype=dtype, compute=compute, device=where, batch_invariant=batch_invariant))
