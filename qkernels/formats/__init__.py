"""Formats: what quantised numbers mean. A new format is one `register(...)` in one file of this folder."""

import importlib
import pkgutil

from qkernels.formats.catalogue import alias_of, aliases, all_formats, get, is_known, register
from qkernels.formats.format import Block, Codebook, Float, Int, Parts, QuantFormat
from qkernels.formats.tensor import QuantStack, QuantTensor

for _module in pkgutil.iter_modules(__path__):  # discovery is by folder
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Block",
    "Codebook",
    "Float",
    "Int",
    "Parts",
    "QuantFormat",
    "QuantStack",
    "QuantTensor",
    "alias_of",
    "aliases",
    "all_formats",
    "get",
    "is_known",
    "register",
]
