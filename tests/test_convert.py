"""replace_linear, restore_linear, save and load: all or nothing."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels
from qkernels import CheckpointError, FormatError, QuantLinear, UnsupportedError, load, replace_linear, restore_linear, save
from qkernels.formats import Codebook, QuantFormat


class Net(nn.Module):
    """Two blocks, a shared projection, an embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.shared = nn.Linear(32, 32, bias=False)
        self.again = self.shared
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.lm_head = nn.Linear(32, 20)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(self.again(self.shared(x)))
        return self.head(x) + self.lm_head(x)


IDS = torch.arange(12).reshape(3, 4)


def quantized(format="int4_g32", **options):
    model = Net().eval()
    return model, replace_linear(model, format, progress=False, **options)


def names(report):
    return [row.name for row in report.replaced]


def fingerprint(model):
    return [(n, id(m)) for n, m in model.named_modules()], {k: t.clone() for k, t in model.state_dict().items()}


def unchanged(model, before):
    modules, state = before
    now = model.state_dict()
    return [(n, id(m)) for n, m in model.named_modules()] == modules and all(torch.equal(now[k], t) for k, t in state.items())


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
        ({"include": ["shared", "blocks.1.2"]}, ["blocks.1.2", "shared"]),
        ({"include": "0"}, ["blocks.0.0", "blocks.1.0"]),
        ({"exclude": ["blocks.*", "lm_head"]}, ["shared", "again"]),
        ({"exclude": ()}, [*EVERY, "lm_head"]),
        ({"filter_fn": lambda m, name: m.out_features == 64}, ["blocks.0.0", "blocks.1.0"]),
    ],
)
def test_choosing(options, expected):
    assert names(quantized(**options)[1]) == expected


def test_report():
    text = str(quantized("int8")[1])
    for part in (*EVERY, "u8b128_g-1_sf32", "6 layers", "x smaller", "skipped head"):
        assert part in text


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
    relative = float((model(IDS) - expected).norm() / expected.norm())
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


# -- save and load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "int4_asym_g32", "int3", "hqq2", "nf4", "fp8_block", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("meta", [False, True])
def test_round_trip(tmp_path, format, meta):
    model, _ = quantized(format)
    save(model, tmp_path / "m")
    with torch.device("meta" if meta else "cpu"):
        fresh = Net().eval()
    if meta:
        fresh.head.weight = fresh.embed.weight
        fresh.tie_weights = lambda: setattr(fresh.head, "weight", fresh.embed.weight)
    assert load(fresh, tmp_path / "m") is fresh
    mine, theirs = model.state_dict(), fresh.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(t.view(torch.uint8), theirs[k].view(torch.uint8)) for k, t in mine.items())
    assert torch.equal(fresh(IDS), model(IDS))


