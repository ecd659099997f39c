// A register tile: ROWS rows of x by PANELS panels of the weight, over some blocks of K.
//
// A block is summed in registers (int32, or fp32), then scaled into the fp32 accumulators in memory: the order of every output
// element's sum depends on K alone, never on M, on the tile or on the threads.

// ---- where a tile's weight vectors come from ------------------------------------------------------------------------------------
// STEPS vectors a tile of 8 k, each against 8 / STEPS consecutive activations. TILE_BYTES from one panel's tile to the next panel's.
// IDLE_ROWS: with so many rows there is next to nothing to do but read.

template <int LARGEST>
struct S8 {  // codes of at most LARGEST
  using Dot = DotS8<LARGEST>;
  using X = int8_t;
  static constexpr int STEPS = 2, IDLE_ROWS = 0;
};
struct F32 {
  using Dot = DotF32;
  using X = float;
  static constexpr int STEPS = 8, IDLE_ROWS = 0;
};

struct S8Bytes : S8<255> {  // 8-bit codes, packed or unpacked into scratch
  static constexpr int TILE_BYTES = 128, IDLE_ROWS = 3;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
template <int LARGEST>
struct S8Unpacked : S8<LARGEST> {  // one a byte, in scratch
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct S8Nibbles : S8<15> {
  static constexpr int TILE_BYTES = 64, IDLE_ROWS = 3;
  static B weight(const uint8_t* tile, int step, const Weight&) { return nibbles(load_b(tile), step); }
};
struct S8Table : S8<255> {
  static constexpr int TILE_BYTES = 64, IDLE_ROWS = 2;
  static auto weight(const uint8_t* tile, int step, const Weight& w) { return entries(w, nibbles(load_b(tile), step)); }
};
struct S8Narrow : S8<31> {
  static constexpr int TILE_BYTES = 64, IDLE_ROWS = 2;
  static B weight(const uint8_t* tile, int step, const Weight& w) { return look_up(w.table_low, nibbles(load_b(tile), step)); }
};
inline bool is_narrow(const Weight& w) { return w.kind == CodeKind::table && w.span <= NARROW; }
// What the codes of a weight are lessened by where they are multiplied.
inline int32_t bias_of(const Weight& w) {
  if (is_narrow(w)) return w.lowest;
  return w.kind == CodeKind::integer && w.bits <= 6 ? DotS8<63>::BIAS : DotS8<255>::BIAS;
}

#ifdef QK_LANES
// What codes are lessened by where that is all that their values lack, and 16 bits then hold the sum of a group, as it is short; else 0.
inline int middle_of(const Weight& w) {
  if (w.inner != 0) return w.kind == CodeKind::integer ? w.offset : 0;
  using Five = DotLanes<31>;
  const bool table = is_narrow(w), five = w.kind == CodeKind::integer && w.bits == 5;
  if (!(table || five) || w.geometry.group_padded > Five::LONGEST) return 0;
  const int middle = table ? 128 - w.lowest : w.offset, above = table ? w.span - middle : Five::HALF;
  return 0 < middle && middle <= Five::HALF && above <= Five::HALF && (table || middle == Five::HALF) ? middle : 0;
}
struct S8Lanes : S8Unpacked<31> {
  using Dot = DotLanes<31>;
};
struct S8NarrowLanes : S8Narrow {
  using Dot = DotLanes<31>;
};
#endif

template <int BITS>
struct S8Planes : S8<(1 << BITS) - 1> {  // integers of other widths
  static constexpr int TILE_BYTES = 16 * BITS, IDLE_ROWS = 1;
  static B weight(const uint8_t* tile, int step, const Weight&) { return planes<BITS>(tile, step); }
};
#ifdef QK_LANES
struct S8PlanesLanes : S8Planes<5> {
  using Dot = DotLanes<31>;
};
#endif

#ifdef QK_PAIRS
struct S8Pairs {  // codes below 16 in scratch
  using Dot = DotPairs;
  using X = int8_t;
  static constexpr int STEPS = 1, TILE_BYTES = 128, IDLE_ROWS = 0;
  static Pair weight(const uint8_t* tile, int, const Weight&) { return {load_b(tile), load_b(tile + 64)}; }
};
#endif

struct F32Unpacked : F32 {
  static constexpr int TILE_BYTES = 512;
  static F weight(const uint8_t* tile, int step, const Weight&) { return load_f(reinterpret_cast<const float*>(tile) + 16 * step); }
};
struct F32Integers : F32 {  // of 4 bits
  static constexpr int TILE_BYTES = 64;
  static F weight(const uint8_t* tile, int step, const Weight& w) {
    return nibble_integers(tile, 8 * (step & 3) + 4 * (step >> 2), w.table);
  }
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
  static constexpr int STEPS = 4, IDLE_ROWS = 0;
};
struct Bf16Unpacked : Bf16 {
  static constexpr int TILE_BYTES = 256;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct Bf16Nibbles : Bf16 {
  static constexpr int TILE_BYTES = 64, IDLE_ROWS = 1;
  static B weight(const uint8_t* tile, int step, const Weight& w) {
    return nibble_pairs(tile, 8 * (step & 1) + 4 * (step >> 1), w.table_bf16);
  }
};
struct Bf16Bytes : Bf16 {  // 8-bit integers
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) {
    const uint8_t* half = tile + 64 * (step >> 1);
    return bf16_pair(byte_integers(half, step & 1), byte_integers(half, (step & 1) + 2));
  }
};
struct Bf16E4m3 : Bf16 {
  static constexpr int TILE_BYTES = 128;
  static B weight(const uint8_t* tile, int step, const Weight&) { return e4m3_pairs(tile + 64 * (step >> 1), step & 1); }
};
struct F32E4m3 : F32 {
  static constexpr int TILE_BYTES = 128;
  static F weight(const uint8_t* tile, int step, const Weight&) {
    return member_of(e4m3_pairs(tile + 64 * (step >> 2), step & 1), step & 2);
  }
};
#endif

template <class Source>
constexpr bool is_s8 = sizeof(typename Source::X) == 1;
template <class Source>
constexpr bool is_bf16 = sizeof(typename Source::X) == 2;
template <class Source>
constexpr bool is_paired = is_s8<Source> && Source::STEPS == 1;

#ifndef QK_LANES
// Sums that integer scales multiply, see scaled.h.
template <class Dot>
struct ScaledDot : Dot {
  static constexpr int PIECE = MAX_BLOCK;
  I scale;
  I scaled(I total) const { return add_i(total, mul_i(this->sum, scale)); }
};
#endif

// A source of which every few columns have an integer scale: see scaled.h.
template <class Source>
struct Scaled : Source {
  using Dot = ScaledDot<typename Source::Dot>;
};
template <class Source>
constexpr bool is_in_tiles = requires(typename Source::Dot dot) { dot.chains; };  // see amx_bf16.h
template <class Source>
constexpr bool is_scaled = requires(typename Source::Dot dot) { dot.scale; };

// ---- the tile ---------------------------------------------------------------------------------------------------------------------

// f(0), f(1), … with constants: what they index stays in registers.
#define QK_WITH(I) [&](auto I) __attribute__((always_inline))
template <int COUNT, class Work>
[[gnu::always_inline]] inline void each(const Work& work) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (work(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, COUNT>{});
}

// Packed codes that will be read later are fetched into L2 meanwhile, evenly: a burst of fetches would hold up the loads behind it.
struct Ahead {  // those of the next chunk, or of the next strip's first
  const uint8_t *at, *end;
  int64_t per_tile;  // bytes, for every tile of 8 k that is worked on
  template <int TILES = 1>
  [[gnu::always_inline]] void fetch(const uint8_t*) {
    if (at >= end) return;
    const uint8_t* const next = at + TILES * per_tile;
    for (; at < next; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Codes that are read once are fetched so many bytes ahead of those in use, into L1 and L2; 0: not. Zen4 and Zen5 want them far ahead, in L2,
// and where there is next to nothing to do but read fetch by themselves what lies between every fourth line. An Intel Xeon wants all lines,
// in L1 and before that in L2: int4 comes a quarter faster than by every fourth line far ahead, 8-bit codes 13 % faster than by L1 alone.
#if defined(QK_FETCH_TWICE)
constexpr int64_t AHEAD_L1 = 1 << 10, AHEAD_L2 = 3 << 10;
#elif defined(QK_FETCH_NEAR)
constexpr int64_t AHEAD_L1 = 2560, AHEAD_L2 = 0;
#else
constexpr int64_t AHEAD_L1 = 0, AHEAD_L2 = 7 << 10;
#endif
[[gnu::always_inline]] inline void fetch_ahead(const uint8_t* codes) {  // a line
  if (AHEAD_L1 != 0) __builtin_prefetch(codes + AHEAD_L1, 0, 3);
  if (AHEAD_L2 != 0) __builtin_prefetch(codes + AHEAD_L2, 0, 2);
}
template <class Source, int ROWS, int PANELS>
struct FarAhead {
  static constexpr int BYTES = PANELS * Source::TILE_BYTES, APART = AHEAD_L1 == 0 && ROWS <= Source::IDLE_ROWS ? 256 : 64;
  [[gnu::always_inline]] void fetch(const uint8_t* codes) {
    each<(BYTES + APART - 1) / APART>(QK_WITH(i) { fetch_ahead(codes + i * APART); });
  }
};

template <class Source>
constexpr bool takes_memory = requires(typename Source::Dot dot) { dot.add_memory(B{}, nullptr); };

template <int STEP, class Dot, class Value, class X>  // of the steps of a tile, for sums to which it makes a difference
[[gnu::always_inline]] inline void add_step(Dot& dot, const Value& w, const X* x) {
  if constexpr (requires { dot.template add_step<STEP>(w, x); }) dot.template add_step<STEP>(w, x);
  else dot.add(w, x);
}

template <class Source, int ROWS, int PANELS, bool STREAMED = false>
struct Sums {
  using X = typename Source::X;
  typename Source::Dot dot[ROWS][PANELS];

  // starts: of the rows, or null for 0; columns: what paired codes add among themselves.
  [[gnu::always_inline]] void start(const int32_t* starts, const int32_t* columns) {
    each<ROWS>(QK_WITH(r) {
      each<PANELS>(QK_WITH(p) {
        if constexpr (is_paired<Source>) dot[r][p].start(starts[r], columns + p * PANEL);
        else dot[r][p].start(starts != nullptr ? starts[r] : 0);
      });
    });
  }
  // A tile of 8 k; x_stride leads to the next row.
  [[gnu::always_inline]] void add_tile(const Weight& w, const uint8_t* codes, const X* x, int64_t x_stride) {
    constexpr int STEP_K = TILE_K / Source::STEPS;
    each<Source::STEPS>(QK_WITH(i) {
      const auto weight = [&](int p) { return Source::weight(codes + p * Source::TILE_BYTES, i, w); };
      if constexpr (STREAMED && (takes_memory<Source> || ROWS == 1)) {  // a panel's at a time: few registers
        each<PANELS>(QK_WITH(p) {
          const auto of_panel = weight(p);
          each<ROWS>(QK_WITH(r) {
            if constexpr (takes_memory<Source>) dot[r][p].add_memory(of_panel, x + r * x_stride + STEP_K * i);
            else add_step<i>(dot[r][p], of_panel, x + r * x_stride + STEP_K * i);
          });
        });
      } else {
        decltype(weight(0)) weights[PANELS];
        each<PANELS>(QK_WITH(p) { weights[p] = weight(p); });
        each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { add_step<i>(dot[r][p], weights[p], x + r * x_stride + STEP_K * i); }); });
      }
    });
  }
  // Tiles of k columns; `step` leads to the next tile's codes.
  template <class Fetch>
  [[gnu::always_inline]] void add(const Weight& w, const uint8_t* codes, int64_t step, const X* x, int64_t x_stride, int64_t k,
                                  Fetch& ahead) {
    const X* end = x + k;
    do {  // once at least: were it to be skipped, GCC would keep the sums on the stack for that case
      ahead.fetch(codes);
      add_tile(w, codes, x, x_stride);
      codes += step, x += TILE_K;
    } while (x < end);
  }
  template <int TILES, class Fetch>
  [[gnu::always_inline]] void add_tiles(const Weight& w, const uint8_t* codes, int64_t step, const X* x, int64_t x_stride, Fetch& ahead) {
    if constexpr (!STREAMED) ahead.template fetch<TILES>(codes);  // before them all: a tenth faster
    each<TILES>(QK_WITH(i) {
      if constexpr (STREAMED) ahead.fetch(codes + i * step);  // a tenth slower if all at once
      add_tile(w, codes + i * step, x + i * TILE_K, x_stride);
    });
  }
  [[gnu::always_inline]] void fold() {
    each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { dot[r][p].fold(); }); });
  }
  // LENGTH: the block's, where it is a constant.
  template <int LENGTH, class Fetch>
  [[gnu::always_inline]] void add_block(const Weight& w, const uint8_t* codes, int64_t step, const X* x, int64_t length, Fetch& ahead) {
    constexpr int64_t FOLD_K = Source::Dot::FOLD_K;
    if constexpr (LENGTH != 0) {
      constexpr int64_t PIECE = FOLD_K < LENGTH ? FOLD_K : LENGTH;
      each<LENGTH / PIECE>(QK_WITH(i) {
        add_tiles<PIECE / TILE_K>(w, codes + i * PIECE / TILE_K * step, step, x + i * PIECE, LENGTH, ahead);
        fold();
      });
    } else if constexpr (FOLD_K == MAX_BLOCK) {
      add(w, codes, step, x, length, length, ahead);
    } else {
      for (int64_t k = 0; k < length; k += FOLD_K, x += FOLD_K, codes += FOLD_K / TILE_K * step) {
        if (length - k >= FOLD_K) add_tiles<FOLD_K / TILE_K>(w, codes, step, x, length, ahead);
        else add(w, codes, step, x, length, length - k, ahead);
        fold();
      }
    }
  }
};

