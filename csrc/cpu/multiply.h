// The kernels, written once over the 16-row vectors of a simd_*.h. Included inside each level's anonymous namespace.
//
// Weights come straight from their packed form (few rows) or from a scratch panel that is unpacked once for many rows.
#include "cpu/tile.h"
#include "cpu/unpack.h"
#include "cpu/rows.h"
#include "cpu/probe.h"
#include "cpu/search.h"

constexpr int64_t ROW_CHUNK = 512;  // rows whose accumulators lie in scratch at a time
constexpr int64_t SCRATCH_ACC = ROW_CHUNK * WIDE * PANEL * 4;
constexpr int64_t SCRATCH_SCALES = MAX_CHUNK * WIDE * PANEL * 4;  // and as much for the shifts, and the columns of pairs
constexpr int64_t CHUNK_CODES = 16 << 10;  // bytes of packed codes: half of L1
constexpr int64_t PAIR_CODES = 16 << 10;  // bytes of unpacked codes: likewise
constexpr int64_t FIRST_CODES = 8 << 10;  // of the next panels, which a tile that has all rows fetches: what lies behind, the machine does
constexpr int64_t SCRATCH_WEIGHTS =
    WIDE * MAX_BLOCK * PANEL * 4;  // bytes: a block of floats, or several of shorter numbers; near L1's size

struct Job {  // rows m0…m1 times PANELS panels from `panel` on, the last of them before p1
  const Weight& w;
  const Activations& x;
  const Output& out;
  int64_t m0, m1, panel, p1;
  char* scratch;
  int64_t rows() const { return m1 - m0; }
  float* acc() const { return reinterpret_cast<float*>(scratch); }
  float* scales() const { return reinterpret_cast<float*>(scratch + SCRATCH_ACC); }
  int32_t* columns() const { return reinterpret_cast<int32_t*>(scratch + SCRATCH_ACC + 2 * SCRATCH_SCALES); }
  uint8_t* unpacked() const { return reinterpret_cast<uint8_t*>(scratch + SCRATCH_ACC + 3 * SCRATCH_SCALES); }
};

// Fill in the blocks from chunk.first on, as many as fit most_k columns but one at least; decode their scales where they serve many tiles.
template <bool CENTRED, int PANELS>
void next_chunk(const Job& j, Block block, int64_t most_k, bool once, Chunk& chunk) {
  const bool shifted = j.w.zeros != nullptr || (CENTRED && j.w.centre != 0);
  chunk.panel = j.panel, chunk.scales = j.scales(), chunk.shifts = shifted ? chunk.scales + SCRATCH_SCALES / 4 : nullptr;
  chunk.k0 = block.k0, chunk.k = chunk.count = 0;
  do {
    chunk.blocks[chunk.count++] = block;
    chunk.k += block.length;
    block = block_after(j.w.geometry, block);
  } while (chunk.first + chunk.count < j.w.geometry.blocks && chunk.count < MAX_CHUNK && chunk.k + block.length <= most_k);
  chunk.decoded = !once;
  if (chunk.decoded) decode_scales<CENTRED, PANELS>(j.w, chunk, 0, chunk.count);
}

template <class Source, int PANELS>
inline Ahead codes_after(const Job& j, const Chunk& chunk) {  // those of the next chunk, or the first of the next panels
  const Geometry& g = j.w.geometry;
  const bool last = chunk.first + chunk.count == g.blocks, once = j.rows() <= MAX_ROWS<Source, PANELS>;
  if (last ? j.panel + 2 * PANELS > j.p1 : once) return {};
  const int64_t bytes_per_k = 2 * j.w.bits, stride = g.k_padded * bytes_per_k, k = last ? 0 : chunk.k0 + chunk.k;
  const uint8_t* at = j.w.codes + (j.panel + (last ? PANELS : 0)) * stride + k * bytes_per_k;
  int64_t bytes = (g.k_padded - k < chunk.k ? g.k_padded - k : chunk.k) * bytes_per_k;
  if (once && bytes > FIRST_CODES) bytes = FIRST_CODES;
  return {at, at + bytes, stride, 0};
}

// In chunks of up to most_k columns, which all the rows take before the next: what of the weight they use again is in the cache.
template <class Source, int PANELS, class Codes>
void by_chunks(const Job& j, int64_t most_k, const Codes& codes_of) {
  const Geometry& g = j.w.geometry;
  __builtin_memset(j.acc(), 0, size_t(j.rows() * PANELS * PANEL * 4));
  Chunk chunk;
  Block block = first_block(g);
  for (chunk.first = 0; chunk.first < g.blocks; chunk.first += chunk.count) {
    next_chunk<!is_s8<Source>, PANELS>(j, block, most_k, j.rows() <= MAX_ROWS<Source, PANELS>, chunk);
    codes_of(chunk);
    chunk.ahead = codes_after<Source, PANELS>(j, chunk);
    rows_of_tiles<Source, PANELS>(j.w, j.x, chunk, j.m0, j.m1, j.acc());
    block = block_after(g, chunk.blocks[chunk.count - 1]);
  }
  write_rows(j.w, j.out, j.m0, j.m1, j.panel, PANELS, j.acc());
}

template <class Source, int PANELS>
void direct(const Job& j) {  // weights straight from their packed form
  const int64_t bytes_per_k = 2 * j.w.bits, stride = j.w.geometry.k_padded * bytes_per_k;
  const int64_t most_k = j.rows() <= MAX_ROWS<Source, PANELS> ? j.w.geometry.k_padded : CHUNK_CODES / (bytes_per_k * PANELS);
  by_chunks<Source, PANELS>(
      j, most_k, [&](Chunk& chunk) { chunk.codes = j.w.codes + j.panel * stride + chunk.k0 * bytes_per_k, chunk.panel_stride = stride; });
}

