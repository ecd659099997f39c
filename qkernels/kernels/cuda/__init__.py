"""Kernels in CUDA C++, compiled when the package is installed; their sources lie in csrc/cuda."""
