"""The command line, and above all `quantize`: what replace_linear and save would write, without the model in memory."""

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qkernels
from qkernels import CheckpointError, FormatError, UnsupportedError, cli, formats
from qkernels.integrations.transformers import quantize_directory
from qkernels.io import directory, native, shards
from qkernels.kernels.cuda import library as cuda_library

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = SMALL | {"num_key_value_heads": 2}
IDS = torch.arange(8)[None]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def failure(*arguments):
    """The one line of an error that exits with 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=250))


# -- models ------------------------------------------------------------------------------------------------------------------------


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)).bfloat16()


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def mixtral():
    """Its checkpoint has a tensor for every expert, the model one for all."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=3))


MODELS = {
    "llama tied, sharded": (lambda: llama(tie_word_embeddings=True), "40KB"),
    "llama untied, one file": (llama, "1GB"),
    "bert, one file": (bert, "1GB"),
    "mixtral, sharded": (mixtral, "80KB"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """model name -> its directory, as transformers saves it."""
    found = {}
    for number, (name, (make, size)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        found[name] = tmp_path_factory.mktemp("model") / "m"
        make().save_pretrained(found[name], max_shard_size=size)
        (found[name] / "vocab.txt").write_text("a\nb\n")
    return found


@pytest.fixture
def source(saved, tmp_path):
    """A sharded tied llama to damage."""
    return shutil.copytree(saved["llama tied, sharded"], tmp_path / "source")


@pytest.fixture
def single(saved, tmp_path):
    """An untied llama in one file, to damage."""
    return shutil.copytree(saved["llama untied, one file"], tmp_path / "single")


def model_class(path):
    return getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])


def skeleton(path, device):
    with torch.device(device):
        return model_class(path)._from_config(transformers.AutoConfig.from_pretrained(path)).eval()


def reference(path, out, *arguments, **options):
    """The other way to the same directory, which holds the whole model."""
    model = model_class(path).from_pretrained(path, dtype="auto")
    report = qkernels.replace_linear(model, *arguments, progress=False, **options)
    qkernels.save(model, out)
    return model, report


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- quantize: what comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int4_g32", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_quantize_writes_what_replace_linear_and_save_would(saved, tmp_path, name, format):
    done = run("quantize", saved[name], tmp_path / "q", "--format", format)
    assert done.exit_code == 0, done.output
    model, report = reference(saved[name], tmp_path / "r", format)
    for file in ("model.safetensors", "qkernels.json"):  # safetensors orders its tensors itself: same tensors, same bytes
        assert (tmp_path / "q" / file).read_bytes() == (tmp_path / "r" / file).read_bytes()
    files = {f.name for f in (tmp_path / "q").iterdir()}
    assert {"config.json", "vocab.txt"} < files and not any("index" in f or "-of-" in f for f in files)
    assert (tmp_path / "q" / "config.json").read_bytes() == (saved[name] / "config.json").read_bytes()
    for row in report.replaced:
        assert row.name in done.output and row.kernel in done.output
    for skipped, reason in report.skipped.items():
        assert f"skipped {skipped}: {reason}" in done.output
    assert f"{len(report.replaced)} layers" in done.output and f"MB -> {tmp_path / 'q'}" in done.output
    for device in ("meta", "cpu"):
        fresh = qkernels.load(skeleton(tmp_path / "q", device), tmp_path / "q")
        with torch.no_grad():
            assert torch.equal(fresh(IDS)[0], model(IDS)[0])
        assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--include", "q_proj", "--include", "*.mlp.*"], {"include": ["q_proj", "*.mlp.*"]}),
        (["--exclude", "*.0.*", "--quantizer", "absmax"], {"exclude": ["*.0.*"], "quantizer": "absmax"}),
        (["--compute", "float"], {"compute": "float"}),
    ],
)
def test_options(saved, tmp_path, flags, options):
    path = saved["llama untied, one file"]
    assert run("quantize", path, tmp_path / "q", "--format", "int8", *flags).exit_code == 0
    reference(path, tmp_path / "r", "int8", **options)
    for file in ("model.safetensors", "qkernels.json"):
        assert (tmp_path / "q" / file).read_bytes() == (tmp_path / "r" / file).read_bytes()


