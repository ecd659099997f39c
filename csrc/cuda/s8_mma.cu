// y = x · Ŵᵀ with activations in int8 and codes of 8 or 4 bits, from Ampere on: products of codes are summed exactly.
//
// Activations were quantised before (s8_quantize.cu): codes, a scale for each row, and its sum of codes. Codes of 8 bits lie row after row
// (qkernels/kernels/triton/s8_gemm.py). Those of 4 bits lie in tiles of 128, 64 or 32 columns (s8_w4_gemm.py there) and become int8 in
// registers, in the order of the tensor core's left operand: weights are its rows, tokens its columns. Both operands come to shared memory
// in stages of 128 columns, which threads copy while they multiply the ones before. With one scale a row sums are int32 to the end, and
// zero points come off by a token's sum of codes; else zero points come off the codes, sums of a group's columns, of 128 at most, are
// int32, and float32 those over the groups. Blocks share the tiles as stream_k.h says.
//
// Source: scales of tokens and channels after the product as in LLM.int8() and SmoothQuant; copies in stages as in CUTLASS and Marlin;
// subtracting under a guard bit, LiquidGEMM; stream-K, Osama et al. 2023. Written from scratch.

#include "cuda/s8.cuh"
#include "cuda/unpack.cuh"

#include <algorithm>
#include <type_traits>

namespace qk {
namespace {

constexpr int STEP = 128;  // columns, and bytes of a row of int8
constexpr int STAGE_BYTES = 24 << 10;  // of four stages; of larger ones there are three, in 99 KiB, what a block may have everywhere

// A part of the result, and how warps share it: each has 16 I rows of the weight and 8 J tokens.
template <int ROWS_, int TOKENS_, int WARPS_N_, int WARPS_M>
struct Tile {
  static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, WARPS_N = WARPS_N_, THREADS = 32 * WARPS_N * WARPS_M;
  static constexpr int I = ROWS / WARPS_N / 16, J = TOKENS / WARPS_M / 8, X = TOKENS * STEP;
};

// flip: what makes four codes positive, and guards where zero points come off.
struct Arguments : Operands {
  void* parts;  // of every block the sums of a tile
  int* flags;  // of every block: its part is there; 0 before and after
  int steps, tiles_n, tiles_m, raster;
  bool whole;  // no tile is cut
};

// -- to shared memory ------------------------------------------------------------------------------------------------------------------

// Where 16 bytes of a row of 128 lie: eight rows' are in different banks.
__device__ inline uint32_t swizzled(int row, int piece) { return row * STEP + (piece ^ row % 8) * 16; }

// COUNT rows of int8, zeros beyond the last.
template <int COUNT, int THREADS>
__device__ void copy_rows(uint32_t to, const uint8_t* from, int first, int rows, const Arguments& a, int step) {
#pragma unroll
  for (int i = 0; i < COUNT * STEP / 16 / THREADS; ++i) {
    const int row = (i * THREADS + threadIdx.x) / 8, piece = threadIdx.x % 8;
    const bool there = first + row < rows;
    copy_async(to + swizzled(row, piece), from + (int64_t(there ? first + row : 0) * a.steps + step) * STEP + 16 * piece, there);
  }
}

// -- weights ---------------------------------------------------------------------------------------------------------------------------

// Of 8 bits. SPAN: columns whose left operands are made at a time.
struct W8 {
  static constexpr int SPAN = 32, ROW_BYTES = STEP;
  static constexpr bool GROUPS = false;

  template <class T>
  __device__ static void copy(uint32_t to, const Arguments& a, int row, int step) {
    copy_rows<T::ROWS, T::THREADS>(to, a.weight, row, a.n, a, step);
  }
  // Rows `row` and up of a tile, in products of 32 columns.
  template <class T>
  __device__ static void left(uint32_t (&to)[1][4], const Arguments&, uint32_t stage, int row, int span, const uint32_t*) {
    const int lane = threadIdx.x % 32;
    load_matrices(to[0], stage + swizzled(row + lane % 16, 2 * span + lane / 16));
  }
};

// Of 4 bits in tiles of 32 WORDS columns. GROUPS: each tile's sums have a scale.
template <int WORDS, bool GROUPS_>
struct W4 {
  static constexpr int SPAN = 32 * WORDS, ROW_BYTES = STEP / 2;
  static constexpr bool GROUPS = GROUPS_;

