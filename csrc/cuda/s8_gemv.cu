// y = x · Ŵᵀ with activations in int8, at most eight rows of them, and codes of 8 or 4 bits, from Turing on: a lane multiplies four codes by
// four at a time (dp4a).
//
// Operands are those of s8_mma.cu. A lane loads 16 bytes of four rows of the weight in a tile, while it multiplies those of the tile before,
// and finds what they want of x in shared memory. With one scale a row sums are int32 to the end, and results have the bits that they have
// there; else a lane's part of a tile is int32, times 16, and float32 what it adds to its tiles before. Sums of lanes and of warps are added
// in their order, and those of blocks by the last one to come, in theirs: how K is cut depends on the weight's shape and the GPU alone, so that
// a row's result is the same whatever other rows there are.
//
// Source: dp4a for few rows as in llama.cpp; the last block adds up: the threadFenceReduction sample. Written from scratch.

#include "cuda/s8.cuh"
#include "cuda/unpack.cuh"

#include <algorithm>
#include <type_traits>

namespace qk {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LOADS = 4;  // of a lane in a tile: 16 bytes of a row each
constexpr int TOKENS_MOST = 8, HALF = 4, SHARED_MOST = 48 << 10;  // what a block may have everywhere

// flip: of 4-bit codes in groups, the bit that makes them signed where zero points are not; else what makes them positive.
struct Arguments : Operands {
  void* parts;                    // [blocks of K, M, N] sums, or null where K is whole
  int* counters;                  // of every run of rows: blocks that came; 0 before and after
  int64_t tile_bytes;             // of the weight: from one to the next
  int row_bytes, columns;         // likewise; of x: K'
  int run, blocks_n, blocks_k;    // run: tiles of a block
};

// -- weights. A row of a tile has PIECES of 16 bytes. CHUNKS: of what a piece has to multiply, SPAN words of x that are neighbours ----------

// Of 8 bits, row after row.
struct W8 {
  static constexpr int COLUMNS = 128, PIECES = 8, CHUNKS = 1, SPAN = 4;
  static constexpr bool GROUPS = false;
  __device__ static uint32_t codes(const uint32_t (&words)[4], int, int e, uint32_t) { return words[e]; }
};

// Of 4 bits in tiles of 32 WORDS columns: see qkernels/kernels/triton/s8_w4_gemm.py. GROUPS: each tile's sums have a scale.
template <int WORDS, bool GROUPS_>
struct W4 {
  static constexpr int COLUMNS = 32 * WORDS, PIECES = WORDS, CHUNKS = 2 * WORDS, SPAN = 4 / WORDS;
  static constexpr bool GROUPS = GROUPS_;
  // Four columns: 16 chunk + 4 (SPAN piece + e) and the next three. In groups, the codes times 16.
  __device__ static uint32_t codes(const uint32_t (&words)[4], int chunk, int e, uint32_t flip) {
    const uint32_t word = words[chunk / 2 + e * WORDS];
    if constexpr (GROUPS) return upper_halves(chunk % 2 ? word : word << 4, flip);
    else return lower_halves(chunk % 2 ? word >> 4 : word, flip);
  }
};

template <class W>
constexpr int APART = 32 / W::PIECES;  // rows from one load of a lane to the next
template <class W>
constexpr int ROWS = LOADS * APART<W>;  // of a block

// -- what a lane has of a tile -----------------------------------------------------------------------------------------------------------

template <class W>
struct Part {
  uint32_t words[LOADS][4], scales[LOADS], zeros[LOADS];  // scales as they are stored