def _edit(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def _flip(data):
    data[len(data) // 2] ^= 1
    return data


def _manifest(path, change):
    manifest = json.loads((path / "qkernels.json").read_text())
    change(manifest)
    (path / "qkernels.json").write_text(json.dumps(manifest))


DAMAGES = {
    "truncated weights": lambda p: _edit(p / "model.safetensors", lambda d: d[:-9]),
    "edited weights": lambda p: _edit(p / "model.safetensors", _flip),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "no manifest": lambda p: (p / "qkernels.json").unlink(),
    "truncated manifest": lambda p: _edit(p / "qkernels.json", lambda d: d[:40]),
    "other version": lambda p: _manifest(p, lambda m: m.update(version=2)),
    "unknown format": lambda p: _manifest(p, lambda m: m["layers"]["shared"].update(format="int44")),
    "other format": lambda p: _manifest(p, lambda m: m["layers"]["shared"].update(format="int8")),
    "other shape": lambda p: _manifest(p, lambda m: m["layers"]["shared"].update(shape=[32, 31])),
    "unknown layer": lambda p: _manifest(p, lambda m: m["layers"].update(nowhere=m["layers"]["shared"])),
    "not a linear": lambda p: _manifest(p, lambda m: m["layers"].update(embed=m["layers"]["shared"])),
    "lost layer": lambda p: _manifest(p, lambda m: m["layers"].pop("shared")),
    "foreign file": lambda p: _manifest(p, lambda m: m["sha256"].update({"../x": "0"})),
    "list": lambda p: (p / "qkernels.json").write_text("[]"),
    "no layers": lambda p: _manifest(p, lambda m: m.pop("layers")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_and_the_model_is_unchanged(tmp_path, damage):
    save(quantized()[0], tmp_path / "m")
    DAMAGES[damage](tmp_path / "m")
    model = Net()
    before = fingerprint(model)
    with pytest.raises(CheckpointError):
        load(model, tmp_path / "m")
    assert unchanged(model, before)


def test_another_architecture(tmp_path):
    save(quantized()[0], tmp_path / "m")
    for change in (
        lambda m: m.register_buffer("more", torch.ones(1)),
        lambda m: m.register_buffer("steps", torch.ones(4)),
        lambda m: delattr(m, "steps"),
    ):
        model = Net()
        change(model)
        before = fingerprint(model)
        with pytest.raises(CheckpointError):
            load(model, tmp_path / "m")
        assert unchanged(model, before)


class Rope(nn.Module):
    """A buffer that is in no checkpoint, which transformers' models, and no others, know how to make anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def test_a_meta_buffer_that_is_never_saved(tmp_path):
    model = Rope()
    replace_linear(model, "int8", progress=False)
    save(model, tmp_path / "m")
    with torch.device("meta"):
        fresh = Rope()
    with pytest.raises(CheckpointError, match="buffers angles"):
        load(fresh, tmp_path / "m")
    assert type(fresh.linear) is nn.Linear and fresh.angles.is_meta
    fresh.angles = torch.arange(4.0)
    assert isinstance(load(fresh, tmp_path / "m").linear, QuantLinear)
    with torch.device("meta"):
        fresh = Rope()
    fresh.initialize_weights = lambda: fresh.angles.copy_(torch.arange(4.0))
    assert torch.equal(load(fresh, tmp_path / "m").angles, torch.arange(4.0))


@pytest.mark.parametrize("name", ["mine", "nf4"])
def test_save_refuses_a_codebook_that_load_would_not_find(name, tmp_path):
    code = Codebook(name, tuple(i / 15 for i in range(16)))  # "nf4" finds another one
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 16), QuantFormat(code, (1, 32), "f32")))
    with pytest.raises(CheckpointError, match=f"0 has the format {name}_g32_sf32.*register"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_model_without_values(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 16))
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_replaces_its_own_and_nothing_else(tmp_path):
    model, _ = quantized()
    for _ in range(2):
        save(model, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "a.jpg").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for path in (foreign, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="refusing"):
            save(model, path)
    assert (foreign / "a.jpg").read_text() == (tmp_path / "file").read_text() == "dear"
    with pytest.raises(CheckpointError, match="missing"):
        load(Net(), tmp_path / "nowhere")


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
    model = nn.Sequential(Reads(), nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    report = replace_linear(model, "int4_g32", progress=False)
    assert [row.name for row in report.replaced] == ["0.wi"]
    assert report.skipped["0.wo"] == "Reads reads its weight itself"
    assert report.skipped["1.linear1"] == "TransformerEncoderLayer reads its weight itself"
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32)).isfinite().all()


def test_hooks_are_not_lost():
    model, seen = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    report = replace_linear(model, "int4_g32", progress=False)
    assert [row.name for row in report.replaced] == ["1"] and "hooks" in report.skipped["0"]
    model(torch.randn(1, 32))
    assert seen


def test_a_save_that_fails_at_the_end_keeps_the_old_directory(tmp_path, monkeypatch):
    model, _ = quantized()
    save(model, tmp_path / "m")
    before = (tmp_path / "m" / "qkernels.json").read_bytes()
    rename = Path.rename

    def fails(self, target):
        if self.name.startswith(".m-") and "old" not in self.name:
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk"):
        save(model, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and (tmp_path / "m" / "qkernels.json").read_bytes() == before


def test_an_edited_manifest_is_an_error(tmp_path):
    model, _ = quantized()
    save(model, tmp_path / "m")
    path = tmp_path / "m" / "qkernels.json"
    path.write_text(path.read_text().replace("u4b8_g32", "u4b3_g32"))
    with pytest.raises(CheckpointError, match="edited"):
        load(Net(), tmp_path / "m")
