"""QuantLinear: `nn.Linear` with a weight in a quantised format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import formats, quantizers, reference
from qkernels.errors import FormatError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.formats.rows import take
from qkernels.formats.tensor import FIELDS, expected_tensors
from qkernels.kernels import device as devices
from qkernels.kernels import registry
from qkernels.kernels.registry import Compute, Packed, Plan, Problem

log = logging.getLogger("qkernels")
_TENSORS = ("weight", "scales", "zeros", "tensor_scale", "perm")  # names in state_dict(), in the order of FIELDS
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


class QuantLinear(nn.Linear):
    """A drop-in `nn.Linear` whose weight is quantised and frozen.

    The parameters `weight` (packed codes), `scales`, … hold the form that the chosen kernel runs on; `state_dict()` always gives the
    canonical one, so a saved layer does not depend on the machine. A gradient flows to x and to the bias.

    in_features, out_features, bias   as `nn.Linear`
    format      name or QuantFormat
    compute     "float", "int8" or "auto" (see Problem)
    kernel      name of a kernel to force; None takes the cheapest
    batch_invariant   take a kernel whose result for a row of x has the same bits whatever other rows there are
    dtype       of the bias, and of the weight that `to_linear` gives back (attribute dense_dtype; `.to(dtype)` changes both)
    x           under torch.autocast is cast as nn.Linear's is; torch.func's grad, vmap and jacrev work
    A new layer's weight is all code 0: fill it by `load_state_dict`, or make it by `from_linear` / `from_quant_tensor`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str | QuantFormat = "int4",
        *,
        compute: Compute = "auto",
        kernel: str | None = None,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.format = formats.get(format)
        self.compute, self.forced_kernel, self.batch_invariant, self.dense_dtype = compute, kernel, batch_invariant, dtype
        Problem(self.format, out_features, in_features, compute=compute)  # checks compute
        if kernel is not None:
            registry.get(kernel)  # checks the name
        for name in (*_TENSORS, "bias"):
            self.register_parameter(name, None)
        expected = expected_tensors(self.format, (out_features, in_features))
        self._hold({name: torch.zeros(shape, dtype=torch.uint8, device=device).to(dt) for name, (shape, dt) in expected.items()})
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        if self.weight.device.type != "meta":
            self._prepare(self.quant_tensor())

    # -- making one --------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str | QuantFormat = "int4",
        *,
        quantizer: str | quantizers.Quantizer = "rtn",
        compute: Compute = "auto",
        kernel: str | None = None,
        batch_invariant: bool = False,
    ) -> QuantLinear:
        """Quantise an `nn.Linear`. The bias is shared, not copied; on the meta device there is nothing to quantise yet.

        Raises FormatError on NaN or infinite weights, and when a quantizer of one's own returns something else than was asked for.
        """
        asked: dict[str, Any] = {"compute": compute, "kernel": kernel, "batch_invariant": batch_invariant, "dtype": linear.weight.dtype}
        if linear.weight.is_meta:
            n, k = linear.weight.shape
            layer = cls(k, n, False, format, **asked, device="meta")
            layer.bias = linear.bias
            return layer.train(linear.training)
        wanted = formats.get(format), tuple(linear.weight.shape)
        q = quantizers.get(quantizer)(linear.weight.detach(), wanted[0])
        if not isinstance(q, QuantTensor) or (q.format, q.shape) != wanted:
            made = f"{q.format.name} {list(q.shape)}" if isinstance(q, QuantTensor) else f"a {type(q).__name__}"
            raise FormatError(f"the quantizer returned {made}; a QuantTensor {wanted[0].name} {list(wanted[1])} was asked for")
        return cls.from_quant_tensor(q, linear.bias, **asked).train(linear.training)

    @classmethod
    def from_quant_tensor(
        cls,
        q: QuantTensor,
        bias: Tensor | None = None,
        *,
        compute: Compute = "auto",
        kernel: str | None = None,
        batch_invariant: bool = False,
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """Wrap a canonical weight."""
        n, k = q.shape
        layer = cls(k, n, False, q.format, compute=compute, kernel=kernel, batch_invariant=batch_invariant, device="meta", dtype=dtype)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer._prepare(q, dtype)
        return layer

    # -- what it holds -----------------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> str | None:
        """Name of the kernel that serves the layer; None on the meta device."""
        return self._kernel

    def plan(self, m: int | None = None, dtype: torch.dtype | None = None) -> Plan:
        """Which kernel would be chosen for this layer where it is, and why."""
        return self._plan(devices.current(self.weight.device), m, dtype, self.perm is not None)

    def quant_tensor(self) -> QuantTensor:
        """The weight in the canonical form; made anew when the layer holds a kernel's own form."""
        if self._kernel is not None:
            return registry.get(self._kernel).restore(self._packed())
        held = {f: t.detach() for name, f in zip(_TENSORS, FIELDS, strict=True) if (t := getattr(self, name)) is not None}
        return QuantTensor.from_tensors(self.format, self._shape, held)

    def rows(self, index: Tensor) -> QuantTensor:
        """Rows [R] int64 of the weight, canonical: without making the others, where the kernel knows how."""
        kernel = None if self._kernel is None else registry.get(self._kernel)
        if kernel is None or kernel.rows is None or (self.format.block is None and self.format.group[0] != 1):
            return take(self.quant_tensor(), index)
        return kernel.rows(self._packed(), index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] weight that the codes stand for."""
        return reference.decode(self.quant_tensor()).to(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An `nn.Linear` with the dequantised weight, trainable as any new one's.

        dtype defaults to the dense weight's, else the bias's, else torch's default. The bias is shared, not copied.
        """
        dtype = dtype or self.dense_dtype or (self.bias.dtype if self.bias is not None else torch.get_default_dtype())
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def nbytes(self) -> int:
        """Bytes held for the weight: every parameter but the bias."""
        return sum(t.nbytes for name in _TENSORS if (t := getattr(self, name)) is not None)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, format={self.format.name}, kernel={self._kernel}"

    # -- running -----------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] float32, bfloat16 or float16 -> [..., out_features] in the same dtype, or in autocast's."""
        if x.dim() == 0 or x.size(-1) != self.in_features:
            raise FormatError(f"x {list(x.shape)} does not fit a layer with in_features = {self.in_features}")
        if x.dtype not in registry.DTYPES:
            raise FormatError(f"x is {x.dtype}; a QuantLinear takes float32, bfloat16 or float16")
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self._kernel is None:
            raise FormatError("the layer is on the meta device: load or materialise its weight first")
        if (matmul := self._matmul) is None:  # unpickled, or a copy
            matmul = self._matmul = registry.get(self._kernel).matmul(self.format, self._shape)
        device = "cpu" if x.is_cpu else x.device.type  # which would take 0.3 µs of every call
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        held = self._parameters  # a fifth of the call of a small layer would go to Module.__getattr__
        bias = held["bias"]
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            function = _TransformedMatmul if torch._C._are_functorch_transforms_active() else _Matmul
            return function.apply(x, bias, self._kernel, self._packed())
        return matmul(x, held["weight"], held["scales"], held["zeros"], held["tensor_scale"], held["perm"], bias)

    # -- holding the weight: canonical or a kernel's own form, never both --------------------------------------------------------

    _kernel: str | None = None
    _matmul: registry.Matmul | None = None
    scales: nn.Parameter | None
    perm: nn.Parameter | None

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _packed(self) -> Packed:
        assert self._kernel is not None
        return registry.get(self._kernel).packed_type(self.format, self._shape, *(self._parameters[name] for name in _TENSORS))

    def _plan(self, device: devices.Device, m: int | None, dtype: torch.dtype | None, perm: bool) -> Plan:
        if dtype is None:
            dtype = self.bias.dtype if self.bias is not None else torch.bfloat16
        if dtype not in registry.DTYPES:
            dtype = torch.float32
        return registry.plan(
            Problem(
                self.format, self.out_features, self.in_features, m, dtype, self.compute, self.bias is not None, perm, device,
                self.batch_invariant,
            ),
            self.forced_kernel,
        )  # fmt: skip

    def _prepare(self, q: QuantTensor, dtype: torch.dtype | None = None) -> None:
        """Choose a kernel for where `q` lies and hold the weight in that kernel's form."""
        if q.codes.device.type == "meta":
            self._kernel = self._matmul = None
            self._hold(dict(zip(FIELDS, (q.codes, q.scales, q.zeros, q.tensor_scale, q.perm), strict=True)))
            return
        plan = self._plan(devices.current(q.codes.device), None, dtype, q.perm is not None)
        kernel = plan.kernel
        if self.forced_kernel is None:
            _say_if_slow(plan)
        packed = kernel.prepare(q)
        self._kernel, self._matmul = kernel.name, kernel.matmul(self.format, self._shape)
        self._hold(dict(zip(FIELDS, packed[2:], strict=True)))

    def _hold(self, tensors: Mapping[str, Tensor | None]) -> None:
        for name, field in zip(_TENSORS, FIELDS, strict=True):
            self._hold_one(name, tensors.get(field))

    def _hold_one(self, name: str, t: Tensor | None) -> None:
        setattr(self, name, None if t is None else nn.Parameter(t, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`.to()` and its kin: follow the device, keep the dtype of codes and scales (the bias changes as any other)."""
        probe = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device))
        moved = probe.device != self.weight.device
        held = self.quant_tensor().tensors() if moved else {f: getattr(self, name) for name, f in zip(_TENSORS, FIELDS, strict=True)}
        kept = {field: _keep_dtype(fn, t) for field, t in held.items() if t is not None}
        if self.dense_dtype is not None:
            self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.weight.device)).dtype
        if self.bias is not None:
            grad = self.bias.requires_grad
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=grad)
        if moved:
            self._prepare(QuantTensor.from_tensors(self.format, self._shape, kept))
        else:
            self._hold(kept)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle float8 scales as their bytes: torch 2.13 cannot pickle a float8 Parameter."""
        parameters = dict(self._parameters)
        if self.scales is not None and self.scales.dtype in _FLOAT8:
            parameters["scales"] = nn.Parameter(self.scales.detach().view(torch.uint8), requires_grad=False)
        scales_dtype = None if self.scales is None else self.scales.dtype
        return {**self.__dict__, "_parameters": parameters, "_matmul": None, "_scales_dtype": scales_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtype = state.pop("_scales_dtype")
        super().__setstate__(state)
        if dtype in _FLOAT8:
            self._hold_one("scales", state["_parameters"]["scales"].detach().view(dtype))
        if self._kernel is not None and not self.weight.is_meta and not registry.serves(self._kernel, self.weight.device.type):
            self._prepare(self.quant_tensor())  # unpickled on another kind of device

    # -- state_dict: always the canonical tensors --------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        q = self.quant_tensor()
        for name, field in zip(_TENSORS, FIELDS, strict=True):
            if (t := getattr(q, field)) is not None:
                destination[prefix + name] = t
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = expected_tensors(self.format, self._shape)
        given = {field: state_dict[prefix + name] for name, field in zip(_TENSORS, FIELDS, strict=True) if prefix + name in state_dict}
        missing = [prefix + name for name, field in zip(_TENSORS, FIELDS, strict=True) if field in expected and field not in given]
        known = {prefix + name for name in (*_TENSORS, "bias")}
        unexpected_keys.extend(k for k in state_dict if strict and k.startswith(prefix) and k not in known)
        missing_keys.extend(missing)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if not missing:
            try:
                q = QuantTensor.from_tensors(self.format, self._shape, given)
                self._prepare(q if assign else q.to(self.weight.device))
            except FormatError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        holder = nn.Module()  # the bias alone is loaded as any parameter is
        holder.register_parameter("bias", self.bias)
        bias = {name: t for name, t in state_dict.items() if name == prefix + "bias"}
        holder._load_from_state_dict(bias, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.bias = holder.bias  # type: ignore[assignment]


_SAID: set[str] = set()


def _say_if_slow(plan: Plan) -> None:
    """Warn when the reference kernel has to serve: once for every reason."""
    if plan.kernel.backend != "reference":
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(plan.rejected.items()))
    if reasons not in _SAID:
        _SAID.add(reasons)
        log.warning("the slow reference kernel serves %s on %s (%s)", plan.problem.format.name, plan.problem.device, reasons)


def _keep_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Apply fn to the bytes of t, so that a change of floating-point dtype cannot touch them."""
    return fn(t.detach().contiguous().view(torch.uint8)).view(t.dtype)


class _Matmul(torch.autograd.Function):
    """x · Ŵᵀ + bias with a gradient for x and bias; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kernel: str, packed: Packed) -> Tensor:
        ctx.kernel, ctx.packed = kernel, packed
        return registry.get(kernel).run(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            kernel = registry.get(ctx.kernel)
            if kernel.backward is not None:
                grad_x = kernel.backward(grad_y, ctx.packed)
            else:
                weight = kernel.dequantize(ctx.packed) if kernel.dequantize else reference.decode(kernel.restore(ctx.packed))
                grad_x = grad_y @ weight.to(grad_y.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_y.flatten(0, -2).sum(0) if grad_y.dim() > 1 else grad_y
        return grad_x, grad_bias, None, None


class _TransformedMatmul(_Matmul):
    """The same for torch.func's transforms; the form that they ask for takes 17 µs more a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, kernel: str, packed: Packed) -> Tensor:  # type: ignore[override]
        return registry.get(kernel).run(x, packed, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kernel, ctx.packed = inputs[2:]