  // rows: of the weight, those of this lane; of those beyond the last, the last one again, whose results nobody stores. from: of row 0.
  __device__ void load(const Arguments& a, const uint8_t* from, const int (&rows)[LOADS], int tile) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const uint4 v = load_once(from + int64_t(rows[i]) * a.row_bytes);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
    if constexpr (!W::GROUPS) return;
    const int64_t run = min(a.tiles_per_run == 1 ? tile : tile / a.tiles_per_run, a.runs - 1);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      scales[i] = stored(a.scales, run * a.n + rows[i], a.scale_kind);
      zeros[i] = a.zeros ? a.zeros[run * a.n + rows[i]] : 0;
    }
  }
  // The products with x, which begins at an address of shared memory; all of TOKENS, or a half that has them.
  template <int TOKENS>
  __device__ void multiply(int (&sums)[LOADS][TOKENS], uint32_t x, int tokens, uint32_t flip) const {
#pragma unroll
    for (int chunk = 0; chunk < W::CHUNKS; ++chunk) {
      uint32_t codes[LOADS][W::SPAN];
#pragma unroll
      for (int i = 0; i < LOADS * W::SPAN; ++i) codes[i / W::SPAN][i % W::SPAN] = W::codes(words[i / W::SPAN], chunk, i % W::SPAN, flip);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        if (t == HALF && tokens <= HALF) break;
        uint32_t of_x[W::SPAN];
        load_shared(of_x, x + t * W::COLUMNS + 16 * chunk);
#pragma unroll
        for (int i = 0; i < LOADS * W::SPAN; ++i) {
          sums[i / W::SPAN][t] = dot4(codes[i / W::SPAN][i % W::SPAN], of_x[i % W::SPAN], sums[i / W::SPAN][t]);
        }
      }
    }
  }
};

template <class W, int TOKENS>
using Sums = std::conditional_t<W::GROUPS, float, int>[LOADS][TOKENS];

// sums += the products of a tile, of x at an address of shared memory.
template <class W, int TOKENS>
__device__ void add_tile(Sums<W, TOKENS>& sums, const Arguments& a, const Part<W>& part, uint32_t x) {
  if constexpr (W::GROUPS) {
    int products[LOADS][TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      int total = 0;  // of x, where zero points are not 8
#pragma unroll
      for (int chunk = 0; chunk < W::CHUNKS && a.zeros; ++chunk) {
        uint32_t of_x[W::SPAN];
        load_shared(of_x, x + t * W::COLUMNS + 16 * chunk);
#pragma unroll
        for (int e = 0; e < W::SPAN; ++e) total = dot4(of_x[e], 0x01010101, total);
      }
#pragma unroll
      for (int i = 0; i < LOADS; ++i) products[i][t] = WHOLE - 16 * (int(part.zeros[i]) - 8) * total;
    }
    part.multiply(products, x, a.m, a.flip);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const float scale = scale_of(part.scales[i], a.scale_kind);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) sums[i][t] = fmaf(float_of(products[i][t]) - float_of(WHOLE), scale, sums[i][t]);
    }
  } else {
    part.multiply(sums, x, a.m, a.flip);
  }
}

// -- a block's work ----------------------------------------------------------------------------------------------------------------------

// Begins to copy what the run's tiles want of x: of one tile all tokens, then the next.
template <class W, int TOKENS>
__device__ void copy_x(const Arguments& a, uint32_t to, int begin, int count) {
  constexpr int EACH = W::COLUMNS / 16;
  for (int i = threadIdx.x; i < count * EACH; i += THREADS) {
#pragma unroll 1
    for (int token = 0; token < a.m; ++token) {
      const uint8_t* from = a.x + int64_t(token) * a.columns + begin * W::COLUMNS + 16 * i;
      copy_async(to + (i / EACH * TOKENS + token) * W::COLUMNS + i % EACH * 16, from, true);
    }
  }
  copy_async_commit();
}

// Leaves in shared memory the sums of a warp, after those of the warps before it: [tokens, rows].
template <class W, int TOKENS>
__device__ void leave(Sums<W, TOKENS>& sums, uint32_t base) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      auto& sum = sums[i][t];
#pragma unroll
      for (int lanes = 1; lanes < W::PIECES; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      const uint32_t to = base + ((warp * TOKENS + t) * ROWS<W> + i * APART<W> + lane / W::PIECES) * 4;
      if (lane % W::PIECES == 0) store_shared_u32(to, reinterpret_cast<const uint32_t&>(sum));
    }
  }
}

