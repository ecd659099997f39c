// y = x · Ŵᵀ with activations in int8 and codes of 8 or 4 bits, on Hopper: products of codes are summed exactly.
//
// Activations were quantised before: codes, a scale for each row, and its sum of codes (qkernels/kernels/triton/jit/int8.py). Codes of 8 bits
// lie row after row (s8_gemm.py there), and the tensor core takes both operands from shared memory. Those of 4 bits lie in tiles of 128
// columns (s8_w4_gemm.py) and become int8 in registers: in the upper half of a byte, 16 times their value, or less their zero point.
// With one scale a row sums are int32 to the end; else those of a step are, and float32 over the steps.
//
// Source: weights from registers as in Machete and humming; subtracting under a guard bit, LiquidGEMM; stream-K, Osama et al. 2023. Written from scratch.

#include "cuda/persistent.cuh"
#include "cuda/unpack.cuh"

namespace qk {
namespace {

struct S8Arguments : Common {
  const float* rows;  // of x: scales [M], then sums of codes [M]
  const void* scales;
  const uint8_t *weight, *zeros;  // of 4 bits [steps, N, 64]; zeros [runs, N] or null
  Kind scale_kind;
  int steps_per_run;              // steps that share a scale
  float factor;                   // of all scales: weights may be 16 times their value
};

// What the results of all int8 products need. SCALED: sums have their scales; ZEROS: sums lack their zero points.
template <class Sum, bool SCALED, bool ZEROS>
struct Finish {
  struct Token {
    float scale;
    int sum = 0;
    __device__ Token(const S8Arguments& a, int m) : scale(m < a.m ? a.rows[m] : 0.0f) {
      if (ZEROS && a.zeros && m < a.m) sum = int(a.rows[a.m + m]);
    }
  };
  struct Rows {
    float scale[2], bias[2];
    int zero[2];
    __device__ Rows(const S8Arguments& a, int row) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = row + 8 * h;
        const bool inside = n < a.n;
        scale[h] = SCALED || !inside ? 1.0f : a.factor * number(a.scales, n, a.scale_kind);
        bias[h] = inside && a.bias ? number(a.bias, n, a.bias_kind) : 0.0f;
        zero[h] = ZEROS && inside && a.zeros ? a.zeros[n] - 128 : 0;
      }
    }
    __device__ float value(int h, Sum sum, Token token) const {
      if constexpr (ZEROS) sum -= zero[h] * token.sum;
      return fmaf(float(sum) * scale[h], token.scale, bias[h]);
    }
  };
};

template <bool WIDE, int TOKENS_>
struct W8 : Finish<int, false, true> {
  static constexpr int TOKENS = TOKENS_, X = TOKENS * STEP, W = ROWS * STEP;
  using Sum = int;
  using Arguments = S8Arguments;

  static int stage_bytes(const Arguments&) { return X + W; }

  __device__ static void copy_weights(const Maps& maps, const Arguments&, int row, int step, uint32_t stage, uint32_t full, uint64_t) {
    barrier_arrive_expecting(full, X + W);
    copy_box(stage + X, maps.weight, step * STEP, row, full);
  }
  __device__ static void copy_tokens(const Maps& maps, int token, int step, uint32_t stage, uint32_t full) {
    copy_box(stage, maps.x, step * STEP, token, full);
  }
  template <class F>
  __device__ static void add_step(int (&sums)[TOKENS / 2], const Arguments&, uint32_t stage, int row, F released) {
    product_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply<true>(sums, swizzled_rows(stage + X + row / 64 * 64 * STEP + 32 * i), swizzled_rows(stage + 32 * i));
    }
    product_commit();
    product_wait<1>();
    released();
  }
  __device__ static uint32_t pair(float a, float b) { return Pair<std::conditional_t<WIDE, bf16, f16>>::of(a, b); }
};

// BY_STEP: scales belong to the sums of a step, and those over the steps are float32.
template <bool WIDE, int TOKENS_, bool BY_STEP>
struct W4 : Finish<std::conditional_t<BY_STEP, float, int>, BY_STEP, false> {
  static constexpr int TOKENS = TOKENS_, X = TOKENS * STEP, ROW_BYTES = STEP / 2, W = ROWS * ROW_BYTES;
  using Sum = std::conditional_t<BY_STEP, float, int>;
  using Arguments = S8Arguments;

