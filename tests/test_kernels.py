"""Every kernel × every format that it takes × every instruction set of the machine, against fp64."""

import copy
import dataclasses
import functools
import gc
import itertools
import pickle
import re

import pytest
import torch
from cases import assert_rows, random_quant, whole, with_parts

from qkernels import FormatError, UnsupportedError, config, formats, kernels, reference, rtn
from qkernels.formats import Codebook
from qkernels.formats.packing import pack
from qkernels.kernels import device as devices
from qkernels.kernels.cpu import library
from qkernels.kernels.registry import DTYPES, Problem, why_not
from qkernels.testing import assert_matmul_close, beside_int8

ROWS = (0, 1, 3, 8, 16, 17, 33, 128)
SHAPES = ((1, 8), (17, 40), (48, 300), (64, 256), (130, 515))
BLOCK_SHAPES = ((1, 256), (17, 256), (130, 512))  # of nested blocks
KERNELS = kernels.all_kernels()
# other groups than the registered ones; 20, 12 and 9 are padded
MORE = ("int4_g32", "int4_g-1", "int8_g32", "u4b8_g20_sf16", "u5_g12_zi_sf16", "u4_g32_zm_sf16", "u5b3_g12_zm_sbf16", "nf4_g9_sbf16")
FORMATS = [*formats.all_formats(), *map(formats.get, MORE)]
HERE = devices.current("cpu")
HIGHEST = library.level()  # of this machine: it gets all the cases, the others half of them


def of_each_reason(kernel, device=HERE):
    """The formats that a kernel takes, and of the others one for each of the registry's reasons, with which its test is skipped."""
    found = {}
    for f in FORMATS:
        found.setdefault(why_not(kernel, Problem(f, 64, 256, device=device)) or f, f)
    return list(found.values())


def at_levels(kernel):
    """(format, level): at a level that this machine lacks, one format is skipped for all."""
    if kernel.backend != "cpu":
        return [(f, "any") for f in of_each_reason(kernel)]
    there = [level for level in config.ISA_LEVELS if HIGHEST != "none" and torch.ops.qkernels.cpu_has_level(level)]
    of = {level: of_each_reason(kernel, dataclasses.replace(HERE, isa=level)) for level in there}
    return [(f, level) for f in FORMATS for level in config.ISA_LEVELS if f in of.get(level, FORMATS[:1])]


PAIRS = [pytest.param(kernel, f, id=f"{kernel.name}-{f.name}") for kernel in KERNELS for f in of_each_reason(kernel)]
LEVELS = [pytest.param(kernel, f, level, id=f"{kernel.name}-{f.name}-{level}") for kernel in KERNELS for f, level in at_levels(kernel)]


def need(kernel, format, n=64, k=256, **fields):
    if reason := why_not(kernel, Problem(format, n, k, device=devices.current("cpu"), **fields)):
        pytest.skip(reason)


def able(kernel, format, n, k, **fields):
    return why_not(kernel, Problem(format, n, k, device=devices.current("cpu"), **fields)) is None


def shapes(format):
    return SHAPES if format.block is None else BLOCK_SHAPES


@functools.lru_cache(maxsize=16)
def weight_of(format, n, k, seed, perm):
    """A weight and its values, kept for the levels that follow each other."""
    q = random_quant(format, n, k, seed=seed, perm=perm)
    return q, reference.decode(q, torch.float64)


def check(kernel, q, y, x, bias, weight=None):
    """Where int8 can hold x (one magnitude, and zeros) its rounding is no excuse: the bound is that of float kernels."""
    if kernel.compute == "int8" and x.abs().unique().numel() <= 2:
        assert_matmul_close(y, x, reference.decode(with_int8_entries(q), torch.float64), bias)
    else:
        weight = reference.decode(q, torch.float64) if weight is None else weight
        assert_matmul_close(y, x, weight, bias, int8=q if kernel.compute == "int8" else None)


