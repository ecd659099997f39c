"""Our numbers are those of other libraries (tests/golden/make.py says whose), value for value."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import equal_values

from qkernels import config, formats, kernels, reference, rtn
from qkernels.formats import QuantTensor
from qkernels.formats.format import SCALE_DTYPES
from qkernels.formats.tensor import FIELDS
from qkernels.kernels import device as devices
from qkernels.kernels.registry import Problem, why_not
from qkernels.quantizers import nearest

# the names in ggml.npz are ids of ggml: test_ggml.py has them
FILES = sorted(path for path in (Path(__file__).parent / "golden").glob("*.npz") if path.stem != "ggml")
CASES = [(path, key.removesuffix(".values")) for path in FILES for key in np.load(path) if key.endswith(".values")]


def load(path, name):
    """QuantTensor, the producer's values, and the weight that it encoded (or None)."""
    with np.load(path) as file:
        held = {key.removeprefix(f"{name}."): torch.from_numpy(file[key]) for key in file if key.startswith(f"{name}.")}
    format, values, weight = formats.get(name), held.pop("values"), held.pop("weight", None)
    held["scales"] = held["scales"].contiguous().view(SCALE_DTYPES[format.scale])
    assert held.keys() <= set(FIELDS)
    return QuantTensor(format, tuple(values.shape), **held), values, weight


def ids(case):
    return f"{case[0].stem}-{case[1]}"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_decode(case):
    q, values, _ = load(*case)
    equal_values(reference.decode(q), values)


@pytest.mark.parametrize("level", config.ISA_LEVELS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_decode_by_kernels(case, level, isa):
    isa(level)
    q, values, _ = load(*case)
    kernel = kernels.get("cpu_f32_wN_dot")
    if reason := why_not(kernel, Problem(q.format, *q.shape, device=devices.current("cpu"))):
        pytest.skip(reason)
    packed = kernel.prepare(q)
    assert kernel.restore(packed).equal(q)
    decoded = kernel.dequantize(packed)
    if q.format.name.endswith("zf_sf32"):  # the compiled kernels take the middle of the codes from the zero point: that rounds
        largest = reference.spread((q.zeros.abs() + 2**q.format.bits) * q.scales.abs(), q.format, *q.shape)
        assert bool(((decoded - values).abs() <= torch.finfo(torch.float32).eps * largest).all())
    else:
        equal_values(decoded, values)


@pytest.mark.parametrize("case", [case for case in CASES if load(*case)[2] is not None], ids=ids)
def test_encode(case):
    """With the producer's scales. Values and not codes are compared: some producers know one zero, where e2m1 has two."""
    q, values, weight = load(*case)
    zeros = None if q.zeros is None else q.zeros.float()
    equal_values(reference.decode(reference.encode(weight, q.format, q.scales.float(), zeros, q.tensor_scale)), values)
    codes = nearest.codes(weight, q.format, q.scales.float(), zeros, q.tensor_scale)
    equal_values(reference.decode(dataclasses.replace(q, codes=codes)), values)


@pytest.mark.parametrize("case", [case for case in CASES if "e2m1" in case[1] and load(*case)[2] is not None], ids=ids)
def test_scales(case):
    """Where the standard says how to choose the scales, ours are the producer's too."""
    q, values, weight = load(*case)
    mine = rtn(weight, q.format, clip_search=False)
    equal_values(mine.scales.float(), q.scales.float())
    equal_values(reference.decode(mine), values)
