// What kernels share that work through tiles of a product: where parts of a tile meet, and some of the host's side.
#pragma once

#include "common/ptx.h"
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

// What is left of a tile that is cut: leaves the sums of its first steps in memory, or adds what others left, in the order of K. True: the
// sums are the tile's. parts: room for a tile of every block; flags: 0 of every block, before and after.
template <int SIZE, class Sum>
__device__ bool join_sums(Sum (&sums)[SIZE], const StreamK& schedule, const Work& work, int steps, void* parts, int* flags, int thread,
                          int threads) {
  const int64_t part = SIZE / 4 * threads;  // fours of sums of a tile
  if (work.end < steps) {
    leave_sums(sums, parts, schedule.block() * part, thread, threads);
    __threadfence();
    sync_warps(1, threads);
    if (thread == 0) raise_flag(flags + schedule.block());
    return false;
  }
  if (work.begin > 0) {
    const int first = schedule.first_helper(work), last = schedule.block();
    for (int helper = first + thread; helper < last; helper += threads) {
      wait_for_flag(flags + helper);
      flags[helper] = 0;
    }
    sync_warps(1, threads);
#pragma unroll 1
    for (int helper = first; helper < last; ++helper) add_sums(sums, parts, helper * part, thread, threads);
  }
  return true;
}

// Of blocks that leave parts of one result: whether this is the last of `count`, which then sees what all have left. The counter is 0 before
// and after.
__device__ inline bool comes_last(int* counter, int count) {
  __threadfence();
  __syncthreads();
  if (!__syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == count - 1)) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
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
