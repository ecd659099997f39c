// y = x · Ŵᵀ with 16-bit activations, at most eight rows of them, and codes of 4 and 8 bits; from sm_75 on, bfloat16 from sm_80.
//
// The weight is the left operand of a warp's products, unpacked in registers from the layout of qkernels/kernels/triton/layout.py; the rows
// of x, eight or fewer, are the right one's eight columns. So a product costs less than unpacking for it, and its sums are float32 of exact
// products; what columns beyond the last row of x give is left. Scales are applied to the sums of their columns, a float zero point to the
// sum of x there, for which there is one more product, with ones.
//
// A block has a run of K and, one after the other, every so many 32 rows of the weight. Its warps take the run's tiles in turns, 16 bytes of
// four rows a lane: the words of two or three tiles are on their way before anything else is done, and of one, of these rows or the next,
// while another is multiplied. Rows of x wait in shared memory for all of it; scales of the next rows are copied there while these are multiplied. Sums of
// warps are added in their order, and those of blocks by the last one to come, in theirs: how K is cut depends on the weight's shape and
// the GPU alone, so that a row's result is the same whatever other rows there are.
//
// In the gated form there are two weights, of which a block has 16 rows each: rows 16 and up of the block are the second's. Their sums are
// next to each other in the end, and the result is silu(first) · second, rounded once.
//
// An H200's memory brings 36 weights of 4 bits in a clock of one processor: 3.6 instructions of a lane for each. Here they are 2.1, of
// floats 2.8 and of codebooks 3.5, where a scale serves a tile (benchmarks/results/static/cuda.md); unpacking alone takes 1.4, 2.1 and 2.9.
//
// Source: weights as the left operand: Machete and humming; the last block adds up: the threadFenceReduction sample. Written from scratch.

#include "cuda/tile.cuh"
#include "cuda/unpack.cuh"

#include <algorithm>
#include <optional>

namespace qk {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROWS = 32;  // of the weight, in a block
constexpr int TOKENS = 8;  // rows of x
constexpr int ROW_BYTES = 64;  // of the weight, in a tile
constexpr int NUMBERS = 4 * ROWS;  // bytes of a number of every row
constexpr int APART = ROWS + 4;  // sums of two tokens lie so far apart: in other banks of shared memory
constexpr int WARP_SUMS = 4 * TOKENS * APART;  // bytes
constexpr int RESERVED = 1024;  // bytes of shared memory that the driver takes for every block

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool TURING = true;
#else
constexpr bool TURING = false;
#endif

struct Weight {
  const uint8_t* codes;  // [tiles, N, 64]
  const void *scales, *zeros;  // [runs, rows_of_scales, per_tile]; zeros of 8 bits, in the type of the scales, or null
  const float* tensor_scale;  // [1] or null
  const void* bias;  // [N] or null
};

struct Arguments {
  Weight of[2];  // two where it is `gated`, of one format and shape
  const float* table;  // [16] or null
  const uint16_t* x;  // [M, K]
  uint16_t* out;  // [M, N]
  float* parts;  // [blocks of K, M, rows], or null where K is whole
  int* counters;  // of every 32 rows: blocks that came; 0 before and after
  int64_t stride;  // of x
  int m, n, k, tiles, run, blocks_k;  // run: tiles of a block
  int blocks_n, at_once;  // blocks of rows; those that are worked on at a time, by a block each
  int rows;  // of both weights
  int64_t half;  // bytes of weights from row 0 of a block to row 16
  int rows_of_scales, per_tile, rows_per_scale;
  uint64_t runs_of_tile;  // tile t has run t · runs_of_tile / 2^32 of the scales, without the fraction
  int zero;  // of all codes, where zeros is null or what is taken away afterwards
  Kind scale_kind, bias_kind;
  bool aligned;  // 16 bytes of x can be copied at a time
  bool gated;

  __device__ bool zeros() const { return of[0].zeros; }
  // Which weight row `r` of a block is of, and where it is there.
  __device__ const Weight& weight(int r) const { return of[gated && r >= ROWS / 2]; }
  __device__ int row(int block, int r) const { return gated ? block * (ROWS / 2) + r % (ROWS / 2) : block * ROWS + r; }
};

// Where a block has what, in shared memory: of scales and zero points two sets, for these rows and the next.
struct Room {
  uint32_t x, row_bytes, numbers, set_bytes, sums, bytes;

