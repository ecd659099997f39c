"""llama.cpp: one ggml_mul_mat by ggml's CPU backend, fp32 in and out, called through the C interface.

llama.cpp lays weights into the first of the CPU's buffer types that takes them (AMX, CPU_REPACK, …), else as they are in the file (CPU);
here each one is a contestant of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..base import CheckFailed, Contestant, Prepared
from ..check import rows_to_check

TYPES = {  # ggml's names -> its ids
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "mxfp4": 39,
}  # fmt: skip
BUFFERS = ("CPU", "CPU_REPACK", "AMX")
ABSENT = "not installed (make peers compiles it)"
F32, GRAPH_NODES, USAGE_WEIGHTS = 0, 8, 1
Pointer = ctypes.c_void_p


class UnsupportedError(Exception):
    """ggml has no such kernel for this problem."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p), ("block_size", ctypes.c_int64), ("interleave", ctypes.c_int64), ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, Pointer, Pointer, ctypes.c_int64)), ("from_float", Pointer),
    )  # fmt: skip


_SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)(lambda *_: None)  # it reports every weight that it lays out

# function -> result, arguments
_SIGNATURES: dict[str, tuple] = {
    "ggml_init": (Pointer, _InitParams),
    "ggml_free": (None, Pointer),
    "ggml_version": (ctypes.c_char_p,),
    "ggml_log_set": (None, type(_SILENCE), Pointer),
    "ggml_tensor_overhead": (ctypes.c_size_t,),
    "ggml_graph_overhead_custom": (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), ctypes.c_int),
    "ggml_quantize_chunk": (ctypes.c_size_t, ctypes.c_int, Pointer, Pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Pointer),
    "ggml_new_tensor_2d": (Pointer, Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_mul_mat": (Pointer, Pointer, Pointer, Pointer),
    "ggml_new_graph_custom": (Pointer, Pointer, ctypes.c_size_t, ctypes.c_bool),
    "ggml_build_forward_expand": (None, Pointer, Pointer),
    "ggml_backend_cpu_init": (Pointer,),
    "ggml_backend_cpu_reg": (Pointer,),
    "ggml_backend_cpu_buffer_type": (Pointer,),
    "ggml_backend_cpu_buffer_from_ptr": (Pointer, Pointer, ctypes.c_size_t),
    "ggml_backend_cpu_set_n_threads": (None, Pointer, ctypes.c_int),
    "ggml_backend_reg_dev_get": (Pointer, Pointer, ctypes.c_size_t),
    "ggml_backend_reg_get_proc_address": (Pointer, Pointer, ctypes.c_char_p),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, Pointer, Pointer),
    "ggml_backend_buft_name": (ctypes.c_char_p, Pointer),
    "ggml_backend_buft_alloc_buffer": (Pointer, Pointer, ctypes.c_size_t),
    "ggml_backend_buft_get_alloc_size": (ctypes.c_size_t, Pointer, Pointer),
    "ggml_backend_buffer_free": (None, Pointer),
    "ggml_backend_buffer_get_base": (Pointer, Pointer),
    "ggml_backend_buffer_set_usage": (None, Pointer, ctypes.c_int),
    "ggml_backend_tensor_alloc": (ctypes.c_int, Pointer, Pointer, Pointer),
    "ggml_backend_tensor_set": (None, Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t),
    "ggml_backend_graph_compute": (ctypes.c_int, Pointer, Pointer),
}


def libraries() -> list[Path]:
    """The files that ggml lies in, the one to ask last: compiled by `make peers`, of llama-cpp-python, or of xllamacpp; [] without any."""
    compiled = [Path(sys.prefix, "lib", "ggml"), *(folder / "lib" for folder in _packages("llama_cpp"))]
    for folder in compiled:
        if (folder / "libggml-cpu.so").exists():
            return [folder / "libggml-base.so", folder / "libggml-cpu.so"]
    return [file for folder in _packages("xllamacpp") for file in folder.glob("xllamacpp*.so")][:1]