  __host__ __device__ static int scale_bytes(const Arguments& a) { return BY_STEP ? a.scale_kind == Kind::f32 ? 4 : 2 : 0; }
  static int stage_bytes(const Arguments& a) { return X + W + ROWS * (scale_bytes(a) + 1); }

  __device__ static void copy_weights(const Maps&, const Arguments& a, int row, int step, uint32_t stage, uint32_t full, uint64_t policy) {
    const int rows = min(ROWS, a.n - row), bytes = rows * scale_bytes(a);
    const int64_t at = int64_t(step / a.steps_per_run) * a.n + row;
    barrier_arrive_expecting(full, X + rows * ROW_BYTES + bytes + (a.zeros ? rows : 0));
    copy_bytes(stage + X, a.weight + (int64_t(step) * a.n + row) * ROW_BYTES, rows * ROW_BYTES, full, policy);
    if (BY_STEP) copy_bytes(stage + X + W, static_cast<const uint8_t*>(a.scales) + at * scale_bytes(a), bytes, full, policy);
    if (a.zeros) copy_bytes(stage + X + W + ROWS * scale_bytes(a), a.zeros + at, rows, full, policy);
  }
  __device__ static void copy_tokens(const Maps& maps, int token, int step, uint32_t stage, uint32_t full) {
    copy_box(stage, maps.x, step * STEP, token, full);
  }

  // Rows g and g + 8 of 16, in a step, for one lane.
  struct Words {
    uint32_t words[2][4], zero[2];
    __device__ Words(const Arguments& a, uint32_t stage, int row) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        load_shared(words[h], stage + X + (row + 8 * h) * ROW_BYTES + threadIdx.x % 4 * 16);
        zero[h] = a.zeros ? load_shared_u8(stage + X + W + ROWS * scale_bytes(a) + row + 8 * h) : 0;
        zero[h] *= 0x01010101;
      }
    }
    // Words 2 half and 2 half + 1 as the left operands of two products of 32 columns.
    __device__ void unpack(const Arguments& a, int half, uint32_t (&left)[2][4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i % 2;
        const uint32_t word = words[h][2 * half + i / 2];
        if (a.zeros) {
          left[i / 2][h] = less_zeros(lower_halves(word, HIGHEST), zero[h]);
          left[i / 2][2 + h] = less_zeros(lower_halves(word >> 4, HIGHEST), zero[h]);
        } else {
          left[i / 2][h] = upper_halves(word << 4, 0);
          left[i / 2][2 + h] = upper_halves(word, 0);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) keep(left[i / 4][i % 4]);
    }
  };
  __device__ static float scale(const Arguments& a, uint32_t stage, int row) {
    const uint32_t at = stage + X + W + row * scale_bytes(a);
    if (a.scale_kind == Kind::f32) return load_shared_f32(at);
    const uint16_t raw = load_shared_u16(at);
    return a.scale_kind == Kind::f16 ? __half2float(__ushort_as_half(raw)) : __bfloat162float(__ushort_as_bfloat16(raw));
  }

  // The tensor core works at one half of a step while the other one is unpacked.
  template <class F>
  __device__ static void add_step(Sum (&sums)[TOKENS / 2], const Arguments& a, uint32_t stage, int row, F released) {
    const int mine = row + threadIdx.x % 32 / 4;
    const Words words(a, stage, mine);
    if constexpr (BY_STEP) {
      int part[TOKENS / 2];
      uint32_t left[2][2][4];
      words.unpack(a, 0, left[0]), words.unpack(a, 1, left[1]);
      product_fence();
      multiply<false>(part, left[0][0], swizzled_rows(stage));
#pragma unroll
      for (int i = 1; i < 4; ++i) multiply<true>(part, left[i / 2][i % 2], swizzled_rows(stage + 32 * i));
      product_commit();
      released();
      const float scales[2] = {a.factor * scale(a, stage, mine), a.factor * scale(a, stage, mine + 8)};
      product_wait<0>();
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) {
        keep(part[i]);
        sums[i] = fmaf(float(part[i]), scales[i / 2 % 2], sums[i]);
      }
    } else {
      uint32_t left[2][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words.unpack(a, half, left[half]);
        product_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply<true>(sums, left[half][i], swizzled_rows(stage + 64 * half + 32 * i));
        product_commit();
        product_wait<1>();
        if (half == 0) released();
      }
    }
  }
  __device__ static uint32_t pair(float a, float b) { return Pair<std::conditional_t<WIDE, bf16, f16>>::of(a, b); }
};

