"""Readers and writers of checkpoints: files and tensors only, no modules.

>>> for name, tensor in qkernels.io.read("model.gguf"): ...
>>> qkernels.io.write(qkernels.io.read("gptq/"), "awq/", "awq")

Each layout is one file of this folder with the functions

    read(tensors, settings)      the tensors of a checkpoint by name, and what it states about them -> (name, value) one by one
    write(items, settings, add)  the inverse: calls add(name, tensor) for what is to be stored and returns what the checkpoint has to
                                 state, `settings` themselves where they were given (of a checkpoint that was read)

where a value is a QuantTensor, a QuantStack, or a plain tensor for what is not quantised. A weight is called "<module>.weight".
"""

from qkernels.io.checkpoint import LAYOUTS, read, write
from qkernels.io.detect import CheckpointInfo, detect

__all__ = ["LAYOUTS", "CheckpointInfo", "detect", "read", "write"]
