"""Kernels: every file of the backend folders registers its own."""

import importlib
import pkgutil

from qkernels.kernels import reference
from qkernels.kernels.registry import Kernel, Packed, Plan, Problem, all_kernels, explain, get, plan, register

for _backend in ("cpu", "triton", "cuda"):
    _package = importlib.import_module(f"{__name__}.{_backend}")
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

__all__ = ["Kernel", "Packed", "Plan", "Problem", "all_kernels", "explain", "get", "plan", "reference", "register"]
