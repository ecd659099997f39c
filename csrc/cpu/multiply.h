// The kernels, written once over the 16-row vectors of a simd_*.h. Included inside each level's anonymous namespace.
//
// Weights come straight from their packed form (few rows) or from a scratch panel that is unpacked once for many rows.
#include "cpu/tile.h"
#include "cpu/unpack.h"
#include "cpu/rows.h"
#include "cpu/probe.h"
#include "cpu/search.h"

constexpr int64_t SCRATCH_ACC = MOST_ROWS * STRIP * PANEL * 4;
constexpr int64_t SCRATCH_SCALES = MAX_CHUNK * STRIP * PANEL * 4;  // and as much for the shifts, and the columns of pairs
constexpr int64_t CHUNK_CODES = 8 << 10;  // bytes of packed codes: a quarter of L1
constexpr int64_t PAIR_CODES = 16 << 10;  // bytes of unpacked codes: half of it
constexpr int64_t FAR_AHEAD = 7 << 10;  // bytes beyond the codes in use, where a tile reads them once
constexpr int64_t SCRATCH_WEIGHTS =
    STRIP * MAX_BLOCK * PANEL * 4;  // bytes: a block of floats, or several of shorter numbers; near L1's size

struct Job {  // rows m0…m1 times the strip that begins with `panel`
  const Weight& w;
  const Activations& x;
  const Output& out;
  int64_t m0, m1, panel;
  char* scratch;
  int64_t rows() const { return m1 - m0; }
  float* acc() const { return reinterpret_cast<float*>(scratch); }
  float* scales() const { return reinterpret_cast<float*>(scratch + SCRATCH_ACC); }
  int32_t* columns() const { return reinterpret_cast<int32_t*>(scratch + SCRATCH_ACC + 2 * SCRATCH_SCALES); }
  uint8_t* unpacked() const { return reinterpret_cast<uint8_t*>(scratch + SCRATCH_ACC + 3 * SCRATCH_SCALES); }
};

// The blocks from chunk.first on, as many as fit most_k columns but one at least.
inline void next_blocks(const Geometry& g, Block block, int64_t most_k, Chunk& chunk) {
  chunk.k0 = block.k0, chunk.k = chunk.count = 0;
  do {
    chunk.blocks[chunk.count++] = block;
    chunk.k += block.length;
    block = block_after(g, block);
  } while (chunk.first + chunk.count < g.blocks && chunk.count < MAX_CHUNK && chunk.k + block.length <= most_k);
}

struct Fetch {  // meanwhile: lines of packed codes
  int64_t ahead = 0, apart = 64;  // bytes from the codes in use, 0: to the next chunk's; bytes from one line to the next
};

// In chunks of up to most_k columns, which all the rows take before the next: what of the weight they use again is in the cache.
// codes_of(chunk) gives a chunk's codes, in the form of the source.
template <class Source, int PANELS, int ALL, class Codes>  // ALL: panels of the strip
void by_chunks(const Job& j, int64_t most_k, const Codes& codes_of, Fetch fetch = {}) {
  constexpr bool CENTRED = !is_s8<Source>;
  const Geometry& g = j.w.geometry;
  const bool shifted = j.w.zeros != nullptr || (CENTRED && j.w.centre != 0), once = j.rows() <= MAX_ROWS<Source, PANELS>;
  const uint8_t* end = codes_at(j.w, panels_of(j.w.n), 0);  // of all: the next strip is ours, or nearly always
  __builtin_memset(j.acc(), 0, size_t(j.rows() * ALL * PANEL * 4));
  Chunk chunk;
  chunk.step = ALL * Source::TILE_BYTES, chunk.decoded = !once;
  chunk.scales = j.scales(), chunk.shifts = shifted ? chunk.scales + SCRATCH_SCALES / 4 : nullptr, chunk.columns = j.columns();
  Block block = first_block(g);
  for (chunk.first = 0; chunk.first < g.blocks; chunk.first += chunk.count) {
    next_blocks(g, block, most_k, chunk);
    const uint8_t* codes = codes_of(chunk);
    const int64_t bytes = chunk.k * 2 * j.w.bits * ALL;
    const uint8_t* next = codes_at(j.w, j.panel, chunk.k0) + (fetch.ahead ? fetch.ahead : bytes);  // may be of the next strip
    chunk.ahead = {next, bytes < end - next ? next + bytes : end, fetch.apart, 0};
    for (int p = 0; p < ALL; p += PANELS) {
      chunk.panel = j.panel + p, chunk.codes = codes + p * Source::TILE_BYTES, chunk.passes = (ALL - p) / PANELS;
      if (chunk.decoded) decode_scales<CENTRED, PANELS>(j.w, chunk, 0, chunk.count);
      rows_of_tiles<Source, PANELS>(j.w, j.x, chunk, j.m0, j.m1, j.acc() + j.rows() * p * PANEL);
    }
    block = block_after(g, chunk.blocks[chunk.count - 1]);
  }
  for (int p = 0; p < ALL; p += PANELS) write_rows(j.w, j.out, j.m0, j.m1, j.panel + p, PANELS, j.acc() + j.rows() * p * PANEL);
}