  template <class T>
  __device__ static void copy(uint32_t to, const Arguments& a, int row, int step) {
    constexpr int PIECES = T::ROWS * WORDS;  // of a tile, 16 bytes each
#pragma unroll
    for (int i = 0; i < T::ROWS * ROW_BYTES / 16 / T::THREADS; ++i) {
      const int at = i * T::THREADS + threadIdx.x, tile = step * (STEP / SPAN) + at / PIECES, piece = at % PIECES;
      const bool there = tile < a.tiles && row + piece / WORDS < a.n;
      copy_async(to + 16 * at, a.weight + (there ? (int64_t(tile) * a.n + row) * WORDS + piece : 0) * 16, there);
    }
  }
  template <class T>
  __device__ static void left(uint32_t (&to)[WORDS][4], const Arguments& a, uint32_t stage, int row, int span, const uint32_t* zero) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[WORDS];
      load_shared(words, stage + ((span * T::ROWS + row + 8 * h + lane / 4) * 4 + lane % 4) * 4 * WORDS);
#pragma unroll
      for (int s = 0; s < WORDS; ++s) {
        to[s][h] = codes(lower_halves(words[s], a.flip), zero[h]);
        to[s][2 + h] = codes(lower_halves(words[s] >> 4, a.flip), zero[h]);
      }
    }
  }

 private:
  __device__ static uint32_t codes(uint32_t four, uint32_t zero) { return GROUPS ? less_zeros(four, zero) : four; }
};

// The scales and zero points of a lane's rows, in one of the tiles of a step: of four lanes, which have the same rows, each loads another's.
template <class W, class T>
struct Numbers {
  static constexpr int SPANS = W::GROUPS ? STEP / W::SPAN : 1;
  uint32_t scales[2 * T::I], zeros[2 * T::I];  // scales as they are stored

  __device__ void load(const Arguments& a, int row, int step) {
    if constexpr (!W::GROUPS) return;
    const int tile = step * SPANS + int(threadIdx.x) % SPANS;
    const int64_t run = min(a.tiles_per_run == 1 ? tile : tile / a.tiles_per_run, a.runs - 1);
#pragma unroll
    for (int i = 0; i < 2 * T::I; ++i) {
      const int64_t at = run * a.n + min(row + 8 * i, a.n - 1);
      scales[i] = stored(a.scales, at, a.scale_kind);
      zeros[i] = a.zeros ? a.zeros[at] : a.zero;
    }
  }
  // A scale, and a zero point in four bytes, from the lane that has that tile.
  __device__ float scale(const Arguments& a, int i, int span) const { return of_tile(scale_of(scales[i], a.scale_kind), span); }
  __device__ uint32_t zero(int i, int span) const { return of_tile(zeros[i] * 0x01010101, span); }

 private:
  template <class N>
  __device__ static N of_tile(N mine, int span) {
    return SPANS == 1 ? mine : __shfl_sync(~0u, mine, span, 4);
  }
};

// -- products --------------------------------------------------------------------------------------------------------------------------

template <class W, class T>
constexpr int stage_bytes() {
  return T::X + T::ROWS * W::ROW_BYTES;
}
template <class W, class T>
constexpr int stages() {
  return stage_bytes<W, T>() <= STAGE_BYTES ? 4 : 3;
}

template <class W, class T>
using Sums = std::conditional_t<W::GROUPS, float, int>[T::I * T::J][4];