def test_quantizing_again_keeps_what_the_user_put_there(saved, tmp_path):
    path = saved["llama untied, one file"]
    quantize_directory(path, tmp_path / "q", "int4_g32", progress=False)
    (tmp_path / "q" / "notes.md").write_text("dear")
    (tmp_path / "q" / "config.json").write_text("{}")  # the source's comes again
    quantize_directory(path, tmp_path / "q", "int8", progress=False)
    assert (tmp_path / "q" / "notes.md").read_text() == "dear"
    assert (tmp_path / "q" / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert native.read_manifest(tmp_path / "q")["layers"]["model.layers.0.mlp.up_proj"]["format"] == formats.get("int8").name


def test_several_output_files(saved, tmp_path):
    path = saved["llama tied, sharded"]
    quantize_directory(path, tmp_path / "q", "int8", shard_bytes=20_000, progress=False)
    reference(path, tmp_path / "r", "int8")
    files = sorted(f.name for f in (tmp_path / "q").glob("*.safetensors"))
    assert files == directory.weight_files(len(files)) and len(files) > 3
    for file in files:
        tensors = load_file(tmp_path / "q" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    (got, *rest), (expected, *expected_rest) = native.read(tmp_path / "q"), native.read(tmp_path / "r")
    assert rest == expected_rest and got.keys() == expected.keys() and all(same(got[k], expected[k]) for k in got)
    model = qkernels.load(skeleton(path, "meta"), tmp_path / "q")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (tmp_path / "q" / files[1]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        qkernels.load(skeleton(path, "meta"), tmp_path / "q")
    manifest = json.loads((tmp_path / "q" / "qkernels.json").read_text())
    del manifest["sha256"][files[1]]
    (tmp_path / "q" / "qkernels.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lists the files"):
        qkernels.load(skeleton(path, "meta"), tmp_path / "q")


class Watch:
    """Bytes of the tensors that came to life since, over their storages; `peak` is the most there were at any `look`."""

    def __init__(self):
        gc.collect()
        gc.freeze()  # what there is already is not looked at again
        self.peak = 0

    def look(self):
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
        now = sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())
        self.peak = max(self.peak, now)
        return now

    def around(self, function):
        def watched(*args, **kwargs):
            self.look()
            result = function(*args, **kwargs)
            self.look()
            return result

        return watched


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(native.Writer, "add", watch.around(native.Writer.add))
    monkeypatch.setattr(directory, "save_file", watch.around(directory.save_file))
    monkeypatch.setattr(shards.Tensors, "__getitem__", watch.around(shards.Tensors.__getitem__))
    yield watch
    gc.unfreeze()


def test_memory(tmp_path, watch):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6})
    )
    model.save_pretrained(tmp_path / "m", max_shard_size="1MB")
    whole, largest = sum(t.nbytes for t in model.state_dict().values()), 256 * 128 * 4
    del model
    gc.collect()
    assert watch.look() < 1000
    limit = 100_000 + 3 * largest  # a file of output, two source tensors and one being quantised
    assert whole > 5 * limit
    rtn = watch.around(qkernels.rtn)
    quantize_directory(tmp_path / "m", tmp_path / "q", "int8", quantizer=rtn, shard_bytes=100_000, progress=False)
    assert largest < watch.peak < limit
    watch.peak = 0
    loaded = qkernels.load(skeleton(tmp_path / "q", "meta"), tmp_path / "q")
    assert 0 < watch.peak < watch.look() + 2 * largest  # never a second copy beside the one that the model holds
    assert not any(t.is_meta for t in loaded.parameters())


# -- quantize: names that differ ---------------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Change the tensors of a directory of one file."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors) or tensors, path / "model.safetensors", {"format": "pt"})
    return path


