"""Pages that could rot: what they print is compared with what the registry says."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from cases import random_quant

from benchmarks import ggml, readme, report
from benchmarks.gpu.readme import markdown as gpu_markdown
from qkernels import formats, kernels, reference
from qkernels.formats.packing import unpack
from qkernels.kernels import registry, table
from qkernels.kernels.cpu import layout as cpu_layout
from qkernels.kernels.registry import Problem
from qkernels.kernels.triton import layout as gpu_layout
from qkernels.kernels.triton import s8_gemm, s8_w4_gemm
from qkernels.quantizers.rtn import rtn
from qkernels.testing import assert_matmul_close

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_formats_prints_the_registry():
    text = (ROOT / "docs" / "formats.md").read_text()
    begin, end = "<!-- formats:begin -->\n", "<!-- formats:end -->"
    assert text.split(begin)[1].split(end)[0].strip() == table.markdown()


def test_readme_prints_the_results():
    """`python -m benchmarks readme --write` after a change of benchmarks/results."""
    assert readme.current(README.read_text()) == readme.markdown(report.load_all())
    assert readme.current(README.read_text(), ggml.SECTION) == ggml.markdown(report.load_all(report.PUBLISHED / "ggml"))
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


# -- docs/layouts.md ------------------------------------------------------------------------------------------------------------------

LAYOUTS = ROOT / "docs" / "layouts.md"
PICTURE = re.compile(r"<!-- picture: (\w+)\(bits=(\d), N=(\d+), K=(\d+)\), (byte|word)(?:, (\d+))? -->\n(.*?)<!-- end -->", re.S)


def layout_functions():
    """The code of the page, run."""
    made = {}
    for code in re.findall(r"```python\n(.*?)```", LAYOUTS.read_text(), re.S):
        exec(compile(code, str(LAYOUTS), "exec"), made)
    return made


def picture(where, bits, n, k, unit, most):
    """What lies in each byte or word, its lowest bits first: `12.7` is row 12, column 7."""
    size = {"byte": 8, "word": 32}[unit]
    held = {}
    for row, column in itertools.product(range(n), range(k)):
        for bit in where(row, column, bits, n, k):
            held[bit] = f"{row}.{column}"
    lines = [f"{unit:>6}  its codes, the lowest first (row.column)"]
    for first in range(0, max(held) + 1, size)[:most]:
        codes = dict.fromkeys(held.get(bit, "-") for bit in range(first, first + size))
        lines.append(f"{first // size:>6}  {'  '.join(codes)}")
    return "\n".join(("```text", *lines, "```", ""))


def test_pictures_of_layouts():
    """`PYTHONPATH=.:tests python tests/test_docs.py` prints them into the page."""
    made, found = layout_functions(), PICTURE.findall(LAYOUTS.read_text())
    assert len(found) >= 5
    for name, bits, n, k, unit, most, shown in found:
        assert shown == picture(made[name], int(bits), int(n), int(k), unit, int(most) if most else None), name


PREPARED = [
    ("canonical", lambda q: q.codes, ("int8", "int6", "int5", "int4", "int3", "int2", "nf4"), 0),
    ("cpu", lambda q: cpu_layout.prepare(q).weight, ("int8", "int6", "int5", "int4", "int3", "int2", "nf4", "fp8"), 0),
    ("gpu", lambda q: gpu_layout.prepare(q).weight, ("int8", "int4", "int2", "fp8"), 0),
    ("gpu_planes", lambda q: gpu_layout.prepare(q).weight, ("int3", "int5", "int6"), 0),
    ("gpu_w4", lambda q: s8_w4_gemm.prepare(q).weight, ("int4",), 8),
    ("gpu_w4", lambda q: s8_w4_gemm.prepare(q).weight, ("int4_asym",), 0),
    ("gpu_table", lambda q: gpu_layout.prepare(q).weight, ("nf4", "mxfp4"), 0),
    ("gpu_int8", lambda q: s8_gemm.prepare(q).weight, ("int8",), 128),
]


@pytest.mark.parametrize(("layout", "tensor", "names", "flipped"), PREPARED, ids=[case[0] for case in PREPARED])
def test_layouts_are_as_documented(layout, tensor, names, flipped):
    where = layout_functions()[layout]
    for name, (n, k) in itertools.product(names, ((1, 128), (70, 264))):
        q = random_quant(formats.get(name), n, k)
        bits = q.format.bits
        memory = tensor(q).contiguous().view(torch.uint8).flatten()
        at = torch.tensor([[where(row, column, bits, n, k) for column in range(k)] for row in range(n)])
        held = (memory[at // 8].long() >> (at % 8)) & 1
        codes = (held << torch.arange(bits)).sum(-1) ^ flipped
        assert torch.equal(codes.to(torch.uint8), unpack(q.codes, bits, k)), name
        assert at.unique().numel() == n * k * bits, "two codes share a bit"


if __name__ == "__main__":
    functions = layout_functions()

    def printed(match):
        name, bits, n, k, unit, most, _ = match.groups()
        drawn = picture(functions[name], int(bits), int(n), int(k), unit, int(most) if most else None)
        return match[0].partition("\n")[0] + "\n" + drawn + "<!-- end -->"

    LAYOUTS.write_text(PICTURE.sub(printed, LAYOUTS.read_text()))