// Of codes that are dear to decode: tiles of half the width and twice the height decode half as often.
template <class Source, int PANELS>
void direct_tall(const Job& j) {
  if constexpr (PANELS > 1)
    if (j.rows() > MAX_ROWS<Source, PANELS>) {
      Job half = j;
      direct<Source, PANELS / 2>(half);
      half.panel += PANELS / 2;
      return direct<Source, PANELS / 2>(half);
    }
  direct<Source, PANELS>(j);
}

template <class Unpacked, int PANELS>
void through_scratch(const Job& j) {
  const int64_t bytes_per_k = 2 * j.w.bits, stride = j.w.geometry.k_padded * bytes_per_k;
  constexpr int64_t unpacked_per_k = Unpacked::TILE_BYTES / TILE_K;
  by_chunks<Unpacked, PANELS>(j, SCRATCH_WEIGHTS / (unpacked_per_k * WIDE), [&](Chunk& chunk) {
    chunk.codes = j.unpacked(), chunk.panel_stride = chunk.k * unpacked_per_k;
    for (int p = 0; p < PANELS; p++)
      unpack(Unpacked{}, j.w, j.w.codes + (j.panel + p) * stride + chunk.k0 * bytes_per_k, chunk.k, j.unpacked() + p * chunk.panel_stride);
  });
}

// Up to a few rows (FEW_…, of the level), unpacking in registers again for every tile is cheaper than a trip through scratch.

struct ByS8 {
  template <int PANELS>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 8) direct<S8Bytes, PANELS>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_S8) integers ? direct<S8Nibbles, PANELS>(j) : direct<S8Table, PANELS>(j);
    else if (j.w.bits <= 4 && integers) through_scratch<S8Unpacked, PANELS>(j);
    else through_scratch<S8Bytes, PANELS>(j);
  }
};

#ifdef QK_PAIRS
struct ByPairs {  // through scratch
  template <int PANELS>
  static void panels(const Job& j) {
    const int64_t bytes_per_k = 2 * j.w.bits, stride = j.w.geometry.k_padded * bytes_per_k;
    by_chunks<S8Pairs, PANELS>(j, PAIR_CODES / (PANEL * PANELS), [&](Chunk& chunk) {
      chunk.codes = j.unpacked(), chunk.panel_stride = chunk.k * PANEL, chunk.columns = j.columns();
      int32_t* column = j.columns();
      for (int64_t b = 0; b < chunk.count; b++)
        for (int p = 0; p < PANELS; p++, column += PANEL) {
          const auto& [group, k0, length, end] = chunk.blocks[b];
          uint8_t* out = j.unpacked() + p * chunk.panel_stride + (k0 - chunk.k0) * PANEL;
          unpack_pairs(j.w.bits, j.w.codes + (j.panel + p) * stride + k0 * bytes_per_k, length, out, column);
        }
    });
  }
};
#endif

struct ByF32 {
  template <int PANELS>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 4 && integers && j.rows() <= FEW_INTEGERS) direct<F32Integers, PANELS>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_TABLE) direct<F32Table, PANELS>(j);
    else if (j.w.bits == 8 && integers && j.rows() <= FEW_BYTES) direct_tall<F32Bytes, PANELS>(j);
    else through_scratch<F32Unpacked, PANELS>(j);
  }
};

#ifdef QK_BF16_DOT
struct ByBf16 {
  template <int PANELS>
  static void panels(const Job& j) {
    if (j.w.bits == 4 && j.rows() <= FEW_INTEGERS) direct<Bf16Nibbles, PANELS>(j);
    else if (j.w.bits == 8 && j.w.kind == CodeKind::integer && j.rows() <= FEW_BYTES) direct_tall<Bf16Bytes, PANELS>(j);
    else through_scratch<Bf16Unpacked, PANELS>(j);
  }
};
#endif

template <class By>
void multiply(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch) {
  for (int64_t m = m0; m < m1; m += ROW_CHUNK) {
    Job j{w, x, out, m, m + ROW_CHUNK < m1 ? m + ROW_CHUNK : m1, p0, p1, scratch};
    for (; j.panel + WIDE <= p1; j.panel += WIDE) By::template panels<WIDE>(j);
    for (; j.panel < p1; j.panel++) By::template panels<1>(j);
  }
}

constexpr Arithmetic S8_ARITHMETIC = {1, rows_to_s8<false>, multiply<ByS8>, probe<S8Unpacked>};
#ifdef QK_PAIRS
constexpr Arithmetic PAIRS_ARITHMETIC = {1, rows_to_s8<true>, multiply<ByPairs>, nullptr};
#else
constexpr Arithmetic PAIRS_ARITHMETIC = {};
#endif
constexpr Arithmetic F32_ARITHMETIC = {4, rows_to_f32, multiply<ByF32>, probe<F32Unpacked>};
#ifdef QK_BF16_DOT
constexpr Arithmetic BF16_ARITHMETIC = {2, rows_to_bf16, multiply<ByBf16>, probe<Bf16Unpacked>};
#else
constexpr Arithmetic BF16_ARITHMETIC = {};
#endif

#define QK_LEVEL(NAME)                                                                                                                    \
  {NAME,       S8_ARITHMETIC, PAIRS_ARITHMETIC, F32_ARITHMETIC, BF16_ARITHMETIC, int(SCRATCH_ACC + 3 * SCRATCH_SCALES + SCRATCH_WEIGHTS), \
   dequantize, to_floats,     best_scales,      encode,         read_bytes}