struct Chunk {  // of K, for PANELS panels of a strip
  int64_t first, count, k, room;  // blocks first…first + count, of k columns in all, which take `room` in scratch
  Block block;  // the first of them
  Place place;  // of the first of these panels
  const uint8_t* codes;  // its codes, in the form of a source
  int64_t step;  // bytes to the next tile's: TILE_BYTES of every panel of the strip
  float* scales;  // [count, PANELS, 16]; where weights are streamed [PANELS, 16], of the block at hand
  float* shifts;  // likewise: what the scale does not multiply, as in scale * code + shift; or null
  int64_t waiting;  // of how many blocks before the first the shifts are still to be added: they lie before those of the chunk
  const int32_t* columns;  // [count, PANELS, 16], of paired codes: what they add among themselves
  const float* nested;  // [count, panels of the strip, 16], scales of blocks that came apart
  // Where scales are integers: [count, inner groups, PANELS, 16] and [count, inner groups / 2, PANELS, 16], in the forms of load_scales and
  // load_pairs; and what multiplies the minima, as `scales` multiply the sums.
  int32_t *inner, *minima;
  float* minima_scales;
  int digits;  // likewise, by AMX: of the values times their scales
  Ahead ahead;  // unless weights are streamed
  int passes;  // over these columns, this one and those to come: the strip's other panels
};