  // parts: scales of a tile, as they are stored here
  __host__ __device__ Room(const Arguments& a, int columns, int parts, uint32_t base) {
    x = base, row_bytes = a.run * columns * 2 + 16;  // rows begin in different banks
    numbers = x + a.m * row_bytes, set_bytes = a.run * parts * NUMBERS * (a.of[0].zeros ? 2 : 1);
    sums = numbers + (a.at_once < a.blocks_n ? 2 : 1) * set_bytes;
    bytes = sums + WARPS * WARP_SUMS - base;
  }
};

// Scales and zero points of a block of rows, on their way to where its warps take them: of a tile, a part of it and g those of rows g,
// g + 8, g + 16 and g + 24. The words that have them are copied there, and become floats in their place, by the same thread. Integer zero
// points lie there as Codes wants them, others times the scale.
template <class Codes, int PARTS, bool FLOAT_ZERO>
struct Numbers {
  static_assert(WARPS % PARTS == 0);
  const Arguments& a;
  const int block, begin, parts;  // of rows; of the run: its first tile, and parts of all its tiles
  const uint32_t scales, zeros;  // where they go

  // f(where a number of this lane goes, past the first; the weight's place for it), for all of them.
  template <class F>
  __device__ void each(F f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t every = a.rows_of_scales * a.per_tile;
    const uint32_t last = min(a.row(block, lane), a.n - 1), row = a.rows_per_scale == 1 ? last : last / a.rows_per_scale;
    const uint32_t own = row * a.per_tile + warp % PARTS * a.per_tile / PARTS;
#pragma unroll 1
    for (int part = warp; part < parts; part += WARPS) {  // every warp has one part, of every so many tiles
      f(part * NUMBERS + lane % 8 * 16 + lane / 8 * 4, ((begin + part / PARTS) * a.runs_of_tile >> 32) * every + own);
    }
  }
  __device__ Place scale_at(int64_t i) const { return place_of(a.weight(threadIdx.x % 32).scales, i, a.scale_kind); }
  __device__ Place zero_at(int64_t i) const { return place_of(a.weight(threadIdx.x % 32).zeros, i, FLOAT_ZERO ? a.scale_kind : Kind::u8); }

  __device__ void copy() const {
    each([&](uint32_t to, int64_t i) {
      copy_async_word(scales + to, scale_at(i).word);
      if (a.zeros()) copy_async_word(zeros + to, zero_at(i).word);
    });
    copy_async_commit();
  }
  // After the copies have arrived.
  __device__ void convert() const {
    of_kind(a.scale_kind, [&](auto kind) {
      each([&](uint32_t to, int64_t i) {
        uint32_t word[1];
        load_shared(word, scales + to);
        const float scale = number_of(word[0] >> scale_at(i).shift, kind);
        store_shared_f32(scales + to, scale);
        if (!FLOAT_ZERO && !a.zeros()) return;
        load_shared(word, zeros + to);
        const uint32_t zero = word[0] >> zero_at(i).shift;
        store_shared_f32(zeros + to, FLOAT_ZERO ? scale * number_of(zero, kind) : __uint_as_float(Codes::zero(zero & 0xff)));
      });
    });
  }
};

// Begins to copy the run's columns of x, and zeros beyond the last one.
__device__ inline void copy_x(const Arguments& a, const Room& room, int begin, int columns) {
#pragma unroll 1
  for (int i = 8 * threadIdx.x; i < columns; i += 8 * THREADS) {
    const uint16_t* from = a.x + begin + i;
    uint32_t to = room.x + 2 * i;
    const int there = a.k - begin - i;
    if (a.aligned && (there >= 8 || there <= 0)) {
#pragma unroll 1
      for (int token = 0; token < a.m; ++token, from += a.stride, to += room.row_bytes) copy_async(to, from, there > 0);
      continue;
    }
#pragma unroll 1
    for (int token = 0; token < a.m; ++token, from += a.stride, to += room.row_bytes) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = (2 * j < there ? from[2 * j] : 0) | (2 * j + 1 < there ? from[2 * j + 1] : 0) << 16;
      store_shared(to, pairs);
    }
  }
  copy_async_commit();
}

