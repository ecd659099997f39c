// Rounding weights to the values of a code, and finding the scale that loses least. Included inside each level's anonymous namespace.
//
// The arithmetic is that of qkernels.reference, operation by operation (no contraction: see setup.py), so the codes are the same, ties
// included. An error is summed in 16 lanes, whatever the width of a register, and the lanes in a fixed order: every level, and any number
// of threads, finds the same bits.

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

constexpr int64_t PIECE = 512;  // weights that are rounded under one candidate after the other while they lie in L1

inline Floats load_lanes(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store_lanes(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// ---- the kinds of code: the nearest value, and its code ---------------------------------------------------------------------------
// A NaN (from 0 * inf, where a scale is too small to be inverted) falls to the lowest.

struct ToInteger {
  static constexpr bool SHIFTS = true;  // the only kind with zero points
  Floats low, high;
  explicit ToInteger(const Grid& g) : low(Floats{} + g.low), high(Floats{} + g.high) {}
  Floats value(Floats x) const {
    x = x > low ? x : low;
    x = x < high ? x : high;
    const Floats magic = Floats{} + 0x1.8p23f;
    return (x + magic) - magic;  // round half to even
  }
  Ints code(Floats x) const { return __builtin_convertvector(value(x) - low, Ints); }
};

template <bool Mirrored, bool Wide>
struct ToTable {  // up to 16 values: compare with every threshold; more (Wide): bisect
  static constexpr bool SHIFTS = false;
  const Grid& g;
  explicit ToTable(const Grid& grid) : g(grid) {}
  static Floats key(Floats x) { return Mirrored ? Floats(Ints(x) & INT32_MAX) : x; }
  static Floats with_sign(Floats v, Floats x) { return Mirrored ? Floats(Ints(v) | (Ints(x) & INT32_MIN)) : v; }
  int bisect(float x) const {
    int at = 0;
    for (int step = 128; step; step >>= 1)
      if (at + step < g.count && x > g.thresholds[at + step - 1]) at += step;
    return at;
  }
  Floats value(Floats x) const {
    const Floats k = key(x);
    Floats v = Floats{} + g.values[0];
    if constexpr (Wide)
      for (int i = 0; i < WIDTH; i++) v[i] = g.values[bisect(k[i])];
    else
      for (int i = 1; i < g.count; i++) v = k > g.thresholds[i - 1] ? Floats{} + g.values[i] : v;
    return with_sign(v, x);
  }
  Ints code(Floats x) const {
    const Floats k = key(x);
    Ints c{};
    if constexpr (Wide)
      for (int i = 0; i < WIDTH; i++) c[i] = bisect(k[i]);
    else
      for (int i = 1; i < g.count; i++) c -= k > g.thresholds[i - 1];
    for (int i = 0; i < WIDTH; i++) c[i] = g.codes[c[i]];
    return Mirrored ? c | ((Ints(x) < 0) & g.sign) : c;
  }
};

template <class Work>
void with_kind(const Grid& g, const Work& work) {
  if (g.values == nullptr) work(ToInteger(g));
  else if (g.count > 16) g.sign ? work(ToTable<true, true>(g)) : work(ToTable<false, true>(g));
  else g.sign ? work(ToTable<true, false>(g)) : work(ToTable<false, false>(g));
}

// ---- groups -----------------------------------------------------------------------------------------------------------------------

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min would be a symbol that the levels share
template <class Kind>
inline Floats scaled(const Kind&, Floats w, float inverse, float zero) {
  const Floats x = w * inverse;
  if constexpr (Kind::SHIFTS) return x + zero;
  return x;
}
inline float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

template <class Kind>
inline void add_errors(const Kind& kind, const float* weights, int64_t count, float scale, float zero, float* sums) {
  const float inverse = inverse_of(scale);
  Floats sum[16 / WIDTH];
  for (int p = 0; p < 16 / WIDTH; p++) sum[p] = load_lanes(sums + p * WIDTH);
  for (int64_t i = 0; i < count; i += 16)
    for (int p = 0; p < 16 / WIDTH; p++) {
      const Floats w = load_lanes(weights + i + p * WIDTH), value = kind.value(scaled(kind, w, inverse, zero));
      Floats error = (Kind::SHIFTS ? value - zero : value) * scale - w;
      if (i + 16 > count)
        for (int j = 0; j < WIDTH; j++) error[j] = i + p * WIDTH + j < count ? error[j] : 0.0f;
      sum[p] += error * error;
    }
  for (int p = 0; p < 16 / WIDTH; p++) store_lanes(sums + p * WIDTH, sum[p]);
}

inline float total(float* lanes) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// For groups g0…g1 the candidate with the smallest error (the first of equal ones), and that error.
void best_scales(const Grouped& w, int64_t g0, int64_t g1, int64_t* best, float* errors) {
  with_kind(w.grid, [&](const auto& kind) {
    alignas(64) float weights[PIECE] = {}, sums[MAX_CANDIDATES][16];
    for (int64_t g = g0; g < g1; g++) {
      const int64_t row = g / w.groups_k * w.group_n, k0 = g % w.groups_k * w.group_k;
      const int64_t rows_end = lesser(w.n, row + w.group_n), k1 = lesser(w.k, k0 + w.group_k);
      __builtin_memset(sums, 0, size_t(w.candidates) * sizeof sums[0]);
      for (int64_t r = row; r < rows_end; r++)
        for (int64_t k = k0; k < k1; k += PIECE) {
          const int64_t count = lesser(PIECE, k1 - k);
          load_row(w.weight, w.dtype, r * w.k + k, count, weights);
          for (int64_t c = 0; c < w.candidates; c++) {
            const int64_t at = c * w.groups + g;
            add_errors(kind, weights, count, w.scales[at], w.zeros ? w.zeros[at] : 0.0f, sums[c]);
          }
        }
      best[g] = 0, errors[g] = __builtin_inff();  // a scale out of range gives NaN, and wins against nothing
      for (int64_t c = 0; c < w.candidates; c++) {
        const float error = total(sums[c]);
        if (error < errors[g]) best[g] = c, errors[g] = error;
      }
    }
  });
}

// Codes, one a byte, of rows r0…r1 under the first candidate.
void encode(const Grouped& w, int64_t r0, int64_t r1, uint8_t* codes) {
  with_kind(w.grid, [&](const auto& kind) {
    alignas(64) float weights[PIECE] = {};
    alignas(64) int32_t rounded[PIECE];
    for (int64_t r = r0; r < r1; r++)
      for (int64_t k = 0, count; k < w.k; k += count) {
        const int64_t g = r / w.group_n * w.groups_k + k / w.group_k;
        count = lesser(lesser(PIECE, w.k - k), w.group_k - k % w.group_k);
        const float inverse = inverse_of(w.scales[g]), zero = w.zeros ? w.zeros[g] : 0.0f;
        load_row(w.weight, w.dtype, r * w.k + k, count, weights);
        for (int64_t i = 0; i < count; i += WIDTH) {
          const Ints c = kind.code(scaled(kind, load_lanes(weights + i), inverse, zero));
          __builtin_memcpy(rounded + i, &c, sizeof c);
        }
        for (int64_t i = 0; i < count; i++) codes[r * w.k + k + i] = uint8_t(rounded[i]);
      }
  });
}
