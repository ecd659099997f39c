"""save and load: bit for bit, all or nothing."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from net import IDS, Net, fingerprint, quantized, unchanged
from rich.console import Console
from torch import nn

from qkernels import CheckpointError, QuantLinear, load, replace_linear, restore_linear, save
from qkernels.formats import Codebook, QuantFormat
from qkernels.io import native
from qkernels.kernels.cpu import library


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
    "deep": lambda p: (p / "qkernels.json").write_text("[" * 100_000),
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
    if reason := library.why_missing():
        pytest.skip(f"no kernel here runs a format that is not registered: {reason}")
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
    with pytest.raises(CheckpointError, match=r"cannot write .*m, which is as it was: disk") as caught:
        save(model, tmp_path / "m")
    assert isinstance(caught.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and (tmp_path / "m" / "qkernels.json").read_bytes() == before


def others(path):
    """Put into a directory what qkernels does not write; return what must then be there."""
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("dear")
    (path / "runs" / "1").mkdir(parents=True)
    (path / "runs" / "1" / "log").write_text("loss")
    (path / "latest").symlink_to("runs/1")
    return tree(path)


def tree(path):
    return {str(f.relative_to(path)): f.readlink() if f.is_symlink() else f.is_dir() or f.read_bytes() for f in path.rglob("*")}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_save_keeps_what_others_put_there(tmp_path, monkeypatch, links):
    save(quantized()[0], tmp_path / "m")
    before = others(tmp_path / "m")
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError("links")))
    save(quantized("int8")[0], tmp_path / "m")
    after = tree(tmp_path / "m")
    changed = {"model.safetensors", "qkernels.json"}
    assert after.keys() == before.keys() and {name for name in after if after[name] != before[name]} == changed
    assert isinstance(load(Net(), tmp_path / "m").shared, QuantLinear)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def sharded(path):
    with native.Writer(path, {}, {}, shard_bytes=1) as writer:
        for name in "ab":
            writer.add(name, torch.ones(1))


def test_save_replaces_no_weights_of_others(tmp_path):
    sharded(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_text("dear")
    before = others(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"refusing to replace model\.safetensors in .*m, which"):
        save(quantized()[0], tmp_path / "m")
    assert tree(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "m" / "model.safetensors").unlink()
    save(quantized()[0], tmp_path / "m")
    assert not list((tmp_path / "m").glob("model-*"))


def test_save_does_not_guess_what_a_damaged_directory_holds(tmp_path):
    save(quantized()[0], tmp_path / "m")
    others(tmp_path / "m")
    _edit(tmp_path / "m" / "qkernels.json", lambda d: d[:40])
    before = tree(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"refusing to replace .*no JSON"):
        save(quantized()[0], tmp_path / "m")
    assert tree(tmp_path / "m") == before


def test_save_through_a_symbolic_link(tmp_path):
    model, _ = quantized()
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to("disk")
    for _ in range(2):  # an empty directory, then one of ours
        save(model, tmp_path / "m")
        assert (tmp_path / "m").readlink() == Path("disk") and (tmp_path / "disk" / "qkernels.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "m"]
    (tmp_path / "lost").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"lost is a symbolic link to .*nowhere, which is not there"):
        save(model, tmp_path / "lost")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "lost", "m"]


def test_save_does_not_replace_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "", "..", tmp_path):
        with pytest.raises(CheckpointError, match="current directory"):
            save(quantized()[0], path)
    assert not list(tmp_path.iterdir())


def test_save_below_a_file(tmp_path):
    (tmp_path / "file").write_text("dear")
    for path in ("file/m", "file/below/m"):
        with pytest.raises(CheckpointError, match=rf"cannot write .*{path}") as caught:
            save(quantized()[0], tmp_path / path)
        assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == {"file": b"dear"}


def denied(*_, **__):
    raise PermissionError("permission denied")


@pytest.mark.parametrize("refuses", ["tempfile.mkdtemp", "shutil.copytree", "pathlib.Path.write_text"])
def test_save_without_permission(tmp_path, monkeypatch, refuses):
    model, _ = quantized()
    save(model, tmp_path / "m")
    before = others(tmp_path / "m")
    monkeypatch.setattr(refuses, denied)
    with pytest.raises(CheckpointError, match=r"cannot write .*m.*: permission denied"):
        save(model, tmp_path / "m")
    assert tree(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("limit", [1000, 20_000], ids=["weights", "manifest"])
def test_save_on_a_full_disk(tmp_path, limit):
    """A limit on the size of a file stands for the disk's end: it meets safetensors' own writes too."""
    import resource

    model, _ = quantized()
    layers = {f"{name}{i}": {"format": "x" * 99} for i in range(200) for name in "ab"}
    save(model, tmp_path / "m")
    before = tree(tmp_path / "m")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*m, which is as it was: .*[Ff]ile too large") as caught:
            if limit == 1000:
                save(model, tmp_path / "m")
            else:
                with native.Writer(tmp_path / "m", layers, {}) as writer:
                    writer.add("x", torch.ones(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.__cause__ is not None
    assert tree(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["qkernels.json", "model.safetensors"])
def test_an_unreadable_file_is_a_typed_error(tmp_path, monkeypatch, name):
    save(quantized()[0], tmp_path / "m")
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **options: (denied if path.name == name else real)(path, *args, **options))
    with pytest.raises(CheckpointError, match=f"{name}.*permission denied"):
        load(Net(), tmp_path / "m")


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress(tmp_path, monkeypatch, show, terminal):
    screen, path, model = io.StringIO(), tmp_path / "[m]", Net()
    monkeypatch.setattr("rich._console", Console(file=screen, force_terminal=terminal, width=300))
    replace_linear(model, progress=show)
    save(model, path, progress=show)
    load(Net(), path, progress=show)
    for text in ("quantizing to u4b8_g128_sf16", f"saving to {path}", f"checking {path}", f"loading {path}"):
        assert (text in screen.getvalue()) == (show and terminal)
    assert bool(screen.getvalue()) == (show and terminal)  # not so much as an empty line


class Mixed(nn.Module):
    """A norm that stays in float32, a frozen linear that is not quantised, and no bias that would tell a layer's dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False, dtype=dtype), nn.Linear(64, 32, dtype=dtype)
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 8, dtype=dtype)
        self.lm_head.requires_grad_(False)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x):
        x = self.down(self.up(x))
        return self.lm_head(self.norm(x.float()).to(x.dtype))


