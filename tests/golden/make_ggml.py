"""Make ggml.npz: what ggml's own C code makes of weights and of raw blocks. No test runs this; tests/test_ggml.py reads.

    pip install numpy==2.4.6 xllamacpp==2026.10.11549
    python tests/golden/make_ggml.py

The library of xllamacpp happens to export the C functions of ggml; they are called through ctypes. Types go by ggml's ids:

    weight          [7, 768]          float16    rows 0, 1, 2 are Gaussian, the others are what encoders stumble over
    <id>.raw        [7, bytes]        uint8      what C encodes the weight to; with an importance of 1 where C cannot do without
    <id>.blocks     [3, n * bytes]    uint8      random bytes, except for floats that are not finite
    <id>.values     [3, n * block]    float32    and what C decodes them to
    <id>.digest     [32]              uint8      SHA-256 of the float32 values of `SWEEP` random blocks; -0 is 0, so is what is not finite

Nothing of qkernels is imported.
"""

import ctypes
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

IDS = (2, 3, 6, 7, 8, *range(10, 15), *range(16, 24), 29, 34, 35, *range(39, 43))
SWEEP = 1024
# MXFP4 and NVFP4: how many bytes are scales, and the last whose meaning is agreed.
FLOAT_SCALES = {39: (1, 0xFE), 40: (4, 0x7E)}


class Traits(ctypes.Structure):
    """The head of ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


PACKAGE = Path(importlib.util.find_spec("xllamacpp").origin).parent
GGML = ctypes.CDLL(str(next(PACKAGE.glob("xllamacpp*.so"))))
GGML.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
GGML.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
GGML.ggml_quantize_chunk.restype = ctypes.c_size_t
GGML.ggml_quantize_chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p)


def traits(id):
    return GGML.ggml_get_type_traits(id).contents


def encode(id, weight):
    """[N, K] float32 -> [N, bytes]."""
    n, k = weight.shape
    raw = np.zeros((n, k // traits(id).block * traits(id).nbytes), np.uint8)
    importance = np.ones(k, np.float32)
    needed = importance.ctypes.data if GGML.ggml_quantize_requires_imatrix(id) else None
    GGML.ggml_quantize_init(id)
    GGML.ggml_quantize_chunk(id, weight.ctypes.data, raw.ctypes.data, 0, n, k, needed)
    return raw


def decode(id, raw):
    """[N, bytes] -> [N, K] float32."""
    n, nbytes = raw.shape
    values = np.zeros((n, nbytes // traits(id).nbytes * traits(id).block), np.float32)
    traits(id).to_float(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def weights():
    """Rows with zeros, constants, one large value, few distinct values, one sign, and magnitudes from 1e-7 to 1e3."""
    random = np.random.RandomState(0)
    w = random.standard_normal((7, 768)).astype(np.float32)
    w[3, :256], w[3, 256:512], w[3, 512:] = 0, -0.75, 0
    w[3, 700] = 3.0
    w[4] = random.randint(-8, 9, 768) / 4
    w[5, :384], w[5, 384:] = np.abs(w[5, :384]), -np.abs(w[5, 384:])
    w[6] *= np.exp2(np.repeat(np.linspace(-23, 8, 24), 32))
    return w.astype(np.float16)


def random_blocks(id, blocks):
    """[blocks, bytes] of RandomState(id), whose numbers are the same in every version of numpy."""
    raw = np.frombuffer(np.random.RandomState(id).bytes(blocks * traits(id).nbytes), np.uint8).reshape(blocks, -1).copy()
    scales, last = FLOAT_SCALES.get(id, (0, 0))
    raw[:, :scales] = np.minimum(raw[:, :scales], last)
    return raw


def digest(values):
    values = np.where(np.isfinite(values), values, 0).astype(np.float32) + np.float32(0)
    return np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint8)


def case(id, weight):
    swept = random_blocks(id, SWEEP)
    values = decode(id, swept)
    rows = max(1, 128 // traits(id).block)
    finite = np.isfinite(values).all(-1).nonzero()[0][: 3 * rows]
    blocks = swept[finite].reshape(3, -1)
    return dict(raw=encode(id, weight.astype(np.float32)), blocks=blocks, values=decode(id, blocks), digest=digest(values))


if __name__ == "__main__":
    weight = weights()
    arrays = {f"{id}.{field}": a for id in IDS for field, a in case(id, weight).items()}
    np.savez_compressed(Path(__file__).with_name("ggml.npz"), weight=weight, **arrays)
