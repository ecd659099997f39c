// Products by AMX: an instruction takes 16 rows of x, 16 rows of the weight and up to 64 k. The int32 sums are those of DotS8, so the bits are.
//
// A panel in scratch lies as the instruction reads it: 64 bytes for every 4 k, byte 4n+i of them row n at k0+i. They are the values, code
// less offset, signed (unsigned where there is no offset), so that no sum starts from a correction; every block is padded with 0 to whole
// tiles, which is why the activations beyond its end, whatever they are, add nothing.

constexpr int64_t AMX_ROWS = 16, AMX_K = 64;
// Rows of x times columns of a group (64 at most) from which it is faster than DotS8, where unpacking and scaling are less of the work: 25
// rows of groups of 64 and more, 100 of groups of 16; and half as many where DotS8 does not take the codes as they lie. Found on a Xeon.
constexpr int64_t AMX_FROM = 1600, AMX_FROM_ODD_BITS = 768, AMX_LEAST_GROUP = 16;
constexpr int64_t AMX_COLUMNS = 512;  // of a strip in scratch: 32 KiB, most of L1
constexpr int AMX_BATCH = 2;  // blocks whose sums are scaled together: they share a trip of the accumulators through registers

struct S8Amx : S8<255> {
  static constexpr int TILE_BYTES = 128;
};
inline int64_t tile_columns(int64_t length) { return length <= 16 ? 16 : length <= 32 ? 32 : AMX_K; }
template <>
inline int64_t room_of<S8Amx>(int64_t length) {
  return (length + tile_columns(length) - 1) / tile_columns(length) * tile_columns(length);
}

// A chunk of a strip: [STRIP, room / 4, 64].
inline void unpack(S8Amx, const Weight& w, const uint8_t* codes, const Chunk& chunk, uint8_t* out) {
  const int bits = w.bits;
  const bool table = w.kind == CodeKind::table;
  const __m512i offset = _mm512_set1_epi8(char(w.offset));
  const int64_t panel_bytes = chunk.room * PANEL;
  Block block = chunk.block;
  for (int64_t b = 0; b < chunk.count; b++, block = block_after(w.geometry, block)) {
    for (int64_t k = 0; k < block.length; k += TILE_K, out += 128)
      for (int p = 0; p < STRIP; p++, codes += 16 * bits)
        for (int half = 0; half < 2; half++) {
          if (64 * half < 16 * bits) fetch_ahead(codes + 64 * half);
          uint8_t* to = out + p * panel_bytes + 64 * half;
          const B found = load_b(half_codes(bits, codes, half, to));
          store_b(to, {_mm512_sub_epi8((table ? look_up(w.table_u8, found) : found).v, offset)});
        }
    for (int64_t k = block.length; k < room_of<S8Amx>(block.length); k += 4, out += 64)
      for (int p = 0; p < STRIP; p++) __builtin_memset(out + p * panel_bytes, 0, 64);
  }
}
inline bool by_amx(const Weight& w, int64_t rows) {
  const int64_t group = w.geometry.group_padded < AMX_K ? w.geometry.group_padded : AMX_K;
  const bool fits = w.nested == Nested::none && (w.bits < 8 || w.offset == 0 || w.offset == 128);
  return fits && group >= AMX_LEAST_GROUP && rows * group >= (w.bits == 4 || w.bits == 8 ? AMX_FROM : AMX_FROM_ODD_BITS);
}

struct TileConfig {  // what ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0…3 are sums of two halves of the rows by two panels, 4 and 5 the halves of x, 6 and 7 the panels.
inline void configure(int64_t rows, int64_t columns) {
  alignas(64) TileConfig config;
  const int64_t first = rows < AMX_ROWS ? rows : AMX_ROWS, second = rows - first;
  const int64_t rows_of[8] = {first, first, second, second, first, second, columns / 4, columns / 4};
  for (int i = 0; i < 8; i++)
    if (rows_of[i] != 0) config.rows[i] = uint8_t(rows_of[i]), config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? columns : 64);
  __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's _tile_loadconfig says that it reads 8 bytes
  _tile_loadconfig(&config);
}

// The instructions themselves: GCC 12's intrinsics want literal numbers, and _tile_loadd does not say that it reads memory.
#ifdef QKERNELS_EMULATE
template <int TILE>
inline void clear_tile() {
  _tile_zero(TILE);
}
template <int TILE>
inline void load_tile(const void* p, int64_t stride) {
  _tile_loadd(TILE, p, stride);
}
template <int TILE>
inline void store_tile(void* p) {
  _tile_stored(TILE, p, 64);
}
template <bool SIGNED, int SUM, int X, int WEIGHTS>
inline void dot_tiles() {
  SIGNED ? _tile_dpbssd(SUM, X, WEIGHTS) : _tile_dpbsud(SUM, X, WEIGHTS);
}
template <int SUM, int X, int WEIGHTS>
inline void dot_bf16_tiles() {
  _tile_dpbf16ps(SUM, X, WEIGHTS);
}
#else
template <int TILE>
[[gnu::always_inline]] inline void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
[[gnu::always_inline]] inline void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(p), "r"(stride) : "memory");
}
template <int TILE>
[[gnu::always_inline]] inline void store_tile(void* p) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(p), "r"(int64_t(64)) : "memory");
}
template <bool SIGNED, int SUM, int X, int WEIGHTS>
[[gnu::always_inline]] inline void dot_tiles() {
  if (SIGNED) __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHTS));
  else __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHTS));
}
template <int SUM, int X, int WEIGHTS>
[[gnu::always_inline]] inline void dot_bf16_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHTS));
}
#endif

