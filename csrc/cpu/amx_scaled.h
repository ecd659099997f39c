// Products by AMX of weights with integer scales, see scaled.h.
//
// A value times its scale is an integer of 16 bits, 256 high + low with both signed bytes: all of a block goes through the tiles in one run,
// twice, and no sum of an inner group is ever looked at. Where all high digits are 0 (nearly always with codes of 2 and 3 bits) once.

template <>
inline int64_t room_of<Scaled<S8Amx>>(int64_t length) {
  return 2 * length;
}

template <>
constexpr bool UNPACKS_SCALES<Scaled<S8Amx>> = true;

constexpr int64_t DIGIT = MAX_BLOCK * PANEL;  // bytes of one digit of a panel and block
struct Digits {
  I of[2];
};
// Of bytes: code (less offset) times scale, in lanes of 32 bits. scale: twice 16 bits; shift: 128 - offset * scale, likewise.
inline Digits digits_of(I codes, I scale, I shift) {
  const I even = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)), scale), shift);
  const I odd = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), scale), shift);
  const I mask = _mm512_set1_epi16(255);
  const I low = _mm512_ternarylogic_epi32(mask, even, _mm512_slli_epi16(odd, 8), 0xca);  // mask ? even : odd
  return {{_mm512_xor_si512(low, _mm512_set1_epi8(char(128))), _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(even, 8), odd, 0xca)}};
}

// A block of a strip: [STRIP, 2, MAX_BLOCK / 4, 64]. Returns how many digits there are.
template <int BITS>
int unpack_digits(const Weight& w, const uint8_t* codes, const Chunk& chunk, uint8_t* out) {
  const bool table = w.kind == CodeKind::table;
  I any = zero_i();
  for (int64_t k = 0; k < MAX_BLOCK; k += w.inner)
    for (int p = 0; p < STRIP; p++) {
      const I one = inner_scales(w, chunk.place, chunk.first, k / w.inner, p);
      const I scale = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), one, _mm512_slli_epi32(one, 16), 0xca);
      const I shift = _mm512_sub_epi16(_mm512_set1_epi16(128), _mm512_mullo_epi16(scale, _mm512_set1_epi16(short(w.offset))));
      for (int64_t i = k; i < k + w.inner; i += TILE_K)
        for (int half = 0; half < 2; half++) {
          const uint8_t* tile = codes + (i / TILE_K * STRIP + p) * 16 * BITS;
          if (64 * half < 16 * BITS) fetch_ahead(tile + 64 * half);
          const B found = codes_of<BITS>(tile, half);
          const Digits digits = digits_of((table ? look_up(w.table_u8, found) : found).v, scale, shift);
          uint8_t* to = out + 2 * p * DIGIT + i * PANEL + 64 * half;
          store_b(to, {digits.of[0]}), store_b(to + DIGIT, {digits.of[1]});
          any = _mm512_or_si512(any, digits.of[1]);
        }
    }
  return _mm512_test_epi32_mask(any, any) != 0 ? 2 : 1;
}
inline int unpack_digits(const Weight& w, const uint8_t* codes, const Chunk& chunk, uint8_t* out) {
  switch (w.bits) {
    case 2: return unpack_digits<2>(w, codes, chunk, out);
    case 3: return unpack_digits<3>(w, codes, chunk, out);
    case 4: return unpack_digits<4>(w, codes, chunk, out);
    case 5: return unpack_digits<5>(w, codes, chunk, out);
    case 6: return unpack_digits<6>(w, codes, chunk, out);
  }
  __builtin_unreachable();  // set_inner
}

// Units of a block by a panel and 16 rows, in two sets of tiles by turns: while one is at work, the sums of the other are stored and scaled.
// A store waits for its tile's last product, and whatever is to do with tiles behind it waits, too: so it comes late.
template <int DIGITS, int PAIRS>  // of minima: inner groups / 2, or 0
class ScaledUnits {
 public:
  ScaledUnits(const Weight& w, const Activations& x, const Chunk& chunk) : w_(w), x_(x), chunk_(chunk) {}

