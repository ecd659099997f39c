"""The floor plan: who may import whom, and what `import qkernels` may not touch."""

import ast
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "qkernels").rglob("*.py"))
LAYERS = {
    "errors": -1, "config": -1, "progress": -1, "formats": 0, "reference": 1, "quantizers": 1, "io": 1, "kernels": 2,
    "linear": 3, "scaled": 3, "embedding": 3, "convert": 3, "checkpoint": 3, "warmup": 3, "swiglu": 3, "inspection": 3,
    "integrations": 4, "cli": 4, "testing": 4,
}  # fmt: skip
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def imports(path, top_level=False):
    """Full dotted names that a file imports; `from a import b` gives a.b."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(path):
    """First name below qkernels: the file or folder that has a layer."""
    return path.relative_to(ROOT / "qkernels").parts[0].removesuffix(".py")


def module(name):
    """The file that a dotted name of ours lies in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.exists():
                return candidate
    raise AssertionError(name)


@every_file
def test_layers(path):
    if unit(path) == "__init__":
        return
    assert unit(path) in LAYERS, f"{path.name} has no layer: say which"
    for name in imports(path):
        if name.startswith("qkernels."):
            target = name.split(".")[1]
            assert target in LAYERS, f"{path}: import {name} from its own file, not from the package"
            assert LAYERS[target] <= LAYERS[unit(path)], f"{path} imports {name}, a layer above"
            assert LAYERS[unit(path)] >= 0, f"{path} may import nothing of ours"


def test_no_cycles():
    edges = {
        p: {module(n) for n in imports(p, top_level=True) if n.startswith("qkernels.")} - {p} for p in FILES if p.name != "__init__.py"
    }
    done = set()

    def visit(path, trail):
        assert path not in trail, " -> ".join(p.name for p in (*trail, path))
        if path not in done:
            for target in edges.get(path, ()):
                visit(target, (*trail, path))
            done.add(path)

    for path in edges:
        visit(path, ())


@every_file
def test_environment_and_triton_have_their_places(path):
    text, inner = path.read_text(), path.relative_to(ROOT / "qkernels")
    if inner.name != "config.py" or len(inner.parts) > 1:
        assert not re.search(r"\bos\.(environ|getenv|putenv)", text)
        assert not any(name in ("os.environ", "os.getenv") for name in imports(path))
    if inner.parts[:2] != ("kernels", "triton"):
        assert not any(name.split(".")[0] == "triton" for name in imports(path))


LIGHT = """
import sys, torch
before = set(sys.modules)
import qkernels
print(qkernels.kernels.cpu.library.level(), qkernels.QuantLinear(8, 8)(torch.ones(1, 8)).shape == (1, 8))
print(*{name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
print(*{name.removeprefix("qkernels.io.") for name in sys.modules if name.startswith("qkernels.io.")})
"""
IO = (ROOT / "qkernels" / "io").glob("*.py")
READERS = {path.stem for path in IO if path.stem == "gguf" or "\ndef read(tensors: " in path.read_text()}


@pytest.mark.parametrize("compiled", [True, False])
def test_import_is_light(compiled, tmp_path):
    """Beyond torch (and what that imports) safetensors alone, and no reader of a checkpoint; where the library is missing, it works too."""
    if compiled and library.why_missing():
        pytest.skip(library.why_missing())
    shutil.copytree(ROOT / "qkernels", tmp_path / "qkernels", ignore=shutil.ignore_patterns("__pycache__", "" if compiled else "_C*"))
    run = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    works, loaded, of_io = run.stdout.splitlines()
    assert works == f"{library.level() if compiled else 'none'} True"
    assert set(loaded.split()) == {"qkernels", "safetensors"}
    assert len(READERS) == 11 and "checkpoint" in of_io.split() and not READERS & set(of_io.split())


# -- instructions: a level's may be met nowhere else, as all other code runs before the CPU has been asked what it has -------------

# In 64-bit code every EVEX instruction (AVX-512, also on xmm and ymm) starts with the byte 62, every AVX one's name with v.
EVEX = r"62 .*|k.*|\{.*"  # and operations on masks, and the VEX forms that came later still (AVX-VNNI)
BF16_OR_VBMI = r"62 (vcvtne2?ps2bf16|vdpbf16ps|vperm(|i2|t2)b|vpmultishiftqb).*"
NEWER = r"62 (vp(compress|expand)[bw]|vpsh[lr]d|vpmadd52|vpopcnt|vpshufbit|vpconflict|vplzcnt|vpbroadcastm|vgf2|vaes|vpclmul|vp2inter).*"
AMX = "tile.*|tdp.*|[ls][dt]tilecfg"
MAY_NOT_HAVE = {
    "level_avx2.cpp": f"{EVEX}|{AMX}",
    "level_avx512vnni.cpp": f"{BF16_OR_VBMI}|{NEWER}|{AMX}",
    "level_avx512bf16.cpp": f"{NEWER}|{AMX}",
    "level_amx.cpp": NEWER,
    None: rf"{EVEX}|{AMX}|v.*|pdep|pext|mulx|rorx|sarx|shlx|shrx|bzhi",  # every other source, and inline functions that sources share
}
HAS = {
    "level_avx2.cpp": "vfmadd231ps",
    "level_avx512vnni.cpp": "62 vpdpbusd",
    "level_avx512bf16.cpp": "62 vdpbf16ps",
    "level_amx.cpp": "tdpbssd",
}


def objdump(*options):
    path = ROOT / "qkernels" / "_C.abi3.so"
    return subprocess.run(["objdump", *options, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def instructions():
    """Source -> names of its instructions, after "62 " where they are EVEX-coded; only the levels are told apart."""
    if reason := library.why_missing():
        pytest.skip(reason)
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump"):
        pytest.skip("needs objdump, on x86")
    sources, source = {}, None
    for line in objdump("--syms"):  # a file's own functions follow its name; what several files may define follows no name
        if " df *ABS*" in line:
            source = name if (name := line.split()[-1]) in MAY_NOT_HAVE else None
        elif " F " in line:
            sources.setdefault(line[:16], source)
    if not set(HAS) <= set(sources.values()):
        pytest.skip("the library was stripped of its symbols, or built without these levels")
    found = {source: set() for source in MAY_NOT_HAVE}
    for line in objdump("--disassemble"):
        if m := re.fullmatch(r" +[0-9a-f]+:\t(?:(?:2e|36|3e|26|6[4-7]) )*(62 )?[0-9a-f ]+\t(\S+).*", line):
            found[source].add((m[1] or "") + m[2])
        elif line.endswith(">:"):
            source = sources.get(line[:16])
    return found


@pytest.mark.parametrize("source", MAY_NOT_HAVE)
def test_instructions_stay_in_their_levels(instructions, source):
    assert source is None or HAS[source] in instructions[source]
    assert not [name for name in instructions[source] if re.fullmatch(MAY_NOT_HAVE[source], name)]
