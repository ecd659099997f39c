"""Feed broken files to a parser until one gets through that should not: `make fuzz`, or

    python tests/fuzz_gguf.py gguf|index [options of libFuzzer, -max_total_time=60 say]

gguf    files that begin as tests/golden/*.gguf: read, written, and what was written is written again to the same bytes
index   model.safetensors.index.json of a directory with one small file

Errors of ours are what is to come; any other exception ends the run, and the file that made it lies in build/fuzz.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris
import torch
from safetensors.torch import save_file

with atheris.instrument_imports(include=["qkernels.io"]):
    from qkernels import io
    from qkernels.errors import QKernelsError
    from qkernels.io import gguf as _  # which io would import later, when nothing looks on
    from qkernels.io import shards

ROOT = Path(__file__).resolve().parents[1]
MEMORY = Path("/dev/shm")
DIRECTORY = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))


def rewritten(path):
    """The bytes of a file that is read and written; None where it cannot be."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    try:
        info = io.detect(path)
        io.write(io.read(info), new, "gguf", settings=info.settings)
    except QKernelsError:
        assert not new.exists()
        return None
    return new.read_bytes()


def gguf(data):
    path = DIRECTORY / "a.gguf"
    path.write_bytes(b"GGUF" + data)
    if (once := rewritten(path)) is not None:
        path.write_bytes(once)
        assert rewritten(path) == once


def index(data):
    (DIRECTORY / shards.INDEX).write_bytes(data)
    try:
        assert set(shards.open_directory(DIRECTORY)) == {"x", "y"}
    except QKernelsError:
        return


def seeds(target):
    """A directory of files to begin with, to which libFuzzer adds what it finds."""
    folder = ROOT / "build" / "fuzz" / target
    folder.mkdir(parents=True, exist_ok=True)
    if target == "gguf":
        for path in (ROOT / "tests" / "golden").glob("*.gguf"):
            (folder / path.name).write_bytes(path.read_bytes()[4:])
    else:
        save_file({"x": torch.ones(2), "y": torch.ones(3)}, DIRECTORY / "a.safetensors")
        weight_map = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
        (folder / "sound.json").write_text(json.dumps(weight_map))
    return folder


if __name__ == "__main__":
    if child := os.fork():  # libFuzzer leaves without a goodbye, so that another has to clear away
        _, status = os.waitpid(child, 0)
        shutil.rmtree(DIRECTORY)
        sys.exit(os.waitstatus_to_exitcode(status))
    _, name, *options = sys.argv
    folder = seeds(name)
    options = ["-rss_limit_mb=4096", "-timeout=5", f"-artifact_prefix={folder.parent}/{name}-", *options]
    atheris.Setup([sys.argv[0], *options, str(folder)], {"gguf": gguf, "index": index}[name])
    atheris.Fuzz()