template <class Source, int PANELS, int ALL>
void direct(const Job& j) {  // weights straight from their packed form
  const auto codes_of = [&](const Chunk& chunk) { return codes_at(j.w, j.panel, chunk.k0); };
  if (PANELS < ALL || j.rows() > MAX_ROWS<Source, PANELS>)
    return by_chunks<Source, PANELS, ALL>(j, CHUNK_CODES / (2 * j.w.bits * ALL), codes_of);
  // Where there is next to nothing to do but read, the CPU fetches by itself what lies between the lines that it is asked for.
  const bool idle = j.rows() <= (std::is_same_v<Source, S8Bytes> ? 3 : std::is_same_v<Source, S8Nibbles> ? 1 : 0);
  by_chunks<Source, PANELS, ALL>(j, j.w.geometry.k_padded, codes_of, {FAR_AHEAD, idle ? 128 : 64});
}

// Of codes that are dear to decode: tiles of half the width and twice the height decode half as often.
template <class Source, int PANELS, int ALL>
void direct_tall(const Job& j) {
  if constexpr (PANELS > 1)
    if (j.rows() > MAX_ROWS<Source, PANELS>) return direct<Source, PANELS / 2, ALL>(j);
  direct<Source, PANELS, ALL>(j);
}

template <class Unpacked, int PANELS, int ALL>
void through_scratch(const Job& j) {
  by_chunks<Unpacked, PANELS, ALL>(j, SCRATCH_WEIGHTS / (Unpacked::TILE_BYTES / TILE_K * STRIP), [&](const Chunk& chunk) {
    unpack(Unpacked{}, j.w, codes_at(j.w, j.panel, chunk.k0), chunk.k * ALL, j.unpacked());
    return j.unpacked();
  });
}

// Up to a few rows (FEW_…, of the level), unpacking in registers again for every tile is cheaper than a trip through scratch.

struct ByS8 {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 8) direct<S8Bytes, PANELS, ALL>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_S8) integers ? direct<S8Nibbles, PANELS, ALL>(j) : direct<S8Table, PANELS, ALL>(j);
    else if (j.w.bits <= 4 && integers) through_scratch<S8Unpacked, PANELS, ALL>(j);
    else through_scratch<S8Bytes, PANELS, ALL>(j);
  }
};

#ifdef QK_PAIRS
struct ByPairs {  // through scratch
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    static_assert(PANELS == ALL);
    by_chunks<S8Pairs, PANELS, ALL>(j, PAIR_CODES / (PANEL * PANELS), [&](const Chunk& chunk) {
      uint8_t* out = j.unpacked();
      for (int64_t b = 0; b < chunk.count; b++) {
        const auto& [group, k0, length, end] = chunk.blocks[b];
        unpack_pairs<PANELS>(j.w.bits, codes_at(j.w, j.panel, k0), length, out, j.columns() + b * PANELS * PANEL);
        out += length * PANELS * PANEL;
      }
      return j.unpacked();
    });
  }
};
#endif

struct ByF32 {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 4 && integers && j.rows() <= FEW_INTEGERS) direct<F32Integers, PANELS, ALL>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_TABLE) direct<F32Table, PANELS, ALL>(j);
    else if (j.w.bits == 8 && integers && j.rows() <= FEW_BYTES) direct_tall<F32Bytes, PANELS, ALL>(j);
    else through_scratch<F32Unpacked, PANELS, ALL>(j);
  }
};

#ifdef QK_BF16_DOT
struct ByBf16 {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if (j.w.bits == 4 && j.rows() <= FEW_INTEGERS) direct<Bf16Nibbles, PANELS, ALL>(j);
    else if (j.w.bits == 8 && j.w.kind == CodeKind::integer && j.rows() <= FEW_BYTES) direct_tall<Bf16Bytes, PANELS, ALL>(j);
    else through_scratch<Bf16Unpacked, PANELS, ALL>(j);
  }
};
#endif

template <class By>
void multiply(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch) {
  Job j{w, x, out, m0, m1, p0, scratch};
  if (p1 - p0 == STRIP) return By::template panels<WIDE, STRIP>(j);
  for (; j.panel < p1; j.panel++) By::template panels<1, 1>(j);
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
