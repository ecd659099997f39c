"""Every kernel × every format that it takes × every instruction set of the machine, against fp64."""

import dataclasses
import itertools
import re

import pytest
import torch
from cases import plain, random_quant

from qkernels import FormatError, config, formats, kernels, reference
from qkernels.formats import Codebook
from qkernels.formats.packing import pack
from qkernels.kernels import device as devices
from qkernels.kernels.cpu import library
from qkernels.kernels.registry import DTYPES, Problem, why_not
from qkernels.testing import assert_matmul_close

ROWS = (0, 1, 3, 8, 16, 17, 33, 128)
SHAPES = ((1, 8), (17, 40), (48, 300), (64, 256), (130, 515))
KERNELS = kernels.all_kernels()
# other groups than the registered ones; 20, 12 and 9 are padded
MORE = [formats.get(name) for name in ("int4_g32", "int4_g-1", "int8_g32", "u4b8_g20_sf16", "u5_g12_zi_sf16", "nf4_g9_sbf16")]
FORMATS = [*plain(formats.all_formats()), *MORE]
PAIRS = [pytest.param(kernel, f, id=f"{kernel.name}-{f.name}") for kernel in KERNELS for f in FORMATS]
LEVELS = [
    pytest.param(kernel, f, level, id=f"{kernel.name}-{f.name}-{level}")
    for kernel in KERNELS
    for f in FORMATS
    for level in (config.ISA_LEVELS if kernel.backend == "cpu" else ("any",))
]


def _forget():
    library.level.cache_clear()
    devices.current.cache_clear()


@pytest.fixture
def isa():
    """A function that switches the compiled kernels to a level, or skips; the level is put back afterwards."""
    before = library.level()

    def switch(level):
        if level == "any":
            return
        if reason := library.why_missing():
            pytest.skip(reason)
        try:
            torch.ops.qkernels.cpu_set_level(level)
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        _forget()
        if library.level() != level:
            pytest.skip(f"this machine has {before}, not {level}")

    yield switch
    if before != "none":
        torch.ops.qkernels.cpu_set_level(before)
        _forget()


def need(kernel, format, n=64, k=256, **fields):
    if reason := why_not(kernel, Problem(format, n, k, device=devices.current("cpu"), **fields)):
        pytest.skip(reason)


def able(kernel, format, n, k, **fields):
    return why_not(kernel, Problem(format, n, k, device=devices.current("cpu"), **fields)) is None


def check(kernel, q, y, x, bias):
    assert_matmul_close(y, x, reference.decode(q, torch.float64), bias, int8=q if kernel.compute == "int8" else None)


def inputs(i, m, k, dtype):
    """Activations [.., k]: contiguous, strided, transposed or 3-D, by turns."""
    x = torch.randn(m, 2 * k).to(dtype)
    kind = i % 4
    if kind == 0:
        return x[:, :k].contiguous()
    if kind == 1:
        return x[:, ::2]
    if kind == 2:
        return torch.randn(k, m).to(dtype).t()
    return x[:, :k].reshape(1, m, k)


