"""Make gguf_c.gguf, which the C code of ggml writes: every type of tensor it has, rows of random bytes, and key-values. No test runs this.

    pip install numpy==2.4.6 xllamacpp==2026.10.11549
    python tests/golden/make_gguf_c.py

The library of xllamacpp happens to export the C functions of ggml; they are called through ctypes. A tensor is called as its type, and
its bytes are those of numpy.random.default_rng(type). Nothing of qkernels is imported.
"""

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int, c_int16, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np

TYPES = (0, 1, 2, 3, 6, 7, 8, *range(10, 15), *range(16, 31), 34, 35, 39, 40, 41, 42)
C = ctypes.CDLL(str(next(Path(importlib.util.find_spec("xllamacpp").origin).parent.glob("xllamacpp*.so"))))


class Memory(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


def function(name, result, *arguments):
    found = C[name]
    found.restype, found.argtypes = result, arguments
    return found


gguf = c_void_p(function("gguf_init_empty", c_void_p)())
memory = c_void_p(function("ggml_init", c_void_p, Memory)(Memory(1 << 24, None, False)))
VALUES = {
    "str": (b"general.architecture", c_char_p, b"llama"),
    "i16": (b"of.i16", c_int16, -3),
    "u32": (b"of.u32", c_uint32, 7),
    "u64": (b"of.u64", c_uint64, 2**60),
    "f32": (b"of.f32", c_float, 0.1),
    "f64": (b"of.f64", c_double, 0.1),
    "bool": (b"of.bool", c_bool, True),
}
for suffix, (key, type, value) in VALUES.items():
    function(f"gguf_set_val_{suffix}", None, c_void_p, c_char_p, type)(gguf, key, value)
set_data = function("gguf_set_arr_data", None, c_void_p, c_char_p, c_int, c_void_p, c_size_t)
set_data(gguf, b"list.f32", 6, (c_float * 3)(1, -2, 0.3), 3)
set_data(gguf, b"list.empty", 5, (c_int32 * 1)(), 0)
words = (c_char_p * 3)(b"a", b"", b"\xff")
function("gguf_set_arr_str", None, c_void_p, c_char_p, POINTER(c_char_p), c_size_t)(gguf, b"list.string", words, 3)

nbytes, data = function("ggml_nbytes", c_size_t, c_void_p), function("ggml_get_data", c_void_p, c_void_p)
new = function("ggml_new_tensor", c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
block = function("ggml_blck_size", c_int64, c_int)
name = function("ggml_type_name", c_char_p, c_int)
set_name, add = function("ggml_set_name", c_void_p, c_void_p, c_char_p), function("gguf_add_tensor", None, c_void_p, c_void_p)
for type in TYPES:
    tensor = c_void_p(new(memory, type, 2, (c_int64 * 2)(block(type) * 2, 3)))
    set_name(tensor, name(type))
    raw = np.random.default_rng(type).bytes(nbytes(tensor))
    ctypes.memmove(data(tensor), raw, len(raw))
    add(gguf, tensor)
path = Path(__file__).with_name("gguf_c.gguf")
assert function("gguf_write_to_file", c_bool, c_void_p, c_char_p, c_bool)(gguf, str(path).encode(), False)
