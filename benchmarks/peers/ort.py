"""onnxruntime: a graph of one MatMulNBits node with accuracy_level 4 (int8 activations), fp32 in and out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..base import Contestant, Prepared, expand, groupwise, nbytes_of

GROUP = 128


def graph(codes: Tensor, scales: Tensor) -> bytes:
    """Serialise y = MatMulNBits(x [m, K]) with 4-bit codes [N, K] (values -7…7) and float32 scales [N, K/128]."""
    from onnx import TensorProto, helper, numpy_helper

    n, k = codes.shape
    unsigned = (codes + 8).to(torch.uint8)
    packed = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).view(n, k // GROUP, GROUP // 2)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])]
    wanted = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])]
    constants = [numpy_helper.from_array(packed.numpy(), "w"), numpy_helper.from_array(scales.reshape(-1).numpy(), "s")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "layer", given, wanted, constants), opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


@functools.cache  # the pool can be made once per process, before the first session
def share_threads(threads: int) -> None:
    """Let all sessions use one pool of `threads` threads."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def prepare(weight: Tensor, threads: int) -> Prepared:
    """One session per copy, each with its own packed weights, all on one thread pool.

    With a pool for each session, dozens of idle workers would spin beside everybody's next call.
    """
    import onnxruntime

    codes, scales = groupwise(weight, GROUP, 7)
    model = graph(codes, scales)
    share_threads(threads)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.force_spinning_stop", "1")  # spin within a run, but not after it

    def make():
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return Prepared(expand(codes, scales), codes.numel() // 2 + nbytes_of(scales), make)


CONTESTANTS = (
    Contestant("onnxruntime MatMulNBits", "peer", "int4 g128", "int8", torch.float32, prepare, "onnxruntime", "onnxruntime onnx"),
)
