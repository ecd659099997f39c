"""What the kernels with int8 activations share: rows of x become codes."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def quantize_rows(p_x, p_codes, p_rows, M, K, padded, stride_x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """A row of x [M, K] -> int8 codes [M, padded], its scale and the sum of its codes, float32 [2, M]; one program a row.

    Codes are to the nearest, ties to even. The sum is exact below 2^24. A row that is not finite gets the scale NaN; one of at most 2^-118
    counts as zeros: its scale would have lost bits.
    """
    row = tl.program_id(0)
    p_x += row.to(tl.int64) * stride_x
    p_codes += row.to(tl.int64) * padded
    o_k = tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        a = tl.abs(tl.load(p_x + first + o_k, first + o_k < K, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(a < float("inf"), a, float("inf")))  # a maximum may pass over NaN
    amax = tl.max(largest, 0)
    usable = (amax > 3.0e-36) & (amax < float("inf"))
    inverse = tl.where(usable, 127.0 / tl.where(usable, amax, 1.0), 0.0)
    scale = tl.where(usable, amax / 127.0, tl.where(amax < float("inf"), 0.0, float("nan")))
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, padded, BLOCK):
        x = tl.load(p_x + first + o_k, first + o_k < K, other=0.0).to(tl.float32)
        # next to 1.5 · 2^23 floats are whole numbers: their last bits are the code
        code = (x * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(p_codes + first + o_k, code.to(tl.int8), first + o_k < padded)
        total += code
    tl.store(p_rows + row, scale)
    tl.store(p_rows + M + row, tl.sum(total, 0).to(tl.float32))
