"""The bit tricks of csrc/common/bits.h, csrc/cuda/numbers.cuh and unpack.cuh over all inputs: plain C++ for the host, with CUDA's own
16-bit floats where they are installed, and with those of tests/cuda_emulation."""

import ctypes
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values
from emulated_cuda import EMULATION, ROOT, compile, why_not

from qkernels import formats
from qkernels.formats.format import SCALE_DTYPES
from qkernels.kernels.cuda.f16_w4_mma import KINDS

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
PROGRAM = """
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
EXPORT void halves(const uint32_t* w, int n, uint32_t flip, uint32_t zeros, uint32_t* to) {
  for (int i = 0; i < n; ++i) {
    to[3 * i] = qk::lower_halves(w[i], flip), to[3 * i + 1] = qk::upper_halves(w[i], flip);
    to[3 * i + 2] = qk::less_zeros(qk::lower_halves(w[i], qk::HIGHEST), zeros);
  }
}
EXPORT int dot4(uint32_t a, uint32_t b, int sum) { return qk::dot4(a, b, sum); }
"""


def cuda_headers():
    """The folder of CUDA's own headers, or None."""
    nvcc = shutil.which("nvcc")
    places = (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    return next((Path(place, "include") for place in places if place and Path(place, "include", "cuda_fp16.h").exists()), None)


@pytest.fixture(scope="module", params=["emulated", "CUDA's"])
def functions(request, tmp_path_factory):
    headers = f"-I{EMULATION}"
    if request.param == "CUDA's":
        if (found := cuda_headers()) is None:
            pytest.skip("CUDA's headers are not installed")
        headers = f"-isystem{found}"
    folder = tmp_path_factory.mktemp("unpack")
    (folder / "unpack.cpp").write_text(PROGRAM)
    library = folder / "unpack.so"
    compile("-shared", headers, f"-I{ROOT / 'csrc'}", folder / "unpack.cpp", "-o", library)
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


def test_halves_of_bytes(functions):
    """Codes of 4 bits as int8: unsigned, signed, around 8, and less every zero point."""
    codes = every_code(4, 4096, 8)
    words, out = words_of(codes, 4 * np.arange(8), 4), np.empty((len(codes), 3), np.uint32)
    lower, upper = codes[:, ::2], codes[:, 1::2]
    for zero in range(129):
        flip = (0, 0x80808080)[zero % 2]
        functions.halves(ctypes.c_void_p(words.ctypes.data), len(words), flip, zero * 0x01010101, ctypes.c_void_p(out.ctypes.data))
        found = out.view(np.int8).reshape(-1, 3, 4)
        assert (found[:, 0] == (lower - 128 if flip else lower)).all()
        assert (found[:, 1] == 16 * (upper - 8 if flip else (upper ^ 8) - 8)).all()
        assert (found[:, 2] == lower - zero).all()


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


def test_sums_of_bytes(functions):
    """Every byte by every other, at each place; the other three and the sum are random."""
    a, b = np.divmod(np.arange(65536), 256)
    words = np.random.default_rng(0).integers(-128, 128, (2, len(a), 4)).astype(np.int8)
    place = np.arange(len(a)) % 4
    words[0, np.arange(len(a)), place], words[1, np.arange(len(a)), place] = a.astype(np.int8), b.astype(np.int8)
    left, right = words.view(np.uint32)[..., 0].tolist()
    want = (words[0].astype(int) * words[1]).sum(1)
    assert [functions.dot4(u, v, i - 9) for i, (u, v) in enumerate(zip(left, right))] == (want + np.arange(len(a)) - 9).tolist()
