"""Pages that could rot: what they print is compared with what the registry says."""

import re
from pathlib import Path

import pytest
import torch
from cases import random_quant

from benchmarks import readme, report
from benchmarks.gpu.readme import markdown as gpu_markdown
from qkernels import formats, kernels, reference
from qkernels.kernels import registry, table
from qkernels.kernels.registry import Problem
from qkernels.quantizers.rtn import rtn
from qkernels.testing import assert_matmul_close

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_readme_prints_the_registry():
    text = README.read_text()
    begin, end = "<!-- formats:begin -->\n", "<!-- formats:end -->"
    assert text.split(begin)[1].split(end)[0].strip() == table.markdown()


def test_readme_prints_the_results():
    """`python -m benchmarks readme --write` after a change of benchmarks/results."""
    assert readme.current(README.read_text()) == readme.markdown(report.load_all())
    assert readme.current(README.read_text(), readme.GPU) == gpu_markdown(report.load_all(report.PUBLISHED / "gpu"))


def test_readme_says_what_the_clip_search_gains():
    said = re.findall(r"(int\d) g\d+ from ([\d.]+) to ([\d.]+)", README.read_text().replace("\n", " "))
    assert [name for name, *_ in said] == ["int4", "int3", "int2"]
    weight = torch.randn(512, 2048)
    for name, *figures in said:
        for figure, clip_search in zip(figures, (False, True)):
            error = reference.decode(rtn(weight, formats.get(name), clip_search=clip_search)) - weight
            assert float(error.norm() / weight.norm()) == pytest.approx(float(figure), rel=0.01)


def test_the_skeleton_kernel_runs(monkeypatch):
    """The code in docs/add_a_kernel.md registers a kernel that is chosen, right, and inverted by its `restore`."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    code = (ROOT / "docs" / "add_a_kernel.md").read_text().split("```python\n")[1].split("```")[0]
    made = {"__name__": "skeleton"}
    exec(compile(code, "add_a_kernel.md", "exec"), made)
    kernel = made["KERNEL"]
    assert kernel in kernels.all_kernels()
    for perm in (False, True):
        q = random_quant(made["FORMAT"], 17, 40, perm=perm)
        packed = kernel.prepare(q)
        assert kernel.restore(packed).equal(q)
        x, bias = torch.randn(3, 40).bfloat16(), torch.randn(17).bfloat16()
        assert_matmul_close(kernel.run(x, packed, bias), x, reference.decode(q, torch.float64), bias)
    assert registry.plan(Problem(made["FORMAT"], 64, 64), kernel.name).kernel is kernel