  // Rows m…m + rows of x times the panel p of the strip.
  template <int SET>
  void add(int64_t m, int64_t rows, int p, float* acc) {
    const int8_t* values = static_cast<const int8_t*>(x_.values) + (chunk_.first * x_.m + m) * MAX_BLOCK;
    const uint8_t* weights = chunk_.codes + 2 * p * DIGIT;
    clear_tile<2 * SET>();
    if (DIGITS == 2) clear_tile<2 * SET + 1>();
    each<MAX_BLOCK / AMX_K>(QK_WITH(i) {
      load_tile<4 + SET>(values + i * AMX_K, MAX_BLOCK);
      load_tile<6>(weights + i * AMX_K * PANEL, 64);
      dot_tiles<true, 2 * SET, 4 + SET, 6>();
      if (DIGITS == 2) {
        load_tile<7>(weights + DIGIT + i * AMX_K * PANEL, 64);
        dot_tiles<true, 2 * SET + 1, 4 + SET, 7>();
      }
      fetch<SET>(values, p, i);
      if (i == 1) store<1 - SET>();
      if (i >= 2) scale(AMX_ROWS / 2 * (i - 2), AMX_ROWS / 2 * (i - 1));
    });
    last_ = {m, rows, p, acc};
  }
  template <int SET>
  void finish() {
    store<SET>();
    scale(0, AMX_ROWS);
    last_.rows = 0;
  }

 private:
  // A share of the next 32 rows' columns, which the units of these fetch between them.
  template <int SET>
  static void fetch(const int8_t* values, int p, int step) {
    constexpr int64_t UNITS = 2 * STRIP, BYTES = 2 * AMX_ROWS * MAX_BLOCK / UNITS / (MAX_BLOCK / AMX_K);
    const int8_t* next = values + (2 - SET) * AMX_ROWS * MAX_BLOCK + ((p * 2 + SET) * (MAX_BLOCK / AMX_K) + step) * BYTES;
    each<BYTES / 64>(QK_WITH(i) { __builtin_prefetch(next + 64 * i); });
  }
  template <int SET>
  void store() {
    if (last_.rows == 0) return;
    store_tile<2 * SET>(sums_[0]);
    if (DIGITS == 2) store_tile<2 * SET + 1>(sums_[1]);
  }
  void scale(int64_t first, int64_t last) {
    const int64_t at = chunk_.first * x_.m + last_.m;
    const F of_sums = load_f(chunk_.scales + last_.p * PANEL), of_minima = load_f(chunk_.minima_scales + last_.p * PANEL);
    I minima[PAIRS + 1];
    each<PAIRS>(QK_WITH(g) { minima[g] = load_i(chunk_.minima + (g * STRIP + last_.p) * PANEL); });
    for (int64_t r = first; r < (last_.rows < last ? last_.rows : last); r++) {
      I total = load_i(sums_[0][r]);
      if (DIGITS == 2) total = add_i(total, _mm512_slli_epi32(load_i(sums_[1][r]), 8));
      const F scale = set1_f(x_.scales[at + r]);
      float* acc = last_.acc + r * STRIP * PANEL;
      F sum = fma(mul(of_sums, scale), to_float(total), load_f(acc));
      if constexpr (PAIRS > 0) {
        I least = zero_i();
        each<PAIRS>(QK_WITH(g) { least = add_pairs(least, minima[g], set1_i(two_sums(x_, at + r, 2 * g))); });
        sum = fma(mul(of_minima, scale), to_float(least), sum);
      }
      store_f(acc, sum);
    }
  }

  const Weight& w_;
  const Activations& x_;
  const Chunk& chunk_;
  alignas(64) int32_t sums_[2][AMX_ROWS][PANEL];  // of the digits
  struct {
    int64_t m, rows = 0;
    int p = 0;
    float* acc;
  } last_;
};

template <int DIGITS, int PAIRS>
void amx_scaled_rows(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  ScaledUnits<DIGITS, PAIRS> units(w, x, chunk);
  int64_t configured = 0;
  for (int64_t m = m0, rows; m < m1; m += rows, acc += rows * STRIP * PANEL) {
    rows = m1 - m < 2 * AMX_ROWS ? m1 - m : 2 * AMX_ROWS;
    if (rows != configured) {
      if (configured != 0) units.template finish<1>();
      configure(rows, AMX_K), configured = rows;
    }
    for (int p = 0; p < STRIP; p++) {
      units.template add<0>(m, rows < AMX_ROWS ? rows : AMX_ROWS, p, acc + p * PANEL);
      if (rows > AMX_ROWS) units.template add<1>(m + AMX_ROWS, rows - AMX_ROWS, p, acc + (AMX_ROWS * STRIP + p) * PANEL);
      else units.template finish<0>();
    }
  }
  units.template finish<1>();
}

template <>
void rows_of_tiles<Scaled<S8Amx>, STRIP>(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  const auto with = [&](auto digits) {
    if (w.zeros == nullptr) amx_scaled_rows<digits, 0>(w, x, chunk, m0, m1, acc);
    else if (w.inner == 32) amx_scaled_rows<digits, 4>(w, x, chunk, m0, m1, acc);
    else amx_scaled_rows<digits, 8>(w, x, chunk, m0, m1, acc);
  };
  chunk.digits == 2 ? with(std::integral_constant<int, 2>{}) : with(std::integral_constant<int, 1>{});
}