template <class Sum>
__device__ void store(const Arguments& a, int m, int n, Sum sum) {
  constexpr bool GROUPS = std::is_same_v<Sum, float>;
  Row row;
  row.load(a, n, GROUPS);
  if constexpr (GROUPS) row.scale = 1.0f / 16;
  else sum -= row.zero * int(a.rows[a.m + m]);
  const float y = fmaf(float(sum) * row.scale, a.rows[m], row.bias);
  const int64_t at = int64_t(m) * a.n + n;
  if (a.out_kind == Kind::f32) static_cast<float*>(a.out)[at] = y;
  else static_cast<uint16_t*>(a.out)[at] = uint16_t(a.out_kind == Kind::bf16 ? Pair<bf16>::of(y, 0) : Pair<f16>::of(y, 0));
}

template <class W, int TOKENS>
__global__ void __launch_bounds__(THREADS, 3 - W::GROUPS - (TOKENS > 1)) gemv(const __grid_constant__ Arguments a) {
  using Sum = std::remove_all_extents_t<Sums<W, TOKENS>>;
  const uint32_t shared = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_n = blockIdx.x % a.blocks_n, block_k = blockIdx.x / a.blocks_n;
  const int first = block_n * ROWS<W>, begin = block_k * a.run, count = min(a.run, a.tiles - begin);
  int rows[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; ++i) rows[i] = min(first + i * APART<W> + lane / W::PIECES, a.n - 1);

  Part<W> part, next;
  int tile = begin + warp;
  const uint8_t* from = a.weight + tile * a.tile_bytes + lane % W::PIECES * 16;
  const auto load = [&](Part<W>& to) {
    if (tile < begin + count) to.load(a, from, rows, tile);
    tile += WARPS, from += WARPS * a.tile_bytes;
  };
  load(part);
  let_next_begin();
  wait_for_previous();
  copy_x<W, TOKENS>(a, shared, begin, count);
  copy_async_wait<0>();
  __syncthreads();

  Sums<W, TOKENS> sums = {};
  uint32_t x = shared + warp * TOKENS * W::COLUMNS + lane % W::PIECES * W::SPAN * 4;
#pragma unroll 1
  for (int left = count - warp; left > 0; left -= WARPS, x += WARPS * TOKENS * W::COLUMNS) {
    load(next);
    add_tile<W, TOKENS>(sums, a, part, x);
    part = next;
  }

  __syncthreads();  // nobody reads x any more
  leave<W, TOKENS>(sums, shared);
  __syncthreads();
  const auto of_all = [&](auto f) {  // results of this thread: token, row of the block
    for (int i = threadIdx.x; i < ROWS<W> * a.m; i += THREADS) {
      if (first + i % ROWS<W> < a.n) f(i / ROWS<W>, i % ROWS<W>);
    }
  };
  const auto place = [&](int block, int token, int r) {
    return static_cast<Sum*>(a.parts) + (int64_t(block) * a.m + token) * a.n + first + r;
  };
  of_all([&](int token, int r) {
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      uint32_t raw[1];
      load_shared(raw, shared + ((w * TOKENS + token) * ROWS<W> + r) * 4);
      sum += reinterpret_cast<const Sum&>(raw[0]);
    }
    if (a.parts) __stcg(place(block_k, token, r), sum);
    else store(a, token, first + r, sum);
  });
  if (!a.parts || !comes_last(a.counters + block_n, a.blocks_k)) return;
  of_all([&](int token, int r) {
    Sum sum = 0;
    for (int b = 0; b < a.blocks_k; ++b) sum += __ldcg(place(b, token, r));
    store(a, token, first + r, sum);
  });
}

// -- the host's side ---------------------------------------------------------------------------------------------------------------------

// early: the launch begins while the kernel before it ends.
struct How {
  bool early;
  cudaStream_t stream;
};

