"""Other libraries: what each needs to use qkernels, imported only when asked for."""
