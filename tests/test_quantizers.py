"""The search for scales and the rounding of codes: the compiled library against plain torch, and both against fp64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import is_symmetric_int, plain

from qkernels import config, formats, reference, rtn
from qkernels.errors import FormatError
from qkernels.formats import Codebook, Float, Int, QuantFormat
from qkernels.formats.format import SCALE_DTYPES
from qkernels.kernels.cpu import library
from qkernels.quantizers import nearest

ODD = [  # groups that are no multiple of a register, of the buffer, or of anything
    formats.get("int4_g-1"),
    formats.get("nf4_g1000"),
    QuantFormat(Int(4, 8), (3, 37), "f32"),
    QuantFormat(Int(4), (2, 7), "f16", "float"),
    QuantFormat(Float(2, 3), (1, 20), "bf16"),
    QuantFormat(Float(3, 0), (-1, 5), "f16"),
    QuantFormat(Codebook("off", (3.0, -1.0, 0.5, 2.0)), (5, -1), "f32"),
]
every_format = pytest.mark.parametrize("format", [*plain(formats.all_formats()), *ODD], ids=lambda f: f.name)
SHAPES = ((1, 1), (17, 40), (130, 515), (2, 1030))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=config.ISA_LEVELS)
def level(request):
    """Run at this instruction set, and put the usual one back."""
    before = library.level()
    if before == "none" or not torch.ops.qkernels.cpu_has_level(request.param):
        pytest.skip(library.why_missing() or f"this machine has no {request.param}")
    torch.ops.qkernels.cpu_set_level(request.param)
    yield request.param
    torch.ops.qkernels.cpu_set_level(before)


@pytest.fixture
def plain_torch(monkeypatch):
    """A function that runs another without the library."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as m:
            m.setattr(nearest, "_compiled", lambda *_: None)
            return function(*args, **kwargs)

    return run


def candidates(format, n, k, count):
    """Random scales, some negative and some zero, and zeros, as the format stores them."""
    shape, dtype = (*format.group_shape(n, k), count), SCALE_DTYPES[format.scale]
    scales = (torch.rand(shape) + 0.5) * (0.25 if format.bits <= 4 else 0.02)
    if format.scale in ("f32", "f16", "bf16"):
        scales = scales * torch.randint(2, shape).mul(2).sub(1) * (torch.rand(shape) > 0.05)
    zeros = None
    if format.zero == "int":
        zeros = torch.randint(2**format.bits, shape).float()
    elif format.zero == "float":
        zeros = (torch.rand(shape) * 2**format.bits).to(dtype).float()
    elif format.zero == "min":
        zeros = (torch.rand(shape) * -(2**format.bits) / 4).to(dtype).float()
        scales = torch.where(scales == 0, 0.5, scales)  # of a scale that is 0 the minimum is all, which no zero point tells
    return scales.to(dtype).float(), zeros, torch.tensor([0.37]) if format.tensor_scale else None


def group_sums(x, format):
    n, k = x.shape
    group_n, group_k = format.group_extent(n, k)
    return F.pad(x, (0, -k % group_k, 0, -n % group_n)).unflatten(1, (-1, group_k)).unflatten(0, (-1, group_n)).sum((1, 3))


def exact_errors(weight, q):
    return group_sums((reference.decode(q, torch.float64) - weight.double()).square(), q.format)


def ties(format, scale):
    """Weights half way between neighbouring values, on values, signed zeros, and beyond the ends."""
    values = torch.tensor([v for v in format.code.values if abs(v) < float("inf")]).sort().values
    return torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([0.0, -0.0, -1e-9]), values * 3]) * scale


