"""Benchmarks of qkernels against torch and other libraries: `python -m benchmarks --help`, and NOTES.md for the method."""
