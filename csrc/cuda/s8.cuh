// What the products with int8 activations share: their operands, scales as they are stored, and how a sum becomes a result.
#pragma once

#include "cuda/tile.cuh"

#include <optional>

namespace qk {

constexpr int WHOLE = 0x4b400000;  // the bits of 1.5 · 2^23: floats next to it are whole numbers, and their last bits an integer

struct Operands {
  const uint8_t* x;                // codes [M, K']
  const float* rows;               // of x: scales [M], then sums of codes [M]
  const uint8_t *weight, *zeros;   // zeros [runs, N] or null
  const void *scales, *bias;       // [runs, N]; [N] or null
  Kind scale_kind, bias_kind, out_kind;
  int zero, origin;                // a zero point where zeros is null; by how much codes are less here than where zero points belong
  uint32_t flip;                   // bits of four codes that are turned
  int tiles, tiles_per_run, runs;  // of 4-bit codes along K; those that share a scale; scales of a row
  void* out;                       // [M, N]
  int m, n;
};

// A scale as it is stored, and its value.
__device__ inline uint32_t stored(const void* p, int64_t i, Kind kind) {
  return kind == Kind::f32 ? static_cast<const uint32_t*>(p)[i] : static_cast<const uint16_t*>(p)[i];
}
__device__ inline float scale_of(uint32_t raw, Kind kind) {
  return kind == Kind::f16 ? __half2float(__ushort_as_half(uint16_t(raw))) : float_of(kind == Kind::f32 ? raw : raw << 16);
}

// What a row of the weight has for its results. groups: sums have their scales and zero points.
struct Row {
  float scale, bias;
  int zero;
  __device__ void load(const Operands& a, int n, bool groups) {
    const bool inside = n < a.n;
    scale = inside && !groups ? number(a.scales, n, a.scale_kind) : 1.0f;
    bias = inside && a.bias ? number(a.bias, n, a.bias_kind) : 0.0f;
    zero = (inside && a.zeros ? a.zeros[n] : a.zero) - a.origin;
  }
};

// -- the host's side -------------------------------------------------------------------------------------------------------------------

// x [M, K'] in steps of 128 columns, rows [2, M].
inline Operands operands(const Tensor& x, const Tensor& rows, const Tensor& weight, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, const Tensor& out) {
  Operands a{};
  a.x = static_cast<const uint8_t*>(x.const_data_ptr()), a.rows = static_cast<const float*>(rows.const_data_ptr());
  a.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.scales = scales.const_data_ptr(), a.scale_kind = kind_of(scales);
  if (zeros) a.zeros = static_cast<const uint8_t*>(zeros->const_data_ptr());
  if (bias) a.bias = bias->const_data_ptr(), a.bias_kind = kind_of(*bias);
  a.out = out.mutable_data_ptr(), a.out_kind = kind_of(out);
  a.m = int(out.size(0)), a.n = int(out.size(1));
  STD_TORCH_CHECK(x.is_contiguous() && x.size(1) % 128 == 0 && x.size(0) == a.m && a.m > 0 && rows.numel() == 2 * a.m, "codes of x [",
                  x.size(0), ", ", x.size(1), "] in 128 columns, with ", rows.numel(), " numbers, do not fit out [", a.m, ", ", a.n, "]");
  STD_TORCH_CHECK(weight.is_contiguous() && out.is_contiguous() && scales.is_contiguous() && (!zeros || zeros->numel() == scales.numel()) &&
                      (!bias || (bias->is_contiguous() && bias->numel() == a.n)),
                  "weight, scales, zeros, bias and out are contiguous, zeros as many as scales, and biases ", a.n);
  STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight)) % 16 == 0, "codes begin at a multiple of 16");
  return a;
}

// A weight of 8 bits: int8 [N, K'], scales [N].
inline void set_w8(Operands& a, const Tensor& x, const Tensor& weight, const Tensor& scales) {
  STD_TORCH_CHECK(weight.size(0) == a.n && weight.size(1) == x.size(1) && scales.numel() == a.n, "weight [", weight.size(0), ", ",
                  weight.size(1), "] with ", scales.numel(), " scales does not fit");
  a.zero = a.origin = 128;
}

// One of 4 bits: uint8 [tiles, N, 16, 32 or 64], scales [runs, N]. Returns whether every tile's sums have a scale.
inline bool set_w4(Operands& a, const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t tiles_per_run) {
  const int64_t words = weight.size(2) / 16, per_step = 4 / std::max<int64_t>(words, 1);
  a.tiles = int(weight.size(0)), a.runs = int(scales.size(0)), a.tiles_per_run = int(tiles_per_run);
  STD_TORCH_CHECK(words == 1 || words == 2 || words == 4, "tiles have 32, 64 or 128 columns, not ", 2 * weight.size(2));
  STD_TORCH_CHECK(weight.size(1) == a.n && (a.tiles + per_step - 1) / per_step == x.size(1) / 128 && scales.size(1) == a.n &&
                      tiles_per_run > 0,
                  "weight [", a.tiles, ", ", weight.size(1), ", ", weight.size(2), "] with scales [", a.runs, ", ", scales.size(1),
                  "] does not fit");
  a.zero = 8;
  return a.runs > 1 || words < 4;
}

}  // namespace qk