[[gnu::noinline]] float number_of(const void* numbers, Dtype dtype, int64_t i) { return load_number(numbers, dtype, i); }

// work(p, 16 numbers, one a row) for some panels of a group. The dtype is a constant of the loops: as a switch within them, decoding the
// scales took a tenth of the time of one row of x.
template <int PANELS, class Work>
[[gnu::always_inline]] inline void for_numbers(const void* numbers, Dtype dtype, int lanes, int64_t first, const Work& work) {
  if (lanes == 1) return each<PANELS>(QK_WITH(p) { work(p, set1_f(number_of(numbers, dtype, first + p))); });
  const auto all = [&](auto kind) __attribute__((always_inline)) {
    each<PANELS>(QK_WITH(p) { work(p, load_numbers(numbers, kind, (first + p) * PANEL)); });
  };
  switch (dtype) {
    case Dtype::f32: return all(std::integral_constant<Dtype, Dtype::f32>{});
    case Dtype::bf16: return all(std::integral_constant<Dtype, Dtype::bf16>{});
    case Dtype::f16: return all(std::integral_constant<Dtype, Dtype::f16>{});
    case Dtype::e4m3: return all(std::integral_constant<Dtype, Dtype::e4m3>{});
    case Dtype::e8m0: return all(std::integral_constant<Dtype, Dtype::e8m0>{});
    case Dtype::u8: return all(std::integral_constant<Dtype, Dtype::u8>{});
    case Dtype::i8: break;  // those of for_nested
  }
  __builtin_unreachable();
}

