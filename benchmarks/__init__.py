"""Benchmarks of qkernels against torch and other libraries: `python -m benchmarks --help`, and NOTES.md for the method.

In a wheel this folder is `qkernels.benchmarks` (setup.py), run by `qkernels bench`: imports within it are relative.
"""
