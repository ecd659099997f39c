// The torch ops that help to quantise, through the LibTorch stable ABI: checks and threads. No arithmetic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"

namespace qk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
const T* checked(const Tensor& t, ScalarType dtype, int64_t elements, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && t.numel() == elements, what, " must hold ", elements,
                  " contiguous elements of its dtype on the CPU, not ", t.numel());
  return static_cast<const T*>(t.const_data_ptr());
}

Dtype weight_dtype(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "weight must be float32, bfloat16 or float16");
  }
}

Grid grid_of(const Optional& values, const Optional& thresholds, const Optional& codes, int64_t low, int64_t high, int64_t sign) {
  Grid g{float(low), float(high), 0, nullptr, nullptr, nullptr, int(sign)};
  if (!values) {
    STD_TORCH_CHECK(low < high && high - low <= 255 && low >= -255 && high <= 255, "low and high are the ends of at most 8 bits, not ", low,
                    " and ", high);
    return g;
  }
  STD_TORCH_CHECK(thresholds && codes, "values come with thresholds and codes");
  const int64_t count = values->numel();
  STD_TORCH_CHECK(count >= 2 && count <= 256 && sign >= 0 && sign <= 128, "a table has 2 to 256 values and a sign of up to 128, not ",
                  count, " and ", sign);
  g.count = int(count);
  g.values = checked<float>(*values, ScalarType::Float, count, "values");
  g.thresholds = checked<float>(*thresholds, ScalarType::Float, count - 1, "thresholds");
  g.codes = checked<uint8_t>(*codes, ScalarType::Byte, count, "codes");
  return g;
}

Grouped grouped(const Tensor& weight, const Tensor& scales, const Optional& zeros, int64_t group_n, int64_t group_k, const Grid& grid) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0,
                  "weight must be a contiguous matrix on the CPU");
  STD_TORCH_CHECK(group_n >= 1 && group_k >= 1, "a group is at least 1 x 1, not ", group_n, " x ", group_k);
  Grouped w{};
  w.weight = weight.const_data_ptr(), w.dtype = weight_dtype(weight), w.n = weight.size(0), w.k = weight.size(1);
  w.group_n = std::min(group_n, w.n), w.group_k = std::min(group_k, w.k);
  w.groups_k = (w.k + w.group_k - 1) / w.group_k, w.groups = (w.n + w.group_n - 1) / w.group_n * w.groups_k;
  STD_TORCH_CHECK(scales.dim() == 3 && scales.size(2) >= 1 && scales.size(2) <= MAX_CANDIDATES, "scales must be [N groups, K groups, 1 to ",
                  MAX_CANDIDATES, "]");
  w.candidates = scales.size(2), w.grid = grid;
  w.scales = checked<float>(scales, ScalarType::Float, w.candidates * w.groups, "scales");
  STD_TORCH_CHECK(!zeros || grid.values == nullptr, "zeros go with integers only");
  w.zeros = zeros ? checked<float>(*zeros, ScalarType::Float, w.candidates * w.groups, "zeros") : nullptr;
  return w;
}

std::tuple<Tensor, Tensor> best_scales(Tensor weight, Tensor scales, Optional zeros, Optional values, Optional thresholds, Optional codes,
                                       int64_t group_n, int64_t group_k, int64_t low, int64_t high, int64_t sign) {
  const Grouped w = grouped(weight, scales, zeros, group_n, group_k, grid_of(values, thresholds, codes, low, high, sign));
  Tensor best = torch::stable::new_empty(scales, {scales.size(0), scales.size(1)}, ScalarType::Long);
  Tensor errors = torch::stable::new_empty(scales, {scales.size(0), scales.size(1)});
  auto* index = static_cast<int64_t*>(best.mutable_data_ptr());
  auto* error = static_cast<float*>(errors.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 64 * 1024 / (w.group_n * w.group_k));
  torch::stable::parallel_for(0, w.groups, grain, [&](int64_t g0, int64_t g1) { best_level()->best_scales(w, g0, g1, index, error); });
  return {best, errors};
}

Tensor encode(Tensor weight, Tensor scales, Optional zeros, Optional values, Optional thresholds, Optional codes, int64_t group_n,
              int64_t group_k, int64_t low, int64_t high, int64_t sign) {
  const Grouped w = grouped(weight, scales, zeros, group_n, group_k, grid_of(values, thresholds, codes, low, high, sign));
  Tensor out = torch::stable::new_empty(weight, {w.n, w.k}, ScalarType::Byte);
  auto* p = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, w.n, std::max<int64_t>(1, 64 * 1024 / w.k),
                              [&](int64_t r0, int64_t r1) { best_level()->encode(w, r0, r1, p); });
  return out;
}

}  // namespace
}  // namespace qk

#define QK_GROUPED                                                                                                                       \
  "(Tensor weight, Tensor scales, Tensor? zeros, Tensor? values, Tensor? thresholds, Tensor? codes, int group_n, int group_k, int low, " \
  "int high, int sign)"

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def("cpu_best_scales" QK_GROUPED " -> (Tensor, Tensor)");
  m.def("cpu_encode" QK_GROUPED " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("cpu_best_scales", TORCH_BOX(&qk::best_scales));
  m.impl("cpu_encode", TORCH_BOX(&qk::encode));
}
