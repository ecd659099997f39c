// y = x · Ŵᵀ with 16-bit activations and codes of 4 or 8 bits, on Ampere and newer: weights are the left operand of a warp's products, 16 rows
// of them against 8 tokens, unpacked and scaled in registers.
//
// A step is a tile of the layout in qkernels/kernels/triton/layout.py, of which a lane loads 16 bytes of a row: just what it multiplies. So
// weights go to registers, a step ahead, past shared memory, where each would be read once; no other thread wants them. What all warps of a
// block want lies there: tokens, which cp.async brings 64 columns at a time, and the numbers of rows, unpacked once by one thread each.
// Sums are float32. A grid works through the tiles as stream_k.h cuts them, and parts of a tile are added in the order of K.
//
// Source: the products, copies and fragment order of Marlin; unpacking by magic numbers, FasterTransformer's; stream-K, Osama et al. 2023.
// Written from scratch.

#include "cuda/tile.cuh"
#include "cuda/unpack.cuh"

#include <algorithm>
#include <optional>

namespace qk {
namespace {

constexpr int ROWS = 128;  // of the weight, in a tile
constexpr int ROW_BYTES = 64;  // of the weight, in a step
constexpr int STAGES = 4;  // of tokens, 64 columns each
constexpr int STAGE_COLUMNS = 64;  // 128 bytes of a token, in pieces of 16 that are swizzled: no bank is asked twice at a time
constexpr int TOKEN_BYTES = 128;

struct Arguments {
  const uint8_t* x;  // [M, K] of 16 bits
  const uint8_t* weight;  // [steps, N, 64]
  const void *scales, *zeros;  // [runs, rows_of_scales, 1 << shift]; zeros or null
  const float *tensor_scale, *table;  // or null
  const void* bias;  // [N] or null
  uint16_t* out;  // [M, N]
  float* parts;
  int* flags;
  int64_t x_bytes;  // from one token to the next
  Kind scale_kind, zero_kind, bias_kind;
  int zero;  // of all codes, where zeros is null
  int m, n, k, steps, tiles_n, tiles_m, raster;
  int shift, steps_per_run;  // a row has 1 << shift scales in a step; steps that share one
  int rows_of_scales, rows_per_scale;
  bool whole, alike;  // no tile is cut; all tiles of tokens are cut alike, each by a row of the grid
};

// What turns the codes of a group into weights: (code - zero) · (scale + rest) + shift, with one rounding of the 16-bit type that counts.
// rest: what the type lacks of the scale; shift: what the zero point has behind the point.
struct alignas(16) Numbers {
  uint32_t zero, scale, rest, shift;
};

template <class T, class Codes>
__device__ Numbers numbers_of(const Arguments& a, Raw raw_scale, Raw raw_zero) {
  const float scale = number_of(raw_scale.bits(), a.scale_kind);
  const float zero = a.zeros ? number_of(raw_zero.bits(), a.zero_kind) : float(a.zero);
  const float near = fminf(fmaxf(rintf(zero), 0.0f), 128 / Codes::COLUMNS == 1 ? 15.0f : 255.0f);
  const uint32_t pair = Pair<T>::of(scale, scale);
  const float rest = scale - Pair<T>::floats(pair).x, shift = (near - zero) * scale;
  return {Codes::zero(uint32_t(near)), pair, Pair<T>::of(rest, rest), Pair<T>::of(shift, shift)};
}

template <class T>
__device__ uint32_t weights_of(uint32_t codes, const Numbers& of) {
  return times_plus<T>(codes, of.scale, times_plus<T>(codes, of.rest, of.shift));
}

template <class T, class Codes, int TOKENS>
struct Tile {
  static constexpr int BLOCKS = TOKENS >= 64 ? 2 : 1;  // of 16 rows, for a warp: with two, tokens are read half as often
  static constexpr int THREADS = ROWS / (16 * BLOCKS) * 32;
  static constexpr int PIECES = Codes::COLUMNS / STAGE_COLUMNS;  // stages of a step
  static constexpr int X = TOKENS * TOKEN_BYTES;  // bytes of a stage
  static constexpr int SUMS = BLOCKS * TOKENS / 8;  // products that run side by side