// work(p, 16 scales, or zeros) where they have a second level.
template <int PANELS, class Work>
[[gnu::always_inline]] inline void for_nested(const void* numbers, Dtype dtype, int64_t first, const uint16_t* outer, const Work& work) {
  const auto all = [&](auto kind) __attribute__((always_inline)) {
    each<PANELS>(
        QK_WITH(p) { work(p, mul(load_numbers(numbers, kind, (first + p) * PANEL), load_numbers(outer, Dtype::f16, p * PANEL))); });
  };
  if (dtype == Dtype::i8) all(std::integral_constant<Dtype, Dtype::i8>{});
  else all(std::integral_constant<Dtype, Dtype::u8>{});
}

template <int PANELS, class Work>  // work(p, 16 scales)
[[gnu::always_inline]] inline void for_scales(const Weight& w, const Place& place, int64_t group, const Work& work) {
  const int64_t first = numbers_at(w, place, group);
  const auto scale = [&](auto p, F s) __attribute__((always_inline)) { work(p, mul(s, set1_f(w.alpha))); };
  if (w.outer != nullptr) return for_nested<PANELS>(w.scales, w.scale_dtype, first, outer_at(w, place, group, false), scale);
  for_numbers<PANELS>(w.scales, w.scale_dtype, w.scale_lanes, first, scale);
}

