// A register tile: ROWS rows of x by PANELS panels of the weight, over some blocks of K.
//
// A block is summed in registers (int32, or fp32), then scaled into the fp32 accumulators in memory: the order of every output
// element's sum depends on K alone, never on M, on the tile or on the threads.

// ---- where a tile's weight vectors come from ------------------------------------------------------------------------------------
// STEPS vectors a tile of 8 k, each against 8 / STEPS consecutive activations. TILE_BYTES from one tile to the next.

template <bool NIBBLE>
struct S8 {
  using Dot = DotS8<NIBBLE>;
  using X = int8_t;
  static constexpr int STEPS = 2;
};
struct F32 {
  using Dot = DotF32;
  using X = float;
  static constexpr int STEPS = 8;
};

struct S8Bytes : S8<false> {  // 8-bit codes, packed or unpacked into scratch
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct S8Unpacked : S8<true> {  // codes below 16 in scratch
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct S8Nibbles : S8<true> {
  static constexpr int TILE_BYTES = 64;
  static B weight(const uint8_t* tile, int step, const Weight&) { return nibbles(load_b(tile), step); }
};
struct S8Table : S8<false> {
  static constexpr int TILE_BYTES = 64;
  static B weight(const uint8_t* tile, int step, const Weight& w) { return look_up(w.table_u8, nibbles(load_b(tile), step)); }
};

struct F32Unpacked : F32 {
  static constexpr int TILE_BYTES = 512;
  static F weight(const uint8_t* tile, int step, const Weight&) { return load_f(reinterpret_cast<const float*>(tile) + 16 * step); }
};
struct F32Integers : F32 {  // of 4 bits
  static constexpr int TILE_BYTES = 64;
  static F weight(const uint8_t* tile, int step, const Weight& w) { return nibble_integers(tile, 8 * (step & 3) + 4 * (step >> 2), w.table); }
};
struct F32Table : F32 {
  static constexpr int TILE_BYTES = 64;
  static F weight(const uint8_t* tile, int step, const Weight& w) { return nibble_values(tile, 8 * (step & 3) + 4 * (step >> 2), w.table); }
};
struct F32Bytes : F32 {  // 8-bit integers
  static constexpr int TILE_BYTES = 128;
  static F weight(const uint8_t* tile, int step, const Weight&) { return byte_integers(tile + 64 * (step >> 2), step & 3); }
};

#ifdef QK_BF16_DOT
// A vector holds two k of every row. Bytes i and i + 2 of a lane are the ones that a shift brings into place together, hence the order
// 0 2, 1 3, 4 6, 5 7 of the pairs.
struct Bf16 {
  using Dot = DotBf16;
  using X = uint16_t;
  static constexpr int STEPS = 4;
};
struct Bf16Unpacked : Bf16 {
  static constexpr int TILE_BYTES = 256;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct Bf16Nibbles : Bf16 {
  static constexpr int TILE_BYTES = 64;
  static B weight(const uint8_t* tile, int step, const Weight& w) { return nibble_pairs(tile, 8 * (step & 1) + 4 * (step >> 1), w.table_bf16); }
};
struct Bf16Bytes : Bf16 {  // 8-bit integers
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) {
    const uint8_t* half = tile + 64 * (step >> 1);
    return bf16_pair(byte_integers(half, step & 1), byte_integers(half, (step & 1) + 2));
  }
};
#endif

template <class Source>
constexpr bool is_s8 = Source::STEPS == 2;

// ---- the tile ---------------------------------------------------------------------------------------------------------------------

inline F scale_of(const Weight& w, int64_t panel, int64_t group) {
  const int64_t at = (panel * w.geometry.groups + group) * w.scale_lanes;
  const F s = w.scale_lanes == 1 ? set1_f(load_number(w.scales, w.scale_dtype, at)) : load_numbers(w.scales, w.scale_dtype, at);
  return mul(s, set1_f(w.alpha));
}
inline F zero_of(const Weight& w, int64_t panel, int64_t group) {
  return w.zeros == nullptr ? zero_f() : load_numbers(w.zeros, w.zero_dtype, (panel * w.geometry.groups + group) * PANEL);
}

// f(0), f(1), … with constants: what they index stays in registers.
#define QK_WITH(I) [&](auto I) __attribute__((always_inline))
template <int COUNT, class Work>
[[gnu::always_inline]] inline void each(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (work(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, COUNT>{});
}

template <class Source, int ROWS, int PANELS>
struct Sums {
  using X = typename Source::X;
  typename Source::Dot dot[ROWS][PANELS];

  // Tiles of k columns; panel_stride and x_stride lead to the next panel and row.
  [[gnu::always_inline]] void add(const Weight& w, const uint8_t* codes, int64_t panel_stride, const X* x, int64_t x_stride, int64_t k) {
    constexpr int STEP_K = TILE_K / Source::STEPS;
    for (const X* end = x + k; x < end; codes += Source::TILE_BYTES, x += TILE_K)
      each<Source::STEPS>(QK_WITH(step) {
        decltype(Source::weight(codes, step, w)) weights[PANELS];
        each<PANELS>(QK_WITH(p) { weights[p] = Source::weight(codes + p * panel_stride, step, w); });
        each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { dot[r][p].add(weights[p], x + r * x_stride + STEP_K * step); }); });
      });
  }
};

