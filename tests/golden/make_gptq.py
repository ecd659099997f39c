"""Make gptq_<bits>.npz: modules that AutoGPTQ packed, and what it decodes them to. No test runs this; tests/test_io_gptq.py reads.

    pip install torch==2.13.0 numpy==2.4.6 transformers==5.23.0
    pip install --no-deps auto-gptq==0.7.1
    python tests/golden/make_gptq.py

writes the files beside this one, the same bytes every time. A case is called g<group size>_<sym|asym>_<order>_<N>x<K>, where order is
none, act (columns in any order, as a random g_idx) or static (act-order over groups that stayed in place: a sequential g_idx), and has

    qweight, qzeros, scales, g_idx    as the file of a model has them
    dense     [N, K]    float16 or float32    what AutoGPTQ multiplies by: its layer of the unit matrix

AutoGPTQ's package does not import with this transformers, so its module is loaded by its path. It stores a zero point of 0 as rubbish
in the words around it (its loop shifts a -1): asymmetric cases have zero points from 1 to 2^bits - 1. The numbers are stored by its
`pack`, from weights that are its grid's points; nothing of qkernels is imported.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

SITE = next(Path(p) / "auto_gptq" for p in sys.path if (Path(p) / "auto_gptq").is_dir())
spec = importlib.util.spec_from_file_location("qlinear_cuda", SITE / "nn_modules" / "qlinear" / "qlinear_cuda.py")
qlinear_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(qlinear_cuda)

RANDOM = torch.Generator().manual_seed(0)


def case(bits, group_size, sym, order, n, k, dtype=torch.float16):
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    g_idx = torch.arange(k, dtype=torch.int32) // size
    if order == "act":
        g_idx = g_idx[torch.randperm(k, generator=RANDOM)]
    scales = (torch.rand(n, groups, generator=RANDOM) * 0.02 + 0.005).to(dtype)
    scales *= torch.randint(2, scales.shape, generator=RANDOM) * 2 - 1
    middle = torch.full((n, groups), 2.0 ** (bits - 1))
    zeros = middle if sym else torch.randint(1, 2**bits, (n, groups), generator=RANDOM).float()
    if not sym:
        zeros[0], zeros[1] = 1, 2**bits - 1
    codes = torch.randint(2**bits, (n, k), generator=RANDOM).float()
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float32)
    linear.weight.data = (codes - zeros[:, g_idx.long()]) * scales.float()[:, g_idx.long()]
    layer = qlinear_cuda.QuantLinear(bits, group_size, k, n, False, kernel_switch_threshold=128, weight_dtype=dtype)
    layer.pack(linear, scales.float().clone(), zeros.clone(), g_idx)  # which changes zeros where there is one group
    layer.scales = layer.scales.to(dtype)
    values = layer(torch.eye(k, dtype=dtype)).t().contiguous()
    return {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales", "g_idx")} | {"dense": values}


KINDS = [(-1, "none", 32), (32, "none", 96), (32, "act", 96), (64, "act", 160), (64, "none", 96)]
ASYM, SYM = ([(group, sym, order, 32, k) for group, order, k in KINDS[:: 1 + sym]] for sym in (False, True))
CASES = {bits: ASYM + SYM for bits in (2, 3, 4, 8)}
CASES[4] += [(128, True, "none", 32, 160), (64, False, "static", 32, 128), (32, True, "act", 64, 64), (-1, False, "act", 32, 64)]
CASES[3] += [(64, False, "none", 96, 64)]

for bits, cases in CASES.items():
    arrays = {}
    for group, sym, order, n, k in cases:
        name = f"g{group}_{'sym' if sym else 'asym'}_{order}_{n}x{k}"
        arrays |= {f"{name}.{leaf}": t.numpy() for leaf, t in case(bits, group, sym, order, n, k).items()}
    arrays |= {f"g32_asym_act_32x64_f32.{leaf}": t.numpy() for leaf, t in case(bits, 32, False, "act", 32, 64, torch.float32).items()}
    np.savez_compressed(Path(__file__).with_name(f"gptq_{bits}.npz"), **arrays)
