"""Pages that could rot: what they print is compared with what the registry says."""

from pathlib import Path

from benchmarks import readme, report
from qkernels.kernels import table

README = Path(__file__).parents[1] / "README.md"


def test_readme_prints_the_registry():
    text = README.read_text()
    begin, end = "<!-- formats:begin -->\n", "<!-- formats:end -->"
    assert text.split(begin)[1].split(end)[0].strip() == table.markdown()


def test_readme_prints_the_results():
    """`python -m benchmarks readme --write` after a change of benchmarks/results."""
    assert readme.current(README.read_text()) == readme.markdown(report.load_all())