@pytest.mark.parametrize("skeleton", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_saved_dtype_whatever_the_skeleton_s(tmp_path, saved, skeleton):
    model, x = Mixed(saved), torch.randn(2, 32, dtype=saved)
    replace_linear(model, "int4_g32", progress=False)
    save(model, tmp_path / "m")
    fresh = load(Mixed(skeleton), tmp_path / "m")
    mine, theirs = model.state_dict(), fresh.state_dict()
    assert all(t.dtype == theirs[k].dtype and torch.equal(t.view(torch.uint8), theirs[k].view(torch.uint8)) for k, t in mine.items())
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(fresh(x), model(x))
    for m in (model, fresh):
        restore_linear(m)
    assert fresh.up.weight.dtype == fresh.down.weight.dtype == saved and torch.equal(fresh(x), model(x))
    assert fresh.float()(x.float()).dtype == torch.float32


def test_integers_for_floats_are_another_architecture(tmp_path):
    model, _ = quantized()
    save(model, tmp_path / "m")
    fresh = Net()
    fresh.steps = fresh.steps.float()
    before = fingerprint(fresh)
    with pytest.raises(CheckpointError, match=r"'steps' was saved as torch\.int64, the model's is torch\.float32"):
        load(fresh, tmp_path / "m")
    assert unchanged(fresh, before)


def test_an_edited_manifest_is_an_error(tmp_path):
    model, _ = quantized()
    save(model, tmp_path / "m")
    path = tmp_path / "m" / "qkernels.json"
    path.write_text(path.read_text().replace("u4b8_g32", "u4b3_g32"))
    with pytest.raises(CheckpointError, match="edited"):
        load(Net(), tmp_path / "m")
