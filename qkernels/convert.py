"""replace_linear and restore_linear: swap the linears of a model, all or none."""

from __future__ import annotations

import ast
import ctypes
import functools
import inspect
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qkernels import formats, quantizers
from qkernels.errors import FormatError, UnsupportedError
from qkernels.formats import QuantFormat
from qkernels.kernels.registry import Compute, Problem
from qkernels.linear import QuantLinear
from qkernels.progress import track


@dataclass(frozen=True)
class Row:
    """One layer of a report; bytes count weight, scales and zeros, not the bias, and a layer that has two names once."""

    name: str
    format: str
    kernel: str
    bytes_before: int
    bytes_after: int


@dataclass
class Report:
    """What `replace_linear` did: rows of replaced layers, and name -> reason of skipped ones."""

    replaced: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.replaced)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.replaced)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.replaced), default=5)
        lines = [f"{'layer':{width}}  {'format':16}  {'kernel':22}  {'MB':>9}  ->  {'MB':>9}"]
        for row in self.replaced:
            lines.append(
                f"{row.name:{width}}  {row.format:16}  {row.kernel:22}  {row.bytes_before / 1e6:9.3f}  ->  {row.bytes_after / 1e6:9.3f}"
            )
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        ratio = f" ({self.bytes_before / self.bytes_after:.2f} x smaller)" if self.bytes_after else ""
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines.append(
            f"{len(self.replaced)} layers, {before:.1f} -> {after:.1f} MB{ratio}, {len(self.skipped)} skipped, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    format: str | QuantFormat = "int4",
    *,
    quantizer: str | quantizers.Quantizer = "rtn",
    compute: Compute = "auto",
    batch_invariant: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = ("lm_head",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: bool = True,
) -> Report:
    """Replace the `nn.Linear`s of a model by QuantLinears, in place; finishes, or leaves the model as it was.

    format            name or QuantFormat ("int4", "int8", "nf4", "int4_g32", "mxfp4", …)
    quantizer         "rtn", "absmax", or a function (weight, format) -> QuantTensor
    compute           "auto", "float" or "int8"; the report names the kernel that this led to
    batch_invariant   a row of a layer's result has the same bits whatever other rows there are; an error where no kernel can
    include, exclude  fnmatch globs on a module's full name, or on its last part where the glob has no dot; include=None takes all
    filter_fn         (module, name) -> bool, asked last
    Plain `nn.Linear`s alone are taken: a subclass may compute something else (a parametrised weight, a router's softmax) even where it
    inherits `forward`. One that does not can be replaced by hand, `QuantLinear.from_linear(module)`.
    Raises            FormatError (unknown format, NaN or inf weights: the layer is named), UnsupportedError (no Linear to replace)
    """
    fmt, quantize, start = formats.get(format), quantizers.get(quantizer), time.perf_counter()
    Problem(fmt, 1, 1, compute=compute)  # checks compute before any work
    report = Report()
    linears, report.skipped = _choose(model, include, exclude, filter_fn)
    made: dict[int, QuantLinear] = {}
    first: dict[int, str] = {}
    for name, linear in track(linears, progress, f"quantizing to {fmt.name}"):
        if id(linear) not in made:
            try:
                made[id(linear)] = QuantLinear.from_linear(
                    linear, fmt, quantizer=quantize, compute=compute, batch_invariant=batch_invariant
                )
            except (FormatError, UnsupportedError) as error:
                raise type(error)(f"layer {name}: {error}; the model is unchanged") from None
            layer = made[id(linear)]
            report.replaced.append(Row(name, fmt.name, layer.kernel or "none", linear.weight.nbytes, layer.nbytes))
            first[id(linear)] = name
        else:
            report.replaced.append(Row(name, fmt.name, f"shared with {first[id(linear)]}", 0, 0))
    for name, linear in linears:
        _set(model, name, made[id(linear)])
    del linear, linears  # the last hold on the dense weights
    _give_back()
    report.seconds = time.perf_counter() - start
    return report


def _give_back() -> None:
    """Have the C library return freed memory to the system: glibc keeps holes between live blocks, a third of the dense weights here."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def restore_linear(model: nn.Module, *, dtype: torch.dtype | None = None) -> int:
    """Put `nn.Linear`s with the dequantised weights back, in place; return how many. They are trainable, as every new Linear is."""
    layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]
    made = {id(m): m.to_linear(dtype) for _, m in layers}
    for name, m in layers:
        _set(model, name, made[id(m)])
    return len(layers)


def _choose(
    model: nn.Module,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    meta: bool = False,
) -> tuple[list[tuple[str, nn.Linear]], dict[str, str]]:
    """The linears to replace, and name -> reason for the others; `meta` takes those without data too. UnsupportedError if none is left."""
    owners: dict[Any, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(tie_key(parameter), set()).add(id(module))
    linears = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    reasons: dict[str, str | None] = {}
    of_module: dict[int, list[str | None]] = {}
    for name, module in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        reason = _why_skip(name, module, _globs(include), _globs(exclude) or (), filter_fn, owners, parent)
        if reason is None and module.weight.is_meta and not meta:
            reason = "its weight is on the meta device"
        reasons[name] = reason
        of_module.setdefault(id(module), []).append(reason)
    reasons = {name: _of_all_names(reasons[name], of_module[id(module)]) for name, module in linears}
    chosen = [(name, module) for name, module in linears if reasons[name] is None]
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if not chosen:
        raise UnsupportedError("found nothing to replace", skipped or {"model": f"{type(model).__name__} has no nn.Linear"})
    return chosen, skipped


def _of_all_names(own: str | None, reasons: Sequence[str | None]) -> str | None:
    """Keep a module of several names one: it is replaced where `include` has any of them, and left alone where any is skipped for more."""
    if None not in reasons:
        return own
    others = [reason for reason in reasons if reason is not None and not reason.startswith(_NOT_INCLUDED)]
    return (own or f"another name of it was skipped: {others[0]}") if others else None


def tie_key(t: torch.Tensor) -> Any:
    """Equal for tied tensors: those lie in the same memory; where there is none (meta, sparse), they are the same object."""
    if t.is_meta or t.layout != torch.strided or not t.numel():
        return id(t)
    return t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.dtype


def _why_skip(
    name: str,
    module: nn.Linear,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    owners: dict[Any, set[int]],
    parent: nn.Module,
) -> str | None:
    if name == "":
        return "the model itself is a Linear: use QuantLinear.from_linear"
    if isinstance(module, QuantLinear):
        return "quantised already"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain nn.Linear"
    if include is not None and not _matches(name, include):
        return f"{_NOT_INCLUDED}{list(include)}"
    if _matches(name, exclude):
        return f"excluded by {list(exclude)}"
    if len(owners.get(tie_key(module.weight), ())) > 1:
        return "its weight is tied to another module's"
    if "forward" in vars(module) or any(vars(module)[kind] for kind in _HOOKS):
        return "it has hooks or a forward of its own, which a replacement would lose"
    if name.rpartition(".")[2] in _weights_read(type(parent)):  # type: ignore[arg-type]  # mypy takes Module.__hash__ for the class's
        return f"{type(parent).__name__} reads its weight itself"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn said no"
    return None


_NOT_INCLUDED = "not in include="
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@functools.cache
def _weights_read(parent: type[nn.Module]) -> frozenset[str]:
    """Children whose `weight` the methods of a module's class read, as T5's `self.wo.weight.dtype`: packed codes would mislead them.

    Inherited methods count; those that set weights up are passed over, and so are classes without source.
    """
    bases = [base for base in parent.__bases__ if issubclass(base, nn.Module) and base is not nn.Module]
    inherited = frozenset[str]().union(*(_weights_read(base) for base in bases))  # type: ignore[arg-type]  # as at the other call
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
    except (OSError, TypeError, SyntaxError):
        return inherited
    methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not _SETS_UP.search(node.name))
    return inherited | frozenset(
        node.value.attr
        for method in methods
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name) and node.value.value.id == "self"
    )  # fmt: skip


_SETS_UP = re.compile("init|reset|load|save|tie|resize|convert")


def _globs(patterns: str | Sequence[str] | None) -> Sequence[str] | None:
    return (patterns,) if isinstance(patterns, str) else patterns


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return any(fnmatchcase(name, p) or ("." not in p and fnmatchcase(name.rpartition(".")[2], p)) for p in patterns or ())


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
