"""CPU kernels: Python bindings of the compiled library (csrc/cpu)."""