// Adds the products of a stage to the sums of a warp, from `row` and `token` of the tile on.
template <class W, class T>
__device__ void add_step(Sums<W, T>& sums, const Arguments& a, uint32_t stage, int row, int token, const Numbers<W, T>& numbers) {
  const int lane = threadIdx.x % 32;
  const auto right = [&](uint32_t (&to)[4], int j, int product) {
    load_matrices(to, stage + swizzled(token + 8 * j + lane % 8 + lane / 16 * 8, 2 * product + lane / 8 % 2));
  };
#pragma unroll
  for (int span = 0; span < STEP / W::SPAN; ++span) {
    uint32_t left[T::I][W::SPAN / 32][4];
    float scales[2 * T::I];
#pragma unroll
    for (int i = 0; i < T::I; ++i) {
      uint32_t zero[2];
#pragma unroll
      for (int h = 0; h < 2 && W::GROUPS; ++h) {
        scales[2 * i + h] = numbers.scale(a, 2 * i + h, span), zero[h] = numbers.zero(2 * i + h, span);
      }
      W::template left<T>(left[i], a, stage + T::X, row + 16 * i, span, zero);
    }
#pragma unroll
    for (int j = 0; j < T::J; j += 2) {
      int parts[T::I * 2][4];  // of row block p / 2 and token block p % 2
#pragma unroll
      for (int p = 0; p < T::I * 8 && W::GROUPS; ++p) parts[p / 4][p % 4] = WHOLE;
#pragma unroll
      for (int s = 0; s < W::SPAN / 32; ++s) {
        uint32_t pieces[4];
        right(pieces, j, span * (W::SPAN / 32) + s);
        const uint32_t tokens[2][2] = {{pieces[0], pieces[1]}, {pieces[2], pieces[3]}};
#pragma unroll
        for (int p = 0; p < T::I * 2; ++p) {
          if constexpr (W::GROUPS) multiply(parts[p], left[p / 2][s], tokens[p % 2]);
          else multiply(sums[p / 2 * T::J + j + p % 2], left[p / 2][s], tokens[p % 2]);
        }
      }
      if constexpr (W::GROUPS) {
#pragma unroll
        for (int p = 0; p < T::I * 8; ++p) {
          float& sum = sums[p / 8 * T::J + j + p / 4 % 2][p % 4];
          sum = fmaf(float_of(parts[p / 4][p % 4]) - float_of(WHOLE), scales[p / 8 * 2 + p % 4 / 2], sum);
        }
      }
    }
  }
}

// -- results ---------------------------------------------------------------------------------------------------------------------------

// Results of one row and tokens m and m + 1.
__device__ inline void put(const Arguments& a, int m, int n, const float (&y)[2]) {
  const uint32_t pair = a.out_kind == Kind::bf16 ? Pair<bf16>::of(y[0], y[1]) : Pair<f16>::of(y[0], y[1]);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t at = int64_t(m + e) * a.n + n;
    if (m + e >= a.m || n >= a.n) continue;
    if (a.out_kind == Kind::f32) static_cast<float*>(a.out)[at] = y[e];
    else static_cast<uint16_t*>(a.out)[at] = uint16_t(pair >> 16 * e);
  }
}