def _packages(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [] if spec is None or spec.origin is None else [Path(spec.origin).parent]


def why_absent() -> str:
    return "" if libraries() else ABSENT


@functools.cache
def ggml() -> ctypes.CDLL:
    """ggml's functions. The base library is loaded first, as the other one is linked to it."""
    library = [ctypes.CDLL(str(file)) for file in libraries()][-1]
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(_SILENCE, None)
    return library


def versions() -> dict[str, str]:
    """As it says it itself: it is no package that was installed."""
    return {"ggml": ggml().ggml_version().decode()}


@functools.cache
def backend(threads: int) -> int:
    made = ggml().ggml_backend_cpu_init()
    ggml().ggml_backend_cpu_set_n_threads(made, threads)
    return made


@functools.cache
def buffer_types() -> dict[str, int]:
    """Ways of laying out weights, by name, in llama.cpp's order of preference."""
    registry = ggml().ggml_backend_cpu_reg()
    address = ggml().ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra: Iterator[int] = iter(())
    if address:
        found = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(ggml().ggml_backend_reg_dev_get(registry, 0))
        extra = iter(lambda i=iter(range(64)): found[next(i)], None)  # null ends the list
    return {ggml().ggml_backend_buft_name(kind).decode(): kind for kind in (*extra, ggml().ggml_backend_cpu_buffer_type())}


@functools.lru_cache(maxsize=1)  # the contestants of one type follow each other
def blocks(weight: Tensor, type: str) -> Tensor:
    """Quantise a weight [N, K] float32 by ggml itself: [N, bytes of a row] uint8."""
    traits = ggml().ggml_get_type_traits(TYPES[type]).contents
    n, k = weight.shape
    weight, raw = weight.contiguous(), torch.empty(n, k // traits.block_size * traits.type_size, dtype=torch.uint8)
    ggml().ggml_quantize_chunk(TYPES[type], weight.data_ptr(), raw.data_ptr(), 0, n, k, None)
    return raw


def meaning(raw: Tensor, type: str, k: int) -> Tensor:
    """What blocks mean to ggml: [N, K] float32."""
    values = torch.empty(len(raw), k)
    ggml().ggml_get_type_traits(TYPES[type]).contents.to_float(raw.data_ptr(), values.data_ptr(), values.numel())
    return values


@functools.lru_cache(maxsize=8)
def _output(m: int, n: int) -> Tensor:
    return torch.empty(m, n)  # one for all copies, as a model's graph has


class Layer:
    """x [M, K] float32 -> x @ W.T, which is overwritten by the next call with as many rows, of whichever layer."""

    def __init__(self, raw: Tensor, type: str, k: int, buffer: str, threads: int) -> None:
        lib, self.k, self.n, self.backend = ggml(), k, len(raw), backend(threads)
        self.graphs: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self.context = self._context(lib.ggml_tensor_overhead())
        self.weight = lib.ggml_new_tensor_2d(self.context, TYPES[type], k, self.n)
        kind = buffer_types()[buffer]
        held = lib.ggml_backend_buft_alloc_buffer(kind, lib.ggml_backend_buft_get_alloc_size(kind, self.weight))
        weakref.finalize(self, lib.ggml_backend_buffer_free, held)
        lib.ggml_backend_buffer_set_usage(held, USAGE_WEIGHTS)
        lib.ggml_backend_tensor_alloc(held, self.weight, lib.ggml_backend_buffer_get_base(held))
        if not self._is_supported():
            raise UnsupportedError(f"{buffer} does not take {type} {self.n} x {k}")
        lib.ggml_backend_tensor_set(self.weight, raw.data_ptr(), 0, raw.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), len(x))
        if key not in self.graphs:
            self.graphs[key] = self._graph(x)
        graph, y = self.graphs[key]
        if ggml().ggml_backend_graph_compute(self.backend, graph):
            raise RuntimeError("ggml could not compute the graph")
        return y

    def _context(self, nbytes: int) -> int:
        made = ggml().ggml_init(_InitParams(nbytes, None, True))
        weakref.finalize(self, ggml().ggml_free, made)
        return made

    def _is_supported(self) -> bool:
        """Ask as llama.cpp does: with a product of 512 rows."""
        context = self._context(2 * ggml().ggml_tensor_overhead())
        product = ggml().ggml_mul_mat(context, self.weight, ggml().ggml_new_tensor_2d(context, F32, self.k, 512))
        return ggml().ggml_backend_dev_supports_op(ggml().ggml_backend_reg_dev_get(ggml().ggml_backend_cpu_reg(), 0), product)

    def _graph(self, x: Tensor) -> tuple[int, Tensor]:
        """The graph of the product that reads x where it lies, and its output."""
        lib, y = ggml(), _output(len(x), self.n)
        context = self._context(2 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(GRAPH_NODES, False))
        given = lib.ggml_new_tensor_2d(context, F32, self.k, len(x))
        product = lib.ggml_mul_mat(context, self.weight, given)
        for tensor, memory in ((given, x), (product, y)):
            held = lib.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
            weakref.finalize(self, lib.ggml_backend_buffer_free, held)
            lib.ggml_backend_tensor_alloc(held, tensor, memory.data_ptr())
        graph = lib.ggml_new_graph_custom(context, GRAPH_NODES, False)
        lib.ggml_build_forward_expand(graph, product)
        return graph, y


def assert_close(weight: Tensor, run: int, x: Tensor, y: Tensor) -> None:
    """Hold ggml's result against what its int8 activations may cost: half a step for every row and run of `run` elements of K.

    Runs of 32 have their step, and the sum that is multiplied with the minimum, in fp16. A minimum is the value of one of its elements.
    """
    rows, (n, k) = rows_to_check(len(x)), weight.shape
    x, runs = x[rows].double(), weight.double().abs().view(n, -1, run)
    steps = x.abs().view(len(rows), -1, run).amax(2) / 127
    widest = runs.amax(2, keepdim=True).expand_as(runs)
    rounding = k * 2.0**-24 + (2.0**-11 if run == 32 else 0)
    allowed = 0.5 * steps @ runs.sum(2).T + rounding * x.abs() @ (runs + 2 * widest).view(n, k).T
    error = (y[rows].double() - x @ weight.double().T).abs()
    if (error > allowed).any():
        bad = int((error / allowed).argmax())
        raise CheckFailed(f"error {error.view(-1)[bad]:.3g} where int8 activations may cost {allowed.view(-1)[bad]:.3g}")


def contestant(type: str, buffer: str = "") -> Contestant:
    """One type in one buffer type; "": in the one that llama.cpp takes."""

    def prepare(weight: Tensor, threads: int) -> Prepared:
        raw = blocks(weight, type)
        values, kind = meaning(raw, type, weight.shape[1]), buffer or choice(raw, type, weight.shape[1], threads)
        run = 256 if ggml().ggml_get_type_traits(TYPES[type]).contents.block_size == 256 else 32
        make = functools.partial(Layer, raw, type, weight.shape[1], kind, threads)
        return Prepared(values, raw.nbytes, make, kind, "int8", functools.partial(assert_close, values, run))

    name = f"ggml {type} {buffer}" if buffer else f"llama.cpp {type}"
    return Contestant(name, "peer", type, "int8", torch.float32, prepare, absent=why_absent)


def choice(raw: Tensor, type: str, k: int, threads: int) -> str:
    """The first buffer type that takes a weight."""
    for kind in buffer_types():
        try:
            Layer(raw, type, k, kind, threads)
            return kind
        except UnsupportedError:
            continue
    raise UnsupportedError(f"ggml multiplies no {type}")


CONTESTANTS = tuple(contestant(type) for type in ("q4_0", "q8_0"))  # of every benchmark; `python -m benchmarks ggml` has all
