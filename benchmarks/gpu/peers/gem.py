"""gemlite: Triton kernels with symmetric int4 in groups of 128, packed 8 codes to an int32.

It tunes at the first call of each shape and M, among about 20 candidates (a minute for all M of a shape), unless its table of the GPU has
an entry. The table for the H100 covers the layers of common models, but not M of 2, 4 and 64, which the present version gives to other
kernels than the table was made for. Missing entries are borrowed from the nearest shape and M, which leaves one candidate to compile.
"""

from __future__ import annotations

import ast
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ...base import CheckFailed, Contestant, Layer, Prepared, expand, groupwise, nbytes_of
from ...check import measure_deviation

GROUP = 128
PER_WORD = 8  # codes in an int32
FP16_INT4 = 104  # the table's number for 16-bit activations and 4-bit codes
M_OF_KERNEL = {  # as the library chooses; beyond 4096 rows it looks up 4096
    "GEMV_REVSPLITK": (1, 2, 4),
    "GEMM_SPLITK": (8, 16, 32),
    "GEMM": (64, 128, 256, 512, 1024, 2048, 4096),
}
# In its default setting it adds up to K/16 partial sums in bf16, which rounds far more than one bf16 rounding of the result would.
BF16_SUMS_NMSE = 3e-3


def fill_table(table: dict[str, dict[str, dict]], n: int, k: int) -> None:
    """Give every M of a layer an entry: of the nearest M, N and K (by ratios) with the same group and types."""
    for kernel, ms in M_OF_KERNEL.items():
        entries = table.setdefault(kernel, {})
        known = {ast.literal_eval(key): entry for key, entry in entries.items()}
        known = {key: entry for key, entry in known.items() if key[3:] == (GROUP, PER_WORD, FP16_INT4)}
        for m in ms:
            wanted = (m, n, k)
            if not known or (*wanted, GROUP, PER_WORD, FP16_INT4) in known:
                continue
            nearest = min(known, key=lambda key: sum(abs(math.log(a / b)) for a, b in zip(key[:3], wanted, strict=True)))
            entry = known[nearest] | {"BLOCK_SIZE_M": min(known[nearest]["BLOCK_SIZE_M"], max(m, 16))}
            entries[str((*wanted, GROUP, PER_WORD, FP16_INT4))] = entry


def prepare(weight: Tensor, threads: int, bf16_sums: bool) -> Prepared:
    """A layer whose kernels for few rows add partial sums in bf16 (the library's choice on this GPU), or in fp32 and round at the end."""
    import gemlite

    n, k = weight.shape
    table = gemlite.core.GEMLITE_TRITON_CONFIG_CACHE
    if not table:  # it goes by the GPU's name, and has none for an H200
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    fill_table(table, n, k)
    codes, scales = groupwise(weight, GROUP, 7)
    scales = scales.bfloat16()
    packed = gemlite.GemLiteLinear(4, GROUP, k, n, gemlite.DType.BF16, gemlite.DType.BF16)
    packed.pack((codes + 8).to(torch.uint8), scales, zeros=8)
    meaning, meta = expand(codes, scales), packed.get_meta_args()

    def make() -> Layer:
        tensors = [t.detach().clone() for t in packed.get_tensor_args()]

        def layer(x: Tensor) -> Tensor:
            if not bf16_sums and len(x) >= M_OF_KERNEL["GEMM"][0]:
                raise ValueError(f"at M = {len(x)} there are no partial sums")
            gemlite.set_native_atomic_bfp16(bf16_sums)  # looked up at each call
            return gemlite.forward_functional(x, None, tensors, meta)

        return layer

    def check(x: Tensor, y: Tensor) -> None:
        nmse = measure_deviation(y, x, meaning).nmse
        if not nmse <= BF16_SUMS_NMSE:
            raise CheckFailed(f"NMSE {nmse:.2g} is over {BF16_SUMS_NMSE:.0e}, what partial sums in bf16 may cost")

    return Prepared(meaning, nbytes_of(packed.W_q, packed.scales), make, check=check if bf16_sums else None)


CONTESTANTS = tuple(
    Contestant(name, "peer", "int4 g128", "bf16", torch.bfloat16, functools.partial(prepare, bf16_sums=bf16_sums), "gemlite")
    for name, bf16_sums in (("gemlite W4A16", True), ("gemlite W4A16, fp32 sums", False))
)
