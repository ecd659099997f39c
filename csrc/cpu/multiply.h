// The kernels, written once over the 16-row vectors of a simd_*.h. Included inside each level's anonymous namespace.
//
// Weights come straight from their packed form (few rows) or from a scratch panel that is unpacked once for many rows.
#include "cpu/tile.h"
#include "cpu/scaled.h"
#include "cpu/tiles.h"
#include "cpu/nested.h"
#include "cpu/unpack.h"
#include "cpu/rows.h"
#include "cpu/probe.h"
#include "cpu/search.h"

constexpr int MAX_CHUNK = 32;  // blocks
constexpr int64_t SCRATCH_SCALES = MAX_CHUNK * STRIP * PANEL * 4;  // as much for what multiplies minima, and the columns of pairs
constexpr int64_t SCRATCH_ACC = 2 * SHIFT_SUMS * 4 + SCRATCH_SCALES;
constexpr int64_t CHUNK_CODES = 8 << 10;  // bytes of packed codes: a quarter of L1
constexpr int64_t PAIR_CODES = 8 << 10;  // bytes of unpacked codes: likewise
constexpr int64_t SCRATCH_WEIGHTS =
    STRIP * MAX_BLOCK * PANEL * 4;  // bytes: a block of floats, or several of shorter numbers; near L1's size
constexpr int64_t SCRATCH_NESTED = STRIP * NESTED_K * PANEL;  // bytes: codes on their way to floats
constexpr int64_t MOST_K = SCRATCH_WEIGHTS / (STRIP * PANEL);  // columns of a chunk that is unpacked to int8
constexpr int64_t SCRATCH_INNER = MOST_K / LEAST_INNER * STRIP * PANEL * 4;  // bytes: integer scales; and half of it for minima
constexpr int64_t SCRATCH = SCRATCH_ACC + 3 * SCRATCH_SCALES + SCRATCH_WEIGHTS + SCRATCH_NESTED + SCRATCH_INNER * 3 / 2;

struct Job {  // rows m0…m1 times the strip that begins with `panel`
  const Weight& w;
  const Activations& x;
  const Output& out;
  int64_t m0, m1, panel;
  char* scratch;
  // The first of the scratch: [panels of the strip / those of a tile, rows, those of a tile, 16], as much for the sums of shifts, and shifts.
  float* acc;
  int64_t rows() const { return m1 - m0; }
  float* shifts(int p) const { return acc + 2 * SHIFT_SUMS + p * MAX_CHUNK * PANEL; }  // of a tile that begins with this panel of the strip
  float* scales() const { return reinterpret_cast<float*>(scratch + SCRATCH_ACC); }
  int32_t* columns() const { return reinterpret_cast<int32_t*>(scratch + SCRATCH_ACC + 2 * SCRATCH_SCALES); }
  float* nested() const { return reinterpret_cast<float*>(columns()); }  // a weight has the one or the other
  uint8_t* unpacked() const { return reinterpret_cast<uint8_t*>(scratch + SCRATCH_ACC + 3 * SCRATCH_SCALES); }
  uint8_t* nested_codes() const { return unpacked() + SCRATCH_WEIGHTS; }
  int32_t* inner() const { return reinterpret_cast<int32_t*>(nested_codes() + SCRATCH_NESTED); }
};

template <class Source>
inline int64_t room_of(int64_t length) {  // columns that a block of so many takes in scratch
  return length;
}

// Blocks from chunk.first and chunk.block on, as many as fit `most` columns but one at least; returns the one after them.
template <class Source>
Block fill(Chunk& chunk, const Geometry& g, int64_t most) {
  Block block = chunk.block;
  chunk.k = chunk.room = chunk.count = 0;
  do {
    chunk.count++, chunk.k += block.length, chunk.room += room_of<Source>(block.length);
    block = block_after(g, block);
  } while (chunk.first + chunk.count < g.blocks && chunk.count < MAX_CHUNK && chunk.room + room_of<Source>(block.length) <= most);
  return block;
}