// The lane's 16 bytes of rows g, g + 8, g + 16 and g + 24 of a block of `rows`: in all but the last, without a look. half: from row 0 to row 16.
__device__ inline void load_words(uint32_t (&words)[4][4], const uint8_t* from, int64_t half, int rows) {
  const auto load = [&](int i) {
    const uint4 v = load_once(from + (i / 2) * half + i % 2 * 8 * ROW_BYTES);
    words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
  };
  if (rows >= ROWS) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load(i);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (int(threadIdx.x % 32 / 4) + 8 * i < rows) load(i);
    }
  }
}

// Those of four rows.
__device__ inline void load_numbers(float (&to)[4], uint32_t at) {
  uint32_t raw[4];
  load_shared(raw, at);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(raw[i]);
}

template <class T, class Codes, int PARTS, bool FLOAT_ZERO>
struct Gemv {
  static constexpr bool CODEBOOK = std::is_same_v<Codes, Table<T>>, FLOATS = std::is_same_v<Codes, Table<T, true>>;
  static constexpr bool LIGHT = !CODEBOOK && !FLOATS && !FLOAT_ZERO, FULL = std::is_same_v<T, bf16> && Codes::COLUMNS == 128 && FLOAT_ZERO;
  static constexpr bool HEAVY = !LIGHT && PARTS > 1 && (TURING || FULL || (PARTS == 8 && !FLOATS));
  // Blocks of a processor, and tiles of a warp that are on their way: no registers of the loop are spilled.
  static constexpr int RESIDENT = HEAVY ? 1 : 2, DEPTH = LIGHT && PARTS == 1 ? 3 : 2;

  // sums [2][4] += the products of a tile: of rows g, g + 8 and g + 16, g + 24, each for tokens 2 c and 2 c + 1.
  // x, scales, zeros: the tile's, for this lane; zero_of: of the four rows, what `zeros` changes.
  __device__ static void add_tile(float (&sums)[2][4], const Codes& codes, const uint32_t (&words)[4][4], uint32_t (&zero_of)[4],
                                  uint32_t x, uint32_t scales, uint32_t zeros, bool has_zeros) {
    constexpr int STEPS = Codes::COLUMNS / 16, PER_WORD = STEPS / 4, EACH = STEPS / PARTS;
    float parts[2][4], total[4];
    uint32_t right[4];
    const uint32_t one = Pair<T>::of(1, 1), ones[4] = {one, one, one, one};
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {  // 16 columns
      if (j % EACH == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) parts[0][i] = parts[1][i] = total[i] = 0;
        if (!FLOAT_ZERO && has_zeros) load_shared(zero_of, zeros + j / EACH * NUMBERS);
      }
      if (j % 2 == 0) load_matrices(right, x + 32 * j);
      const uint32_t columns[2] = {right[j % 2 * 2], right[j % 2 * 2 + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t upper[Codes::PAIRS], lower[Codes::PAIRS];
        codes.unpack(upper, words[2 * half][j / PER_WORD], zero_of[2 * half]);
        codes.unpack(lower, words[2 * half + 1][j / PER_WORD], zero_of[2 * half + 1]);
        const int s = 2 * (j % PER_WORD);
        const uint32_t left[4] = {upper[s], lower[s], upper[s + 1], lower[s + 1]};
        multiply(parts[half], left, columns, T());
      }
      if (FLOAT_ZERO) multiply(total, ones, columns, T());
      if (j % EACH == EACH - 1) apply(sums, parts, total, scales + j / EACH * NUMBERS, zeros + j / EACH * NUMBERS);
    }
  }

  // The scales, and float zero points, of some columns.
  __device__ static void apply(float (&sums)[2][4], const float (&parts)[2][4], const float (&total)[4], uint32_t scales, uint32_t zeros) {
    float of_row[4];
    load_numbers(of_row, scales);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += of_row[i / 2] * parts[i / 4][i % 4];
    if constexpr (FLOAT_ZERO) {
      load_numbers(of_row, zeros);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] -= of_row[i / 2] * total[i % 2];
    }
  }
};

// Leaves the warps' sums where all can read them.
__device__ inline void leave(const float (&sums)[2][4], uint32_t base) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = 8 * (i / 2) + lane / 4, token = lane % 4 * 2 + i % 2;
    store_shared_f32(base + warp * WARP_SUMS + 4 * (token * APART + r), sums[i / 4][i % 4]);
  }
}