  const Arguments& a;
  const uint32_t shared, numbers;  // where stages are, and twice the numbers of a step
  const uint32_t thread, lane;
  const int row, own;  // of the tile: the first of this warp's, and of this lane's
  int first_row = 0, first_token = 0;
  float sums[SUMS][4];
  uint32_t words[BLOCKS][2][4];
  Numbers of[BLOCKS][2];

  __device__ explicit Tile(const Arguments& a)
      : a(a),
        shared(shared_memory()),
        numbers(shared + STAGES * X),
        thread(threadIdx.x),
        lane(thread % 32),
        row(int(thread / 32 * 16 * BLOCKS)),
        own(row + int(lane / 4)) {}

  // -- from global memory: rows beyond the last are the last one again, whose results nobody stores

  // A stage has a group of copies, be it empty.
  __device__ void begin_stage(int stage, int last) const {
    if (stage < last) copy_tokens(stage * STAGE_COLUMNS, shared + uint32_t(stage) % STAGES * X);
    copy_async_commit();
  }
  __device__ void copy_tokens(int column, uint32_t to) const {
    constexpr int ALL = TOKENS * 8;
    if (ALL < THREADS && thread >= ALL) return;
    const uint32_t piece = thread % 8;
    const int token = first_token + int(thread / 8), at = column + int(piece) * 8;
    const uint8_t* from = a.x + token * a.x_bytes + at * 2;
    to += thread / 8 * TOKEN_BYTES + (piece ^ thread / 8 % 8) * 16;
#pragma unroll
    for (int i = 0; i < ALL; i += THREADS) copy_async(to + i * 16, from + i / 8 * a.x_bytes, token + i / 8 < a.m && at < a.k);
  }

  __device__ void load_words(uint32_t (&to)[BLOCKS][2][4], int step) const {
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      const int n = min(first_row + own + 8 * i, a.n - 1);
      const uint4 four = load_once(a.weight + (int64_t(step) * a.n + n) * ROW_BYTES + lane % 4 * 16);
      uint32_t (&w)[4] = to[i / 2][i % 2];
      w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
    }
  }

  struct RawNumbers {
    Raw scale, zero;
  };
  // Number i of a step, of row i >> shift.
  __device__ RawNumbers load_numbers(int step, int i) const {
    const int n = min(first_row + (i >> a.shift), a.n - 1), run = a.steps_per_run == 1 ? step : step / a.steps_per_run;
    const int row = a.rows_per_scale == 1 ? n : n / a.rows_per_scale;
    const int64_t at = ((int64_t(run) * a.rows_of_scales + row) << a.shift) + (i & ((1 << a.shift) - 1));
    return {raw_at(a.scales, at, a.scale_kind), a.zeros ? raw_at(a.zeros, at, a.zero_kind) : Raw{}};
  }
  __device__ RawNumbers load_first(int step) const {
    return int(thread) < ROWS << a.shift ? load_numbers(step, int(thread)) : RawNumbers{};
  }

  // All of a step; this thread's first is there already.
  __device__ void store_numbers(RawNumbers raw, int step) const {
#pragma unroll 1
    for (int i = int(thread); i < ROWS << a.shift;) {
      const Numbers n = numbers_of<T, Codes>(a, raw.scale, raw.zero);
      store_shared(numbers + (((step & 1) * ROWS << a.shift) + i) * sizeof(Numbers), {n.zero, n.scale, n.rest, n.shift});
      if ((i += THREADS) < ROWS << a.shift) raw = load_numbers(step, i);
    }
  }

  // -- products

  // Of all rows, the numbers of a group of a step.
  __device__ void load_group(int step, int group) {
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      uint32_t n[4];
      load_shared(n, numbers + ((((step & 1) * ROWS + own + 8 * i) << a.shift) + group) * sizeof(Numbers));
      of[i / 2][i % 2] = {n[0], n[1], n[2], n[3]};
    }
  }

