"""Readers and writers of checkpoints: files and tensors only, no modules.

>>> for name, tensor in qkernels.io.read("model.gguf"): ...
>>> qkernels.io.write(qkernels.io.read("gptq/"), "awq/", "awq")

Each layout is one file of this folder with the functions

    read(tensors, settings)      the tensors of a checkpoint by name, and what it states about them -> (name, value) one by one
    write(items, settings, add)  the inverse: calls add(name, tensor) for what is to be stored and returns what the checkpoint has to
                                 state, `settings` themselves where they were given (of a checkpoint that was read)

where a value is a QuantTensor, a QuantStack, or a plain tensor for what is not quantised. A weight is called "<module>.weight".

What is needed for that lies in files of its own: modules.py walks through a checkpoint and hands out the tensors of a module, checked;
checked.py looks at tensors and JSON, settings.py at settings, expressions.py at patterns of names; words.py and groups.py turn words and
scales into canonical ones; weights.py puts the QuantTensor together and names it in errors. A reader leaves what the numbers do not tell
in `QuantTensor.origin`, beside {"layout": its own name}; a writer takes that of its own layout (`weights.kept`) where it still gives the
numbers of the weight, and else makes everything anew.
"""

from qkernels.io.checkpoint import LAYOUTS, read, write
from qkernels.io.detect import CheckpointInfo, detect

__all__ = ["LAYOUTS", "CheckpointInfo", "detect", "read", "write"]