// Adds up those of row `lane` of a block of rows, and of one token a warp.
__device__ inline float sum_of_warps(uint32_t base, int tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0;
  if (warp >= tokens) return sum;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += load_shared_f32(base + w * WARP_SUMS + 4 * (warp * APART + lane));
  return sum;
}

// Leaves a block's sum; whether it is the last to do so, which then has that of all blocks.
__device__ inline bool sum_of_blocks(float& sum, const Arguments& a, int block_n, int block_k, int64_t at, bool inside) {
  const int64_t all = int64_t(a.m) * a.rows;
  if (inside) __stcg(a.parts + block_k * all + at, sum);
  if (!comes_last(a.counters + block_n, a.blocks_k)) return false;
  sum = 0;
  for (int i = 0; inside && i < a.blocks_k; ++i) sum += __ldcg(a.parts + i * all + at);
  return true;
}

// The result of row `lane` of a block of rows and of token `warp`, from the sum over this block's columns.
template <class T>
__device__ void finish(const Arguments& a, float sum, int block_n, int block_k) {
  const int token = threadIdx.x / 32, lane = threadIdx.x % 32, place = block_n * ROWS + lane, n = a.row(block_n, lane);
  const bool inside = place < a.rows && token < a.m;
  if (a.parts && !sum_of_blocks(sum, a, block_n, block_k, int64_t(token) * a.rows + place, inside)) return;
  const Weight& of = a.weight(lane);
  if (inside && of.tensor_scale) sum *= *of.tensor_scale;
  if (inside && of.bias) sum += number(of.bias, n, a.bias_kind);
  if (a.gated) sum = sum / (1 + expf(-sum)) * __shfl_xor_sync(~0u, sum, ROWS / 2);
  if (inside && (!a.gated || lane < ROWS / 2)) a.out[int64_t(token) * a.n + n] = uint16_t(Pair<T>::of(sum, 0));
}

template <class T, class Codes, int PARTS, bool FLOAT_ZERO>
__device__ void run(const Arguments& a) {
  using G = Gemv<T, Codes, PARTS, FLOAT_ZERO>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int block_n = blockIdx.x % a.at_once;
  const int block_k = blockIdx.x / a.at_once, begin = block_k * a.run, count = min(a.run, a.tiles - begin);
  const int own = (count - warp + WARPS - 1) / WARPS;  // tiles of this warp
  const Room room(a, Codes::COLUMNS, PARTS, shared_memory());
  const auto words_of = [&](int block) { return a.of[0].codes + (int64_t(begin + warp) * a.n + a.row(block, 0)) * ROW_BYTES + lane * 16; };
  const auto rows_of = [&](int block) { return a.rows - block * ROWS; };
  const uint32_t zeros_beyond = count * PARTS * NUMBERS;
  const auto numbers_of = [&](int block, uint32_t at) {
    return Numbers<Codes, PARTS, FLOAT_ZERO>{a, block, begin, count * PARTS, at, at + zeros_beyond};
  };

  constexpr int DEPTH = G::DEPTH;
  uint32_t words[DEPTH][4][4] = {};
  const int64_t turn = int64_t(WARPS) * a.n * ROW_BYTES;
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    if (d < own) load_words(words[d], words_of(block_n) + d * turn, a.half, rows_of(block_n));
  }
  let_next_begin();
  uint32_t set = room.numbers;
  numbers_of(block_n, set).copy();
  const Codes codes(a.table);
  wait_for_previous();
  copy_x(a, room, begin * Codes::COLUMNS, count * Codes::COLUMNS);
  uint32_t zero_of[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) zero_of[i] = Codes::zero(a.zero);
  for (;;) {
    copy_async_wait<0>();
    numbers_of(block_n, set).convert();
    __syncthreads();  // x and numbers are there, and nobody reads the sums of the rows before
    const int next = block_n + a.at_once;
    const bool more = next < a.blocks_n;
    const uint32_t next_set = 2 * room.numbers + room.set_bytes - set;
    if (more) numbers_of(next, next_set).copy();
    const uint8_t *from = words_of(block_n) + DEPTH * turn, *after = words_of(next);
    float sums[2][4] = {};
    uint32_t x = room.x + min(lane % 8, a.m - 1) * room.row_bytes + lane / 8 * 16 + warp * Codes::COLUMNS * 2;
    uint32_t scales = set + warp * PARTS * NUMBERS + lane / 4 * 16;
#pragma unroll 1
    for (int left = own; left > 0; from += DEPTH * turn) {
#pragma unroll
      for (int d = 0; d < DEPTH && left > 0; ++d) {
        G::add_tile(sums, codes, words[d], zero_of, x, scales, scales + zeros_beyond, a.zeros());
        const bool here = left > DEPTH;  // the tile that comes into its place is of these rows
        if (here || more) load_words(words[d], (here ? from : after) + d * turn, a.half, rows_of(here ? block_n : next));
        --left, x += WARPS * Codes::COLUMNS * 2, scales += WARPS * PARTS * NUMBERS;
      }
    }
    leave(sums, room.sums);
    __syncthreads();
    finish<T>(a, sum_of_warps(room.sums, a.m), block_n, block_k);
    if (!more) return;
    block_n = next, set = next_set;
  }
}