  // The left operands of product p of a step, 16 columns: of all rows, a part of a word.
  static constexpr int PRODUCTS = Codes::PAIRS / 2;  // of a word
  __device__ void unpack(uint32_t (&left)[BLOCKS][4], const Codes& codes, int step, int p) {
    const bool held = BLOCKS == 1 && p > 0 && a.shift == 0;  // with two, registers are wanted for sums
    if (!held) load_group(step, (p << a.shift) / (4 * PRODUCTS));
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      const Numbers& n = of[i / 2][i % 2];
      uint32_t pairs[Codes::PAIRS];
      codes.unpack(pairs, words[i / 2][i % 2][p / PRODUCTS], n.zero);
#pragma unroll
      for (int h = 0; h < 2; ++h) left[i / 2][2 * h + i % 2] = weights_of<T>(pairs[p % PRODUCTS * 2 + h], n);
    }
  }

  // 16 columns of a stage.
  __device__ void multiply_columns(const uint32_t (&left)[BLOCKS][4], uint32_t stage, int columns) {
    const uint32_t piece = 2 * columns + lane / 8 % 2, token = lane / 16 * 8 + lane % 8;
    const uint32_t at = stage + token * TOKEN_BYTES + (piece ^ lane % 8) * 16;
#pragma unroll
    for (int t = 0; t < TOKENS / 16; ++t) {
      uint32_t right[2][2];
      load_matrices(reinterpret_cast<uint32_t (&)[4]>(right), at + t * 16 * TOKEN_BYTES);
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; ++i)
        multiply(sums[(i % BLOCKS * TOKENS / 8) + 2 * t + i / BLOCKS], left[i % BLOCKS], right[i / BLOCKS], T());
    }
  }

  // The sums of steps [begin, end) of a tile.
  __device__ void multiply_steps(const Codes& codes, const Work& work, int token_tile) {
    first_row = work.n * ROWS, first_token = token_tile * TOKENS;
#pragma unroll
    for (int i = 0; i < 4 * SUMS; ++i) sums[i / 4][i % 4] = 0;
    const int last = work.end * PIECES;
    int stage = work.begin * PIECES, ahead = stage;
    load_words(words, work.begin);
    store_numbers(load_first(work.begin), work.begin);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) begin_stage(ahead++, last);
#pragma unroll 1
    for (int step = work.begin; step < work.end; ++step) {
      uint32_t next[BLOCKS][2][4];
      RawNumbers raw;
      const int after = min(step + 1, work.end - 1);
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece, ++stage) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the stage is there for all, and nobody reads the one before
        begin_stage(ahead++, last);
        if (piece == (BLOCKS == 1 ? 0 : PIECES - 1)) load_words(next, after), raw = load_first(after);  // when there are registers
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          uint32_t left[BLOCKS][4];
          unpack(left, codes, step, 4 * piece + p);
          multiply_columns(left, shared + uint32_t(stage) % STAGES * X, p);
        }
      }
      if (step + 1 < work.end) store_numbers(raw, step + 1);
#pragma unroll
      for (int i = 0; i < 8 * BLOCKS; ++i) words[i / 8][i / 4 % 2][i % 4] = next[i / 8][i / 4 % 2][i % 4];
    }
    copy_async_wait<0>();
    __syncthreads();  // the next tile begins with stages and numbers that nobody reads
  }

  // -- results: 8 rows and 8 tokens are turned, and stored two rows of a token at a time

  __device__ void store() const {
    const float factor = a.tensor_scale ? *a.tensor_scale : 1.0f;
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; ++i) {
      const int block = first_row + row + 8 * i;
      const float bias = a.bias && first_row + own + 8 * i < a.n ? number(a.bias, first_row + own + 8 * i, a.bias_kind) : 0.0f;
#pragma unroll
      for (int t = 0; t < TOKENS / 8; ++t) {
        const float* s = sums[i / 2 * TOKENS / 8 + t] + i % 2 * 2;
        const uint32_t pair = turn(Pair<T>::of(fmaf(s[0], factor, bias), fmaf(s[1], factor, bias)));
        const int m = first_token + 8 * t + int(lane / 4), n = block + int(lane % 4 * 2);
        if (m < a.m && n < a.n) store_pair(a.out + int64_t(m) * a.n + n, pair, n + 1 < a.n);
      }
    }
  }
  __device__ void store_pair(uint16_t* to, uint32_t pair, bool both) const {
    if (a.n % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      to[0] = uint16_t(pair);
      if (both) to[1] = uint16_t(pair >> 16);
    }
  }
};

