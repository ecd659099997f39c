"""The bit tricks of csrc/cuda/unpack.cuh and numbers.cuh over all inputs, compiled for the host over tests/cuda_emulation."""

import ctypes

import numpy as np
import pytest
import torch
from cases import equal_values
from emulated_cuda import INCLUDE, LINK, ROOT, compile, compile_begin, why_not

from qkernels import formats
from qkernels.formats.format import SCALE_DTYPES
from qkernels.kernels.cuda.f16_w4_mma import KINDS

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
PROGRAM = """
#include "begin.h"
#define EMULATED_AS none
#include "cuda/unpack.cuh"
#define EXPORT extern "C" __attribute__((visibility("default")))
template <class C>
void unpack_all(const C& codes, const uint32_t* words, int count, uint32_t zero, uint32_t* to) {
  for (int i = 0; i < count; ++i) codes.unpack(reinterpret_cast<uint32_t(&)[C::PAIRS]>(to[i * C::PAIRS]), words[i], C::zero(zero));
}
#define UNPACK(T) \\
  EXPORT void int4_##T(const uint32_t* w, int n, uint32_t z, uint32_t* to) { unpack_all(qk::Int4<qk::T>(nullptr), w, n, z, to); } \\
  EXPORT void int8_##T(const uint32_t* w, int n, uint32_t z, uint32_t* to) { unpack_all(qk::Int8<qk::T>(nullptr), w, n, z, to); } \\
  EXPORT void table_##T(const uint32_t* w, int n, const float* v, uint32_t* to) { unpack_all(qk::Table<qk::T>(v), w, n, 0, to); } \\
  EXPORT void mirrored_##T(const uint32_t* w, int n, const float* v, uint32_t* to) { unpack_all(qk::Table<qk::T, true>(v), w, n, 0, to); }
UNPACK(bf16)
UNPACK(f16)
EXPORT void numbers(const void* from, int count, int kind, float* to) {
  for (int i = 0; i < count; ++i) to[i] = qk::number(from, i, qk::Kind(kind));
}
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpack")
    compile_begin(folder)
    (folder / "unpack.cpp").write_text(PROGRAM)
    library = folder / "unpack.so"
    compile("-shared", *INCLUDE, f"-I{ROOT / 'csrc'}", folder / "unpack.cpp", folder / "machine.o", *LINK, "-o", library)
    return ctypes.CDLL(str(library))


def call(function, words, more, dtype, pairs):
    """Unpack words, uint32 numpy [count] -> float32 [count, pairs, 2]."""
    out = np.empty((len(words), pairs), np.uint32)
    function(ctypes.c_void_p(words.ctypes.data), len(words), more, ctypes.c_void_p(out.ctypes.data))
    return torch.from_numpy(out.view(np.int16)).view(dtype).float().view(-1, pairs, 2)


def words_of(codes, places, bits):
    """codes [count, 32 / bits], code j at bit places[j] -> uint32 [count]."""
    return np.bitwise_or.reduce(codes.astype(np.uint32) << np.asarray(places, np.uint32), 1)


def every_code(bits, count, per_word):
    """Every value at every place, beside random ones."""
    codes = np.random.default_rng(0).integers(2**bits, size=(count, per_word))
    for place in range(per_word):
        codes[place * 2**bits : (place + 1) * 2**bits, place] = np.arange(2**bits)
    return codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_integers(functions, bits, dtype):
    per_word = 32 // bits
    codes = every_code(bits, 4096, per_word)
    words = words_of(codes, [bits * (j // 2) + 16 * (j % 2) for j in range(per_word)], bits)
    for zero in range(2**bits):
        found = call(getattr(functions, f"int{bits}_{dtype}"), words, zero, DTYPES[dtype], per_word // 2)
        assert torch.equal(found.flatten(1), torch.from_numpy(codes - zero).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "name"), [("table", "nf4"), ("table", "fp4"), ("table", "mxfp4"), ("mirrored", "fp4"), ("mirrored", "mxfp4")]
)
def test_tables(functions, kind, name, dtype):
    values = torch.tensor(formats.get(name).code.values, dtype=torch.float32)
    codes = np.arange(65536)[:, None] >> 4 * np.arange(4) & 15
    words = words_of(np.concatenate([codes, codes[::-1]], 1), 4 * np.arange(8), 4)
    table = ctypes.c_void_p(values.numpy().ctypes.data)
    found = call(getattr(functions, f"{kind}_{dtype}"), words, table, DTYPES[dtype], 4)
    assert torch.equal(found.flatten(1), values.to(DTYPES[dtype]).float()[np.concatenate([codes, codes[::-1]], 1)])


@pytest.mark.parametrize(("kind", "scale"), enumerate([*KINDS, "u8"]))
def test_numbers(functions, kind, scale):
    dtype = SCALE_DTYPES.get(scale, torch.uint8)
    raw = torch.arange(2 ** (16 if dtype.itemsize > 1 else 8), dtype=torch.int32)
    raw = {1: raw.to(torch.uint8), 2: raw.to(torch.int16), 4: raw << 16 | 0x5A5A}[dtype.itemsize]
    found = torch.empty(len(raw))
    functions.numbers(ctypes.c_void_p(raw.data_ptr()), len(raw), kind, ctypes.c_void_p(found.data_ptr()))
    equal_values(found, raw.view(dtype).float())
