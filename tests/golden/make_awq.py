"""Make awq_<version>.npz: modules that AutoAWQ packed, and what it decodes them to. No test runs this; tests/test_io_awq.py reads.

    pip install torch==2.13.0 numpy==2.4.6
    pip download --no-deps --no-binary :all: --no-build-isolation autoawq==0.2.9
    tar xzf autoawq-0.2.9.tar.gz
    python tests/golden/make_awq.py autoawq-0.2.9

writes the files beside this one, the same bytes every time. A case is called g<group size>_<asym|sym>_<N>x<K> and has

    qweight, qzeros, scales    as the file of a model has them
    dense     [N, K]    float16

dense is what its dequantize_gemm gives. gemv and gemv_fast it decodes on a GPU alone: there it is the points of the grid that it packed,
(code - zero) * scale or code * scale + qzeros, rounded to float16.

AutoAWQ's package does not import without the rest of it, so its files are loaded by their paths, beside stubs of what they import.
Nothing of qkernels is imported.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

SOURCE = Path(sys.argv[1]) / "awq"
for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.modules.triton", "awq.modules.triton.gemm"):
    sys.modules[package] = types.ModuleType(package)
sys.modules["awq.utils.module"] = types.ModuleType("awq.utils.module")
sys.modules["awq.utils.module"].try_import = lambda name: (None, "")
sys.modules["awq.utils.utils"] = types.ModuleType("awq.utils.utils")
sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"
sys.modules["awq.modules.triton.gemm"].awq_gemm_triton = sys.modules["awq.modules.triton.gemm"].awq_dequantize_triton = None


def load(name):
    spec = importlib.util.spec_from_file_location(f"awq.{name}", SOURCE / f"{name.replace('.', '/')}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packing = load("utils.packing_utils")
LAYERS = {
    "gemm": load("modules.linear.gemm").WQLinear_GEMM,
    "gemv": load("modules.linear.gemv").WQLinear_GEMV,
    "gemv_fast": load("modules.linear.gemv_fast").WQLinear_GEMVFast,
}
RANDOM = torch.Generator().manual_seed(0)


def case(version, size, sym, n, k):
    groups = k // size
    scales = (torch.rand(n, groups, generator=RANDOM) * 0.02 + 0.005).half()
    zeros = torch.full((n, groups), 8) if sym else torch.randint(16, (n, groups), generator=RANDOM)
    if not sym:
        zeros[0], zeros[1] = 0, 15
    codes = torch.randint(16, (n, k), generator=RANDOM)
    wide_zeros, wide_scales = zeros.repeat_interleave(size, 1), scales.float().repeat_interleave(size, 1)
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = (codes - wide_zeros) * wide_scales
    given = (scales.float(), zeros.float()) if version != "gemm" else (scales.float().t().contiguous(), zeros.float().t().contiguous())
    layer = LAYERS[version].from_linear(linear, 4, size, scales=given[0], zeros=given[1])
    if version == "gemm":
        dense = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size).t()
    elif version == "gemv":
        dense = linear.weight.data.half()
    else:
        dense = (codes * wide_scales + layer.qzeros.t()[:, :groups].float().repeat_interleave(size, 1)).half()
    return {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales")} | {"dense": dense.contiguous()}


CASES = {
    "gemm": [
        (16, False, 32, 96),
        (32, False, 32, 160),
        (64, False, 64, 64),
        (128, False, 32, 128),
        (32, True, 64, 64),
        (128, True, 32, 128),
    ],
    "gemv": [(32, False, 32, 64), (64, False, 32, 192), (32, False, 32, 96), (128, False, 32, 128), (64, True, 32, 64)],
    "gemv_fast": [(32, False, 32, 64), (64, False, 32, 192), (128, False, 32, 256), (64, True, 32, 64)],
}

for version, cases in CASES.items():
    arrays = {}
    for size, sym, n, k in cases:
        name = f"g{size}_{'sym' if sym else 'asym'}_{n}x{k}"
        arrays |= {f"{name}.{leaf}": t.detach().numpy() for leaf, t in case(version, size, sym, n, k).items()}
    np.savez_compressed(Path(__file__).with_name(f"awq_{version}.npz"), **arrays)