template <bool CENTRED, int PANELS, class Work>  // work(p, 16 shifts), for scales [PANELS, 16]
[[gnu::always_inline]] inline void for_shifts(const Weight& w, const Place& place, int64_t group, const float* scales, const Work& work) {
  const F centre = set1_f(CENTRED ? w.centre : 0.0f);
  const int64_t first = numbers_at(w, place, group);
  const auto zero = [&](int p, F v) __attribute__((always_inline)) { work(p, mul(load_f(scales + p * PANEL), sub_f(centre, v))); };
  const auto minimum = [&](int p, F v)
                           __attribute__((always_inline)) { work(p, CENTRED ? fma(load_f(scales + p * PANEL), centre, v) : v); };
  if (w.zeros == nullptr)
    for (int p = 0; p < PANELS; p++) zero(p, zero_f());
  else if (!w.minima) for_numbers<PANELS>(w.zeros, w.zero_dtype, PANEL, first, zero);
  else if (w.outer == nullptr) for_numbers<PANELS>(w.zeros, w.zero_dtype, PANEL, first, minimum);
  else for_nested<PANELS>(w.zeros, w.zero_dtype, first, outer_at(w, place, group, true), minimum);
}
template <bool CENTRED, int PANELS>
[[gnu::noinline]] void decode_shifts(const Weight& w, const Place& place, int64_t group, const float* scales, float* shifts) {
  for_shifts<CENTRED, PANELS>(w, place, group, scales, [&](int p, F shift) { store_f(shifts + p * PANEL, shift); });
}