// A lane's results: rows row + 8 i of the weight, tokens token + 8 j and the one after each.
template <class W, class T>
__device__ void store(const Sums<W, T>& sums, const Arguments& a, int row, int token) {
  Row rows[2 * T::I];
#pragma unroll
  for (int i = 0; i < 2 * T::I; ++i) rows[i].load(a, row + 8 * i, W::GROUPS);
#pragma unroll
  for (int j = 0; j < T::J; ++j) {
    float y[2 * T::I][2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int m = min(token + 8 * j + e, a.m - 1), total = int(a.rows[a.m + m]);
      const float scale = a.rows[m];
#pragma unroll
      for (int i = 0; i < 2 * T::I; ++i) {
        auto sum = sums[i / 2 * T::J + j][i % 2 * 2 + e];
        if constexpr (!W::GROUPS) sum -= rows[i].zero * total;
        y[i][e] = fmaf(float(sum) * rows[i].scale, scale, rows[i].bias);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * T::I; ++i) put(a, token + 8 * j, row + 8 * i, y[i]);
  }
}

// -- the grid's work -------------------------------------------------------------------------------------------------------------------

// A step of a block's work.
struct Cursor {
  StreamK schedule;
  Work work{};
  bool more;
  int step;
  __device__ explicit Cursor(const StreamK& whole) : schedule(whole), more(schedule.next(work)), step(work.begin) {}
  __device__ void advance() {
    if (++step == work.end) more = schedule.next(work), step = work.begin;
  }
};

template <class W, class T>
__global__ void __launch_bounds__(T::THREADS) gemm(const __grid_constant__ Arguments a) {
  constexpr int BYTES = stage_bytes<W, T>(), STAGES = stages<W, T>();
  const uint32_t shared = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % T::WARPS_N * (16 * T::I), token = warp / T::WARPS_N * (8 * T::J);
  const auto copy_weights = [&](int stage, const Cursor& at) {
    W::template copy<T>(shared + stage * BYTES + T::X, a, at.work.n * T::ROWS, at.step);
  };
  const auto copy_tokens = [&](int stage, const Cursor& at) {
    copy_rows<T::TOKENS, T::THREADS>(shared + stage * BYTES, a.x, at.work.m * T::TOKENS, a.m, a, at.step);
  };
  StreamK schedule(a.tiles_n, a.tiles_m, a.steps, a.raster, a.whole, blockIdx.x, gridDim.x);
  Cursor ahead(schedule);
  let_next_begin();
  Cursor early = ahead;
  for (int stage = 0; stage < STAGES - 1 && early.more; ++stage, early.advance()) copy_weights(stage, early);
  wait_for_previous();
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (ahead.more) copy_tokens(stage, ahead), ahead.advance();
    copy_async_commit();
  }
  Sums<W, T> sums;
  Numbers<W, T> numbers, next;
  int stage = 0;
  for (Work work; schedule.next(work);) {
    const int n = work.n * T::ROWS + row + lane / 4;
#pragma unroll
    for (int i = 0; i < T::I * T::J * 4; ++i) sums[i / 4][i % 4] = 0;
    next.load(a, n, work.begin);
#pragma unroll 1
    for (int step = work.begin; step < work.end; ++step) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();  // all have their part of this stage, and are done with the one before
      if (ahead.more) {
        const int free = stage == 0 ? STAGES - 1 : stage - 1;
        copy_weights(free, ahead), copy_tokens(free, ahead), ahead.advance();
      }
      copy_async_commit();
      numbers = next;
      if (step + 1 < work.end) next.load(a, n, step + 1);
      add_step<W, T>(sums, a, shared + stage * BYTES, row, token, numbers);
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    auto& parts = reinterpret_cast<std::remove_all_extents_t<Sums<W, T>>(&)[T::I * T::J * 4]>(sums);
    if (!join_sums(parts, schedule, work, a.steps, a.parts, a.flags, threadIdx.x, T::THREADS)) continue;
    store<W, T>(sums, a, n, work.m * T::TOKENS + token + lane % 4 * 2);
  }
}

// -- the host's side -------------------------------------------------------------------------------------------------------------------

// How a launch goes. raster: tiles of tokens that are worked on side by side; early: it begins while the kernel before it ends.
struct How {
  int64_t rows, tokens, blocks, raster;
  bool whole, early;
  cudaStream_t stream;
};

