"""`python -m benchmarks gpu`: our kernels, cuBLAS and the peers on a CUDA GPU.

The rules, beside those of the CPU benchmark (NOTES.md): a result is checked against the float64 product before it is timed; ratios are
medians over rounds, both sides measured within the same round.

1. Time comes from CUDA graphs: `n` calls in turn over copies of the weights that together exceed four times the L2 cache, so that no
   call finds its weights there. A replay before each measurement keeps the GPU busy while Python queues it: no launch is timed.
2. The graph's output is compared with an eager one, after it was filled with NaN: kernels on a stream of their own would be missing
   from the graph, and take no time.
3. The eager column is wall-clock time per call of calls issued back to back: what Python and the launches cost.
4. Shares are of measured limits: bytes over the bandwidth of a copy (read + written), operations over the best product of 8192³.
5. cuBLAS counts as the best of its variants at each shape and M.
"""
