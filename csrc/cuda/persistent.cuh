// What the Hopper kernels share: one warpgroup copies stages of both operands to shared memory, two multiply; a block on every processor
// works through the tiles that stream_k.h gives it.
//
// A kernel is a class P that says how a tile is made:
//     TOKENS               its rows of x; of the weight it has 64 for each of the two warpgroups
//     Sum                  of products: float or int
//     Arguments            a Common, and what else its functions want
//     stage_bytes(a)       of one stage, a step of 128 columns (host)
//     copy_weights(…)      begins copying a stage's weights, and tells the barrier the bytes of the whole stage
//     copy_tokens(…)       begins copying its tokens
//     add_step(…)          adds the products of a stage to the sums; calls `released` when nothing reads the stage before any more
//     Rows, Token          what rows of the weight and a token have for the result: Rows(a, row).value(h, sum, Token(a, token))
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/tile.cuh"

#include <algorithm>
#include <optional>

namespace qk {

constexpr int STEP = 128;          // columns
constexpr int SCRATCH = 512;       // bytes of a warp, where 16 tokens of its result are turned
constexpr int MOST_STAGES = 12;
constexpr int COPYING = 40;        // registers of a thread of the warpgroup that copies
constexpr int SHARED = 227 << 10;  // bytes of shared memory that a block may have
constexpr int WORKERS = 256;       // threads that multiply
constexpr int THREADS = WORKERS + 128;
constexpr int WARPS = WORKERS / 32;
constexpr int ROWS = WORKERS / 2;  // of the weight, in a tile

struct Common {
  void* out;         // [M, N]
  const void* bias;  // [N] or null
  Kind bias_kind;
  void* parts;  // of every block the sums of a tile
  int* flags;   // of every block: its part is there; 0 before and after
  int m, n, steps, tiles_n, tiles_m, raster;
  bool whole;  // no tile is cut
  int stages, stage_bytes;
};

struct Maps {
  CUtensorMap x, weight;
};

// Registers of a thread that multiplies: what a block of so many threads gets at its start, 8 at a time, less what those that copy keep.
constexpr int MULTIPLYING = ((1 << 16) / THREADS / 8 * 8 * THREADS - COPYING * 128) / WORKERS / 8 * 8;
constexpr int AFTER_STAGES = SCRATCH * WARPS + 16 * MOST_STAGES;  // bytes

// Where a ring of stages is.
struct Ring {
  int stages, stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// -- the two roles -----------------------------------------------------------------------------------------------------------------------

// One thread: fills the stages of the ring, the first ones with weights before the kernel before this one has ended.
template <class P>
__device__ void copy_all(const Maps& maps, const typename P::Arguments& a, StreamK schedule, uint32_t base, uint32_t full, uint32_t empty) {
  const uint64_t policy = cache_policy(a.tiles_m == 1);
  Work work;
  int early = 0;
  StreamK ahead = schedule;
  while (early < a.stages && ahead.next(work)) {
#pragma unroll 1
    for (int step = work.begin; step < work.end && early < a.stages; ++step, ++early) {
      P::copy_weights(maps, a, work.n * ROWS, step, base + early * a.stage_bytes, full + 8 * early, policy);
    }
  }
  wait_for_previous();
  Ring ring{a.stages};
  for (int done = 0; schedule.next(work);) {
#pragma unroll 1
    for (int step = work.begin; step < work.end; ++step, ++done, ring.advance()) {
      const uint32_t stage = base + ring.stage * a.stage_bytes, barrier = full + 8 * ring.stage;
      if (done >= early) {
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        P::copy_weights(maps, a, work.n * ROWS, step, stage, barrier, policy);
      }
      P::copy_tokens(maps, work.m * P::TOKENS, step, stage, barrier);
    }
  }
}

// Turns the results of 16 rows of the weight and all tokens of a tile over in shared memory, and stores them with 32 bytes a token.
template <class P>
__device__ void store(const typename P::Sum (&sums)[P::TOKENS / 2], const typename P::Arguments& a, int row, int token, uint32_t scratch) {
  const int lane = threadIdx.x % 32;
  const typename P::Rows rows(a, row + lane / 4);
  const uint32_t to = scratch + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16;
#pragma unroll
  for (int i = 0; i < P::TOKENS / 2; i += 8) {
    uint32_t pairs[4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {  // of 8 tokens, of which this lane has two
      const int first = token + 2 * i + 8 * block + lane % 4 * 2;
      const typename P::Token left(a, first), right(a, first + 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto* s = sums + i + 4 * block + 2 * h;
        pairs[2 * block + h] = P::pair(rows.value(h, s[0], left), rows.value(h, s[1], right));
      }
    }
    store_turned(to, pairs);
    __syncwarp();
    uint32_t values[4];
    load_shared(values, scratch + lane * 16);
    __syncwarp();
    const int m = token + 2 * i + lane / 2, n = row + lane % 2 * 8;
    if (m < a.m && n < a.n) {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.out) + int64_t(m) * a.n + n) = make_uint4(values[0], values[1], values[2], values[3]);
    }
  }
}

// A warpgroup that multiplies.
template <class P>
__device__ void multiply_all(const typename P::Arguments& a, StreamK schedule, uint32_t base, uint32_t full, uint32_t empty, uint32_t scratch) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = warp * 16;  // of the tile: the first of 16
  typename P::Sum sums[P::TOKENS / 2];
  Ring ring{a.stages};
  int held = -1;  // the stage before this one, which products may still read
  const auto release = [&] {
    if (held >= 0 && lane == 0) barrier_arrive(empty + 8 * held);
  };
  wait_for_previous();
  for (Work work; schedule.next(work);) {
#pragma unroll
    for (int i = 0; i < P::TOKENS / 2; ++i) sums[i] = 0;
#pragma unroll 1
    for (int step = work.begin; step < work.end; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage, ring.parity);
      P::add_step(sums, a, base + ring.stage * a.stage_bytes, row, release);
      held = ring.stage;
    }
    product_wait<0>();
    release();
    held = -1;
#pragma unroll
    for (int i = 0; i < P::TOKENS / 2; ++i) keep(sums[i]);

