// Products by AMX: an instruction takes 16 rows of x, 16 rows of the weight and 64 k. The int32 sums are those of DotS8, so the bits are.
//
// A panel in scratch lies as the instruction reads it: 64 bytes for every 4 k, byte 4n+i of them row n at k0+i. They are the values, code
// less offset, signed (unsigned where there is no offset), so that no sum starts from a correction; every block is padded with 0 to a
// multiple of 64, which is why the activations beyond its end, whatever they are, add nothing.

constexpr int64_t AMX_ROWS = 16, AMX_K = 64;
// Rows of x, and columns of a block, from which it is faster than DotS8: below, unpacking and scaling are most of the work.
constexpr int64_t AMX_FROM = 32, AMX_LEAST_BLOCK = 32;
constexpr int64_t AMX_COLUMNS = 512;  // of a strip in scratch: 32 KiB, most of L1

struct S8Amx : S8<false> {
  static constexpr int TILE_BYTES = 128;
};
template <>
constexpr int64_t room_of<S8Amx>(int64_t length) {
  return (length + AMX_K - 1) / AMX_K * AMX_K;
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
inline bool fits_amx(const Weight& w) {
  return w.nested == Nested::none && w.geometry.group_padded >= AMX_LEAST_BLOCK && (w.bits < 8 || w.offset == 0 || w.offset == 128);
}

struct TileConfig {  // what ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0…3 are sums of two halves of the rows by two panels, 4 and 5 the halves of x, 6 and 7 the panels.
inline void configure(int64_t first, int64_t second) {
  alignas(64) TileConfig config;
  const int64_t rows[8] = {first, first, second, second, first, second, AMX_ROWS, AMX_ROWS};
  for (int i = 0; i < 8; i++)
    if (rows[i] != 0) config.rows[i] = uint8_t(rows[i]), config.row_bytes[i] = 64;
  __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's _tile_loadconfig says that it reads 8 bytes
  _tile_loadconfig(&config);
}

struct TileSums {
  alignas(64) int32_t of[2][2][AMX_ROWS][PANEL];  // half of the rows, panel
};

// x [16 * HALVES, room] times two panels
template <bool SIGNED, int HALVES>
inline void multiply_tiles(const int8_t* x, int64_t length, const uint8_t* weights, int64_t panel_bytes, TileSums& sums) {
  __asm__ volatile("" : : : "memory");  // GCC's _tile_loadd does not say that it reads memory
  _tile_zero(0);
  _tile_zero(1);
  if (HALVES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < length; k += AMX_K, weights += AMX_K * PANEL) {
    const uint8_t* other = weights + panel_bytes;
    _tile_loadd(4, x + k, length);
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
      _tile_loadd(5, x + AMX_ROWS * length + k, length);
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

inline void add_scaled(const TileSums& sums, const float* factors, const float* scales, int64_t rows, float* acc) {
  const F first = load_f(factors), second = load_f(factors + PANEL);
  for (int64_t r = 0; r < rows; r++, acc += STRIP * PANEL) {
    const F scale = set1_f(scales[r]);
    const int32_t* sum = sums.of[r / AMX_ROWS][0][r % AMX_ROWS];
    store_f(acc, fma(mul(first, scale), to_float(_mm512_load_si512(sum)), load_f(acc)));
    store_f(acc + PANEL, fma(mul(second, scale), to_float(_mm512_load_si512(sum + AMX_ROWS * PANEL)), load_f(acc + PANEL)));
  }
}

// Every block by two pairs of panels. The tiles of one pair are at work while the sums of the one before are scaled.
template <bool SIGNED, int HALVES>
void amx_rows(const Weight& w, const Activations& x, const Chunk& chunk, int64_t m, int64_t rows, float* acc) {
  TileSums sums[2];
  const int64_t panel_bytes = chunk.room * PANEL;
  const auto scale = [&](int64_t unit) __attribute__((always_inline)) {
    const int64_t b = unit / 2, p = unit % 2 * 2, of_block = (chunk.first + b) * x.m + m;
    add_scaled(sums[unit % 2], chunk.scales + (b * STRIP + p) * PANEL, x.scales + of_block, rows, acc + p * PANEL);
  };
  const uint8_t* codes = chunk.codes;
  Block block = chunk.block;
  for (int64_t unit = 0; unit < 2 * chunk.count; unit++) {
    const auto* values = static_cast<const int8_t*>(x.values) + x.m * block.k0 + m * block.length;
    multiply_tiles<SIGNED, HALVES>(values, block.length, codes + unit % 2 * 2 * panel_bytes, panel_bytes, sums[unit % 2]);
    if (unit > 0) scale(unit - 1);
    if (unit % 2 == 1) codes += room_of<S8Amx>(block.length) * PANEL, block = block_after(w.geometry, block);
  }
  scale(2 * chunk.count - 1);
}

template <>
void rows_of_tiles<S8Amx, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  if (chunk.shifts != nullptr) add_shifts<STRIP>(chunk.shifts, x, chunk.first, chunk.count, m0, m1, acc + SHIFT_SUMS);
  const int64_t tiles = (m1 - m0 + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
  chunk.ahead.per_tile = ((chunk.ahead.end - chunk.ahead.at) / tiles + 63) / 64 * 64;
  const auto low = w.offset != 0 ? amx_rows<true, 1> : amx_rows<false, 1>;
  const auto tall = w.offset != 0 ? amx_rows<true, 2> : amx_rows<false, 2>;
  int64_t configured = 0;
  for (int64_t m = m0, rows; m < m1; m += rows, acc += rows * STRIP * PANEL) {
    rows = m1 - m < 2 * AMX_ROWS ? m1 - m : 2 * AMX_ROWS;
    const int64_t first = rows < AMX_ROWS ? rows : AMX_ROWS;
    if (rows != configured) configure(first, rows - first), configured = rows;
    chunk.ahead.fetch(nullptr);
    const auto of_height = rows > AMX_ROWS ? tall : low;
    of_height(w, x, chunk, m, rows, acc);
  }
}

struct ByAmx {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if constexpr (ALL == STRIP) {
      if (j.rows() >= AMX_FROM && fits_amx(j.w)) {
        const bool kept = j.w.nested != Nested::none;
        const int64_t group = j.w.geometry.group, most = kept ? NESTED_K / group * room_of<S8Amx>(group) : AMX_COLUMNS;
        by_chunks<S8Amx, PANELS, ALL>(j, most, [&](const Chunk& chunk) {
          if (kept) apart(j.w, j.panel, ALL, chunk.block.k0, j.nested_codes(), j.nested());
          unpack(S8Amx{}, j.w, kept ? j.nested_codes() : codes_at(j.w, j.panel, chunk.block.k0), chunk, j.unpacked());
          return j.unpacked();
        });
        return _tile_release();
      }
    }
    ByS8::panels<PANELS, ALL>(j);
  }
};

int64_t probe_amx(int64_t rounds) {
  alignas(64) static const uint8_t codes[1024] = {};
  configure(AMX_ROWS, AMX_ROWS);
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
