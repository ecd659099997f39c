"""Every format of the catalogue: its name, its values, its size, its quality."""

import math

import pytest
import torch
from cases import is_symmetric_int, plain, random_quant

import qkernels
from qkernels import FormatError, QuantTensor, UnsupportedError, formats, quantizers, reference, rtn
from qkernels.formats import Block, Codebook, Float, Int, Parts, QuantFormat
from qkernels.formats.packing import pack

ALL = plain(formats.all_formats())
every_format = pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)


@every_format
def test_name_round_trip(format):
    assert formats.get(format.name) is format
    assert formats.get(format) is format
    assert formats.format.parse(format.name, (formats.codebook.NF4, formats.codebook.FP4)) == format


@every_format
def test_every_code_means_its_value(format):
    values = torch.tensor(format.code.values, dtype=torch.float64)
    k = len(values)
    q = random_quant(format, 1, k)
    q = QuantTensor(format, (1, k), pack(torch.arange(k, dtype=torch.uint8)[None], format.bits), q.scales, q.zeros, q.tensor_scale)
    scale = reference.spread(q.scales.double(), format, 1, k) * (1.0 if q.tensor_scale is None else q.tensor_scale.double())
    zero = 0.0 if q.zeros is None else reference.spread(q.zeros.double(), format, 1, k)
    expected = values * scale + zero if format.zero == "min" else (values - zero) * scale
    torch.testing.assert_close(reference.decode(q, torch.float64), expected, rtol=0, atol=0, equal_nan=True)


@every_format
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (130, 515)])
def test_bytes(format, shape):
    q = random_quant(format, *shape)
    assert q.nbytes == format.nbytes(*shape)
    assert format.bits_per_weight() >= format.bits


def test_aliases():
    for alias, name in formats.aliases().items():
        assert formats.get(alias).name == name
    assert formats.alias_of(formats.get("int4")) == "int4"
    assert formats.get("int4_g32") == QuantFormat(Int(4, 8), (1, 32), "f16")
    assert formats.get("int4_g-1").group == (1, -1)
    assert formats.get("u4_g96_zi_sbf16") == QuantFormat(Int(4), (1, 96), "bf16", "int")


@pytest.mark.parametrize(("name", "hint"), [("int44", "int4"), ("nf5", "nf4"), ("mxfp8", "mxfp4"), ("", "int4"), ("u9_g32_sf16", "8 bits")])
def test_unknown_names(name, hint):
    with pytest.raises(FormatError, match=hint):
        formats.get(name)


@pytest.mark.parametrize("name", [4, None, "int4_g0", "u4b16_g32_sf16", "u4b8_g32_zi_sf16", "e2m1_g32_zi_sf16", "u4_g32_zi_se8m0"])
def test_names_that_spell_nonsense(name):
    with pytest.raises(FormatError):
        formats.get(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(9),
        lambda: Int(0),
        lambda: Int(4, 16),
        lambda: Float(6, 1),
        lambda: Codebook("three", (0.0, 1.0, 2.0)),
        lambda: QuantFormat(Int(4, 8), (1, 0)),
        lambda: QuantFormat(Int(4, 8), (1, 32), "f8"),
        lambda: QuantFormat(Int(4, 8), (1, 32), name="mine"),
        lambda: QuantFormat(Int(4), (1, 32), zero="integer"),
        lambda: QuantFormat(Int(4, 8), block=Block(32, 18, split=Parts)),
        lambda: formats.register(formats.get("int4")),
    ],
)
def test_bad_fields(make):
    with pytest.raises(FormatError):
        make()


# Relative RMSE of Gaussian weights: measured once with independent implementations.
CEILINGS = {
    "int8_g128": 0.0066, "int4_g32": 0.0885, "int4_g64": 0.096, "int4": 0.102, "int4_asym": 0.0985, "int3_g128": 0.198,
    "int2_g64": 0.382, "nf4": 0.0925, "nf4_g32": 0.0878, "nf4_g128": 0.096, "fp4": 0.1225,
}  # fmt: skip


@pytest.mark.parametrize("name", CEILINGS)
def test_quality_of_rtn(name):
    weight = torch.randn(256, 1024)
    error = reference.decode(rtn(weight, formats.get(name))) - weight
    assert float(error.norm() / weight.norm()) <= CEILINGS[name]


@every_format
def test_rtn_odd_shapes(format):
    for n, k in ((1, 1), (1, 8), (17, 40), (130, 515)):
        weight = torch.randn(n, k)
        error = reference.decode(rtn(weight, format)) - weight
        assert torch.isfinite(error).all()
        assert float(error.norm() / weight.norm()) <= {2: 0.6, 3: 0.3}.get(format.bits, 0.16), (n, k)


