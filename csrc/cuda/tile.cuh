// What kernels share that work through tiles of a product: where parts of a tile meet, and some of the host's side.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/stream_k.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace qk {

// -- where parts of a tile meet --------------------------------------------------------------------------------------------------------

// Sums lie as the threads hold them: 16 bytes of every thread, then the next 16.
__device__ inline float4 four(const float* s) { return make_float4(s[0], s[1], s[2], s[3]); }
__device__ inline int4 four(const int* s) { return make_int4(s[0], s[1], s[2], s[3]); }

template <int SIZE, class Sum>
__device__ void leave_sums(const Sum (&sums)[SIZE], void* parts, int64_t at, int thread, int threads) {
  using Four = decltype(four(sums));
#pragma unroll
  for (int i = 0; i < SIZE; i += 4) __stcg(static_cast<Four*>(parts) + at + i / 4 * threads + thread, four(sums + i));
}

template <int SIZE, class Sum>
__device__ void add_sums(Sum (&sums)[SIZE], const void* parts, int64_t at, int thread, int threads) {
  using Four = decltype(four(sums));
#pragma unroll
  for (int i = 0; i < SIZE; i += 4) {
    const Four left = __ldcg(static_cast<const Four*>(parts) + at + i / 4 * threads + thread);
    sums[i] += left.x, sums[i + 1] += left.y, sums[i + 2] += left.z, sums[i + 3] += left.w;
  }
}

// -- the host's side ---------------------------------------------------------------------------------------------------------------------

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Half: return Kind::f16;
    case ScalarType::BFloat16: return Kind::bf16;
    default: STD_TORCH_CHECK(false, "numbers are float32, float16 or bfloat16");
  }
}

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA says: ", cudaGetErrorString(error)); }

}  // namespace qk
