"""Make gguf_written.npz: the logits that llama.cpp gives of the files that are written of tests/gguf_models.py. No test runs this.

    pip install xllamacpp==2026.10.11549; python tests/golden/make_gguf_written.py

<name>          [vocab] float32   of the last of IDS; weights are float32 in the file, the cache float16
<name>.sha256   of the file, so that a test can tell whether llama.cpp has seen what is written today
The files are written by qkernels: llama.cpp, which computes what they say, is the judge of them.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import make_models_gguf
import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import gguf_models  # noqa: E402

from qkernels.io.convert import convert  # noqa: E402

made = {}
make_models_gguf.IDS = gguf_models.IDS
for name in gguf_models.CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        model = gguf_models.save(name, Path(folder) / "m")
        convert(Path(folder) / "m", path, "gguf")
        made[name] = make_models_gguf.by_llama_cpp(path, gguf_models.SIZES["vocab_size"])
        made[f"{name}.sha256"] = np.frombuffer(hashlib.sha256(path.read_bytes()).digest(), np.uint8)
        expected = model(gguf_models.IDS).logits[0, -1].detach().numpy()
        print(f"{name:30}", "apart from transformers by", np.abs(made[name] - expected).max() / np.abs(expected).max())
np.savez_compressed(HERE / "gguf_written.npz", **made)