@every_format
def test_rtn_keeps_zero_groups_zero(format):
    weight = torch.randn(4, 256)
    weight[:, :128], weight[2] = 0.0, 0.0
    decoded = reference.decode(rtn(weight, format))
    tolerance = 1e-3 if format.zero == "float" else 0.0
    assert float(decoded[2].abs().max()) <= tolerance or format.group[0] != 1
    assert torch.isfinite(decoded).all()
    assert torch.isfinite(reference.decode(rtn(torch.zeros(3, 40), format))).all()
    assert float(reference.decode(rtn(torch.zeros(3, 40), format)).abs().max()) <= tolerance


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rtn_names_the_bad_place(format, bad):
    weight = torch.randn(5, 40)
    weight[3, 7] = bad
    with pytest.raises(FormatError, match=r"\[3, 7\]"):
        rtn(weight, format)


def test_rtn_refuses_what_is_no_matrix():
    for weight in (torch.randn(4), torch.randn(0, 4), torch.ones(4, 4, dtype=torch.int32)):
        with pytest.raises(FormatError):
            rtn(weight, formats.get("int4"))
    with pytest.raises(FormatError, match="sf32"):
        rtn(torch.full((2, 128), 1e9), formats.get("int4"))


@pytest.mark.parametrize("format", [f for f in ALL if is_symmetric_int(f)], ids=lambda f: f.name)
def test_negative_scales(format):
    weight = -random_weight_with_long_side(format)
    q = rtn(weight, format, clip_search=True)
    flipped = QuantTensor(format, q.shape, q.codes, -q.scales)
    assert torch.equal(reference.decode(flipped), -reference.decode(q))


def random_weight_with_long_side(format):
    weight = torch.randn(4, 256)
    weight[:, ::32] += 4.0
    return weight


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_int_rtn_is_symmetric_under_sign(name):
    weight = random_weight_with_long_side(None)
    a, b = (reference.decode(rtn(w, formats.get(name))) for w in (weight, -weight))
    assert float((a - weight).norm()) == pytest.approx(
        float((b + weight).norm()), rel=0.01
    )  # not equal: only the side of -8 is searched twice


def test_quantize_and_quantizers():
    weight = torch.randn(8, 256)
    assert qkernels.quantize(weight).format == formats.get("int4")
    assert not qkernels.quantize(weight, quantizer="absmax").equal(qkernels.quantize(weight))
    assert quantizers.get(rtn) is rtn
    with pytest.raises(FormatError, match="nearest: rtn"):
        quantizers.get("rtm")


def test_quant_tensor_checks_itself():
    q = random_quant(formats.get("int4"), 4, 256)
    with pytest.raises(FormatError, match="scales"):
        QuantTensor(q.format, q.shape, q.codes)
    with pytest.raises(FormatError, match="codes"):
        QuantTensor(q.format, (4, 128), q.codes, q.scales)
    with pytest.raises(FormatError, match="zeros"):
        QuantTensor(q.format, q.shape, q.codes, q.scales, zeros=q.scales)
    with pytest.raises(FormatError, match="perm"):
        QuantTensor(q.format, q.shape, q.codes, q.scales, perm=torch.arange(3))


# One sub-scale per 8 codes under an fp32 scale per 16: nested, as the block families of other libraries are.
def _split_toy(raw):
    return Parts(raw[..., 6:], raw[..., :4].contiguous().view(torch.float32), raw[..., 4:6])


def _join_toy(parts):
    return torch.cat([parts.d.contiguous().view(torch.uint8), parts.scales, parts.codes], -1)


TOY = QuantFormat(Int(8, 128), block=Block(16, 22, _split_toy, _join_toy), name="toy_k")


def test_nested_blocks_need_no_edit(monkeypatch):
    monkeypatch.setitem(formats.catalogue._FORMATS, TOY.name, TOY)  # registered for this test alone
    raw = torch.randint(256, (3, 2, 22)).to(torch.uint8)
    raw[..., :4] = torch.tensor([0.5]).view(torch.uint8)
    q = QuantTensor(TOY, (3, 32), raw.flatten(1))
    expected = (raw[..., 6:].float() - 128) * raw[..., 4:6].float().repeat_interleave(8, -1) * 0.5
    assert torch.equal(reference.decode(q), expected.flatten(1))
    assert q.nbytes == TOY.nbytes(3, 32) == 3 * 44
    assert torch.equal(TOY.block.join(TOY.block.split(raw)), raw)
    x = torch.randn(2, 32)
    torch.testing.assert_close(qkernels.QuantLinear.from_quant_tensor(q)(x), x @ expected.flatten(1).T)
    with pytest.raises(FormatError, match="K = 33"):
        TOY.codes_shape(3, 33)
    with pytest.raises(UnsupportedError, match="toy_k"):
        rtn(torch.randn(3, 32), TOY)