template <class Source>
Chunk chunk_of(const Job& j, int panels) {  // of the strip; its sums start from 0
  const bool shifted = (j.w.zeros != nullptr && !is_scaled<Source>) || (!is_s8<Source> && j.w.centre != 0);
  Chunk chunk;
  chunk.first = 0, chunk.block = first_block(j.w.geometry), chunk.place = place_of(j.w, j.panel);
  chunk.step = panels * Source::TILE_BYTES;
  chunk.scales = j.scales(), chunk.shifts = shifted ? j.shifts(0) : nullptr, chunk.waiting = 0, chunk.columns = j.columns();
  chunk.nested = j.nested();
  chunk.inner = j.inner(), chunk.minima = chunk.inner + SCRATCH_INNER / 4, chunk.minima_scales = chunk.scales + SCRATCH_SCALES / 4;
  __builtin_memset(j.acc, 0, size_t(j.rows() * panels * PANEL * 4));
  if (shifted) __builtin_memset(j.acc + SHIFT_SUMS, 0, size_t(j.rows() * panels * PANEL * 4));
  return chunk;
}

// All rows times the shifts that wait: those of a chunk alone would not be worth the trip of their sums, which lie in L2.
template <int PANELS, int ALL>
void add_waiting_shifts(const Job& j, Chunk& chunk) {
  if (chunk.waiting == 0) return;
  const int64_t all = j.w.geometry.blocks;
  const float* sums = j.x.sums + j.m0 * all + chunk.first - chunk.waiting;
  for (int p = 0; p < ALL; p += PANELS)
    add_shifts<PANELS>(j.shifts(p), sums, all, chunk.waiting, j.rows(), j.acc + SHIFT_SUMS + j.rows() * p * PANEL);
  chunk.waiting = 0;
}

// A chunk of up to most_k columns, which all the rows take before the next: what of the weight they use again is in the cache.
// codes_of(chunk) gives its codes, in the form of the source.
template <class Source, int PANELS, int ALL, class Codes>  // ALL: panels of the strip
void add_chunk(const Job& j, Chunk& chunk, int64_t most_k, const Codes& codes_of) {
  const uint8_t* end = codes_at(j.w, panels_of(j.w.n), 0);  // of all: the next strip is ours, or nearly always
  const Block after = fill<Source>(chunk, j.w.geometry, most_k);
  const bool shifted = chunk.shifts != nullptr;
  if (chunk.waiting + chunk.count > MAX_CHUNK) add_waiting_shifts<PANELS, ALL>(j, chunk);
  const uint8_t* codes = codes_of(chunk);
  const int64_t bytes = chunk.k * 2 * j.w.bits * ALL;
  const uint8_t* next = codes_at(j.w, j.panel, chunk.block.k0) + bytes;  // may be of the next strip
  chunk.ahead = {next, j.w.nested != Nested::none ? next : bytes < end - next ? next + bytes : end, 0};
  for (int p = 0; p < ALL; p += PANELS) {
    chunk.place = place_of(j.w, j.panel + p), chunk.codes = codes + p * Source::TILE_BYTES, chunk.passes = (ALL - p) / PANELS;
    if (shifted) chunk.shifts = j.shifts(p) + chunk.waiting * PANELS * PANEL;
    if constexpr (is_scaled<Source>) decode_scaled<!UNPACKS_SCALES<Source>, PANELS>(j.w, chunk);
    else decode<!is_s8<Source>, PANELS>(j.w, chunk);
    rows_of_tiles<Source, PANELS>(j.w, j.x, chunk, j.m0, j.m1, j.acc + j.rows() * p * PANEL);
  }
  chunk.first += chunk.count, chunk.block = after;
  if (shifted) chunk.waiting += chunk.count;
}
template <int PANELS, int ALL>
void write_strip(const Job& j, Chunk& chunk) {
  add_waiting_shifts<PANELS, ALL>(j, chunk);
  for (int p = 0; p < ALL; p += PANELS)
    write_rows(j.w, j.out, j.m0, j.m1, j.panel + p, PANELS, chunk.shifts != nullptr, j.acc + j.rows() * p * PANEL);
}