template <bool WIDE>
void launch_w8(int64_t tokens, const S8Arguments& a, const Tensor& x, const Tensor& weight, const Tensor& out,
               const std::optional<Tensor>& parts, const Tensor& flags, const How& how) {
  STD_TORCH_CHECK(tokens == 128 || tokens == 256, "s8_w8_wgmma: tiles have 128 or 256 tokens, not ", tokens);
  if (tokens == 128) return launch<W8<WIDE, 128>>(a, {boxes(x, 128), boxes(weight, 128)}, out, parts, flags, how);
  launch<W8<WIDE, 256>>(a, {boxes(x, 256), boxes(weight, 128)}, out, parts, flags, how);
}

template <bool WIDE>
void launch_w4(int64_t tokens, const S8Arguments& a, const Tensor& x, bool by_step, const Tensor& out, const std::optional<Tensor>& parts,
               const Tensor& flags, const How& how) {
  STD_TORCH_CHECK(tokens == 128 || (tokens == 256 && !by_step), "s8_w4_wgmma: tiles have 128 tokens",
                  by_step ? ", with scales of groups," : " or 256,", " not ", tokens);
  const Maps maps{boxes(x, int(tokens)), {}};
  if (by_step) return launch<W4<WIDE, 128, true>>(a, maps, out, parts, flags, how);
  if (tokens == 128) return launch<W4<WIDE, 128, false>>(a, maps, out, parts, flags, how);
  launch<W4<WIDE, 256, false>>(a, maps, out, parts, flags, how);
}

S8Arguments arguments(const Tensor& x, const Tensor& rows, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& bias, const Tensor& out) {
  S8Arguments a{};
  a.rows = static_cast<const float*>(rows.const_data_ptr());
  a.scales = scales.const_data_ptr();
  a.scale_kind = kind_of(scales);
  set_bias(a, bias);
  a.zeros = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  a.steps = int(x.size(1) / STEP);
  a.factor = 1;
  STD_TORCH_CHECK(x.is_contiguous() && x.size(1) % STEP == 0 && x.size(0) == out.size(0) && out.size(1) % 16 == 0,
                  "codes of x [", x.size(0), ", ", x.size(1), "] in 128 columns, out [", out.size(0), ", ", out.size(1), "] in 16");
  return a;
}

// out [M, N] from codes of x [M, K'] and their rows' numbers [2, M]; weight int8 [N, K'].
void s8_w8_wgmma(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
                 std::optional<Tensor> parts, Tensor flags, int64_t tokens, int64_t blocks, int64_t raster, bool whole, bool early,
                 int64_t stream) {
  const S8Arguments a = arguments(x, rows, scales, zeros, bias, out);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == out.size(1) && weight.size(1) == x.size(1), "weight [", weight.size(0), ", ",
                  weight.size(1), "] does not fit");
  const How how{blocks, raster, whole, early, reinterpret_cast<cudaStream_t>(stream)};
  (out.scalar_type() == ScalarType::BFloat16 ? launch_w8<true> : launch_w8<false>)(tokens, a, x, weight, out, parts, flags, how);
}

// Likewise; weight uint8 [steps, N, 64], scales and zeros [runs, N].
void s8_w4_wgmma(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
                 std::optional<Tensor> parts, Tensor flags, int64_t steps_per_run, int64_t tokens, int64_t blocks, int64_t raster, bool whole,
                 bool early, int64_t stream) {
  S8Arguments a = arguments(x, rows, scales, zeros, bias, out);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == a.steps && weight.size(1) == out.size(1) && weight.size(2) == STEP / 2, "weight [",
                  weight.size(0), ", ", weight.size(1), ", ", weight.size(2), "] does not fit");
  a.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.steps_per_run = int(steps_per_run);
  if (!zeros) a.factor = 0.0625f;
  const How how{blocks, raster, whole, early, reinterpret_cast<cudaStream_t>(stream)};
  (out.scalar_type() == ScalarType::BFloat16 ? launch_w4<true> : launch_w4<false>)(tokens, a, x, scales.size(0) > 1, out, parts, flags, how);
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "s8_w8_wgmma(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!) flags, int tokens, int blocks, int raster, bool whole, bool early, int stream) -> ()");
  m.def(
      "s8_w4_wgmma(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!) flags, int steps_per_run, int tokens, int blocks, int raster, bool whole, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("s8_w8_wgmma", TORCH_BOX(&qk::s8_w8_wgmma));
  m.impl("s8_w4_wgmma", TORCH_BOX(&qk::s8_w4_wgmma));
}
