"""The floor plan: who may import whom, and what `import qkernels` may not touch."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "qkernels").rglob("*.py"))
LAYERS = {
    "errors": -1, "config": -1, "progress": -1, "formats": 0, "reference": 1, "quantizers": 1, "io": 1, "kernels": 2,
    "linear": 3, "convert": 3, "checkpoint": 3, "integrations": 4, "cli": 4, "testing": 4,
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


def test_import_is_light():
    code = "import torch, sys; old = set(sys.modules); import qkernels; print(*{m.split('.')[0] for m in set(sys.modules) - old})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert not {"transformers", "triton", "matplotlib", "hypothesis", "pytest", "scipy", "pandas"} & set(loaded)


def objects(pattern):
    return [p for p in (ROOT / "build").rglob("*.o") if re.search(pattern, p.name)] if (ROOT / "build").exists() else []


def disassembled(path):
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout


def test_avx512_stays_in_its_objects():
    others = [p for p in objects(r"\.o$") if "avx512" not in p.name]
    if not others or not shutil.which("objdump"):
        pytest.skip("no object files under build/, or no objdump")
    evex = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
    for path in others:
        bad = next((line for line in disassembled(path).splitlines() if evex.search(line)), None)
        assert bad is None, f"{path.name}: {bad}"