template <class T, class Codes, int PARTS, bool FLOAT_ZERO>
__global__ void __launch_bounds__(THREADS, Gemv<T, Codes, PARTS, FLOAT_ZERO>::RESIDENT) gemv(const __grid_constant__ Arguments a) {
  if constexpr (TURING && std::is_same_v<T, bf16>) __trap();  // it has no such products
  else run<T, Codes, PARTS, FLOAT_ZERO>(a);
}

// -- the host's side ---------------------------------------------------------------------------------------------------------------------

// processors: of the GPU; shared: bytes that a block may have; early: the launch begins while the kernel before it ends.
struct How {
  int64_t processors, shared;
  bool early;
  cudaStream_t stream;
};

template <class T, class Codes, int PARTS, bool FLOAT_ZERO>
void launch(Arguments a, const How& how) {
  const auto kernel = gemv<T, Codes, PARTS, FLOAT_ZERO>;
  const auto shared = [&] { return int64_t(Room(a, Codes::COLUMNS, PARTS, 0).bytes); };
  // As many blocks as find room at once, and all with as many rows, if there are more.
  const int64_t resident =
      std::clamp<int64_t>((how.shared + RESERVED) / (shared() + RESERVED), 1, Gemv<T, Codes, PARTS, FLOAT_ZERO>::RESIDENT);
  const int64_t room = how.processors * resident, turns = (int64_t(a.blocks_n) * a.blocks_k + room - 1) / room;
  a.at_once = int((a.blocks_n + turns - 1) / turns);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(a.at_once * a.blocks_k)), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared();
  config.stream = how.stream;
  STD_TORCH_CHECK(int64_t(config.dynamicSmemBytes) <= how.shared, "w4_gemv: runs of ", a.run, " tiles want ", config.dynamicSmemBytes,
                  " bytes of shared memory; a block may have ", how.shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = how.early;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared)));
  check(cudaLaunchKernelEx(&config, kernel, a));
}

template <class T, class Codes, bool FLOAT_ZERO>
void launch_parts(const Arguments& a, const How& how) {
  if (a.per_tile == 1) return launch<T, Codes, 1, FLOAT_ZERO>(a, how);
  if constexpr (Codes::COLUMNS == 128) {
    if (a.per_tile == 8) return launch<T, Codes, 8, FLOAT_ZERO>(a, how);
  }
  STD_TORCH_CHECK(a.per_tile == 2 || a.per_tile == 4, "w4_gemv: a row has ", a.per_tile, " scales in a tile");
  launch<T, Codes, 4, FLOAT_ZERO>(a, how);
}

template <class T>
void launch_codes(const Arguments& a, int64_t bits, bool mirrored, bool float_zero, const How& how) {
  if (a.table && mirrored) return launch_parts<T, Table<T, true>, false>(a, how);
  if (a.table) return launch_parts<T, Table<T>, false>(a, how);
  const auto of_4 = float_zero ? launch_parts<T, Int4<T>, true> : launch_parts<T, Int4<T>, false>;
  const auto of_8 = float_zero ? launch_parts<T, Int8<T>, true> : launch_parts<T, Int8<T>, false>;
  (bits == 4 ? of_4 : of_8)(a, how);
}