template <class Source, int PANELS, int ALL, class Codes>
void by_own_chunks(const Job& j, int64_t most_k, const Codes& codes_of) {
  Chunk chunk = chunk_of<Source>(j, ALL);
  while (chunk.first < j.w.geometry.blocks) add_chunk<Source, PANELS, ALL>(j, chunk, most_k, codes_of);
  write_strip<PANELS, ALL>(j, chunk);
}

#ifdef QK_BASE  // a level whose loops are the same, but for those that stream: they are not compiled a second time
template <class Source>
constexpr bool AS_BASE = !is_in_tiles<Source>;
template <class Source>
void by_base(const Job& j, int panels) {
  const Arithmetic& same = is_paired<Source> ? QK_BASE.pairs : is_s8<Source> ? QK_BASE.s8 : is_bf16<Source> ? QK_BASE.bf16 : QK_BASE.f32;
  same.multiply(j.w, j.x, j.out, j.m0, j.m1, j.panel, j.panel + panels, j.scratch);
}
#else
template <class Source>
constexpr bool AS_BASE = false;
template <class Source>
void by_base(const Job&, int) {}
#endif
template <class Source, int PANELS, int ALL, class Codes>
void by_chunks(const Job& j, int64_t most_k, const Codes& codes_of) {
  if constexpr (AS_BASE<Source>) by_base<Source>(j, ALL);
  else by_own_chunks<Source, PANELS, ALL>(j, most_k, codes_of);
}

template <class Source>
void streamed(const Job& j) {  // a whole strip, for rows that one tile holds
  Chunk chunk = chunk_of<Source>(j, STRIP);
  chunk.count = j.w.geometry.blocks, chunk.codes = codes_at(j.w, j.panel, 0);
  tile_of<Source, STRIP, true>(j.w, chunk, j.w.geometry.k_padded, j.rows(), LENGTHS{})(j.w, j.x, chunk, j.m0, j.acc);
  write_rows(j.w, j.out, j.m0, j.m1, j.panel, STRIP, chunk.shifts != nullptr, j.acc);
}

template <class Source, int PANELS, int ALL>
void direct(const Job& j) {  // weights straight from their packed form
  if constexpr (ALL == STRIP && STREAMS)
    if (j.rows() <= STREAMED_ROWS<Source>) return streamed<Source>(j);
  by_chunks<Source, PANELS, ALL>(j, CHUNK_CODES / (2 * j.w.bits * ALL), [&](const Chunk& c) { return codes_at(j.w, j.panel, c.block.k0); });
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
    unpack(Unpacked{}, j.w, codes_at(j.w, j.panel, chunk.block.k0), chunk.k * ALL, j.unpacked());
    return j.unpacked();
  });
}

template <class Unpacked, int PANELS, int ALL>
void from_nested(const Job& j) {
  by_chunks<Unpacked, PANELS, ALL>(j, NESTED_K, [&](const Chunk& chunk) {
    uint8_t* codes = is_s8<Unpacked> ? j.unpacked() : j.nested_codes();
    apart(j.w, j.panel, ALL, chunk.block.k0, codes, j.nested());
    if constexpr (!is_s8<Unpacked>) unpack(Unpacked{}, j.w, codes, chunk.k * ALL, j.unpacked());
    return j.unpacked();
  });
}

// Up to a few rows (FEW_…, of the level), unpacking in registers again for every tile is cheaper than a trip through scratch.

