"""Kernels in CUDA C++ for NVIDIA's Hopper: Python bindings of the compiled library (csrc/cuda)."""