template <bool CENTRED, int PANELS>
[[gnu::noinline]] void decode(const Weight& w, const Chunk& chunk) {
  float *scales = chunk.scales, *shifts = chunk.shifts;
  Block block = chunk.block;
  for (int64_t b = 0; b < chunk.count; b++, block = block_after(w.geometry, block), scales += PANELS * PANEL) {
    if (w.nested != Nested::none) {
      const float* those = chunk.nested + (b * chunk.place.panels + chunk.place.in_strip) * PANEL;
      each<PANELS>(QK_WITH(p) { store_f(scales + p * PANEL, mul(load_f(those + p * PANEL), set1_f(w.alpha))); });
      continue;
    }
    for_scales<PANELS>(w, chunk.place, block.group, [&](int p, F scale) { store_f(scales + p * PANEL, scale); });
    if (shifts != nullptr) decode_shifts<CENTRED, PANELS>(w, chunk.place, block.group, scales, shifts), shifts += PANELS * PANEL;
  }
}

// The next strip's numbers lie as many panels further on as the strip has.
template <int PANELS>
[[gnu::always_inline]] inline void fetch_numbers(const void* numbers, Dtype dtype, int lanes, int64_t first) {
  const int64_t size = lanes * bytes_of(dtype);
  const char* line = static_cast<const char*>(numbers) + first * size;
  for (int64_t i = 0; i < PANELS * size; i += 64) __builtin_prefetch(line + i, 0, 2);
}

// What shifts add goes into sums of its own, that many floats beyond those of the products, and comes to them at the end: a matmul of the
// shifts with the sums of x, block by block, beside the products' and in registers.
constexpr int64_t SHIFT_SUMS = MOST_ROWS * STRIP * PANEL;

template <int ROWS, int PANELS>
[[gnu::always_inline]] inline void add_shifts(const float* shifts, const float* sums, int64_t all_blocks, int64_t blocks, float* acc) {
  F total[ROWS][PANELS];
  each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { total[r][p] = load_f(acc + (r * PANELS + p) * PANEL); }); });
  for (int64_t b = 0; b < blocks; b++, shifts += PANELS * PANEL)
    each<PANELS>(QK_WITH(p) {
      const F shift = load_f(shifts + p * PANEL);
      each<ROWS>(QK_WITH(r) { total[r][p] = fma(shift, set1_f(sums[r * all_blocks + b]), total[r][p]), hold(total[r][p]); });
    });
  each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { store_f(acc + (r * PANELS + p) * PANEL, total[r][p]); }); });
}

// For so many rows, whose sums lie all_blocks apart; out of line: where there is nothing to shift, GCC finds better registers for the rest.
template <int PANELS>
[[gnu::noinline]] void add_shifts(const float* shifts, const float* sums, int64_t all_blocks, int64_t blocks, int64_t rows, float* acc) {
  constexpr int ROWS = 4;
  for (; rows >= ROWS; rows -= ROWS, sums += ROWS * all_blocks, acc += ROWS * PANELS * PANEL)
    add_shifts<ROWS, PANELS>(shifts, sums, all_blocks, blocks, acc);
  for (; rows > 0; rows--, sums += all_blocks, acc += PANELS * PANEL) add_shifts<1, PANELS>(shifts, sums, all_blocks, blocks, acc);
}

// A block's shifts, of a strip that is streamed, from where they lie: decoded and added in one go.
template <bool CENTRED, int PANELS>
[[gnu::noinline]] void add_block_shifts(const Weight& w, const Place& place, int64_t group, const float* scales, const float* sums,
                                        int rows, float* acc) {
  for_shifts<CENTRED, PANELS>(w, place, group, scales, [&](int p, F shift) __attribute__((always_inline)) {
    float* sum = acc + p * PANEL;
    for (int r = 0; r < rows; r++, sum += PANELS * PANEL) store_f(sum, fma(shift, set1_f(sums[r * w.geometry.blocks]), load_f(sum)));
  });
}

