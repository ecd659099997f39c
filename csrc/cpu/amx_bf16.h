// Products by AMX of bf16 numbers: an instruction takes 16 rows of x, 16 rows of the weight and up to 32 k. It sums the first members of the
// pairs of k and the second ones, each in a chain of fused multiply-adds that starts from 0, and adds the sum of both to the tile's. Source:
// Intel's manual on TDPBF16PS. Subnormal numbers are zeros to it.
//
// A row's bits may not depend on M: few rows, which are not worth unpacking for, take fp32 products in that very order (DotInTiles), and a
// weight with blocks that do not come apart so, at any M, DotBf16.

constexpr int64_t AMX_BF16_K = 32;
constexpr int64_t AMX_BF16_FROM = 4;  // rows of x: fewer are one tile of DotInTiles
inline bool in_tiles(const Weight& w) {
  const Geometry& g = w.geometry;
  const auto fits = [](int64_t length) { return length % AMX_BF16_K == 0 || length < AMX_BF16_K; };
  const int64_t last = g.k_padded - (g.groups - 1) * g.group_padded;
  return fits((g.groups > 1 ? g.group_padded : last) % MAX_BLOCK) && fits(last % MAX_BLOCK);
}

// ---- few rows

inline bool are_few(const Weight& w, int64_t rows) {  // e5m2 is rare, and becomes bf16 sooner than fp32
  return rows < AMX_BF16_FROM && w.kind != CodeKind::e5m2;
}

struct DotInTiles {
  static constexpr int FOLD_K = AMX_BF16_K;
  F sum, chains[2];
  void start(int32_t) { sum = chains[0] = chains[1] = zero_f(); }
  template <int STEP>
  void add_step(F w, const float* x) {  // the pairs of a tile are 0 2, 1 3, 4 6, 5 7
    F& chain = chains[STEP >> 1 & 1];
    chain = _mm512_fmadd_ps(w, set1_f(*x), chain), hold(chain);
  }
  void fold() { sum = add_f(sum, add_f(chains[0], chains[1])), chains[0] = chains[1] = zero_f(); }
  F value() const { return sum; }
};
template <class Source>
struct InTiles : Source {
  using Dot = DotInTiles;
};
template <class Source>
constexpr int MOST_SUMS<InTiles<Source>> = (AMX_BF16_FROM - 1) * WIDE;  // each takes three registers

struct ByInTiles {
  template <int PANELS, int ALL>
  static void panels(const Job& j) {
    if (j.w.nested != Nested::none) return from_nested<InTiles<F32Unpacked>, PANELS, ALL>(j);
    if constexpr (ALL == STRIP) {
      const bool integers = j.w.kind == CodeKind::integer;
      if (j.w.bits == 4) return integers ? streamed<InTiles<F32Integers>>(j) : streamed<InTiles<F32Table>>(j);
      if (j.w.bits == 8 && integers) return streamed<InTiles<F32Bytes>>(j);
      if (j.w.kind == CodeKind::e4m3) return streamed<InTiles<F32E4m3>>(j);
    }
    through_scratch<InTiles<F32Unpacked>, PANELS, ALL>(j);
  }
};

// ---- many rows

struct Bf16Amx : Bf16 {
  static constexpr int TILE_BYTES = 256;
};
template <>
inline int64_t room_of<Bf16Amx>(int64_t length) {
  return 2 * length;
}

template <int PANELS>  // of a strip: [PANELS, k / 2, 64]
inline const uint8_t* unpack_bf16(const Job& j, const Chunk& chunk) {
  const Weight& w = j.w;
  const uint8_t* codes = codes_at(w, j.panel, chunk.block.k0);
  if (w.nested != Nested::none) {
    apart(w, j.panel, PANELS, chunk.block.k0, j.nested_codes(), j.nested());
    codes = j.nested_codes();
  }
  const int64_t panel_bytes = chunk.room * PANEL, tile_bytes = 16 * w.bits;
  for (int64_t k = 0; k < chunk.k; k += TILE_K)
    for (int p = 0; p < PANELS; p++, codes += tile_bytes) {
      fetch_ahead(codes);
      if (tile_bytes > 64) fetch_ahead(codes + 64);
      unpack(Bf16{}, w, codes, TILE_K, j.unpacked() + p * panel_bytes + k * 2 * PANEL);
    }
  return j.unpacked();
}

struct Bf16Sums {  // 2 KiB: of 4, the stores of one unit would keep the loads of the one before waiting, as if of the same memory
  alignas(64) float of[2][AMX_ROWS][PANEL];  // panel
};

// x [16, length] times some panels.
template <int PANELS>
inline void multiply_tiles(const uint16_t* x, int64_t length, const uint8_t* weights, int64_t panel_bytes, Bf16Sums& sums) {
  each<PANELS>(QK_WITH(p) { clear_tile<p>(); });
  for (int64_t k = 0; k < length; k += AMX_BF16_K, weights += AMX_BF16_K * 2 * PANEL) {
    load_tile<4>(x + k, 2 * length);
    each<PANELS>(QK_WITH(p) { load_tile<6 + p>(weights + p * panel_bytes, 64), dot_bf16_tiles<p, 4, 6 + p>(); });
  }
  each<PANELS>(QK_WITH(p) { store_tile<p>(sums.of[p]); });
}