template <class T, class Codes, int TOKENS>
__global__ void __launch_bounds__(Tile<T, Codes, TOKENS>::THREADS, TOKENS > 16 ? 2 : 3) gemm(const __grid_constant__ Arguments a) {
  using This = Tile<T, Codes, TOKENS>;
  let_next_begin();
  This tile(a);
  const Codes codes(a.table);
  StreamK schedule(a.tiles_n, a.alike ? 1 : a.tiles_m, a.steps, a.raster, a.whole, blockIdx.x, gridDim.x);
  const int64_t others = int64_t(blockIdx.y) * gridDim.x;  // blocks of other tiles of tokens
  for (Work work; schedule.next(work);) {
    tile.multiply_steps(codes, work, work.m + blockIdx.y);
    float (&sums)[4 * This::SUMS] = reinterpret_cast<float (&)[4 * This::SUMS]>(tile.sums);
    if (join_sums(sums, schedule, work, a.steps, a.parts + others * ROWS * TOKENS, a.flags + others, threadIdx.x, This::THREADS))
      tile.store();
  }
}

// -- the host's side ---------------------------------------------------------------------------------------------------------------------

// How a launch goes. blocks: for every tile of tokens where all are cut alike; early: it begins while the kernel before it ends.
struct How {
  int64_t blocks;
  bool early;
  cudaStream_t stream;
};

template <class T, class Codes, int TOKENS>
void launch(Arguments a, const How& how, int64_t room, int64_t flags) {
  using This = Tile<T, Codes, TOKENS>;
  a.tiles_n = (a.n + ROWS - 1) / ROWS, a.tiles_m = (a.m + TOKENS - 1) / TOKENS;
  const int64_t grids = a.alike ? a.tiles_m : 1, tiles = int64_t(a.tiles_n) * (a.alike ? 1 : a.tiles_m);
  const int64_t blocks = std::min<int64_t>(how.blocks, a.whole ? tiles : tiles * a.steps);
  a.whole = a.whole || tiles % blocks == 0;
  STD_TORCH_CHECK(a.whole || room >= grids * blocks * ROWS * TOKENS, "w4_mma: parts hold ", room, " sums; ", grids * blocks * ROWS * TOKENS,
                  " are wanted");
  STD_TORCH_CHECK(a.whole || flags >= grids * blocks, "w4_mma: there are ", flags, " flags for ", grids * blocks, " blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks), unsigned(grids)), config.blockDim = dim3(This::THREADS);
  config.dynamicSmemBytes = STAGES * This::X + (2 * ROWS << a.shift) * sizeof(Numbers);
  config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = how.early ? 1 : 0;
  check(cudaFuncSetAttribute(gemm<T, Codes, TOKENS>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)));
  check(cudaLaunchKernelEx(&config, gemm<T, Codes, TOKENS>, a));
}

using Launch = void(Arguments, const How&, int64_t, int64_t);

// Tables and 8 bits have two sizes of tiles, for the sake of the time that compiling takes.
template <class T>
Launch* launch_of(int64_t bits, bool table, int64_t tokens) {
  STD_TORCH_CHECK(
      (bits == 4 || (bits == 8 && !table)) && (tokens == 16 || tokens == 64 || ((tokens == 32 || tokens == 128) && bits == 4 && !table)),
      "w4_mma: there is no tile of ", tokens, " tokens for ", bits, " bits");
  if (table) return tokens == 16 ? launch<T, Table<T>, 16> : launch<T, Table<T>, 64>;
  if (bits == 8) return tokens == 16 ? launch<T, Int8<T>, 16> : launch<T, Int8<T>, 64>;
  switch (tokens) {
    case 16: return launch<T, Int4<T>, 16>;
    case 32: return launch<T, Int4<T>, 32>;
    case 64: return launch<T, Int4<T>, 64>;
    default: return launch<T, Int4<T>, 128>;
  }
}