// Integers of the commoner odd widths, for as few rows as one tile holds; false for others.
template <template <int> class Planes, int ALL>
bool streamed_planes(const Job& j) {
  if constexpr (ALL != STRIP || !STREAMS_PLANES) {
    return false;
  } else {
    if (j.w.kind != CodeKind::integer || j.rows() > STREAMED_ROWS<Planes<5>>) return false;
    switch (j.w.bits) {
      case 2: return streamed<Planes<2>>(j), true;
      case 3: return streamed<Planes<3>>(j), true;
      case 5: return streamed<Planes<5>>(j), true;
      case 6: return streamed<Planes<6>>(j), true;
    }
    return false;
  }
}
template <int BITS>
using ScaledPlanes = Scaled<S8Planes<BITS>>;

// What has integer scales. Codes of 5 and 6 bits are such that ScaledDot holds their sums: see set_inner in ops.cpp.
template <int PANELS, int ALL>
void by_scaled(const Job& j) {
  const bool integers = j.w.kind == CodeKind::integer;
  if (streamed_planes<ScaledPlanes, ALL>(j)) return;
  if constexpr (ALL == STRIP)  // a panel alone is not worth the build of its tiles
    if (j.w.bits == 4 && j.rows() <= FEW_S8)
      return integers ? direct<Scaled<S8Nibbles>, PANELS, ALL>(j) : direct<Scaled<S8Table>, PANELS, ALL>(j);
  if constexpr (NARROW != 0) {  // else all codes cost the same
    if (integers && j.w.bits <= 4) return through_scratch<Scaled<S8Unpacked<15>>, PANELS, ALL>(j);
    if (j.w.bits == 5) return through_scratch<Scaled<S8Unpacked<31>>, PANELS, ALL>(j);
    if (j.w.bits == 6) return through_scratch<Scaled<S8Unpacked<63>>, PANELS, ALL>(j);
  }
  through_scratch<Scaled<S8Bytes>, PANELS, ALL>(j);
}

#ifdef QK_LANES
// Of weights that have a middle; false for others.
template <int PANELS, int ALL>
bool by_lanes(const Job& j) {
  if (middle_of(j.w) == 0) return false;
  if constexpr (ALL == STRIP && STREAMS_PLANES)
    if (j.w.bits == 5 && j.rows() <= STREAMED_ROWS<S8PlanesLanes>) return streamed<S8PlanesLanes>(j), true;
  if (j.w.bits == 4 && j.rows() <= FEW_S8) direct<S8NarrowLanes, PANELS, ALL>(j);
  else through_scratch<S8Lanes, PANELS, ALL>(j);
  return true;
}
#endif

struct ByS8 {
  template <int PANELS, int ALL>
  static void tables(const Job& j) {
    if constexpr (NARROW != 0)
      if (is_narrow(j.w)) return direct<S8Narrow, PANELS, ALL>(j);
    direct<S8Table, PANELS, ALL>(j);
  }
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if (j.w.nested != Nested::none) return from_nested<S8Bytes, PANELS, ALL>(j);
    if (j.w.inner != 0) return by_scaled<PANELS, ALL>(j);
    const bool integers = j.w.kind == CodeKind::integer;
#ifdef QK_LANES
    if (by_lanes<PANELS, ALL>(j)) return;
#endif
    if (streamed_planes<S8Planes, ALL>(j)) return;
    if (j.w.bits == 8) return direct<S8Bytes, PANELS, ALL>(j);
    if (j.w.bits == 4 && j.rows() <= FEW_S8) return integers ? direct<S8Nibbles, PANELS, ALL>(j) : tables<PANELS, ALL>(j);
    if constexpr (NARROW != 0) {  // else all codes cost the same
      if (j.w.bits <= 4 && integers) return through_scratch<S8Unpacked<15>, PANELS, ALL>(j);
      if (is_narrow(j.w) || (integers && j.w.bits == 5)) return through_scratch<S8Unpacked<31>, PANELS, ALL>(j);
      if (integers && j.w.bits == 6) return through_scratch<S8Unpacked<63>, PANELS, ALL>(j);
    }
    through_scratch<S8Bytes, PANELS, ALL>(j);
  }
};

