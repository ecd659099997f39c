"""The kernels' own code: the only files that import Triton. Nothing here is imported before a kernel runs."""