@pytest.mark.parametrize(("kernel", "format", "level"), LEVELS)
def test_against_fp64(kernel, format, level, isa):
    isa(level)
    ran = 0
    turns = enumerate(itertools.product(SHAPES, ROWS))
    for i, ((n, k), m) in turns:
        if level != "any" and level != config.ISA_LEVELS[-1] and i % 2 == (config.ISA_LEVELS.index(level) % 2):
            continue
        dtype, with_bias, with_perm = DTYPES[(i + i // 8) % 3], i % 5 < 2, i % 7 < 3
        if not able(kernel, format, n, k, m=m, dtype=dtype, bias=with_bias, perm=with_perm):
            continue
        q = random_quant(format, n, k, seed=i, perm=with_perm)
        x = inputs(i // 3, m, k, dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        check(kernel, q, kernel.run(x, kernel.prepare(q), bias), x, bias)
        ran += 1
    if not ran:
        need(kernel, format)
        pytest.fail("the kernel takes 64 x 256, and none of the shapes here")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_codebooks_of_one_name_are_kept_apart(kernel):
    x = torch.randn(3, 64)
    for values in (tuple(float(i) for i in range(16)), tuple(-float(i) for i in range(16))):
        format = dataclasses.replace(formats.get("nf4"), code=Codebook("twice", values), name="")
        need(kernel, format)
        q = random_quant(format, 32, 64)
        check(kernel, q, kernel.run(x, kernel.prepare(q), None), x, None)


@pytest.mark.parametrize(("kernel", "format", "level"), LEVELS)
def test_the_largest_products_fit(kernel, format, level, isa):
    """Ends of the range of codes against ends of the range of activations: exact, so that a sum that saturates or wraps shows."""
    isa(level)
    n, k = 48, 256
    need(kernel, format, n, k)
    values = torch.tensor(format.code.values, dtype=torch.float64)
    ends = torch.stack([torch.where(values.isfinite(), values, 0).argmin(), torch.where(values.isfinite(), values, 0).argmax()])
    signs = torch.stack([torch.arange(k) // run % 2 for run in (1, 2, 4, 8, 16, k)])  # 0 and 1, by turns of `run`
    q = random_quant(format, n, k)
    codes = torch.cat([ends[signs], ends[1 - signs]]).repeat(n // 12, 1).to(torch.uint8)
    q = dataclasses.replace(q, codes=pack(codes, format.bits))
    x = torch.cat([signs, 1 - signs]).repeat(3, 1).float() * 2 - 1
    y, weight = kernel.run(x, kernel.prepare(q), None), reference.decode(q, torch.float64)
    assert_matmul_close(y, x, weight)


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_restore_inverts_prepare(kernel, format):
    need(kernel, format)
    for (n, k), perm in itertools.product(SHAPES, (False, True)):
        if able(kernel, format, n, k, perm=perm):
            q = random_quant(format, n, k, perm=perm)
            packed = kernel.prepare(q)
            assert type(packed) is kernel.packed_type
            assert kernel.restore(packed).equal(q), (n, k, perm)
            if kernel.dequantize is not None:
                torch.testing.assert_close(kernel.dequantize(packed).float(), reference.decode(q), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_nan_and_inf_stay_in_their_row(kernel, format, bad):
    need(kernel, format, 48, 300)
    packed = kernel.prepare(random_quant(format, 48, 300))
    for m in (1, 5, 20):
        x = torch.randn(m, 300)
        x[m // 2, 7] = bad
        y = kernel.run(x, packed, None)
        others = [i for i in range(m) if i != m // 2]
        assert not torch.isfinite(y[m // 2]).all()
        assert torch.isfinite(y[others]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_bits_do_not_depend_on_threads_or_batch(kernel, format, dtype):
    if kernel.name == "reference":
        pytest.skip("torch's own matmul promises neither")
    need(kernel, format, 130, 515, dtype=dtype)
    packed, x = kernel.prepare(random_quant(format, 130, 515)), torch.randn(33, 515).to(dtype)
    y = kernel.run(x, packed, None)
    torch.set_num_threads(1)
    assert torch.equal(kernel.run(x, packed, None), y)
    torch.set_num_threads(2)
    for i in (0, 16, 32):
        assert torch.equal(kernel.run(x[i : i + 1], packed, None), y[i : i + 1]), i
    assert torch.equal(kernel.run(x[:5], packed, None), y[:5])


def test_opcheck(monkeypatch):
    """Record the calls that the kernels make of our ops, and have torch check each op on one of them."""
    if reason := library.why_missing():
        pytest.skip(reason)
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "qkernels" and any(isinstance(a, torch.Tensor) for a in args):
                calls.setdefault(func, (args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        for kernel, f in itertools.product(KERNELS, plain(formats.all_formats())):
            if able(kernel, f, 48, 300):
                kernel.run(torch.randn(3, 300), kernel.prepare(random_quant(f, 48, 300)), torch.randn(48))
    assert calls, "no kernel called an op of torch.ops.qkernels"
    for op, (args, kwargs) in calls.items():
        torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "zzz"}, "unknown format 'zzz'. Short names: nf4, "),
        ({"format": "int4_g"}, "'int4_g'; nearest: int4, "),
        ({"compute": "zzz"}, "compute='zzz' is not one of auto, float, int8; nearest: "),
        ({"device": "cuda:smXX"}, "'cuda:smXX'; write cpu, cpu:<portable|avx2|avx512vnni|avx512bf16|none>, cuda:sm<NN> or meta"),
        ({"device": torch.device("cuda")}, "'cuda'; write cpu, "),
        ({"device": None}, "'None'; write cpu, "),
        ({"dtype": torch.float64}, "dtype=torch.float64 of the activations is not one of torch.float32, torch.bfloat16, torch.float16"),
        ({"dtype": "float32"}, "dtype='float32' of the activations is not one of torch.float32, "),
    ],
)
def test_explain_says_what_would_have_worked(options, text):
    with pytest.raises(FormatError, match=re.escape(text)):
        kernels.registry.explain(**options)


def test_explain_takes_any_spelling_of_a_device():
    here = kernels.registry.explain(device="cpu").problem
    assert here == kernels.registry.explain(device=torch.device("cpu")).problem == kernels.registry.explain(device=here.device).problem
