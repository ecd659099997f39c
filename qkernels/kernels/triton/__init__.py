"""GPU kernels in Triton. The files here register them and import no Triton; the kernels themselves lie in `jit`, imported on first use."""
