// Nested blocks whose scales and minima are integers, times one float16 a block each (ggml's K-quants, IQ4_XS). Activations have one scale
// for the 256 columns of a block, as in llama.cpp, so that the integer scales belong to the integer sums:
//
//     y  =  d s  sum of groups g: scale_g (sum of x q in g)   +   dmin s  sum of groups g: minimum_g (sum of x in g)
//
// Both outer sums are exact int32: codes of up to 8 bits, less than 2^8 in a scale, 127 in x and 256 columns stay below 2^31. So every
// level may add in the order that it likes.

// Of inner group `group` of the panel p beyond the first, in the form in which ScaledDot takes them; minima of that group and the next.
inline I inner_scales(const Weight& w, const Place& place, int64_t block, int64_t group, int p) {
  return load_scales(static_cast<const uint8_t*>(w.scales) + (inner_at(w, place, block, group) + p) * PANEL, w.scale_dtype == Dtype::i8);
}
inline I inner_minima(const Weight& w, const Place& place, int64_t block, int64_t group, int p) {
  const uint8_t* first = static_cast<const uint8_t*>(w.zeros) + (inner_at(w, place, block, group) + p) * PANEL;
  return load_pairs(first, first + place.panels * PANEL, w.zero_dtype == Dtype::i8);
}

// An inner group's numbers are fetched while the strip before is at work, as those of tile() are.
template <int PANELS>
[[gnu::always_inline]] inline void fetch_inner(const Weight& w, const Place& place, int64_t block, int64_t group) {
  const int64_t strip = PANELS * w.geometry.groups * (MAX_BLOCK / w.inner), next = inner_at(w, place, block, group) + strip;
  fetch_numbers<PANELS>(w.scales, Dtype::u8, PANEL, next);
  if (w.zeros != nullptr) fetch_numbers<PANELS>(w.zeros, Dtype::u8, PANEL, next);
}

// What multiplies a block's scales, or minima [PANELS, 16].
template <int PANELS>
[[gnu::always_inline]] inline void decode_outer(const Weight& w, const Place& place, int64_t block, bool of_minima, float* out) {
  const uint16_t* outer = outer_at(w, place, block, of_minima);
  each<PANELS>(QK_WITH(p) {
    const F number = load_numbers(outer, Dtype::f16, p * PANEL);
    store_f(out + p * PANEL, of_minima ? number : mul(number, set1_f(w.alpha)));
  });
}

template <class Source>
constexpr bool UNPACKS_SCALES = false;  // with the codes: nobody asks for them afterwards

template <bool SCALES, int PANELS>  // and minima, always
[[gnu::noinline]] void decode_scaled(const Weight& w, const Chunk& chunk) {
  const int64_t groups = MAX_BLOCK / w.inner;
  int32_t *inner = chunk.inner, *minima = chunk.minima;
  for (int64_t b = 0; b < chunk.count; b++) {
    const int64_t block = chunk.first + b;
    decode_outer<PANELS>(w, chunk.place, block, false, chunk.scales + b * PANELS * PANEL);
    if constexpr (SCALES)
      for (int64_t g = 0; g < groups; g++)
        for (int p = 0; p < PANELS; p++, inner += PANEL) store_i(inner, inner_scales(w, chunk.place, block, g, p));
    if (w.zeros == nullptr) continue;
    decode_outer<PANELS>(w, chunk.place, block, true, chunk.minima_scales + b * PANELS * PANEL);
    for (int64_t g = 0; g < groups; g += 2)
      for (int p = 0; p < PANELS; p++, minima += PANEL) store_i(minima, inner_minima(w, chunk.place, block, g, p));
  }
}

// Rows of a block: their sums with the panels, times the scales, to acc, where rows lie so many floats apart.
template <int ROWS, int PANELS, class Total>
[[gnu::always_inline]] inline void add_totals(const Total& total, const float* factors, const float* scales, int64_t apart, float* acc) {
  each<ROWS>(QK_WITH(r) {
    const F scale = set1_f(scales[r]);
    each<PANELS>(QK_WITH(p) {
      float* sum = acc + r * apart + p * PANEL;
      store_f(sum, fma(mul(load_f(factors + p * PANEL), scale), to_float(total(r, p)), load_f(sum)));
    });
  });
}

inline int32_t two_sums(const Activations& x, int64_t at, int64_t group) {  // of x in a group and the next
  int32_t two;
  __builtin_memcpy(&two, x.inner_sums + at * MOST_INNER + group, 4);
  return two;
}
// What the minima of block b of a chunk of so many panels add to the rows from m on, for PANELS of them from the panel p on.
template <int PANELS>
[[gnu::noinline]] void add_minima(const Weight& w, const Activations& x, const Chunk& chunk, int64_t b, int64_t block, int p, int panels,
                                  int64_t m, int64_t rows, float* acc) {
  const int64_t groups = MAX_BLOCK / w.inner, at = block * x.m + m;
  const int32_t* minima = chunk.minima + (b * groups / 2 * panels + p) * PANEL;
  for (int64_t r = 0; r < rows; r++, acc += panels * PANEL) {
    I totals[PANELS];
    each<PANELS>(QK_WITH(q) { totals[q] = zero_i(); });
    for (int64_t g = 0; g < groups; g += 2) {
      const I two = set1_i(two_sums(x, at + r, g));
      each<PANELS>(QK_WITH(q) { totals[q] = add_pairs(totals[q], load_i(minima + (g / 2 * panels + q) * PANEL), two); });
    }
    const auto total = [&](int, int q) __attribute__((always_inline)) { return totals[q]; };
    add_totals<1, PANELS>(total, chunk.minima_scales + (b * panels + p) * PANEL, x.scales + at + r, 0, acc);
  }
}

