"""What qkernels does to two models; run by `make demo`."""