def reconfigure(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


RENAMES = {
    "without the base model's prefix": lambda p: rewrite(p, renamed("model.", "")),
    "a head for a model without": lambda p: reconfigure(p, architectures=["LlamaModel"]),
    "the tied head alone": lambda p: rewrite(
        reconfigure(p, tie_word_embeddings=True), lambda t: {k: v for k, v in t.items() if "embed" not in k}
    ),
    "both of the tied": lambda p: rewrite(
        reconfigure(p, tie_word_embeddings=True), lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    ),
    "an obsolete buffer": lambda p: rewrite(p, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "an unknown tensor": lambda p: rewrite(p, lambda t: t | {"value_head.weight": torch.ones(8)}),
}


@pytest.mark.parametrize("case", RENAMES)
def test_names_as_from_pretrained_takes_them(single, tmp_path, case):
    RENAMES[case](single)
    report = quantize_directory(single, tmp_path / "q", "int8", progress=False)
    model, _ = reference(single, tmp_path / "r", "int8")
    for file in ("model.safetensors", "qkernels.json"):
        assert (tmp_path / "q" / file).read_bytes() == (tmp_path / "r" / file).read_bytes()
    assert ("value_head.weight" in report.skipped) == (case == "an unknown tensor")
    fresh = qkernels.load(skeleton(tmp_path / "q", "meta"), tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(fresh(IDS)[0], model(IDS)[0])


def test_old_names_of_layer_norm(saved, tmp_path):
    path = shutil.copytree(saved["bert, one file"], tmp_path / "old")
    expected = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(path / "model.safetensors").items()}
    rewrite(path, lambda _: expected)
    quantize_directory(path, tmp_path / "q", "int8", progress=False)
    assert not any("gamma" in name for name in native.read(tmp_path / "q")[0])


# -- quantize: what goes wrong -----------------------------------------------------------------------------------------------------


def edit_index(change):
    def damage(path):
        index = json.loads((path / shards.INDEX).read_text())
        (path / shards.INDEX).write_text(json.dumps(change(index["weight_map"], index) or index))

    return damage


def to(file):
    return edit_index(lambda m, _: m.update({next(iter(m)): file}))


def pickled(path):
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80")


def twice(path):
    first, second, *_ = sorted(path.glob("*.safetensors"))
    save_file(load_file(second) | load_file(first), second, {"format": "pt"})


def first_shard(change):
    return lambda path: change(min(path.glob("*.safetensors")))


DAMAGES = {  # of a sharded directory: what to do, what the error must say
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json"),
    "unknown architecture": (lambda p: reconfigure(p, architectures=["LlamaForWhales"]), "'LlamaForWhales'"),
    "an architecture that is none": (lambda p: reconfigure(p, architectures=["pipeline"]), "'pipeline'"),
    "unknown model type": (lambda p: reconfigure(p, model_type="whale"), "whale"),
    "impossible config": (lambda p: reconfigure(p, hidden_size=-1), "config.json"),
    "another config": (lambda p: reconfigure(p, intermediate_size=95), r"\[64, 96\] in the checkpoint.*\[64, 95\]"),
    "more layers": (lambda p: reconfigure(p, num_hidden_layers=3), r"lacks model\.layers\.2"),
    "quantised by others": (lambda p: reconfigure(p, quantization_config={"quant_method": "gptq"}), "quantised already"),
    "quantised by us": (lambda p: (p / "qkernels.json").write_text("{}"), "quantised already"),
    "no weights": (lambda p: [f.unlink() for f in p.glob("*.safetensors*")], "neither"),
    "pickled weights": (pickled, "pytorch_model.bin.*save_pretrained"),
    "index no JSON": (lambda p: (p / shards.INDEX).write_text("{"), "no JSON"),
    "index a list": (lambda p: (p / shards.INDEX).write_text("[]"), "no JSON object"),
    "index empty": (edit_index(lambda _, index: index | {"weight_map": {}}), "weight_map"),
    "index out of the directory": (to("../other.safetensors"), r"'\.\./other"),
    "index at the root": (to("/other.safetensors"), "'/other"),
    "index to a pickle": (to("x.bin"), r"'x\.bin'"),
    "index to a number": (to(3), "names the file 3"),
    "index to nowhere": (to("model-00009-of-00009.safetensors"), "missing, truncated"),
    "index to another shard": (to("model-00002-of-00002.safetensors"), "where it is not|missing, truncated"),
    "index with a name too many": (edit_index(lambda m, _: m.update(more=next(iter(m.values())))), "'more'.*where it is not"),
    "missing shard": (first_shard(lambda f: f.unlink()), "missing, truncated"),
    "truncated shard": (first_shard(lambda f: f.write_bytes(f.read_bytes()[:-9])), "missing, truncated"),
    "truncated header": (first_shard(lambda f: f.write_bytes(f.read_bytes()[:40])), "missing, truncated"),
    "empty shard": (first_shard(lambda f: f.write_bytes(b"")), "missing, truncated"),
    "tensor in two shards": (twice, "lies in two files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_directory(source, tmp_path, damage):
    change, text = DAMAGES[damage]
    change(source)
    with pytest.raises(CheckpointError, match=text):
        quantize_directory(source, tmp_path / "q", progress=False)
    failure("quantize", source, tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")


def without(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def one_name_twice(tensors):
    tensors["layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (nan, FormatError, r"layer model\.layers\.1\.mlp\.up_proj.*\[2, 3\].*nothing was written"),
        (without, CheckpointError, r"lacks model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM"),
        (one_name_twice, CheckpointError, "are both"),
        (lambda t: {"x": torch.ones(1)}, CheckpointError, "21 in all.*it has x"),
    ],
)
def test_damaged_tensors_leave_the_target_as_it_was(single, tmp_path, change, error, text):
    quantize_directory(single, tmp_path / "q", progress=False)
    before = (tmp_path / "q" / "qkernels.json").read_bytes()
    rewrite(single, change)
    with pytest.raises(error, match=text):
        quantize_directory(single, tmp_path / "q", progress=False)
    failure("quantize", single, tmp_path / "q")
    assert (tmp_path / "q" / "qkernels.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "single"]


def test_fused_experts_that_are_not_all_there(saved, tmp_path):
    path = shutil.copytree(saved["mixtral, sharded"], tmp_path / "m")
    name, file = next((k, f) for k, f in shards.open_directory(path).files.items() if "experts.1.w1" in k)
    save_file({k: t for k, t in load_file(file).items() if k != name}, file, {"format": "pt"})
    (path / shards.INDEX).write_text(
        json.dumps({"weight_map": {k: f.name for k, f in shards.Tensors(path.glob("*.safetensors")).files.items()}})
    )
    assert "experts" in failure("quantize", path, tmp_path / "q")


def test_tied_weights_that_differ(single, tmp_path):
    reconfigure(single, tie_word_embeddings=True)
    assert "tie_word_embeddings" in failure("quantize", single, tmp_path / "q")


def test_refusals(saved, tmp_path, monkeypatch):
    path = saved["bert, one file"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear")
    assert "refusing" in failure("quantize", path, tmp_path / "photos")
    assert "config.json is missing" in failure("quantize", tmp_path / "nowhere", tmp_path / "q")
    assert "nearest: int4" in failure("quantize", path, tmp_path / "q", "--format", "int44")
    assert "nearest: rtn" in failure("quantize", path, tmp_path / "q", "--quantizer", "rtm")
    assert "nearest: int8" in failure("quantize", path, tmp_path / "q", "--compute", "int9")
    with pytest.raises(UnsupportedError, match="nothing to replace"):
        quantize_directory(path, tmp_path / "q", exclude="*", progress=False)
    assert run("quantize", path).exit_code == 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "qkernels[transformers]" in failure("quantize", path, tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


# -- the other commands ------------------------------------------------------------------------------------------------------------


def test_info_and_formats():
    info, listed = run("info"), run("formats")
    assert info.exit_code == listed.exit_code == 0
    assert torch.__version__ in info.output and qkernels.__version__ in info.output
    assert re.search(rf"cuda kernels +│ {re.escape(cuda_library.why_missing() or 'for compute capability ')}", info.output)
    for f in qkernels.formats.all_formats():
        assert f.name in listed.output


def test_explain():
    done = run("explain", "--format", "int8", "--device", "cpu:avx2", "--nk", "64x128", "--m", "1,16", "--dtype", "float32")
    assert done.exit_code == 0 and "1 x 64 x 128, float32" in done.output and "16 x 64 x 128" in done.output
    assert "4 x 8, float16" in run("explain", "--nk", "4X8", "--dtype", "torch.float16").output


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--nk", "64"], "--nk='64'"),
        (["--nk", "64xx64"], "--nk"),
        (["--nk", "ax64"], "--nk"),
        (["--nk", "²x64"], "--nk"),
        (["--nk", "0x64"], "at least 1 x 1, not 0 x 64"),
        (["--m", "1;2"], "--m='1;2'"),
        (["--format", "int44"], "nearest: int4"),
        (["--compute", "int9"], "nearest: int8"),
        (["--nk", "64X"], "--nk='64X'"),
        (["zzz"], "unknown format 'zzz'. Short names: nf4, "),
        (["--compute", "zzz"], "compute='zzz' is not one of auto, float, int8"),
        (["--device", "cpu:avx9"], "'cpu:avx9'; write cpu, cpu:<portable|avx2|avx512vnni|avx512bf16|amx|none>, cuda:sm<NN>"),
        (["--device", "cuda:smXX"], "'cuda:smXX'; write cpu, cpu:<portable|avx2|avx512vnni|avx512bf16|amx|none>, cuda:sm<NN>"),
        (["--dtype", "bf16"], "dtype='bf16' of the activations is not one of torch.float32, torch.bfloat16, torch.float16"),
    ],
)
def test_explain_refuses(flags, text):
    assert text in failure("explain", *flags)


def test_inspect(saved, tmp_path):
    quantize_directory(saved["llama untied, one file"], tmp_path / "q", "nf4", progress=False)
    done = run("inspect", tmp_path / "q")
    assert (
        done.exit_code == 0 and "model.layers.1.mlp.up_proj" in done.output and "nf4_g64_sf32" in done.output and "96 x 64" in done.output
    )
    assert "layout dense" in run("inspect", saved["bert, one file"]).output
    manifest = json.loads((tmp_path / "q" / "qkernels.json").read_text())
    for key, value in (
        ("shape", "96"),
        ("shape", [96]),
        ("shape", [96, 0]),
        ("compute", "int9"),
        ("shared_with", []),
        ("rows_of", 3),
        ("dtype", 4),
        ("dtype", "nn"),
    ):
        layers = {name: layer | {key: value} for name, layer in manifest["layers"].items()}
        (tmp_path / "q" / "qkernels.json").write_text(json.dumps(manifest | {"layers": layers}))
        assert "damaged" in failure("inspect", tmp_path / "q")


def test_bench_in_a_checkout():
    done = run("bench", "cliff", "--help")
    assert done.exit_code == 0 and "Usage: qkernels bench cliff" in done.output
    assert run("bench", "--shapes", "llama9").exit_code == 2


def test_bench_in_a_wheel(tmp_path):
    """A wheel holds the benchmark's modules, without tests and results; they run there with no checkout, peers' probe included."""
    root, packed = Path(__file__).parents[1], tmp_path / "qkernels" / "benchmarks"
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    modules = {p.relative_to(root / "benchmarks") for p in (root / "benchmarks").rglob("*.py")}
    tests = {p for p in modules if p.name.startswith(("test_", "conftest"))}
    assert tests and {p.relative_to(packed) for p in packed.rglob("*") if p.is_file()} == modules - tests
    code = """if True:
        import dataclasses, os, pathlib, pkgutil, sys
        from qkernels import benchmarks, cli
        for module in pkgutil.walk_packages(benchmarks.__path__, "qkernels.benchmarks."):
            pkgutil.resolve_name(module.name)
        from qkernels.benchmarks import machine, peers, report
        os.chdir("elsewhere")
        peer = dataclasses.replace(peers.TORCH[0], package="torch")
        print(peers.why_not(peer, 1), report.RESULTS, "benchmarks" in sys.modules, flush=True)
        cli.app(["bench", "cliff", "--help"])
    """
    (tmp_path / "elsewhere" / "qkernels").mkdir(parents=True)  # what lies where the user is must not come first
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("None benchmarks-results False\n") and "Usage: qkernels bench cliff" in done.stdout, done.stderr


def test_help_and_usage():
    assert run("--help").exit_code == 0 and run("whale").exit_code == 2
