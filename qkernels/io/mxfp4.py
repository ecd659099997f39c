"""gpt-oss: experts in MXFP4, all of a layer in one tensor.

    X_blocks [E, N, K / 32, 16] uint8, the even column in the low nibble      X_scales [E, N, K / 32] uint8: 2^(scale - 127)

become the QuantStack X of [E, N, K], named as the parameter of the model ("….mlp.experts.gate_up_proj", "….down_proj"); its bytes are
those of the file. N is the output: the dequantised parameter of transformers is the transpose, [E, K, N]. Rows of gate_up_proj
alternate, gate first. Biases ("X_bias") and all that is not quantised come as plain tensors.
Source: transformers 5.23, integrations.mxfp4, whose own values are tests/golden/fp8.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, FormatError
from qkernels.formats import QuantFormat, QuantStack
from qkernels.io import floats
from qkernels.io.modules import dense, of_dtype
from qkernels.io.settings import Settings

FORMAT = QuantFormat(floats.E2M1, (1, floats.MX_GROUP), "e8m0")


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantStack | Tensor]]:
    """Yield (parameter, QuantStack) for each pair of blocks and scales, and every other tensor as stored."""
    s = Settings(settings, "quantization_config")
    s.take("quant_method", of=str, choices=["mxfp4"])
    s.take("modules_to_not_convert", of=list, default=[])  # what the tensors are tells it
    s.ignore("dequantize")
    s.done()
    for name in tensors:
        base, _, part = name.rpartition("_")
        other = f"{base}_{'scales' if part == 'blocks' else 'blocks'}"
        if part not in ("blocks", "scales") or not base:
            yield name, dense(name, tensors[name])
        elif other not in tensors:
            raise CheckpointError(f"{name} has no {other} beside it")
        elif part == "blocks":
            yield base, _stack(base, tensors[name], tensors[other])


def _stack(name: str, blocks: Tensor, scales: Tensor) -> QuantStack:
    of_dtype(f"{name}_blocks", blocks, torch.uint8)
    of_dtype(f"{name}_scales", scales, torch.uint8)
    if blocks.dim() != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape or 0 in blocks.shape:
        raise CheckpointError(
            f"{name}_blocks is {list(blocks.shape)} and {name}_scales {list(scales.shape)}; [E, N, K / 32, 16] and [E, N, K / 32] are read"
        )
    experts, n, groups, _ = blocks.shape
    held = {"codes": blocks.flatten(2), "scales": floats.exponents(scales)}
    try:
        return QuantStack(FORMAT, (experts, n, groups * floats.MX_GROUP), held)
    except FormatError as error:
        raise CheckpointError(f"{name}: {error}") from error
