"""humming: CUDA kernels compiled when they are needed, here int4 weights with bf16 or int8 activations, and int8 with int8.

Its heuristics cut the range of M into about 30 different kernels a shape. Only those that serve the M that are measured are compiled,
in parallel, when a layer is prepared: about 8 of 1 to 4 s each, kept on disk for the next process (in ~/.humming, or $HUMMING_CACHE_DIR).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ...base import Arithmetic, Contestant, Layer, Prepared, nbytes_of

GROUP = 128
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # other M raise, unless they share a kernel with one of these
TENSORS = ("weight", "weight_scale", "weight_scale_2")


def choose_compiler() -> None:
    """Prefer nvcc to NVRTC, which is its default: NVRTC from pip does not find its own second library unless told where it is.

    Both give nearly the same machine code, nvcc slightly less of it. What is set in the environment stays.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    if not Path("/usr/local/cuda/bin/nvcc").exists():  # the only place where it looks by itself
        os.environ.setdefault("CUDA_HOME", str(Path(nvcc).resolve().parents[1]))


def prepare(weight: Tensor, threads: int, dtype: str, group: int, activations: str) -> Prepared:
    """Quantise as the library does: codes 0…15 (or 0…255) less the middle, times bf16 scales, negative where that serves the group."""
    choose_compiler()
    from humming.forward import humming_forward
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    n, k = weight.shape
    with weight.device:
        layer = HummingLayer(n, k, {"dtype": dtype, "group_size": group}, {"dtype": activations}, torch_dtype=torch.bfloat16)
    layer.load_from_unquantized(weight)
    meaning = layer.weight_schema.dequant_tensors({"weight": layer.weight.data, "weight_scale": layer.weight_scale.data})
    layer.transform()
    stored = {name: getattr(layer, name).data for name in TENSORS if getattr(layer, name, None) is not None}
    config = layer.humming_config
    ranges = get_heuristics_config(config, gemm_type="dense", device=weight.device)  # [above M, up to M, parameters of the kernel]
    tuning = json.dumps([r for r in ranges if any(r[0] < m <= r[1] for m in MS)])
    HummingKernel.prepare_kernels(config.to_str(), None, tuning, weight.device)

    def make() -> Layer:
        own = {name: tensor.clone() for name, tensor in stored.items()}
        locks = torch.zeros_like(layer.locks)  # which its kernels leave at zero
        return lambda x: humming_forward(config, x, **own, locks=locks, tuning_config=tuning)

    return Prepared(meaning, nbytes_of(*stored.values()), make, kernel=str(config.b_dtype))


def contestant(name: str, weights: str, arithmetic: Arithmetic, dtype: str, group: int, activations: str) -> Contestant:
    """One combination of types; a group of 0 is a whole row."""
    how = functools.partial(prepare, dtype=dtype, group=group, activations=activations)
    return Contestant(name, "peer", weights, arithmetic, torch.bfloat16, how, "humming", "humming-kernels")


CONTESTANTS = (
    contestant("humming W4A16", "int4 g128", "bf16", "uint4", GROUP, "bfloat16"),
    contestant("humming W4A8", "int4 g128", "int8", "uint4", GROUP, "int8"),
    contestant("humming W8A8", "int8", "int8", "uint8", 0, "int8"),
)