template <class W, int TOKENS>
void launch(const Arguments& a, const How& how) {
  const int x = a.run * W::COLUMNS * TOKENS, sums = WARPS * TOKENS * ROWS<W> * 4;
  static_assert(WARPS * TOKENS * ROWS<W> * 4 <= SHARED_MOST);
  STD_TORCH_CHECK(x <= SHARED_MOST, "s8_gemv: runs of ", a.run, " tiles want ", x, " bytes of shared memory; a block may have ", SHARED_MOST);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(a.blocks_n * a.blocks_k)), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = std::max(x, sums), config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = how.early;
  check(cudaLaunchKernelEx(&config, gemv<W, TOKENS>, a));
}

// tiles: of K; run: those of a block.
template <class W>
void launch_for(Arguments a, const std::optional<Tensor>& parts, const std::optional<Tensor>& counters, int64_t run, const How& how) {
  STD_TORCH_CHECK(a.m <= TOKENS_MOST && run > 0, "s8_gemv: x has ", a.m, " rows, and a block ", run, " tiles; at most 8 rows are taken");
  a.run = int(std::min<int64_t>(run, a.tiles));
  a.blocks_n = (a.n + ROWS<W> - 1) / ROWS<W>, a.blocks_k = (a.tiles + a.run - 1) / a.run;
  if (a.blocks_k > 1) {
    STD_TORCH_CHECK(parts && parts->numel() >= int64_t(a.blocks_k) * a.m * a.n && counters && counters->numel() >= a.blocks_n, "s8_gemv: ",
                    a.blocks_k, " blocks of K want parts of as many results, and ", a.blocks_n, " counters");
    a.parts = parts->mutable_data_ptr(), a.counters = static_cast<int*>(counters->mutable_data_ptr());
  }
  (a.m == 1 ? launch<W, 1> : launch<W, TOKENS_MOST>)(a, how);
}

// out [M, N] from codes of x [M, K'] and their rows' numbers [2, M]; weight int8 [N, K'], scales [N]; parts [blocks of K, M, N] of 32 bits
// and counters int32, a 0 for every ROWS.
void s8_w8_gemv(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
                std::optional<Tensor> parts, std::optional<Tensor> counters, int64_t run, bool early, int64_t stream) {
  Arguments a{operands(x, rows, weight, scales, zeros, bias, out)};
  set_w8(a, x, weight, scales);
  a.columns = int(x.size(1)), a.tiles = a.columns / W8::COLUMNS;
  a.tile_bytes = W8::COLUMNS, a.row_bytes = a.columns;
  launch_for<W8>(a, parts, counters, run, {early, reinterpret_cast<cudaStream_t>(stream)});
}

// Likewise; weight uint8 [tiles, N, 16, 32 or 64], scales and zeros [runs, N].
void s8_w4_gemv(Tensor x, Tensor rows, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias, Tensor out,
                std::optional<Tensor> parts, std::optional<Tensor> counters, int64_t tiles_per_run, int64_t run, bool early,
                int64_t stream) {
  Arguments a{operands(x, rows, weight, scales, zeros, bias, out)};
  const bool groups = set_w4(a, x, weight, scales, tiles_per_run);
  a.flip = groups ? (zeros ? HIGHEST : 0) : (zeros ? 0 : 0x08080808);
  a.columns = int(x.size(1)), a.row_bytes = int(weight.size(2)), a.tile_bytes = int64_t(a.n) * a.row_bytes;
  auto launch = groups ? launch_for<W4<4, true>> : launch_for<W4<4, false>>;
  if (a.row_bytes < 64) launch = a.row_bytes == 32 ? launch_for<W4<2, true>> : launch_for<W4<1, true>>;
  launch(a, parts, counters, run, {early, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "s8_w8_gemv(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!)? counters, int run, bool early, int stream) -> ()");
  m.def(
      "s8_w4_gemv(Tensor x, Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!)? counters, int tiles_per_run, int run, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("s8_w8_gemv", TORCH_BOX(&qk::s8_w8_gemv));
  m.impl("s8_w4_gemv", TORCH_BOX(&qk::s8_w4_gemv));
}