const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// A weight of an op. Shapes: codes [tiles, 16 N] int32, scales [runs, rows, per_tile], zeros likewise; tensor_scale [1] float32; bias [N].
struct Layer {
  const Tensor &codes, &scales;
  const std::optional<Tensor>&zeros, &tensor_scale, &bias;
};

// How a launch cuts a product; of the table's second half, whether it is minus the first.
struct Format {
  int64_t bits;
  bool mirrored;
  int64_t scale_kind, zero, rows_per_scale, tiles_per_scale, run;
};

void multiply(const Tensor& x, const Layer& layer, const Layer* up, const std::optional<Tensor>& table, const Tensor& out,
              const std::optional<Tensor>& parts, const std::optional<Tensor>& counters, const Format& f, const How& how) {
  const int64_t m = x.size(0), k = x.size(1), n = out.size(1), tiles = layer.codes.size(0), columns = f.bits == 4 ? 128 : 64;
  STD_TORCH_CHECK(f.bits == 4 || (f.bits == 8 && !table), "w4_gemv: codes have 4 or 8 bits, those of a table 4; not ", f.bits);
  STD_TORCH_CHECK((x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16) && out.scalar_type() == x.scalar_type(),
                  "w4_gemv: x and out are float16, or bfloat16");
  STD_TORCH_CHECK(0 < m && m <= TOKENS && out.size(0) == m, "w4_gemv: x has ", m, " rows, out ", out.size(0), "; at most 8 are taken");
  STD_TORCH_CHECK(tiles < 1 << 16, "w4_gemv: K = ", k, " are too many columns");
  STD_TORCH_CHECK(x.stride(1) == 1 && out.is_contiguous(), "w4_gemv: rows of x and out have to be dense");
  Arguments a{};
  a.gated = up;
  for (const Layer* each : {&layer, up}) {
    if (!each) break;
    const Tensor &w = each->codes, &s = each->scales;
    STD_TORCH_CHECK(w.is_contiguous() && w.size(0) == tiles && w.size(1) == n * 16 && k <= tiles * columns && k > (tiles - 1) * columns,
                    "w4_gemv: weight [", w.size(0), ", ", w.size(1), "] does not fit x [", m, ", ", k, "] and out [", m, ", ", n, "]");
    a.of[each != &layer] = {static_cast<const uint8_t*>(w.const_data_ptr()), s.const_data_ptr(), data_of(each->zeros),
                            static_cast<const float*>(data_of(each->tensor_scale)), data_of(each->bias)};
    if (each->bias) a.bias_kind = kind_of(*each->bias);
  }
  const Tensor& scales = layer.scales;
  if (up) {
    STD_TORCH_CHECK(n % (ROWS / 2) == 0, "w4_swiglu: N = ", n, " is no multiple of ", ROWS / 2);
    const auto like = [](const std::optional<Tensor>& a, const std::optional<Tensor>& b) { return a.has_value() == b.has_value(); };
    const bool same = up->scales.size(0) == scales.size(0) && up->scales.size(1) == scales.size(1) &&
                      up->scales.size(2) == scales.size(2) && up->scales.scalar_type() == scales.scalar_type() &&
                      like(up->zeros, layer.zeros) && (!up->zeros || up->zeros->scalar_type() == layer.zeros->scalar_type());
    STD_TORCH_CHECK(same, "w4_swiglu: both weights have scales and zero points of one type and shape");
    STD_TORCH_CHECK(!layer.bias || !up->bias || layer.bias->scalar_type() == up->bias->scalar_type(), "w4_swiglu: biases are of one type");
  }
  a.table = static_cast<const float*>(data_of(table));
  a.x = static_cast<const uint16_t*>(x.const_data_ptr()), a.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  a.stride = x.stride(0), a.aligned = x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  a.m = int(m), a.n = int(n), a.k = int(k), a.tiles = int(tiles), a.run = int(std::min(f.run, tiles)), a.zero = int(f.zero);
  a.rows = a.gated ? 2 * a.n : a.n, a.half = a.gated ? a.of[1].codes - a.of[0].codes : ROWS / 2 * ROW_BYTES;
  a.blocks_n = (a.rows + ROWS - 1) / ROWS, a.blocks_k = (a.tiles + a.run - 1) / a.run;
  a.rows_of_scales = int(scales.size(1)), a.per_tile = int(scales.size(2));
  a.rows_per_scale = int(f.rows_per_scale), a.scale_kind = Kind(f.scale_kind);
  a.runs_of_tile = (int64_t(1) << 32) / std::min(f.tiles_per_scale, tiles) + 1;  // a little more, for fewer than 2^16 tiles not by much
  if (a.blocks_k > 1) {
    STD_TORCH_CHECK(parts && parts->numel() >= a.blocks_k * m * a.rows && counters && counters->numel() >= a.blocks_n,
                    "w4_gemv: ", a.blocks_k, " blocks of K want parts of as many results, and ", a.blocks_n, " counters");
    a.parts = static_cast<float*>(parts->mutable_data_ptr()), a.counters = static_cast<int*>(counters->mutable_data_ptr());
  }
  const bool float_zero = layer.zeros && layer.zeros->scalar_type() != ScalarType::Byte;
  const auto launch = x.scalar_type() == ScalarType::BFloat16 ? launch_codes<bf16> : launch_codes<f16>;
  launch(a, f.bits, f.mirrored, float_zero, how);
}