// codes: tile (panel, k = first block's k0), panel_stride bytes to the next panel; acc [ROWS][acc_stride]
template <class Source, int ROWS, int PANELS>
void tile(const Weight& w, const Activations& x, int64_t m, int64_t panel, int64_t b0, int64_t b1, const uint8_t* codes, int64_t panel_stride,
          float* acc, int64_t acc_stride) {
  using Dot = typename Source::Dot;
  const Geometry& g = w.geometry;
  const float centre = is_s8<Source> ? 0.0f : w.centre;
  for (int64_t b = b0; b < b1; b++) {
    const Block block = block_at(g, b);
    const auto* rows = static_cast<const typename Source::X*>(x.values) + x.m * block.k0 + m * block.length;
    const float *scales = x.scales + b * x.m + m, *sums = x.sums + b * x.m + m;
    Sums<Source, ROWS, PANELS> total;
    each<ROWS>(QK_WITH(r) {
      int32_t start = 0;  // int8 codes are unsigned: what their offset adds is taken off beforehand
      if constexpr (is_s8<Source>) start = -(w.offset - Dot::BIAS) * int32_t(sums[r]);
      each<PANELS>(QK_WITH(p) { total.dot[r][p].start(start); });
    });
    for (int64_t k = 0; k < block.length; k += Dot::FOLD_K, codes += Dot::FOLD_K / TILE_K * Source::TILE_BYTES) {
      const int64_t length = Dot::FOLD_K < block.length - k ? Dot::FOLD_K : block.length - k;
      total.add(w, codes, panel_stride, rows + k, block.length, length);
      each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { total.dot[r][p].fold(); }); });
    }
    each<PANELS>(QK_WITH(p) {
      const F scale = scale_of(w, panel + p, block.group);
      each<ROWS>(QK_WITH(r) {
        float* out = acc + r * acc_stride + p * PANEL;
        F factor = scale;
        if constexpr (is_s8<Source>) factor = mul(scale, set1_f(scales[r]));
        store_f(out, fma(factor, total.dot[r][p].value(), load_f(out)));
      });
      if (w.zeros == nullptr && centre == 0) return;
      const F shift = mul(scale, sub_f(set1_f(centre), zero_of(w, panel + p, block.group)));  // scale * (code - zero): the zero's share
      for (int r = 0; r < ROWS; r++) {
        float* out = acc + r * acc_stride + p * PANEL;
        store_f(out, fma(shift, set1_f(is_s8<Source> ? scales[r] * sums[r] : sums[r]), load_f(out)));
      }
    });
  }
}

template <int PANELS>
constexpr int MAX_ROWS = ACCUMULATORS / PANELS < 12 ? ACCUMULATORS / PANELS : 12;

// All rows m0…m1, in tiles of nearly equal height (so that no M is much dearer than the next).
template <class Source, int PANELS>
void rows_of_tiles(const Weight& w, const Activations& x, int64_t m0, int64_t m1, int64_t panel, int64_t b0, int64_t b1, const uint8_t* codes,
                   int64_t panel_stride, float* acc) {
  constexpr int64_t stride = PANELS * PANEL;
  constexpr auto tile_of = []<size_t... R>(std::index_sequence<R...>) { return std::array{tile<Source, int(R) + 1, PANELS>...}; };
  constexpr auto TILES = tile_of(std::make_index_sequence<MAX_ROWS<PANELS>>{});  // by height, from 1
  int64_t tiles = (m1 - m0 + MAX_ROWS<PANELS> - 1) / MAX_ROWS<PANELS>;
  for (int64_t m = m0, rows; m < m1; m += rows, tiles--) {
    rows = (m1 - m + tiles - 1) / tiles;
    TILES[size_t(rows - 1)](w, x, m, panel, b0, b1, codes, panel_stride, acc + (m - m0) * stride, stride);
  }
}