struct TileSums {
  alignas(64) int32_t of[2][2][AMX_ROWS][PANEL];  // half of the rows, panel
};

// x [16 * HALVES, length], rows x_stride apart, times two panels
template <bool SIGNED, int HALVES>
inline void multiply_tiles(const int8_t* x, int64_t x_stride, int64_t length, const uint8_t* weights, int64_t panel_bytes, TileSums& sums) {
  const int64_t columns = tile_columns(length);
  clear_tile<0>();
  clear_tile<1>();
  if (HALVES == 2) {
    clear_tile<2>();
    clear_tile<3>();
  }
  for (int64_t k = 0; k < length; k += columns, weights += columns * PANEL) {
    const uint8_t* other = weights + panel_bytes;
    load_tile<4>(x + k, x_stride);
    load_tile<6>(weights, 64);
    load_tile<7>(other, 64);
    dot_tiles<SIGNED, 0, 4, 6>();
    dot_tiles<SIGNED, 1, 4, 7>();
    if (HALVES == 2) {
      load_tile<5>(x + AMX_ROWS * x_stride + k, x_stride);
      dot_tiles<SIGNED, 2, 5, 6>();
      dot_tiles<SIGNED, 3, 5, 7>();
    }
  }
  store_tile<0>(sums.of[0][0]);
  store_tile<1>(sums.of[0][1]);
  if (HALVES == 2) {
    store_tile<2>(sums.of[1][0]);
    store_tile<3>(sums.of[1][1]);
  }
}

// Rows r0…r1 of the sums of some blocks with two panels, scaled: factors [BLOCKS, STRIP, 16] from the first of the panels on, scales
// [BLOCKS, m].
template <int BLOCKS>
inline void add_scaled(const TileSums* sums, const float* factors, const float* scales, int64_t m, int64_t r0, int64_t r1, float* acc) {
  F first[BLOCKS], second[BLOCKS];
  each<BLOCKS>(QK_WITH(b) { first[b] = load_f(factors + b * STRIP * PANEL), second[b] = load_f(factors + (b * STRIP + 1) * PANEL); });
  for (int64_t r = r0; r < r1; r++) {
    float* out = acc + r * STRIP * PANEL;
    F one = load_f(out), other = load_f(out + PANEL);
    each<BLOCKS>(QK_WITH(b) {
      const F scale = set1_f(scales[b * m + r]);
      const int32_t* sum = sums[b].of[r / AMX_ROWS][0][r % AMX_ROWS];
      one = fma(mul(first[b], scale), to_float(load_i(sum)), one);
      other = fma(mul(second[b], scale), to_float(load_i(sum + AMX_ROWS * PANEL)), other);
    });
    store_f(out, one), store_f(out + PANEL, other);
  }
}

// Units of a batch of blocks by two panels. The tiles of one unit are at work while the sums of the one before are scaled: by turns, block
// by block, as the CPU looks no further ahead than a few hundred instructions.
template <bool SIGNED, int HALVES>
void amx_rows(const Weight& w, const Activations& x, const Chunk& chunk, int64_t m, int64_t rows, int64_t& configured, float* acc) {
  TileSums sums[2][AMX_BATCH];
  const int64_t panel_bytes = chunk.room * PANEL, units = (chunk.count + AMX_BATCH - 1) / AMX_BATCH * 2;
  const auto blocks_of = [&](int64_t unit) {
    const int64_t left = chunk.count - unit / 2 * AMX_BATCH;
    return unit < 0 || unit >= units ? 0 : left < AMX_BATCH ? left : AMX_BATCH;
  };
  Block block = chunk.block, first = block;
  const uint8_t *codes = chunk.codes, *first_codes = codes;
  for (int64_t unit = 0; unit <= units; unit++) {
    if (unit % 2 == 0) first = block, first_codes = codes;
    else block = first, codes = first_codes;
    const int64_t blocks = blocks_of(unit), before = blocks_of(unit - 1), b = (unit - 1) / 2 * AMX_BATCH, p = (unit - 1) % 2 * 2;
    for (int64_t i = 0; i < AMX_BATCH; i++) {
      if (i < blocks) {
        const int64_t columns = tile_columns(block.length);
        if (configured != rows * AMX_K + columns) configure(rows, columns), configured = rows * AMX_K + columns;
        const auto* values = static_cast<const int8_t*>(x.values) + x.m * block.k0 + m * block.length;
        multiply_tiles<SIGNED, HALVES>(values, block.length, block.length, codes + unit % 2 * 2 * panel_bytes, panel_bytes,
                                       sums[unit % 2][i]);
        codes += room_of<S8Amx>(block.length) * PANEL, block = block_after(w.geometry, block);
      }
      if (before > 0) {
        const auto scale = before == 1 ? add_scaled<1> : add_scaled<AMX_BATCH>;
        scale(sums[(unit + 1) % 2], chunk.scales + (b * STRIP + p) * PANEL, x.scales + (chunk.first + b) * x.m + m, x.m,
              rows * i / AMX_BATCH, rows * (i + 1) / AMX_BATCH, acc + p * PANEL);
      }
    }
  }
}