template <class T = void>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// out [M, N] = x [M, K] · Ŵᵀ + bias. Shapes: weight [steps, 16 N] int32, scales [runs, rows, per step] of `kind`, zeros likewise or uint8; table
// [16], tensor_scale [1] float32. parts: room for a tile's sums of every block, not wanted where no tile is cut; flags: an int32 0 of each.
void w4_mma(Tensor x, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> tensor_scale,
            std::optional<Tensor> table, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> parts, Tensor flags, int64_t bits,
            int64_t kind, int64_t zero, int64_t steps_per_run, int64_t rows_per_scale, int64_t tokens, int64_t blocks, int64_t raster,
            bool whole, bool alike, bool early, int64_t stream) {
  const int64_t m = x.size(0), k = x.size(1), n = out.size(1), steps = weight.size(0), columns = bits == 4 ? 128 : 64,
                groups = scales.size(2);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(1) == n * 16 && k <= steps * columns && out.size(0) == m && out.is_contiguous(),
                  "w4_mma: weight [", steps, ", ", weight.size(1), "] does not fit x [", m, ", ", k, "] and out [", m, ", ", n, "]");
  STD_TORCH_CHECK(k % 8 == 0 && x.stride(1) == 1 && x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  "w4_mma: K = ", k, ", the stride of x, ", x.stride(0), ", and its address are wanted in pieces of 16 bytes");
  STD_TORCH_CHECK(scales.size(1) == (n + rows_per_scale - 1) / rows_per_scale &&
                      (groups == 1 || groups == 2 || groups == 4 || (groups == 8 && bits == 4)),
                  "w4_mma: scales [", scales.size(0), ", ", scales.size(1), ", ", groups, "] do not fit N = ", n);
  Arguments a{};
  a.x = static_cast<const uint8_t*>(x.const_data_ptr()), a.x_bytes = x.stride(0) * 2;
  a.weight = static_cast<const uint8_t*>(weight.const_data_ptr()), a.scales = scales.const_data_ptr();
  a.zeros = pointer(zeros), a.tensor_scale = pointer<float>(tensor_scale), a.table = pointer<float>(table), a.bias = pointer(bias);
  a.out = static_cast<uint16_t*>(out.mutable_data_ptr()), a.flags = static_cast<int*>(flags.mutable_data_ptr());
  a.parts = parts ? static_cast<float*>(parts->mutable_data_ptr()) : nullptr;
  a.scale_kind = Kind(kind), a.zero = int(zero);
  a.zero_kind = zeros && zeros->scalar_type() != ScalarType::Byte ? kind_of(*zeros) : Kind::u8,
  a.bias_kind = bias ? kind_of(*bias) : Kind::f32;
  a.m = int(m), a.n = int(n), a.k = int(k), a.steps = int(steps), a.raster = int(raster), a.steps_per_run = int(steps_per_run);
  a.rows_of_scales = int(scales.size(1)), a.rows_per_scale = int(rows_per_scale);
  a.shift = groups == 8 ? 3 : int(groups) / 2, a.whole = whole, a.alike = alike;
  const auto run =
      x.scalar_type() == ScalarType::BFloat16 ? launch_of<bf16>(bits, bool(table), tokens) : launch_of<f16>(bits, bool(table), tokens);
  run(a, {blocks, early, reinterpret_cast<cudaStream_t>(stream)}, parts ? parts->numel() : 0, flags.numel());
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "w4_mma(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? table, Tensor? bias, Tensor(a!) out,"
      " Tensor(b!)? parts, Tensor(c!) flags, int bits, int kind, int zero, int steps_per_run, int rows_per_scale, int tokens, int blocks, "
      "int raster, bool "
      "whole,"
      " bool alike, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("w4_mma", TORCH_BOX(&qk::w4_mma)); }