#ifdef QK_PAIRS
struct ByPairs {  // through scratch
  template <class Source, int PANELS>
  static void of(const Job& j) {
    by_chunks<Source, PANELS, PANELS>(j, PAIR_CODES / (PANEL * PANELS), [&](const Chunk& chunk) {
      uint8_t* out = j.unpacked();
      int32_t* columns = j.columns();
      Block block = chunk.block;
      for (int64_t b = 0; b < chunk.count; b++, block = block_after(j.w.geometry, block)) {
        const int64_t run = is_scaled<Source> ? j.w.inner : block.length;
        for (int64_t k = 0; k < block.length; k += run, out += run * PANELS * PANEL, columns += PANELS * PANEL)
          unpack_pairs<PANELS>(j.w.bits, codes_at(j.w, j.panel, block.k0 + k), run, out, columns);
      }
      return j.unpacked();
    });
  }
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    static_assert(PANELS == ALL);
    j.w.inner != 0 ? of<Scaled<S8Pairs>, PANELS>(j) : of<S8Pairs, PANELS>(j);
  }
};
#endif

struct ByF32 {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if (j.w.nested != Nested::none) return from_nested<F32Unpacked, PANELS, ALL>(j);
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
    if (j.w.nested != Nested::none) from_nested<Bf16Unpacked, PANELS, ALL>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_INTEGERS) direct<Bf16Nibbles, PANELS, ALL>(j);
    else if (j.w.bits == 8 && j.w.kind == CodeKind::integer && j.rows() <= FEW_BYTES) direct_tall<Bf16Bytes, PANELS, ALL>(j);
    else if (ALL == STRIP && j.w.kind == CodeKind::e4m3 && j.rows() <= STREAMED_ROWS<Bf16E4m3>) streamed<Bf16E4m3>(j);
    else through_scratch<Bf16Unpacked, PANELS, ALL>(j);
  }
};
#endif

template <class By>
void multiply(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch) {
  Job j{w, x, out, m0, m1, p0, scratch, reinterpret_cast<float*>(scratch)};
  for (; j.panel + STRIP <= p1; j.panel += STRIP) By::template panels<WIDE, STRIP>(j);
  for (; j.panel < p1; j.panel++) By::template panels<1, 1>(j);
}

#ifdef QK_AMX
#include "cpu/amx.h"
constexpr Arithmetic S8_ARITHMETIC = {1, rows_to_s8<false>, multiply_by_amx, probe_amx, AMX_STRIPS};
constexpr int64_t LEVEL_SCRATCH = SCRATCH + (AMX_STRIPS - 1) * SCRATCH_ACC;
#else
constexpr Arithmetic S8_ARITHMETIC = {1, rows_to_s8<false>, multiply<ByS8>, probe<S8Unpacked<15>>, 1};
constexpr int64_t LEVEL_SCRATCH = SCRATCH;
#endif
#ifdef QK_PAIRS
constexpr Arithmetic PAIRS_ARITHMETIC = {1, rows_to_s8<true>, multiply<ByPairs>, nullptr, 1};
#else
constexpr Arithmetic PAIRS_ARITHMETIC = {};
#endif
constexpr Arithmetic F32_ARITHMETIC = {4, rows_to_f32, multiply<ByF32>, probe<F32Unpacked>, 1};
#if defined(QK_AMX)
constexpr Arithmetic BF16_ARITHMETIC = {4, rows_for_amx_bf16, multiply_bf16_by_amx, probe_amx_bf16, AMX_STRIPS};
#elif defined(QK_BF16_DOT)
constexpr Arithmetic BF16_ARITHMETIC = {2, rows_to_bf16, multiply<ByBf16>, probe<Bf16Unpacked>, 1};
#else
constexpr Arithmetic BF16_ARITHMETIC = {};
#endif

#define QK_LEVEL(NAME)                                                                               \
  {NAME,       S8_ARITHMETIC, PAIRS_ARITHMETIC, F32_ARITHMETIC, BF16_ARITHMETIC, int(LEVEL_SCRATCH), \
   dequantize, to_floats,     best_scales,      encode,         read_bytes}
