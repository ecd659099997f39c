"""OpenVINO: a model of one MatMul with u4 weights in groups of 128, fp32 in and out, default precision hints."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Contestant, Prepared, expand, groupwise, nbytes_of

GROUP = 128


def model(codes: Tensor, scales: Tensor):
    """Build x [m, K] @ ((codes - 8) * scale).T in the pattern that OpenVINO recognises as compressed weights.

    `codes` [N, K] holds values -7…7, `scales` [N, K/128] float16. Returns (model, arrays that must outlive it).
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    n, k = codes.shape
    unsigned = (codes + 8).to(torch.uint8)
    packed = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).numpy().reshape(-1)
    zeros = np.full(n * (k // GROUP) // 2, 0x88, np.uint8)
    x = op.parameter([-1, k], ov.Type.f32, name="x")
    w = op.constant(ov.Tensor(packed, ov.Shape([n, k // GROUP, GROUP]), ov.Type.u4))
    z = op.constant(ov.Tensor(zeros, ov.Shape([n, k // GROUP, 1]), ov.Type.u4))
    s = op.constant(scales.numpy().reshape(n, k // GROUP, 1))
    meaning = op.multiply(op.subtract(op.convert(w, "f16"), op.convert(z, "f16")), s)
    flat = op.reshape(meaning, op.constant(np.array([n, k], np.int64)), False)
    return ov.Model([op.matmul(x, op.convert(flat, "f32"), False, True)], [x], "layer"), (packed, zeros)


def prepare(weight: Tensor, threads: int) -> Prepared:
    """One compiled model per copy; arrays are made anew for each, as OpenVINO may use them in place."""
    import openvino as ov

    codes, scales = groupwise(weight, GROUP, 7)
    scales = scales.half()
    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    def make():
        built, arrays = model(codes, scales)
        request = core.compile_model(built, "CPU", config).create_infer_request()

        def layer(x: Tensor, keep=arrays) -> Tensor:
            return torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])

        return layer

    return Prepared(expand(codes, scales), codes.numel() // 2 + nbytes_of(scales) + scales.numel() // 2, make)


CONTESTANTS = (Contestant("OpenVINO u4", "peer", "int4 g128", "int8", torch.float32, prepare, "openvino"),)
