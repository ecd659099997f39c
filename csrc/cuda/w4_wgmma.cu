// y = x · Ŵᵀ with 16-bit activations and codes of 4 bits, on Hopper: weights are the left operand, unpacked in registers while the tensor
// core multiplies the ones before.
//
// A step is a tile of the layout in qkernels/kernels/triton/layout.py. Lane 4 g + c of a warp has rows g and g + 8 of 16, and of each the
// words 4 c … 4 c + 3; a word is what the tensor core wants of two products of 16 columns. Sums are float32, added in an order that the
// shapes and the number of processors decide.
//
// Source: unpacking by magic numbers, FasterTransformer's; weights from registers as in Machete and humming; stream-K, Osama et al. 2023. Written from scratch.

#include "cuda/persistent.cuh"

namespace qk {
namespace {

constexpr int ROW_BYTES = 64;  // of the weight, in a step

// Two weights at a time: codes become floats, exactly, then weights with one rounding.
template <class T>
struct Numbers;

template <>
struct Numbers<bf16> {
  static constexpr uint32_t MAGIC = 0x43004300;  // 128 in both halves; a code is added to it by its bits
  uint32_t zero;
  __nv_bfloat162 scale, rest;

  __device__ void set(uint16_t raw, bool wide, uint32_t z) {
    const float f = wide ? __bfloat162float(__ushort_as_bfloat16(raw)) : __half2float(__ushort_as_half(raw));
    scale = __float2bfloat162_rn(f), rest = __float2bfloat162_rn(f - __low2float(scale));
    zero = MAGIC + z * 0x10001;
  }
  __device__ uint32_t weights(uint32_t pair) const {
    const __nv_bfloat162 code = __hsub2(reinterpret_cast<const __nv_bfloat162&>(pair), reinterpret_cast<const __nv_bfloat162&>(zero));
    const __nv_bfloat162 w = __hfma2(code, scale, __hmul2(code, rest));
    return reinterpret_cast<const uint32_t&>(w);
  }
};

template <>
struct Numbers<f16> {
  static constexpr uint32_t MAGIC = 0x64006400;  // 1024
  uint32_t zero;
  __half2 scale;

  __device__ void set(uint16_t raw, bool, uint32_t z) {
    scale = __half2half2(__ushort_as_half(raw));
    zero = MAGIC + z * 0x10001;
  }
  __device__ uint32_t weights(uint32_t pair) const {
    const __half2 w = __hmul2(__hsub2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(zero)), scale);
    return reinterpret_cast<const uint32_t&>(w);
  }
};

struct W4Arguments : Common {
  const uint8_t *weight, *scales, *zeros;  // [steps, N, 64], [runs, N, per_step] of 16 bits, likewise of 8 bits or null
  int per_step, steps_per_run;             // scales of a row in a step; steps that share one
  int zero;                                // of all codes, where zeros is null
  bool wide_scales;                        // bfloat16, not float16
};

template <class T, int TOKENS_>
struct W4 {
  static constexpr int TOKENS = TOKENS_;
  static constexpr int WORDS = 2;  // of a row, unpacked at a time. With all four, registers would be written that products still read
  using Sum = float;
  using Arguments = W4Arguments;
  static constexpr int X = TOKENS * STEP * 2, W = ROWS * ROW_BYTES;  // bytes of a stage

  static int stage_bytes(const Arguments& a) { return X + W + ROWS * a.per_step * (a.zeros ? 3 : 2); }

  __device__ static void copy_weights(const Maps&, const Arguments& a, int row, int step, uint32_t stage, uint32_t full, uint64_t policy) {
    const int rows = min(ROWS, a.n - row), numbers = rows * a.per_step;
    const int64_t at = int64_t(step / a.steps_per_run) * a.n + row;
    barrier_arrive_expecting(full, X + rows * ROW_BYTES + numbers * (a.zeros ? 3 : 2));
    copy_bytes(stage + X, a.weight + (int64_t(step) * a.n + row) * ROW_BYTES, rows * ROW_BYTES, full, policy);
    copy_bytes(stage + X + W, a.scales + at * a.per_step * 2, numbers * 2, full, policy);
    if (a.zeros) copy_bytes(stage + X + W + ROWS * a.per_step * 2, a.zeros + at * a.per_step, numbers, full, policy);
  }
  __device__ static void copy_tokens(const Maps& maps, int token, int step, uint32_t stage, uint32_t full) {
    copy_box(stage, maps.x, step * STEP, token, full);
    copy_box(stage + X / 2, maps.x, step * STEP + 64, token, full);
  }

  // What rows g and g + 8 of 16 have in a step, for one lane.
  struct Weights {
    uint32_t words[2][4];
    Numbers<T> numbers[2];