def with_int8_entries(q):
    """The same codes, a codebook's values rounded to 1/127 of the largest."""
    if not isinstance(q.format.code, Codebook) or not beside_int8(q.format.code):
        return q
    unit = max(map(abs, q.format.code.values)) / 127
    rounded = Codebook(q.format.code.name, tuple(round(v / unit) * unit for v in q.format.code.values))
    return dataclasses.replace(q, format=dataclasses.replace(q.format, code=rounded))


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
    turns = enumerate(itertools.product(shapes(format), ROWS))
    for i, ((n, k), m) in turns:
        if level not in ("any", HIGHEST) and i % 2 == (config.ISA_LEVELS.index(level) % 2):
            continue
        dtype, with_bias, with_perm = DTYPES[(i + i // 8) % 3], i % 5 < 2, i % 7 < 3
        if not able(kernel, format, n, k, m=m, dtype=dtype, bias=with_bias, perm=with_perm):
            continue
        q, weight = weight_of(format, n, k, i // len(ROWS), with_perm)
        x = inputs(i // 3, m, k, dtype)
        if kernel.compute == "int8" and i // 2 % 2:
            x = x.sign() * (x.abs() > 0.5)
        bias = torch.randn(n).to(dtype) if with_bias else None
        check(kernel, q, kernel.run(x, kernel.prepare(q), bias), x, bias, weight)
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
    n, k = 96, 256  # four panels that are read together, and two alone
    need(kernel, format, n, k)
    values = torch.tensor(format.code.values, dtype=torch.float64)
    ends = torch.stack([torch.where(values.isfinite(), values, 0).argmin(), torch.where(values.isfinite(), values, 0).argmax()])
    signs = torch.stack([torch.arange(k) // run % 2 for run in (1, 2, 4, 8, 16, k)])  # 0 and 1, by turns of `run`
    q = random_quant(format, n, k)
    codes = torch.cat([ends[signs], ends[1 - signs]]).repeat(n // 12, 1).to(torch.uint8)
    if format.block is None:
        q = dataclasses.replace(q, codes=pack(codes, format.bits))
    else:
        q = with_parts(q, codes=codes.unflatten(1, (-1, format.block.elements)))
    x = torch.cat([signs, 1 - signs]).repeat(3, 1).float() * 2 - 1
    packed, weight = kernel.prepare(q), reference.decode(q, torch.float64)
    for rows in (x, x[:1], x[1:7]):
        assert_matmul_close(kernel.run(rows, packed, None), rows, weight)


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_restore_inverts_prepare(kernel, format):
    need(kernel, format)
    for (n, k), perm in itertools.product(shapes(format), (False, True)):
        if able(kernel, format, n, k, perm=perm):
            q = random_quant(format, n, k, perm=perm)
            packed = kernel.prepare(q)
            assert type(packed) is kernel.packed_type
            assert kernel.restore(packed).equal(q), (n, k, perm)
            assert_rows(kernel, packed, q)
            if kernel.dequantize is not None:
                torch.testing.assert_close(kernel.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_nan_and_inf_stay_in_their_row(kernel, format, bad):
    k = whole(format, 300)
    need(kernel, format, 48, k)
    packed = kernel.prepare(random_quant(format, 48, k))
    for m in (1, 5, 20):
        x = torch.randn(m, k)
        x[m // 2, 7] = bad
        y = kernel.run(x, packed, None)
        others = [i for i in range(m) if i != m // 2]
        assert not torch.isfinite(y[m // 2]).all()
        assert torch.isfinite(y[others]).all()


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_nan_scales_stay_in_their_column(kernel, format):
    k = whole(format, 300)
    need(kernel, format, 48, k)
    if format.group[0] != 1:
        pytest.skip("rows share their scales")
    q = random_quant(format, 48, k)

    def with_nan(scales):
        scales[5, -1] = torch.nan
        return scales

    if format.block is None:
        with_nan(q.scales)
    else:
        q = with_parts(q, d=lambda d: with_nan(d.clone()))
    for m in (1, 5, 30):
        y = kernel.run(torch.randn(m, k), kernel.prepare(q), None)
        assert bool(y[:, 5].isnan().all()) and int(y.isfinite().sum()) == m * 47


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_large_and_small_activations(kernel, format, dtype):
    k = whole(format, 300)
    need(kernel, format, 48, k, dtype=dtype)
    q, info = random_quant(format, 48, k), torch.finfo(dtype)
    packed, half = kernel.prepare(q), dtype == torch.float16
    for m, scale in itertools.product((1, 30), (info.max / 1024 if half else 1e30, info.tiny if half else 1e-30)):
        x = (torch.randn(m, k) * scale).to(dtype)
        check(kernel, q, kernel.run(x, packed, None), x, None)
    assert bool(kernel.run(torch.full((2, k), info.smallest_normal * info.eps, dtype=dtype), packed, None).isfinite().all())


@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "fp8_block", "u4_g32_zm_sf16", "q5_k"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_more_rows_than_are_worked_on_at_a_time(kernel, name):
    k = whole(formats.get(name), 300)
    q = random_quant(formats.get(name), 48, k)
    need(kernel, q.format, 48, k)
    packed, x = kernel.prepare(q), torch.randn(1100, k)
    y = kernel.run(x, packed, None)
    check(kernel, q, y, x, None)
    if kernel.name != "reference":
        assert torch.equal(torch.cat([kernel.run(part, packed, None) for part in x.split(100)]), y)


@pytest.mark.parametrize("name", ["int4", "int8", "u4_g32_zm_sf16", "q2_k", "q4_k", "q6_k"])
@pytest.mark.parametrize(("kernel", "dtype"), [("cpu_s8_wN_dot", torch.float32), ("cpu_f32_wN_dot", torch.bfloat16)])
def test_activations_that_l2_does_not_hold(kernel, dtype, name):
    """A CPU with AMX then takes several strips of the weight side by side."""
    kernel, (n, k, m) = kernels.get(kernel), (34 * 16, 1280, 1100)  # 40 groups of 32: their shifts are added in two parts
    need(kernel, formats.get(name), n, k)
    q, x = random_quant(formats.get(name), n, k), torch.randn(m, k).to(dtype)
    packed = kernel.prepare(q)
    y = kernel.run(x, packed, None)
    check(kernel, q, y, x, None)
    assert torch.equal(torch.cat([kernel.run(part, packed, None) for part in x.split(100)]), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_bits_do_not_depend_on_threads_or_batch(kernel, format, dtype):
    k = whole(format, 515)
    need(kernel, format, 130, k, dtype=dtype, batch_invariant=True)
    packed, x = kernel.prepare(random_quant(format, 130, k)), torch.randn(33, k).to(dtype)
    y = kernel.run(x, packed, None)
    for threads in (1, 7, 2):  # 7: more than there are strips of the weight, so that the rows are cut
        torch.set_num_threads(threads)
        assert torch.equal(kernel.run(x, packed, None), y), threads
    for i in (0, 16, 32):
        assert torch.equal(kernel.run(x[i : i + 1], packed, None), y[i : i + 1]), i
    for m in range(2, 14):  # every height of a tile
        assert torch.equal(kernel.run(x[:m], packed, None), y[:m]), m


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("format", of_each_reason(kernels.get("cpu_f32_wN_dot")), ids=lambda f: f.name)
def test_bits_of_sums_that_cancel(format, dtype):
    """A result of 16 bits hides the order of its sums, unless it is small beside them."""
    kernel, n, k = kernels.get("cpu_f32_wN_dot"), 130, 512
    need(kernel, format, n, 2 * k, dtype=dtype)
    if format.group[1] < 0 or k % format.group[1]:
        pytest.skip("one scale for both halves")
    half = random_quant(format, n, k)
    twice = {part: torch.cat([getattr(half, part)] * 2, 1) for part in ("codes", "scales", "zeros") if getattr(half, part) is not None}
    packed = kernel.prepare(dataclasses.replace(half, shape=(n, 2 * k), **twice))
    x = torch.randn(33, k)
    x = torch.cat([x, -x * (1 + (torch.rand(33, k) < 1 / 16) / 128)], 1).to(dtype)
    y = kernel.run(x, packed, None)
    for m in range(1, 33):
        assert torch.equal(kernel.run(x[:m], packed, None), y[:m]), m


@pytest.mark.parametrize("format", of_each_reason(kernels.get("cpu_s8_wN_dot")), ids=lambda f: f.name)
def test_every_level_gives_the_same_bits_with_int8(format, isa):
    kernel, k = kernels.get("cpu_s8_wN_dot"), whole(format, 515)
    need(kernel, format, 130, k)
    there = [level for level in config.ISA_LEVELS if torch.ops.qkernels.cpu_has_level(level)]
    q = random_quant(format, 130, k)
    packed, x = kernel.prepare(q), torch.randn(70, k)
    for m in (1, 3, 6, 40, 70):
        found = {}
        for level in there:
            isa(level)
            found[level] = kernel.run(x[:m], packed, None)
        assert all(torch.equal(y, found[there[0]]) for y in found.values()), (m, list(found))


@pytest.mark.parametrize("bad", [-1, 64, 1 << 30])
def test_a_permutation_may_not_reach_beyond_x(bad):
    kernel = kernels.registry.get("cpu_s8_wN_dot")
    q = random_quant(formats.get("int4"), 16, 64, perm=True)
    need(kernel, q.format, 16, 64)
    q.perm[3] = bad
    with pytest.raises(RuntimeError, match="no columns of x"):
        kernel.run(torch.randn(2, 64), kernel.prepare(q), None)


@pytest.mark.parametrize("name", [f.name for f in FORMATS if f.block is not None])
def test_nested_blocks_take_hardly_more_than_their_own_bytes(name):
    q = random_quant(formats.get(name), 128, 512)
    kernel = kernels.registry.get("cpu_s8_wN_dot")
    need(kernel, q.format, 128, 512)
    most = {"q2_k": 1.2, "q3_k": 1.04}.get(name, 1.03)  # 4- and 6-bit scales are held as bytes
    assert sum(t.nbytes for t in kernel.prepare(q)[2:] if t is not None) <= most * q.codes.nbytes


def test_opcheck():
    """Record the calls that kernels and quantisers make of our ops, and have torch check each op with each kind of arguments."""
    if reason := library.why_missing():
        pytest.skip(reason)
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "qkernels" and any(isinstance(a, torch.Tensor) for a in args):
                calls.setdefault((func, tuple(type(a) for a in args)), args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        for f in FORMATS:
            k = whole(f, 40)
            if f.block is None:
                rtn(torch.randn(2, 40), f)
            for kernel in KERNELS:
                if able(kernel, f, 48, k):
                    packed = kernel.prepare(random_quant(f, 48, k, perm=f.bits == 4))
                    kernel.run(torch.randn(3, k), packed, torch.randn(48))
                    kernel.dequantize(packed)
    names = {str(func).split(".")[1] for func, _ in calls}
    assert names == {"cpu_linear_s8", "cpu_linear_f32", "cpu_dequantize", "cpu_best_scales", "cpu_encode", "reference_decode"}
    for (op, _), args in calls.items():
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if not any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
            checks.append("test_schema")  # compares arguments before and after by a product, which torch 2.13 lacks for float8
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "zzz"}, "unknown format 'zzz'. Short names: nf4, "),
        ({"format": "int4_g"}, "'int4_g'; nearest: int4, "),
        ({"compute": "zzz"}, "compute='zzz' is not one of auto, float, int8; nearest: "),
        ({"device": "cuda:smXX"}, "'cuda:smXX'; write cpu, cpu:<portable|avx2|avx512vnni|avx512bf16|amx|none>, cuda:sm<NN> or meta"),
        ({"device": torch.device("cuda")}, "'cuda'; write cpu, "),
        ({"device": None}, "'None'; write cpu, "),
        ({"dtype": torch.float64}, "dtype=torch.float64 of the activations is not one of torch.float32, torch.bfloat16, torch.float16"),
        ({"dtype": "float32"}, "dtype='float32' of the activations is not one of torch.float32, "),
    ],
)
def test_explain_says_what_would_have_worked(options, text):
    with pytest.raises(FormatError, match=re.escape(text)):
        kernels.registry.explain(**options)


def test_batch_invariance_is_no_wish_but_a_condition():
    with pytest.raises(UnsupportedError, match="reference: a row's last bits depend on how many rows there are; batch_invariant=True"):
        kernels.registry.explain("int4", device="cpu:none", batch_invariant=True)
    assert "batch invariant" in str(kernels.registry.explain("int4", device="cpu:avx2", batch_invariant=True))


def test_explain_takes_any_spelling_of_a_device():
    here = kernels.registry.explain(device="cpu").problem
    assert here == kernels.registry.explain(device=torch.device("cpu")).problem == kernels.registry.explain(device=here.device).problem


@pytest.mark.parametrize("nbytes", [0, 1, 40_001, (2 << 20) - 1, 2 << 20, (6 << 20) + 5])
@pytest.mark.parametrize("refused", [False, True])
def test_memory_of_packed_weights(nbytes, refused, monkeypatch):
    from qkernels.kernels.cpu import memory

    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    if refused:
        monkeypatch.setattr(memory.mmap, "mmap", refuse)
        monkeypatch.setattr(memory, "_memory", None)
    with torch.device("meta"):  # as a model may be made under
        t = memory.empty(nbytes)
    assert (t.shape, t.dtype, t.device.type) == ((nbytes,), torch.uint8, "cpu") and t.is_contiguous()
    t.copy_(torch.arange(nbytes) % 251)
    gc.collect()  # nothing but the tensor holds the memory
    assert torch.equal(t, (torch.arange(nbytes) % 251).to(torch.uint8))
    assert torch.equal(copy.deepcopy(t), t) and torch.equal(pickle.loads(pickle.dumps(t)), t)


def test_small_tensors_share_pages_and_nothing_else(monkeypatch):
    from qkernels.kernels.cpu import memory

    monkeypatch.setattr(memory, "SHARED", memory.HUGE_PAGE)
    monkeypatch.setattr(memory, "_memory", None)
    sizes = [memory.LEAST + 17 * i for i in range(100)]  # more than one mapping holds
    tensors = [memory.empty(nbytes).fill_(i) for i, nbytes in enumerate(sizes)]
    pages = {t.data_ptr() // memory.HUGE_PAGE for t in tensors}
    assert len(pages) < 10 and all(t.data_ptr() % 64 == 0 for t in tensors)
    for i, t in enumerate(tensors):
        assert (t == i).all() and t.untyped_storage().nbytes() == sizes[i]