// STREAMED: the only tile of its columns, which are all. It decodes the scales itself, block by block: their memory is waited for beside
// the codes'. LENGTH: that of all blocks, or 0: each has its own.
template <class Source, int ROWS, int PANELS, bool STREAMED, int LENGTH>
void tile(const Weight& w, const Activations& x, Chunk& chunk, int64_t m, float* acc) {  // acc [ROWS, PANELS, 16]
  constexpr int NEXT = STREAMED ? 0 : PANELS * PANEL;
  const uint8_t* codes = chunk.codes;
  const float* w_scales = chunk.scales;
  std::conditional_t<STREAMED, FarAhead<Source, ROWS, PANELS>, Ahead> ahead;
  if constexpr (!STREAMED) ahead = chunk.ahead;
  const int64_t first = chunk.first * x.m + m;
  const float* scales = x.scales + first;
  const int32_t *starts = x.starts + first, *columns = chunk.columns;
  Block block = chunk.block;
  const auto after = [&](const Block& one) __attribute__((always_inline)) {
    if constexpr (LENGTH == 0) return block_after(w.geometry, one);
    return Block{one.group + 1, one.k0 + LENGTH, LENGTH, 0};
  };
  for (int64_t b = 0; b < chunk.count; b++, block = after(block)) {
    const int64_t length = LENGTH != 0 ? LENGTH : block.length;
    F factors[PANELS];
    if constexpr (STREAMED) {
      const int64_t next = numbers_at(w, chunk.place, block.group) + PANELS * w.geometry.groups;
      for_scales<PANELS>(w, chunk.place, block.group, [&](auto p, F scale) __attribute__((always_inline)) { factors[p] = scale; });
      fetch_numbers<PANELS>(w.scales, w.scale_dtype, w.scale_lanes, next);
      if (chunk.shifts != nullptr) {
        if (!is_s8<Source> || !w.minima) each<PANELS>(QK_WITH(p) { store_f(chunk.scales + p * PANEL, factors[p]); });  // else not asked for
        add_block_shifts<!is_s8<Source>, PANELS>(w, chunk.place, block.group, chunk.scales, x.sums + m * w.geometry.blocks + b, ROWS,
                                                 acc + SHIFT_SUMS);
        if (w.zeros != nullptr) fetch_numbers<PANELS>(w.zeros, w.zero_dtype, PANEL, next);
      }
    }
    const auto* rows = static_cast<const typename Source::X*>(x.values) + x.m * block.k0 + m * length;
    if constexpr (FETCH_X && !STREAMED) {
      const auto* next = reinterpret_cast<const char*>(rows + ROWS * length);
      for (int64_t i = 0; i < ROWS * length * int64_t(sizeof(*rows)); i += 64) __builtin_prefetch(next + i);
    }
    Sums<Source, ROWS, PANELS, STREAMED> total;
    total.start(is_s8<Source> ? starts : nullptr, columns);
    total.template add_block<LENGTH>(w, codes, chunk.step, rows, length, ahead);
    float* out = acc;
    __asm__("" : "+r"(out));  // else GCC keeps acc in registers from block to block, and spills what it needs them for
    each<ROWS>(QK_WITH(r) {
      const F scale = set1_f(is_s8<Source> ? scales[r] : 1.0f);
      each<PANELS>(QK_WITH(p) {
        float* sum = out + (r * PANELS + p) * PANEL;
        const F factor = STREAMED ? factors[p] : load_f(w_scales + p * PANEL);
        store_f(sum, fma(is_s8<Source> ? mul(factor, scale) : factor, total.dot[r][p].value(), load_f(sum)));
      });
    });
    codes += length / TILE_K * chunk.step;
    w_scales += NEXT, columns += PANELS * PANEL, scales += x.m, starts += x.m;
  }
  if constexpr (!STREAMED) chunk.ahead = ahead;
}