    if (!join_sums(sums, schedule, work, a.steps, a.parts, a.flags, thread, WORKERS)) continue;
    store<P>(sums, a, work.n * ROWS + row, work.m * P::TOKENS, scratch + warp * SCRATCH);
  }
}

template <class P>
__global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Maps maps, const __grid_constant__ typename P::Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared), scratch = base + a.stages * a.stage_bytes;
  const uint32_t full = scratch + SCRATCH * WARPS, empty = full + 8 * a.stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, WARPS);
    }
    barriers_made();
  }
  __syncthreads();
  let_next_begin();
  const StreamK schedule(a.tiles_n, a.tiles_m, a.steps, a.raster, a.whole, blockIdx.x, gridDim.x);
  if (threadIdx.x >= WORKERS) {
    give_registers<COPYING>();
    if (threadIdx.x == WORKERS) copy_all<P>(maps, a, schedule, base, full, empty);
  } else {
    take_registers<MULTIPLYING>();
    multiply_all<P>(a, schedule, base, full, empty, scratch);
  }
#endif
}

// -- the host's side ---------------------------------------------------------------------------------------------------------------------

inline void set_bias(Common& a, const std::optional<Tensor>& bias) {
  if (bias) a.bias = bias->const_data_ptr(), a.bias_kind = kind_of(*bias);
}

// The driver's function, found once: nothing of ours is linked with the driver.
inline auto encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// A matrix of 8- or 16-bit numbers, rows of a multiple of 16 bytes, as boxes of 128 bytes and `rows` rows.
inline CUtensorMap boxes(const Tensor& t, int rows) {
  const bool wide = t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  const auto type = wide ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;  // copied, not computed with
  const cuuint64_t sizes[] = {cuuint64_t(t.size(1)), cuuint64_t(t.size(0))}, strides[] = {cuuint64_t(t.stride(0)) * (wide ? 2 : 1)};
  const cuuint32_t box[] = {wide ? 64u : 128u, cuuint32_t(rows)}, every[] = {1, 1};
  CUtensorMap map;
  const CUresult error = encode_tiled()(
      &map, type, 2, const_cast<void*>(t.const_data_ptr()), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled gives ", int(error));
  return map;
}

// How a launch goes. raster: tiles of tokens that are worked on side by side; early: it begins while the kernel before it ends.
struct How {
  int64_t blocks, raster;
  bool whole, early;
  cudaStream_t stream;
};

// parts: room for a tile's sums of every block, not wanted where no tile is cut; flags: an int32 0 of every block.
template <class P>
void launch(typename P::Arguments a, const Maps& maps, const Tensor& out, const std::optional<Tensor>& parts, const Tensor& flags, const How& how) {
  a.out = out.mutable_data_ptr(), a.parts = parts ? parts->mutable_data_ptr() : nullptr, a.flags = static_cast<int*>(flags.mutable_data_ptr());
  a.m = int(out.size(0)), a.n = int(out.size(1)), a.raster = int(how.raster);
  a.stage_bytes = (P::stage_bytes(a) + 1023) / 1024 * 1024;
  a.stages = std::min(MOST_STAGES, (SHARED - AFTER_STAGES) / a.stage_bytes);
  a.tiles_n = (a.n + ROWS - 1) / ROWS, a.tiles_m = (a.m + P::TOKENS - 1) / P::TOKENS;
  const int64_t tiles = int64_t(a.tiles_n) * a.tiles_m, blocks = std::min<int64_t>(how.blocks, how.whole ? tiles : tiles * a.steps);
  a.whole = how.whole || tiles % blocks == 0;
  const int64_t room = parts ? parts->numel() : 0;
  STD_TORCH_CHECK(a.whole || room >= blocks * ROWS * P::TOKENS, "parts hold ", room, " sums; ", blocks * ROWS * P::TOKENS, " are wanted");
  STD_TORCH_CHECK(flags.numel() >= blocks, "there are ", flags.numel(), " flags for ", blocks, " blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = a.stages * a.stage_bytes + AFTER_STAGES;
  config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = how.early;
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaFuncSetAttribute(gemm<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
  check(cudaLaunchKernelEx(&config, gemm<P>, maps, a));
}

}  // namespace qk