@every_format
def test_errors_and_choice_against_fp64(format, level):
    for i, (n, k) in enumerate(SHAPES):
        weight = torch.randn(n, k).to(DTYPES[i % 3])
        weight[0], weight[-1, k // 2 :] = 0.0, 0.0
        scales, zeros, tensor_scale = candidates(format, n, k, 5)
        judged = []
        for c in range(5):
            s, z = scales[..., c], None if zeros is None else zeros[..., c]
            judged.append(exact_errors(weight, reference.encode(weight, format, s, z, tensor_scale)))
            index, error = nearest.best_scales(weight, format, s[..., None], None if z is None else z[..., None], tensor_scale)
            assert not index.any()
            slack = 1e-9 * group_sums(weight.double().square(), format) + 1e-12
            if format.zero == "min":  # became a zero point, -min / scale, and so was rounded
                moved = 2.0**-22 * float(zeros.abs().max())
                slack = slack + 2 * moved * (format.group[1] * judged[-1]).sqrt() + format.group[1] * moved**2
            assert bool(((error - judged[-1]).abs() <= 1e-5 * judged[-1] + slack).all())
        index, error = nearest.best_scales(weight, format, scales, zeros, tensor_scale)
        judged, least = torch.stack(judged, 2), torch.stack(judged, 2).amin(2)
        assert bool((judged.gather(2, index[..., None])[..., 0] <= least * (1 + 2e-5) + slack).all())


@every_format
def test_equal_candidates_and_those_out_of_range(format, level):
    scales, zeros, tensor_scale = candidates(format, 6, 40, 1)
    three = [None if t is None else t.expand(*t.shape[:2], 3) for t in (scales, zeros)]
    weight = torch.randn(6, 40)
    assert not nearest.best_scales(weight, format, *three, tensor_scale)[0].any()
    three[0] = torch.cat([torch.full_like(scales, torch.inf), torch.full_like(scales, torch.nan), scales], 2)
    assert bool((nearest.best_scales(weight, format, *three, tensor_scale)[0] == 2).all())


@every_format
def test_codes_are_those_of_the_reference(format, level):
    for i, (n, k) in enumerate(SHAPES):
        weight = torch.randn(n, k).to(DTYPES[i % 3])
        scales, zeros, tensor_scale = (None if t is None else t.squeeze(2) if t.dim() == 3 else t for t in candidates(format, n, k, 1))
        expected = reference.encode(weight, format, scales, zeros, tensor_scale).codes
        assert torch.equal(nearest.codes(weight, format, scales, zeros, tensor_scale), expected), (n, k)
    for scale in (0.5, -0.5):
        weight = ties(format, scale)[None]
        scales = torch.full(format.group_shape(*weight.shape), abs(scale) if format.scale in ("e4m3", "e8m0") else scale)
        zeros = None if format.zero == "none" else torch.ones_like(scales)
        tensor_scale = torch.ones(1) if format.tensor_scale else None
        expected = reference.encode(weight, format, scales, zeros, tensor_scale).codes
        assert torch.equal(nearest.codes(weight, format, scales, zeros, tensor_scale), expected), scale


@every_format
def test_rtn_has_the_same_bits_on_every_level_and_any_threads(format):
    if library.why_missing():
        pytest.skip(library.why_missing())
    weight, before, found = torch.randn(130, 515), library.level(), []
    try:
        for name in filter(torch.ops.qkernels.cpu_has_level, config.ISA_LEVELS):
            torch.ops.qkernels.cpu_set_level(name)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(rtn(weight, format, clip_search=True))
    finally:
        torch.ops.qkernels.cpu_set_level(before)
    assert all(q.equal(found[0]) for q in found)


@every_format
def test_rtn_without_the_library_loses_as_little(format, plain_torch):
    for (n, k), dtype in zip(SHAPES, (*DTYPES, torch.float64), strict=True):
        weight = torch.randn(n, k).to(dtype)
        ours, theirs = rtn(weight, format, clip_search=True), plain_torch(rtn, weight, format, clip_search=True)
        a, b = exact_errors(weight, ours), exact_errors(weight, theirs)
        slack = 1e-8 * group_sums(weight.double().square(), format)
        assert bool(((a - b).abs() <= 1e-5 * b + slack).all())
        assert torch.equal(rtn(weight, format, clip_search=False).codes, plain_torch(rtn, weight, format, clip_search=False).codes)


@every_format
def test_rtn_takes_strided_weights(format):
    weight = torch.randn(40, 34).t()
    assert rtn(weight, format).equal(rtn(weight.contiguous(), format))
    assert rtn(weight[::2], format).equal(rtn(weight[::2].contiguous(), format))


@every_format
def test_rtn_in_chunks(format, monkeypatch):
    weight = torch.randn(130, 515)
    whole = rtn(weight, format)
    monkeypatch.setattr(sys.modules[rtn.__module__], "_CHUNK", 1000)
    assert rtn(weight, format).equal(whole)


@pytest.mark.parametrize("format", [f for f in plain(formats.all_formats()) if is_symmetric_int(f)], ids=lambda f: f.name)
def test_search_finds_negative_scales(format):
    weight = torch.randn(8, 256)
    weight[:, ::32] = weight[:, ::32].abs() + 4.0
    q = rtn(weight, format, clip_search=True)
    assert bool((q.scales < 0).any())


def good(name):
    format = formats.get(name)
    scales, zeros, _ = candidates(format, 6, 256, 3)
    keys = ("weight", "scales", "zeros", "values", "thresholds", "codes", "group_n", "group_k", "low", "high", "sign")
    return dict(zip(keys, nearest._arguments(torch.randn(6, 256), format, scales, zeros), strict=True))


@pytest.mark.parametrize("op", ["cpu_best_scales", "cpu_encode"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int4", {"weight": torch.randn(6, 256).double()}, "float32"),
        ("int4", {"weight": torch.randn(256)}, "matrix"),
        ("int4", {"weight": torch.randn(256, 6).t()}, "contiguous"),
        ("int4", {"weight": torch.randn(0, 256)}, "matrix"),
        ("int4", {"scales": torch.randn(6, 2)}, r"\[N groups"),
        ("int4", {"scales": torch.randn(6, 2, 0)}, r"\[N groups"),
        ("int4", {"scales": torch.randn(6, 2, 65)}, "64"),
        ("int4", {"scales": torch.randn(6, 1, 3)}, "scales must hold 36"),
        ("int4", {"scales": torch.randn(6, 2, 3).double()}, "scales"),
        ("int4", {"group_n": 0}, "at least 1"),
        ("int4", {"group_k": -1}, "at least 1"),
        ("int4", {"low": 9, "high": 9}, "ends"),
        ("int4", {"high": 1000}, "ends"),
        ("int4_asym", {"zeros": torch.randn(6, 2)}, "zeros must hold 36"),
        ("nf4", {"zeros": torch.randn(6, 4, 3)}, "integers"),
        ("nf4", {"thresholds": None}, "come with"),
        ("nf4", {"thresholds": torch.randn(16)}, "thresholds must hold 15"),
        ("nf4", {"codes": torch.randn(16)}, "codes"),
        ("nf4", {"values": torch.randn(1)}, "2 to 256"),
        ("mxfp4", {"sign": 300}, "sign"),
    ],
)
def test_malformed_arguments(op, name, change, message):
    function = getattr(torch.ops.qkernels, op, None) or pytest.skip(library.why_missing())
    function(**good(name))
    with pytest.raises(RuntimeError, match=message):
        function(**{**good(name), **change})


def test_weights_too_small_for_their_scales_are_an_error():
    weight = torch.randn(16, 128)
    with pytest.raises(FormatError, match="sf32"):
        rtn(weight * 1e-7, formats.get("int4"))
    assert rtn(weight * 1e-7, formats.get("u4b8_g128_sf32")).scales.all()
    weight[3] *= 1e-9  # a dead row among live ones
    assert not rtn(weight, formats.get("int4")).scales[3].any()
    assert rtn(torch.zeros(2, 128), formats.get("int4")).shape == (2, 128)