    __device__ void load_words(uint32_t at) {
#pragma unroll
      for (int h = 0; h < 2; ++h) load_shared(words[h], at + h * 8 * ROW_BYTES);
    }
    // Those of word s, where a step has more than one.
    __device__ void load_numbers(const Arguments& a, uint32_t scales, int row, int s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (row + 8 * h) * a.per_step + s * a.per_step / 4;
        const uint16_t scale = load_shared_u16(scales + 2 * at);
        numbers[h].set(scale, a.wide_scales, a.zeros ? load_shared_u8(scales + ROWS * a.per_step * 2 + at) : a.zero);
      }
    }
    // Word s of both rows as the left operands of two products.
    __device__ void unpack(int s, uint32_t (&left)[2][4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          left[i / 2][i % 2 * 2 + h] = numbers[h].weights(masked<0x000f000f, Numbers<T>::MAGIC>(words[h][s] >> 4 * i));
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) keep(left[i / 4][i % 4]);
    }
  };

  // The tensor core works at some words' products while the next words are unpacked.
  template <class F>
  __device__ static void add_step(float (&sums)[TOKENS / 2], const Arguments& a, uint32_t stage, int row, F released) {
    const int lane = threadIdx.x % 32;
    Weights weights;
    weights.load_words(stage + X + row * ROW_BYTES + lane * 16);
    uint32_t left[4][2][4];
#pragma unroll
    for (int first = 0; first < 4; first += WORDS) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        if (first + w == 0 || a.per_step > 1) weights.load_numbers(a, stage + X + W, row + lane / 4, first + w);
        weights.unpack(first + w, left[first + w]);
      }
      product_fence();
#pragma unroll
      for (int i = 0; i < 2 * WORDS; ++i) {
        const int j = 2 * first + i;  // 16 columns
        multiply<true>(sums, left[first + i / 2][i % 2], swizzled_rows(stage + j / 4 * (X / 2) + j % 4 * 32), T());
      }
      product_commit();
      product_wait<1>();
      if (first == 0) released();
    }
  }

  struct Token {
    __device__ Token(const Arguments&, int) {}
  };
  struct Rows {
    float bias[2];
    __device__ Rows(const Arguments& a, int row) {
#pragma unroll
      for (int h = 0; h < 2; ++h) bias[h] = a.bias && row + 8 * h < a.n ? number(a.bias, row + 8 * h, a.bias_kind) : 0.0f;
    }
    __device__ float value(int h, float sum, Token) const { return sum + bias[h]; }
  };
  __device__ static uint32_t pair(float a, float b) { return Pair<T>::of(a, b); }
};

template <class T>
void launch_for(int64_t tokens, const W4Arguments& a, const Tensor& x, const Tensor& out, const std::optional<Tensor>& parts,
                const Tensor& flags, const How& how) {
  STD_TORCH_CHECK(tokens == 128 || tokens == 256, "w4_wgmma: tiles have 128 or 256 tokens, not ", tokens);
  if (tokens == 128) return launch<W4<T, 128>>(a, {boxes(x, 128), {}}, out, parts, flags, how);
  launch<W4<T, 256>>(a, {boxes(x, 256), {}}, out, parts, flags, how);
}

// out [M, N] = x [M, K] · Ŵᵀ + bias. Shapes: weight [steps, 16 N] int32, scales [runs, N, per_step], zeros likewise.
void w4_wgmma(Tensor x, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
              std::optional<Tensor> parts, Tensor flags, int64_t zero, int64_t steps_per_run, int64_t tokens, int64_t blocks, int64_t raster,
              bool whole, bool early, int64_t stream) {
  const int64_t m = x.size(0), k = x.size(1), n = out.size(1), steps = weight.size(0);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(1) == n * 16 && k <= steps * STEP && k > (steps - 1) * STEP,
                  "w4_wgmma: weight [", steps, ", ", weight.size(1), "] does not fit x [", m, ", ", k, "] and out [", m, ", ", n, "]");
  STD_TORCH_CHECK(n % 16 == 0 && k % 8 == 0 && x.stride(1) == 1 && x.stride(0) % 8 == 0, "w4_wgmma: N = ", n, " in 16s, K = ", k,
                  " and the stride of x, ", x.stride(0), ", in 8s");
  W4Arguments a{};
  a.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  a.zeros = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  set_bias(a, bias);
  a.steps = int(steps), a.per_step = int(scales.size(2)), a.steps_per_run = int(steps_per_run), a.zero = int(zero);
  a.wide_scales = scales.scalar_type() == ScalarType::BFloat16;
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? launch_for<bf16> : launch_for<f16>;
  run(tokens, a, x, out, parts, flags, {blocks, raster, whole, early, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "w4_wgmma(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts, Tensor(c!) flags,"
      " int zero, int steps_per_run, int tokens, int blocks, int raster, bool whole, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("w4_wgmma", TORCH_BOX(&qk::w4_wgmma)); }