template <class OfHeight>  // work of 16 and of 32 rows at most
inline void amx_tiles(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, OfHeight low, OfHeight tall,
                      float* acc) {
  int64_t configured = 0;
  for (int64_t m = m0, rows; m < m1; m += rows, acc += rows * STRIP * PANEL) {
    rows = m1 - m < 2 * AMX_ROWS ? m1 - m : 2 * AMX_ROWS;
    const auto of_height = rows > AMX_ROWS ? tall : low;
    of_height(w, x, chunk, m, rows, configured, acc);
  }
}

template <>
void rows_of_tiles<S8Amx, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  if (w.offset != 0) amx_tiles(w, x, chunk, m0, m1, amx_rows<true, 1>, amx_rows<true, 2>, acc);
  else amx_tiles(w, x, chunk, m0, m1, amx_rows<false, 1>, amx_rows<false, 2>, acc);
}
#include "cpu/amx_scaled.h"

constexpr int64_t AMX_STRIPS = 4;  // side by side: their sums take half of L2, where a chunk of the activations waits for the next strip

template <int PANELS>
const uint8_t* unpack_bf16(const Job& j, const Chunk& chunk);  // amx_bf16.h

// The next chunk of a strip, in the form of its source.
template <class Source>
const uint8_t* amx_codes(const Job& j, Chunk& chunk) {
  if constexpr (is_bf16<Source>) return unpack_bf16<STRIP>(j, chunk);
  const uint8_t* codes = codes_at(j.w, j.panel, chunk.block.k0);
  if constexpr (is_scaled<Source>) chunk.digits = unpack_digits(j.w, codes, chunk, j.unpacked());
  else if constexpr (is_s8<Source>) unpack(S8Amx{}, j.w, codes, chunk, j.unpacked());
  return j.unpacked();
}

template <class Source>
void by_amx_chunks(const Job& first, int64_t strips) {
  Chunk chunks[AMX_STRIPS];
  const auto job_of = [&](int64_t s) {
    Job j = first;
    j.panel += s * STRIP;
    if (s > 0) j.acc = reinterpret_cast<float*>(j.scratch + SCRATCH + (s - 1) * SCRATCH_ACC);
    return j;
  };
  for (int64_t s = 0; s < strips; s++) chunks[s] = chunk_of<Source>(job_of(s), STRIP);
  while (chunks[0].first < first.w.geometry.blocks)
    for (int64_t s = 0; s < strips; s++) {
      const Job j = job_of(s);
      add_chunk<Source, STRIP, STRIP>(j, chunks[s], AMX_COLUMNS, [&](Chunk& chunk) { return amx_codes<Source>(j, chunk); });
    }
  for (int64_t s = 0; s < strips; s++) write_strip<STRIP, STRIP>(job_of(s), chunks[s]);
}

void multiply_by_amx(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
                     char* scratch) {
  if (!by_amx(w, m1 - m0)) return multiply<ByS8>(w, x, out, m0, m1, p0, p1, scratch);
  const int64_t strips = (p1 - p0) / STRIP;
  const Job j{w, x, out, m0, m1, p0, scratch, reinterpret_cast<float*>(scratch)};
  if (strips > 0) w.inner != 0 ? by_amx_chunks<Scaled<S8Amx>>(j, strips) : by_amx_chunks<S8Amx>(j, strips);
  _tile_release();
  multiply<ByS8>(w, x, out, m0, m1, p0 + strips * STRIP, p1, scratch);
}

template <int64_t COLUMNS, class Products>  // products(): one into each tile of sums, of so many columns
int64_t probe_tiles(int64_t rounds, const Products& products) {
  alignas(64) static const uint8_t codes[1024] = {};
  configure(2 * AMX_ROWS, AMX_K);
  each<4>(QK_WITH(i) { clear_tile<i>(); });
  load_tile<4>(codes, 64), load_tile<5>(codes, 64), load_tile<6>(codes, 64), load_tile<7>(codes, 64);
  for (int64_t i = 0; i < rounds; i++) products();
  _tile_release();
  return rounds * 4 * AMX_ROWS * PANEL * COLUMNS;
}
int64_t probe_amx(int64_t rounds) {
  return probe_tiles<AMX_K>(
      rounds, [] { dot_tiles<false, 0, 4, 6>(), dot_tiles<false, 1, 4, 7>(), dot_tiles<false, 2, 5, 6>(), dot_tiles<false, 3, 5, 7>(); });
}

#include "cpu/amx_bf16.h"