// As tile(). LENGTH: the columns of an inner group, or 0.
template <class Source, int ROWS, int PANELS, bool STREAMED, int LENGTH>
void scaled_tile(const Weight& w, const Activations& x, Chunk& chunk, int64_t m, float* acc) {
  using Dot = typename Source::Dot;
  constexpr int PIECE = Dot::PIECE < LENGTH ? Dot::PIECE : LENGTH;  // columns that a dot holds
  static_assert(LENGTH != 0 || Dot::PIECE == MAX_BLOCK);
  const int64_t length = LENGTH != 0 ? LENGTH : w.inner, groups = MAX_BLOCK / length;
  std::conditional_t<STREAMED, FarAhead<Source, ROWS, PANELS>, Ahead> ahead;
  if constexpr (!STREAMED) ahead = chunk.ahead;
  const uint8_t* codes = chunk.codes;
  const int32_t *inner = chunk.inner, *columns = chunk.columns;
  for (int64_t b = 0; b < chunk.count; b++) {
    const int64_t block = chunk.first + b, at = block * x.m + m;
    const int8_t* rows = static_cast<const int8_t*>(x.values) + at * MAX_BLOCK;
    const int32_t* starts = x.starts + block * groups * x.m + m;
    if constexpr (STREAMED) {  // wanted at the block's end
      fetch_numbers<PANELS>(outer_at(w, chunk.place, block, false), Dtype::f16, PANEL, 0);
      if (w.zeros != nullptr) fetch_numbers<PANELS>(outer_at(w, chunk.place, block, true), Dtype::f16, PANEL, 0);
    }
    I totals[ROWS][PANELS], least[ROWS][PANELS];
    each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { totals[r][p] = least[r][p] = zero_i(); }); });
    for (int64_t g = 0; g < groups; g++, rows += length, starts += x.m) {
      if constexpr (FETCH_X && !STREAMED)
        for (int64_t i = 0; i < ROWS * length; i += 64) __builtin_prefetch(rows + ROWS * MAX_BLOCK + g * (ROWS - 1) * length + i);
      if constexpr (STREAMED) {
        fetch_inner<PANELS>(w, chunk.place, block, g);
        if (w.zeros != nullptr && g % 2 == 0)  // here, and not at the end, that the codes' memory is not kept waiting
          each<PANELS>(QK_WITH(p) {
            const I both = inner_minima(w, chunk.place, block, g, p);
            each<ROWS>(QK_WITH(r) { least[r][p] = add_pairs(least[r][p], both, set1_i(two_sums(x, at + r, g))); });
          });
      }
      I scales[PANELS];
      each<PANELS>(QK_WITH(p) {
        if constexpr (STREAMED) scales[p] = inner_scales(w, chunk.place, block, g, p);
        else scales[p] = load_i(inner + p * PANEL);
      });
      each<LENGTH != 0 ? LENGTH / PIECE : 1>(QK_WITH(i) {
        Sums<Source, ROWS, PANELS, STREAMED> sums;
        sums.start(i == 0 ? starts : nullptr, columns);
        each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { sums.dot[r][p].scale = scales[p]; }); });
        if constexpr (LENGTH != 0) sums.template add_tiles<PIECE / TILE_K>(w, codes, chunk.step, rows + i * PIECE, MAX_BLOCK, ahead);
        else sums.add(w, codes, chunk.step, rows, MAX_BLOCK, length, ahead);
        each<ROWS>(QK_WITH(r) { each<PANELS>(QK_WITH(p) { totals[r][p] = sums.dot[r][p].scaled(totals[r][p]); }); });
        codes += (LENGTH != 0 ? PIECE : length) / TILE_K * chunk.step;
      });
      if constexpr (!STREAMED) inner += PANELS * PANEL;
      if constexpr (is_paired<Source>) columns += PANELS * PANEL;
    }
    float* out = acc;
    __asm__("" : "+r"(out));  // as in tile()
    const auto add = [&](const I(&sums)[ROWS][PANELS], const float* factors) __attribute__((always_inline)) {
      const auto total = [&](int r, int p) __attribute__((always_inline)) { return sums[r][p]; };
      add_totals<ROWS, PANELS>(total, factors, x.scales + at, PANELS * PANEL, out);
    };
    if constexpr (STREAMED) {
      decode_outer<PANELS>(w, chunk.place, block, false, chunk.scales);
      add(totals, chunk.scales);
      if (w.zeros == nullptr) continue;
      decode_outer<PANELS>(w, chunk.place, block, true, chunk.scales);
      add(least, chunk.scales);
    } else {
      add(totals, chunk.scales + b * PANELS * PANEL);
      if (w.zeros != nullptr) add_minima<PANELS>(w, x, chunk, b, block, 0, PANELS, m, ROWS, acc);
    }
  }
  if constexpr (!STREAMED) chunk.ahead = ahead;
}
