"""replace_linear and restore_linear: all or nothing."""

import copy
import pickle

import pytest
import torch
from net import IDS, Net, fingerprint, quantized, unchanged
from torch import nn

import qkernels
from qkernels import FormatError, QuantLinear, UnsupportedError, replace_linear, restore_linear
from qkernels.kernels import device as devices
from qkernels.kernels.cpu import library
from qkernels.kernels.device import Device


def names(report):
    return [row.name for row in report.replaced]


EVERY = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "shared", "again"]


def test_what_is_replaced():
    model, report = quantized()
    assert names(report) == EVERY
    assert "tied" in report.skipped["head"] and "lm_head" in report.skipped["lm_head"]
    assert model.shared is model.again and isinstance(model.shared, QuantLinear)
    assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    assert not model.shared.training


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "blocks.0.*"}, EVERY[:2]),
        ({"include": ["shared", "blocks.1.2"]}, ["blocks.1.2", "shared", "again"]),
        ({"include": "0"}, ["blocks.0.0", "blocks.1.0"]),
        ({"exclude": ["blocks.*", "lm_head"]}, ["shared", "again"]),
        ({"exclude": ()}, [*EVERY, "lm_head"]),
        ({"filter_fn": lambda m, name: m.out_features == 64}, ["blocks.0.0", "blocks.1.0"]),
    ],
)
def test_choosing(options, expected):
    assert names(quantized(**options)[1]) == expected


@pytest.mark.skipif(library.why_missing() is not None, reason=f"{library.why_missing()}")
def test_batch_invariance(tmp_path):
    """The CPU's kernels have it in any case; here that it is asked for wherever layers are made."""
    model, _ = quantized(batch_invariant=True)
    qkernels.save(model, tmp_path / "m")
    loaded = qkernels.load(Net(), tmp_path / "m", batch_invariant=True, progress=False)
    for layer in (model.shared, loaded.shared, copy.deepcopy(model).shared, pickle.loads(pickle.dumps(model)).shared):
        assert layer.batch_invariant and layer.plan().problem.batch_invariant
    assert not qkernels.load(Net(), tmp_path / "m", progress=False).shared.batch_invariant
    with torch.device("meta"):
        assert QuantLinear.from_linear(nn.Linear(8, 8), batch_invariant=True).batch_invariant


def test_batch_invariance_that_no_kernel_has(monkeypatch):
    monkeypatch.setattr(devices, "current", lambda device: Device("cpu", isa="none"))
    model = Net()
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"(?s)layer blocks\.0\.0: .*reference: a row's .*batch_invariant=True.*is unchanged"):
        replace_linear(model, batch_invariant=True, progress=False)
    unchanged(model, before)


def test_report():
    text = str(quantized("int8")[1])
    for part in (*EVERY, "u8b128_g-1_sf32", "6 layers", "x smaller", "skipped head"):
        assert part in text


def test_a_layer_of_two_names_stays_one():
    model = Net()
    report = replace_linear(model, exclude=("again", "lm_head"))
    assert model.shared is model.again and type(model.shared) is nn.Linear
    assert "excluded by" in report.skipped["again"] and "another name" in report.skipped["shared"]


def test_weights_in_one_memory_are_tied():
    """Two Parameters over one storage, as `nn.Parameter(embedding.weight.data)` makes them."""
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False), "other": nn.Linear(32, 32)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    report = replace_linear(model)
    assert "tied" in report.skipped["head"] and [row.name for row in report.replaced] == ["other"]


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (lambda w, f: qkernels.quantize(torch.randn(3, 4), f), r"u4b8_g128_sf16 \[3, 4\]; a QuantTensor u4b8_g128_sf16 \[8, 64\]"),
        (lambda w, f: qkernels.quantize(w, "int8"), r"returned u8b128_g-1_sf32 \[8, 64\]"),
        (lambda w, f: w, "returned a Tensor"),
    ],
)
def test_a_quantizer_must_return_what_was_asked_for(quantizer, message):
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(FormatError, match=f"layer 0: the quantizer .*{message}"):
        replace_linear(model, "int4", quantizer=quantizer)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("weight", [torch.randn(8, 64).to(torch.float8_e4m3fn), torch.randn(8, 64).to_sparse()])
def test_weights_that_cannot_be_read_are_named(weight):
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(FormatError, match=r"layer 0: the weight is torch\.float.*write"):
        replace_linear(model)


