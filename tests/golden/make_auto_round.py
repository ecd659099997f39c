"""Make auto_round.npz: modules that AutoRound packed, and what it decodes them to. No test runs this; tests/test_io_auto_round.py reads.

    pip install torch==2.13.0 numpy==2.4.6 transformers==5.23.0
    pip install --no-deps --target auto_round_files auto-round==0.16.1
    python tests/golden/make_auto_round.py auto_round_files

writes the file beside this one, the same bytes every time. A case is called <packing>_<bits>b_g<group size>_<sym|asym>_<N>x<K>, where
packing is exact (packing_format "auto_round") or less_one ("auto_round:auto_gptq"), and has

    qweight, qzeros, scales    as the file of a model has them, without g_idx
    dense     [N, K]    float16    what AutoRound multiplies by: its layer of the unit matrix

Half of the scales are negative, as its full-range symmetric codes have them. AutoRound's package asks for more than is needed here: its
layers are loaded by their paths, beside a stub of its utilities. Nothing of qkernels is imported.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

SOURCE = Path(sys.argv[1])
for package in ("auto_round", "auto_round.utils", "auto_round_extension", "auto_round_extension.torch"):
    sys.modules[package] = types.ModuleType(package)
sys.modules["auto_round.utils"].get_packing_device = lambda device: "cpu"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SOURCE / f"{name.replace('.', '/')}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("auto_round.utils.bit_packing")
FILES = {"exact": "qlinear_torch", "less_one": "qlinear_torch_zp"}
LAYERS = {name: load(f"auto_round_extension.torch.{file}") for name, file in FILES.items()}
RANDOM = torch.Generator().manual_seed(0)


def case(packing, bits, size, sym, n, k):
    groups = -(-k // size)
    scales = (torch.rand(n, groups, generator=RANDOM) * 0.02 + 0.005) * (torch.randint(2, (n, groups), generator=RANDOM) * 2 - 1)
    scales = scales.half().float()
    least = 1 if packing == "less_one" else 0  # it stores a 0 as 1
    zeros = torch.randint(least, 2**bits, (n, groups), generator=RANDOM).float()
    zeros[0], zeros[1] = least, 2**bits - 1
    codes = torch.randint(2**bits, (n, k), generator=RANDOM)
    wide_zeros = torch.full((n, k), 2.0 ** (bits - 1)) if sym else zeros.repeat_interleave(size, 1)[:, :k]
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = (codes - wide_zeros) * scales.repeat_interleave(size, 1)[:, :k]
    layer = LAYERS[packing].QuantLinear(bits, size, k, n, False)
    layer.device = "cpu"  # which its pack asks for where zero points are many, and nothing sets
    layer.pack(linear, scales, 2 ** (bits - 1) if sym else zeros, device="cpu")
    dense = layer(torch.eye(k, dtype=torch.float16)).t().contiguous()
    assert torch.equal(dense, linear.weight.data.half())
    return {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales")} | {"dense": dense}


arrays = {}
for packing in LAYERS:
    for bits in (2, 3, 4, 5, 6, 7, 8):
        for size, sym, n, k in ((32, True, 32, 32), (16, False, 32, 32)):
            name = f"{packing}_{bits}b_g{size}_{'sym' if sym else 'asym'}_{n}x{k}"
            arrays |= {f"{name}.{leaf}": t.detach().numpy() for leaf, t in case(packing, bits, size, sym, n, k).items()}
np.savez_compressed(Path(__file__).with_name("auto_round.npz"), **arrays)