template <class W, class T>
void launch(Arguments a, int64_t room, int64_t flags, const How& how) {
  a.tiles_n = (a.n + T::ROWS - 1) / T::ROWS, a.tiles_m = (a.m + T::TOKENS - 1) / T::TOKENS;
  a.raster = int(how.raster);
  const int64_t tiles = int64_t(a.tiles_n) * a.tiles_m, blocks = std::min<int64_t>(how.blocks, how.whole ? tiles : tiles * a.steps);
  a.whole = how.whole || tiles % blocks == 0;
  const int64_t wanted = a.whole ? 0 : blocks * T::ROWS * T::TOKENS;
  STD_TORCH_CHECK(room >= wanted, "parts hold ", room, " sums; ", wanted, " are wanted");
  STD_TORCH_CHECK(flags >= blocks, "there are ", flags, " flags for ", blocks, " blocks");
  constexpr int shared = stages<W, T>() * stage_bytes<W, T>();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(T::THREADS), config.dynamicSmemBytes = shared, config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = how.early;
  check(cudaFuncSetAttribute(gemm<W, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  check(cudaLaunchKernelEx(&config, gemm<W, T>, a));
}

template <class W>
void launch_for(const Arguments& a, int64_t room, int64_t flags, const How& how) {
  const auto is = [&](int rows, int tokens) { return how.rows == rows && how.tokens == tokens; };
  if (is(64, 16)) return launch<W, Tile<64, 16, 4, 1>>(a, room, flags, how);
  if (is(64, 32)) return launch<W, Tile<64, 32, 4, 1>>(a, room, flags, how);
  if (is(64, 64)) return launch<W, Tile<64, 64, 2, 2>>(a, room, flags, how);
  constexpr int MOST = W::GROUPS ? 64 : 128;  // tokens: with more, scales of groups and sums do not fit into the registers
  if (is(128, MOST)) return launch<W, Tile<128, MOST, 4, 2>>(a, room, flags, how);
  STD_TORCH_CHECK(false, "tiles have 64 rows and 16, 32 or 64 tokens, or 128 and ", MOST, ", not ", how.rows, " and ", how.tokens);
}

Arguments arguments(const Tensor& x, const Tensor& rows, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, const Tensor& out, const std::optional<Tensor>& parts, const Tensor& flags) {
  Arguments a{operands(x, rows, weight, scales, zeros, bias, out)};
  if (parts) a.parts = parts->mutable_data_ptr();
  a.flags = static_cast<int*>(flags.mutable_data_ptr()), a.steps = int(x.size(1) / STEP);
  return a;
}

int64_t room(const std::optional<Tensor>& parts) { return parts ? parts->numel() : 0; }

// out [M, N] from codes of x [M, K'] and their rows' numbers [2, M]; weight int8 [N, K'], scales [N].
void s8_w8_mma(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
               std::optional<Tensor> parts, Tensor flags, int64_t tile_rows, int64_t tokens, int64_t blocks, int64_t raster, bool whole,
               bool early, int64_t stream) {
  Arguments a = arguments(x, rows, weight, scales, zeros, bias, out, parts, flags);
  set_w8(a, x, weight, scales);
  launch_for<W8>(a, room(parts), flags.numel(), {tile_rows, tokens, blocks, raster, whole, early, reinterpret_cast<cudaStream_t>(stream)});
}

// Likewise; weight uint8 [tiles, N, 16, 32 or 64], scales and zeros [runs, N].
void s8_w4_mma(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
               std::optional<Tensor> parts, Tensor flags, int64_t tiles_per_run, int64_t tile_rows, int64_t tokens, int64_t blocks,
               int64_t raster, bool whole, bool early, int64_t stream) {
  Arguments a = arguments(x, rows, weight, scales, zeros, bias, out, parts, flags);
  const bool groups = set_w4(a, x, weight, scales, tiles_per_run);
  const int64_t words = weight.size(2) / 16;
  a.flip = (zeros ? 0 : 0x08080808) | (groups ? HIGHEST : 0);
  const How how{tile_rows, tokens, blocks, raster, whole, early, reinterpret_cast<cudaStream_t>(stream)};
  if (!groups && words == 4) return launch_for<W4<4, false>>(a, room(parts), flags.numel(), how);
  if (words == 4) return launch_for<W4<4, true>>(a, room(parts), flags.numel(), how);
  if (words == 2) return launch_for<W4<2, true>>(a, room(parts), flags.numel(), how);
  launch_for<W4<1, true>>(a, room(parts), flags.numel(), how);
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "s8_w8_mma(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!) flags, int tile_rows, int tokens, int blocks, int raster, bool whole, bool early, int stream) -> ()");
  m.def(
      "s8_w4_mma(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!) flags, int tiles_per_run, int tile_rows, int tokens, int blocks, int raster, bool whole, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("s8_w8_mma", TORCH_BOX(&qk::s8_w8_mma));
  m.impl("s8_w4_mma", TORCH_BOX(&qk::s8_w4_mma));
}