def test_a_shared_layer_counts_once():
    _, report = quantized("int8")
    rows = {row.name: row for row in report.replaced}
    assert rows["again"].kernel == "shared with shared" and rows["again"].bytes_before == 0
    assert report.bytes_before == 4 * (4 * 32 * 64 + 32 * 32)


def test_bad_weights_in_the_last_layer_leave_the_model_alone():
    model = Net()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    before = fingerprint(model)
    with pytest.raises(FormatError, match=r"lm_head.*\[3, 5\].*unchanged"):
        replace_linear(model, exclude=(), progress=False)
    assert [(n, id(m)) for n, m in model.named_modules()] == before[0]


@pytest.mark.parametrize("options", [{"format": "int44"}, {"compute": "int9"}, {"quantizer": "rtm"}])
def test_bad_arguments(options):
    model = Net()
    before = fingerprint(model)
    with pytest.raises(FormatError, match="nearest"):
        replace_linear(model, **options, progress=False)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.ReLU()), nn.Linear(4, 4), nn.Sequential(QuantLinear(8, 8))], ids=["none", "itself", "done"]
)
def test_nothing_to_replace(model):
    with pytest.raises(UnsupportedError, match="nothing to replace"):
        replace_linear(model, progress=False)


def test_restore():
    model, _ = quantized()
    expected = model(IDS)
    assert restore_linear(model) == len(EVERY)
    assert model.shared is model.again and not any(isinstance(m, QuantLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())  # trainable, as every new nn.Linear is
    relative = float(((model(IDS) - expected).norm() / expected.norm()).detach())
    assert relative < 0.02
    assert restore_linear(model) == 0


@pytest.mark.parametrize("progress", [False, True])
def test_a_quantizer_of_ones_own(progress):
    seen = []

    def mine(weight, format):
        seen.append(tuple(weight.shape))
        return qkernels.rtn(weight, format)

    assert len(replace_linear(Net(), "int8", quantizer=mine, progress=progress).replaced) == len(EVERY)
    assert len(seen) == len(EVERY) - 1  # the shared layer once


def test_restored_weights_have_the_model_s_dtype():
    """A model without biases (Llama's) tells its dtype by its weights alone."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)).to(torch.bfloat16)
    replace_linear(model, "int4_g32", progress=False)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    before = model(x)
    restore_linear(model)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in model)
    torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)
    replace_linear(model, "int4_g32", progress=False)
    restore_linear(model.float())
    assert model[0].weight.dtype == torch.float32


class Reads(nn.Module):
    """As T5's feed-forward does: it asks a child for its weight's dtype."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(32, 32), nn.Linear(32, 32)
        nn.init.zeros_(self.wi.weight)

    def forward(self, x):
        return self.wo(self.wi(x).to(self.wo.weight.dtype))


def test_a_weight_that_its_parent_reads_stays():
    class Inherits(Reads):
        pass

    model = nn.Sequential(Reads(), nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), Inherits()).eval()
    report = replace_linear(model, "int4_g32", progress=False)
    assert [row.name for row in report.replaced] == ["0.wi", "2.wi"]
    assert report.skipped["0.wo"] == "Reads reads its weight itself"
    assert report.skipped["2.wo"] == "Inherits reads its weight itself"
    assert report.skipped["1.linear1"] == "TransformerEncoderLayer reads its weight itself"
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32)).isfinite().all()


def test_subclasses_stay_unless_taken_by_hand():
    """A parametrised Linear inherits nn.Linear's forward, and yet is not its weight."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.MultiheadAttention(32, 2)), torch.randn(3, 32)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(UnsupportedError, match=r"0: a ParametrizedLinear, not a plain nn\.Linear\n  1\.out_proj: a NonDynamically"):
        replace_linear(model, "int8", filter_fn=lambda *_: True, progress=False)
    expected = model[0](x)
    model[0] = QuantLinear.from_linear(model[0], "int8")
    assert float((model[0](x) - expected).norm().detach() / expected.norm().detach()) < 0.02


def test_hooks_are_not_lost():
    model, seen = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    report = replace_linear(model, "int4_g32", progress=False)
    assert [row.name for row in report.replaced] == ["1"] and "hooks" in report.skipped["0"]
    model(torch.randn(1, 32))
    assert seen