// out [M, N] = x [M, K] · Ŵᵀ + bias. table [16] float32; parts [blocks of K, M, N] float32, counters int32, a 0 for every 32 rows.
void w4_gemv(Tensor x, Tensor weight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> tensor_scale,
             std::optional<Tensor> table, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> parts,
             std::optional<Tensor> counters, int64_t bits, bool mirrored, int64_t scale_kind, int64_t zero, int64_t rows_per_scale,
             int64_t tiles_per_scale, int64_t run, int64_t processors, int64_t shared, bool early, int64_t stream) {
  multiply(x, {weight, scales, zeros, tensor_scale, bias}, nullptr, table, out, parts, counters,
           {bits, mirrored, scale_kind, zero, rows_per_scale, tiles_per_scale, run},
           {processors, shared, early, reinterpret_cast<cudaStream_t>(stream)});
}

// out [M, N] = silu(x · Ĝᵀ + bias) · (x · Ûᵀ + bias), of two weights of one format; parts [blocks of K, M, 2 N], and twice as many counters.
void w4_swiglu(Tensor x, Tensor gate, Tensor gate_scales, std::optional<Tensor> gate_zeros, std::optional<Tensor> gate_tensor_scale,
               std::optional<Tensor> gate_bias, Tensor up, Tensor up_scales, std::optional<Tensor> up_zeros,
               std::optional<Tensor> up_tensor_scale, std::optional<Tensor> up_bias, std::optional<Tensor> table, Tensor out,
               std::optional<Tensor> parts, std::optional<Tensor> counters, int64_t bits, bool mirrored, int64_t scale_kind, int64_t zero,
               int64_t rows_per_scale, int64_t tiles_per_scale, int64_t run, int64_t processors, int64_t shared, bool early,
               int64_t stream) {
  const Layer second{up, up_scales, up_zeros, up_tensor_scale, up_bias};
  multiply(x, {gate, gate_scales, gate_zeros, gate_tensor_scale, gate_bias}, &second, table, out, parts, counters,
           {bits, mirrored, scale_kind, zero, rows_per_scale, tiles_per_scale, run},
           {processors, shared, early, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "w4_gemv(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? table, Tensor? bias, Tensor(a!) out,"
      " Tensor(b!)? parts, Tensor(c!)? counters, int bits, bool mirrored, int scale_kind, int zero, int rows_per_scale,"
      " int tiles_per_scale, int run, int processors, int shared, bool early, int stream) -> ()");
  m.def(
      "w4_swiglu(Tensor x, Tensor gate, Tensor gate_scales, Tensor? gate_zeros, Tensor? gate_tensor_scale, Tensor? gate_bias, Tensor up,"
      " Tensor up_scales, Tensor? up_zeros, Tensor? up_tensor_scale, Tensor? up_bias, Tensor? table, Tensor(a!) out, Tensor(b!)? parts,"
      " Tensor(c!)? counters, int bits, bool mirrored, int scale_kind, int zero, int rows_per_scale, int tiles_per_scale, int run,"
      " int processors, int shared, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("w4_gemv", TORCH_BOX(&qk::w4_gemv));
  m.impl("w4_swiglu", TORCH_BOX(&qk::w4_swiglu));
}