// All blocks of a chunk and panels of a strip, a unit of PANELS panels and a block at a time; a unit's sums are scaled when the next one's
// tiles are at work.
template <int PANELS, int ALL>
void amx_bf16_rows(const Weight& w, const Activations& x, const Chunk& chunk, int64_t m, int64_t rows, int64_t& configured, float* acc) {
  Bf16Sums sums[2];
  const float* factors = nullptr;
  float* out = nullptr;
  int at = 0;
  const auto scale = [&] {
    if (factors == nullptr) return;
    for (int64_t r = 0; r < rows; r++)
      each<PANELS>(QK_WITH(p) {
        float* sum = out + (r * ALL + p) * PANEL;
        store_f(sum, fma(load_f(factors + p * PANEL), load_f(sums[1 - at].of[p][r]), load_f(sum)));
      });
    factors = nullptr;
  };
  for (int p = 0; p < ALL; p += PANELS) {
    const uint8_t* weights = chunk.codes + p * chunk.room * PANEL;
    Block block = chunk.block;
    for (int64_t b = 0; b < chunk.count; b++, block = block_after(w.geometry, block)) {
      const int64_t columns = block.length < AMX_BF16_K ? block.length : AMX_BF16_K;
      if (configured != rows * AMX_K + columns) configure(rows, 2 * columns), configured = rows * AMX_K + columns;
      const auto* values = static_cast<const uint16_t*>(x.values) + x.m * block.k0 + m * block.length;
      multiply_tiles<PANELS>(values, block.length, weights, chunk.room * PANEL, sums[at]);
      scale();
      factors = chunk.scales + (b * ALL + p) * PANEL, out = acc + p * PANEL, at = 1 - at;
      weights += block.length * 2 * PANEL;
    }
  }
  scale();
}

template <int ALL>
inline void amx_bf16_strip(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  constexpr int PANELS = ALL < 2 ? ALL : 2;
  int64_t configured = 0;
  for (int64_t m = m0, rows; m < m1; m += rows, acc += rows * ALL * PANEL) {
    rows = m1 - m < AMX_ROWS ? m1 - m : AMX_ROWS;
    amx_bf16_rows<PANELS, ALL>(w, x, chunk, m, rows, configured, acc);
  }
}
template <>
void rows_of_tiles<Bf16Amx, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  amx_bf16_strip<STRIP>(w, x, chunk, m0, m1, acc);
}
template <>
void rows_of_tiles<Bf16Amx, 1>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  amx_bf16_strip<1>(w, x, chunk, m0, m1, acc);
}

// ---- both

struct Flushing {  // subnormal numbers are zeros to vectors, too
#ifndef QKERNELS_EMULATE
  unsigned before = _mm_getcsr();
  Flushing() { _mm_setcsr(before | 0x8040); }
  ~Flushing() { _mm_setcsr(before); }
#endif
};

void rows_for_amx_bf16(const Rows& rows, const Weight& w, int64_t m0, int64_t m1, const Activations& a) {
  (in_tiles(w) && are_few(w, a.m) ? rows_to_f32 : rows_to_bf16)(rows, w, m0, m1, a);
}

void multiply_bf16_by_amx(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
                          char* scratch) {
  if (!in_tiles(w)) return multiply<ByBf16>(w, x, out, m0, m1, p0, p1, scratch);
  const Flushing flushing;
  if (are_few(w, x.m)) {
    Weight rounded = w;  // a table as the tiles have it
    for (int i = 0; i < 16; i++) rounded.table[i] = bits_to_float(uint32_t(w.table_bf16[i]) << 16);
    return multiply<ByInTiles>(rounded, x, out, m0, m1, p0, p1, scratch);
  }
  const int64_t strips = (p1 - p0) / STRIP;
  Job j{w, x, out, m0, m1, p0, scratch, reinterpret_cast<float*>(scratch)};
  if (strips > 0) by_amx_chunks<Bf16Amx>(j, strips);
  for (j.panel += strips * STRIP; j.panel < p1; j.panel++)
    by_own_chunks<Bf16Amx, 1, 1>(j, AMX_COLUMNS, [&](Chunk& chunk) { return unpack_bf16<1>(j, chunk); });
  _tile_release();
}

int64_t probe_amx_bf16(int64_t rounds) {
  return probe_tiles<AMX_BF16_K>(
      rounds, [] { dot_bf16_tiles<0, 4, 6>(), dot_bf16_tiles<1, 4, 7>(), dot_bf16_tiles<2, 5, 6>(), dot_bf16_tiles<3, 5, 7>(); });
}
