// Products by AMX: an instruction takes 16 rows of x, 16 rows of the weight and up to 64 k. The int32 sums are those of DotS8, so the bits are.
//
// A panel in scratch lies as the instruction reads it: 64 bytes for every 4 k, byte 4n+i of them row n at k0+i. They are the values, code
// less offset, signed (unsigned where there is no offset), so that no sum starts from a correction; every block is padded with 0 to whole
// tiles, which is why the activations beyond its end, whatever they are, add nothing.

constexpr int64_t AMX_ROWS = 16, AMX_K = 64;
// Rows of x times columns of a group (64 at most) from which it is faster than DotS8, where unpacking and scaling are less of the work: 32
// rows of groups of 64 and more, 128 of groups of 16. Found on a Xeon.
constexpr int64_t AMX_FROM = 2048, AMX_LEAST_GROUP = 16;
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
          uint8_t* to = out + p * panel_bytes + 64 * half;
          const B found = load_b(half_codes(bits, codes, half, to));
          store_b(to, {_mm512_sub_epi8((table ? look_up(w.table_u8, found) : found).v, offset)});
        }
    for (int64_t k = block.length; k < room_of<S8Amx>(block.length); k += 4, out += 64)
      for (int p = 0; p < STRIP; p++) __builtin_memset(out + p * panel_bytes, 0, 64);
  }
}
inline bool by_amx(const Weight& w, int64_t rows) {
  const int64_t run = w.inner != 0 ? w.inner : w.geometry.group_padded, group = run < AMX_K ? run : AMX_K;
  const bool fits = w.nested == Nested::none && (w.bits < 8 || w.offset == 0 || w.offset == 128);
  return fits && group >= AMX_LEAST_GROUP && rows * group >= AMX_FROM;
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

struct TileSums {
  alignas(64) int32_t of[2][2][AMX_ROWS][PANEL];  // half of the rows, panel
};

// x [16 * HALVES, length], rows x_stride apart, times two panels
template <bool SIGNED, int HALVES>
inline void multiply_tiles(const int8_t* x, int64_t x_stride, int64_t length, const uint8_t* weights, int64_t panel_bytes, TileSums& sums) {
  __asm__ volatile("" : : : "memory");  // GCC's _tile_loadd does not say that it reads memory
  const int64_t columns = tile_columns(length);
  _tile_zero(0);
  _tile_zero(1);
  if (HALVES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < length; k += columns, weights += columns * PANEL) {
    const uint8_t* other = weights + panel_bytes;
    _tile_loadd(4, x + k, x_stride);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, other, 64);
    if (SIGNED) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    if (HALVES == 2) {
      _tile_loadd(5, x + AMX_ROWS * x_stride + k, x_stride);
      if (SIGNED) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums.of[0][0], 64);
  _tile_stored(1, sums.of[0][1], 64);
  if (HALVES == 2) {
    _tile_stored(2, sums.of[1][0], 64);
    _tile_stored(3, sums.of[1][1], 64);
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

// Rows r0…r1 of the sums of a batch of inner groups with two panels, times their integer scales [AMX_BATCH, STRIP, 16].
inline void add_integers(const TileSums* sums, const int32_t* scales, int64_t r0, int64_t r1, int32_t (*totals)[2][PANEL]) {
  I first[AMX_BATCH], second[AMX_BATCH];
  each<AMX_BATCH>(QK_WITH(b) { first[b] = load_i(scales + b * STRIP * PANEL), second[b] = load_i(scales + (b * STRIP + 1) * PANEL); });
  for (int64_t r = r0; r < r1; r++) {
    I one = load_i(totals[r][0]), other = load_i(totals[r][1]);
    each<AMX_BATCH>(QK_WITH(b) {
      const int32_t* sum = sums[b].of[r / AMX_ROWS][0][r % AMX_ROWS];
      one = add_i(one, mul_i(first[b], load_i(sum))), other = add_i(other, mul_i(second[b], load_i(sum + AMX_ROWS * PANEL)));
    });
    store_i(totals[r][0], one), store_i(totals[r][1], other);
  }
}

// As amx_rows, where inner groups have integer scales: see scaled.h.
template <bool SIGNED, int HALVES>
void amx_scaled_rows(const Weight& w, const Activations& x, const Chunk& chunk, int64_t m, int64_t rows, int64_t& configured, float* acc) {
  TileSums sums[2][AMX_BATCH];
  alignas(64) int32_t totals[2 * AMX_ROWS][2][PANEL];
  const int64_t length = w.inner, groups = MAX_BLOCK / length, batches = groups / AMX_BATCH, panel_bytes = chunk.room * PANEL;
  if (configured != rows * AMX_K + length) configure(rows, length), configured = rows * AMX_K + length;
  for (int64_t b = 0; b < chunk.count; b++)
    for (int64_t p = 0; p < STRIP; p += 2) {
      const int64_t at = (chunk.first + b) * x.m + m, first = b * groups * STRIP + p;
      const auto* values = static_cast<const int8_t*>(x.values) + at * MAX_BLOCK;
      const uint8_t* codes = chunk.codes + p * panel_bytes + b * MAX_BLOCK * PANEL;
      __builtin_memset(totals, 0, size_t(rows) * sizeof(totals[0]));
      for (int64_t i = 0; i <= batches; i++)
        for (int64_t j = 0; j < AMX_BATCH; j++) {
          const int64_t k = (i * AMX_BATCH + j) * length;
          if (i < batches) multiply_tiles<SIGNED, HALVES>(values + k, MAX_BLOCK, length, codes + k * PANEL, panel_bytes, sums[i % 2][j]);
          if (i > 0)
            add_integers(sums[(i + 1) % 2], chunk.inner + (first + (i - 1) * AMX_BATCH * STRIP) * PANEL, rows * j / AMX_BATCH,
                         rows * (j + 1) / AMX_BATCH, totals);
        }
      for (int64_t r = 0; r < rows; r++)
        add_totals<1, 2>([&](int, int q) { return load_i(totals[r][q]); }, chunk.scales + (b * STRIP + p) * PANEL, x.scales + at + r, 0,
                         acc + (r * STRIP + p) * PANEL);
      if (w.zeros != nullptr) add_minima<2>(w, x, chunk, b, chunk.first + b, int(p), STRIP, m, rows, acc + p * PANEL);
    }
}

template <class OfHeight>  // work of 16 and of 32 rows at most
inline void amx_tiles(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, OfHeight low, OfHeight tall,
                      float* acc) {
  const int64_t tiles = (m1 - m0 + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
  chunk.ahead.per_tile = ((chunk.ahead.end - chunk.ahead.at) / tiles + 63) / 64 * 64;
  int64_t configured = 0;
  for (int64_t m = m0, rows; m < m1; m += rows, acc += rows * STRIP * PANEL) {
    rows = m1 - m < 2 * AMX_ROWS ? m1 - m : 2 * AMX_ROWS;
    chunk.ahead.fetch(nullptr);
    const auto of_height = rows > AMX_ROWS ? tall : low;
    of_height(w, x, chunk, m, rows, configured, acc);
  }
}

template <>
void rows_of_tiles<S8Amx, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  if (chunk.shifts != nullptr) add_shifts<STRIP>(chunk.shifts, x, chunk.first, chunk.count, m0, m1, acc + SHIFT_SUMS);
  if (w.offset != 0) amx_tiles(w, x, chunk, m0, m1, amx_rows<true, 1>, amx_rows<true, 2>, acc);
  else amx_tiles(w, x, chunk, m0, m1, amx_rows<false, 1>, amx_rows<false, 2>, acc);
}
template <>
void rows_of_tiles<Scaled<S8Amx>, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  if (w.offset != 0) amx_tiles(w, x, chunk, m0, m1, amx_scaled_rows<true, 1>, amx_scaled_rows<true, 2>, acc);
  else amx_tiles(w, x, chunk, m0, m1, amx_scaled_rows<false, 1>, amx_scaled_rows<false, 2>, acc);
}

struct ByAmx {
  template <class Source>
  static void of(const Job& j) {
    by_own_chunks<Source, STRIP, STRIP>(j, AMX_COLUMNS, [&](const Chunk& chunk) {
      unpack(S8Amx{}, j.w, codes_at(j.w, j.panel, chunk.block.k0), chunk, j.unpacked());
      return j.unpacked();
    });
    _tile_release();
  }
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if constexpr (ALL == STRIP)
      if (by_amx(j.w, j.rows())) return j.w.inner != 0 ? of<Scaled<S8Amx>>(j) : of<S8Amx>(j);
    ByS8::panels<PANELS, ALL>(j);
  }
};

int64_t probe_amx(int64_t rounds) {
  alignas(64) static const uint8_t codes[1024] = {};
  configure(2 * AMX_ROWS, AMX_K);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, codes, 64);
  _tile_loadd(5, codes, 64);
  _tile_loadd(6, codes, 64);
  _tile_loadd(7, codes, 64);
  for (int64_t i = 0; i < rounds; i++) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * AMX_ROWS * PANEL * AMX_K;
}
