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
inline Floats all(float x) { return x - Floats{}; }  // x + 0 would not be folded: it turns -0 to 0

// ---- the kinds of code: the nearest value, and its code ---------------------------------------------------------------------------
// A NaN (from 0 * inf, where a scale is too small to be inverted) falls to the lowest.

struct ToInteger {
  static constexpr bool SHIFTS = true;  // the only kind with zero points
  float low, high;
  explicit ToInteger(const Grid& g) : low(g.low), high(g.high) {}
  Floats value(Floats x) const {
    x = x > all(low) ? x : all(low);
    x = x < all(high) ? x : all(high);
    return (x + all(0x1.8p23f)) - all(0x1.8p23f);  // half to even
  }
  Ints code(Floats x) const { return __builtin_convertvector(value(x) - all(low), Ints); }
};

// Count the thresholds below x: all of them for up to 16 values, else by bisection. Mirrored: below |x|, and the sign apart.
template <bool Mirrored, int Size>
struct ToTable {
  static constexpr bool SHIFTS = false;
  alignas(64) float table[Size], thresholds[Size];
  explicit ToTable(const Grid& g) {
    for (int i = 0; i < Size; i++) {  // nothing is beyond infinity
      table[i] = i < g.count ? g.values[i] : 0.0f;
      thresholds[i] = i + 1 < g.count ? g.thresholds[i] : __builtin_inff();
    }
  }
  static Floats key(Floats x) { return Mirrored ? Floats(Ints(x) & INT32_MAX) : x; }
  int bisect(float x) const {
    int at = 0;
    for (int step = Size / 2; step; step /= 2) at += x > thresholds[at + step - 1] ? step : 0;
    return at;
  }
  Floats value(Floats x) const {
    const Floats k = key(x);
    Floats v = all(table[0]);
    if constexpr (Size <= 16) {
#pragma GCC unroll 16
      for (int i = 0; i + 1 < Size; i++) v = k > all(thresholds[i]) ? all(table[i + 1]) : v;
    } else {
      for (int i = 0; i < WIDTH; i++) v[i] = table[bisect(k[i])];
    }
    return Mirrored ? Floats(Ints(v) | (Ints(x) & INT32_MIN)) : v;
  }
  Ints code(Floats x) const {  // the place in the table, and 256 for a sign
    const Floats k = key(x);
    Ints c{};
    if constexpr (Size <= 16) {
#pragma GCC unroll 16
      for (int i = 0; i + 1 < Size; i++) c -= k > all(thresholds[i]);
    } else {
      for (int i = 0; i < WIDTH; i++) c[i] = bisect(k[i]);
    }
    return Mirrored ? c | ((Ints(x) < 0) & 256) : c;
  }
};

template <class Work>
void with_kind(const Grid& g, const Work& work) {
  if (g.values == nullptr) work(ToInteger(g));
  else if (g.sign) g.count <= 8 ? work(ToTable<true, 8>(g)) : work(ToTable<true, 256>(g));
  else g.count <= 16 ? work(ToTable<false, 16>(g)) : work(ToTable<false, 256>(g));
}

// ---- groups -----------------------------------------------------------------------------------------------------------------------

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min would be a symbol that the levels share
inline float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }
template <class Kind>
inline Floats scaled(const Kind&, Floats w, float inverse, float zero) {
  return Kind::SHIFTS ? w * inverse + zero : w * inverse;
}

template <class Kind>
inline void add_errors(const Kind& kind, const float* weights, int64_t count, float scale, float zero, float* sums) {
  const float inverse = inverse_of(scale);
  for (int lane = 0; lane < 16; lane += WIDTH) {
    Floats sum = load_lanes(sums + lane);
    for (int64_t i = lane; i < count; i += 16) {
      const Floats w = load_lanes(weights + i), value = kind.value(scaled(kind, w, inverse, zero));
      Floats error = (Kind::SHIFTS ? value - zero : value) * scale - w;
      if (__builtin_expect(i + WIDTH > count, 0))
        for (int j = int(count - i); j < WIDTH; j++) error[j] = 0.0f;
      sum += error * error;
    }
    __builtin_memcpy(sums + lane, &sum, sizeof sum);
  }
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
          to_floats(w.weight, w.dtype, r * w.k + k, count, weights);
          for (int64_t c = 0; c < w.candidates; c++) {
            const int64_t at = g * w.candidates + c;
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
        to_floats(w.weight, w.dtype, r * w.k + k, count, weights);
        for (int64_t i = 0; i < count; i += WIDTH) {
          const Ints c = kind.code(scaled(kind, load_lanes(weights + i), inverse, zero));
          __builtin_memcpy(rounded + i, &c, sizeof c);
        }
        uint8_t* out = codes + r * w.k + k;
        if (w.grid.values == nullptr)
          for (int64_t i = 0; i < count; i++) out[i] = uint8_t(rounded[i]);
        else
          for (int64_t i = 0; i < count; i++) out[i] = uint8_t(w.grid.codes[rounded[i] & 255] | (rounded[i] >> 8) * w.grid.sign);
      }
  });
}
