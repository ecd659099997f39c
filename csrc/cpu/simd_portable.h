// 16 rows at a time in plain C++: arrays that any compiler can keep in whatever vectors it has.
struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct B {
  uint8_t v[64];
};
constexpr int ACCUMULATORS = 4, WIDE = 1;  // register tile: rows of x times panels; panels at most
constexpr int S8_ACCUMULATORS = ACCUMULATORS, NARROW = 0;
using LENGTHS = std::integer_sequence<int>;
constexpr bool STREAMS = false, STREAMS_PLANES = false, FETCH_X = false;
constexpr int64_t FEW_S8 = 4, FEW_INTEGERS = 4, FEW_TABLE = 4, FEW_BYTES = 4;  // see multiply.h

inline F zero_f() { return F{}; }
inline F set1_f(float x) {
  F r;
  for (auto& v : r.v) v = x;
  return r;
}
inline F load_f(const float* p) {
  F r;
  for (int i = 0; i < 16; i++) r.v[i] = p[i];
  return r;
}
inline void store_f(float* p, F a) {
  for (int i = 0; i < 16; i++) p[i] = a.v[i];
}
inline F add_f(F a, F b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
inline F sub_f(F a, F b) {
  for (int i = 0; i < 16; i++) a.v[i] -= b.v[i];
  return a;
}
inline F mul(F a, F b) {
  for (int i = 0; i < 16; i++) a.v[i] *= b.v[i];
  return a;
}
inline F fma(F a, F b, F c) {
  for (int i = 0; i < 16; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline I magnitude_bits(F a) {
  I r;
  for (int i = 0; i < 16; i++) r.v[i] = int32_t(float_to_bits(a.v[i]) & 0x7fffffffu);
  return r;
}
inline I max_i(I a, I b) {
  for (int i = 0; i < 16; i++)
    if (b.v[i] > a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline int32_t highest(I a) {
  int32_t r = a.v[0];
  for (int32_t v : a.v) r = v > r ? v : r;
  return r;
}
inline I set1_i(int32_t x) {
  I r;
  for (auto& v : r.v) v = x;
  return r;
}
inline F to_float(I a) {
  F r;
  for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]);
  return r;
}
inline void hold(F&) {}  // registers are GCC's to choose here
inline I zero_i() { return I{}; }
inline I add_i(I a, I b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
inline int32_t total(I a) {
  int32_t r = 0;
  for (int32_t v : a.v) r += v;
  return r;
}
inline I round_to_s8(F a, int8_t* out) {  // half to even, in the adder
  I r;
  for (int i = 0; i < 16; i++) r.v[i] = out[i] = int8_t((a.v[i] + 0x1.8p23f) - 0x1.8p23f);
  return r;
}

inline B load_b(const uint8_t* p) {
  B r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
inline void store_b(uint8_t* p, B a) { __builtin_memcpy(p, a.v, 64); }
inline B nibbles(B a, int high) {
  for (auto& v : a.v) v = high ? v >> 4 : v & 15;
  return a;
}
inline B look_up(const uint8_t* table, B index) {
  for (auto& v : index.v) v = table[v & 15];
  return index;
}
inline B entries(const Weight& w, B index) { return look_up(w.table_u8, index); }

template <int LARGEST>
struct DotS8 {  // sum[n] += sum of w[4n+i] * x[i]
  static constexpr int FOLD_K = MAX_BLOCK, BIAS = 0;
  I sum;
  void start(int32_t value) {
    for (auto& v : sum.v) v = value;
  }
  void add(B w, const int8_t* x) {
    for (int n = 0; n < 16; n++)
      for (int i = 0; i < 4; i++) sum.v[n] += int(w.v[4 * n + i]) * x[i];
  }
  void fold() {}
  F value() const { return to_float(sum); }
};
struct DotF32 {
  static constexpr int FOLD_K = MAX_BLOCK;
  F sum;
  void start(int32_t) { sum = zero_f(); }
  void add(F w, const float* x) {
    for (int i = 0; i < 16; i++) sum.v[i] += w.v[i] * *x;
  }
  void fold() {}
  F value() const { return sum; }
};

inline F nibble_values(const uint8_t* tile, int shift, const float* table) {
  F r;
  for (int n = 0; n < 16; n++) r.v[n] = table[tile[4 * n + shift / 8] >> (shift & 7) & 15];
  return r;
}
inline F nibble_integers(const uint8_t* tile, int shift, const float* table) { return nibble_values(tile, shift, table); }
inline F byte_integers(const uint8_t* half, int i) {
  F r;
  for (int n = 0; n < 16; n++) r.v[n] = float(half[4 * n + i] - 128);
  return r;
}
inline F e4m3_values(const uint8_t* half, int i) {
  F r;
  for (int n = 0; n < 16; n++) r.v[n] = from_e4m3(half[4 * n + i]);
  return r;
}
inline F e5m2_values(const uint8_t* half, int i) {
  F r;
  for (int n = 0; n < 16; n++) r.v[n] = from_f16(uint16_t(half[4 * n + i] << 8));
  return r;
}
inline I mul_i(I a, I b) {
  for (int i = 0; i < 16; i++) a.v[i] *= b.v[i];
  return a;
}
inline I load_i(const int32_t* p) {
  I r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
inline void store_i(int32_t* p, I a) { __builtin_memcpy(p, a.v, 64); }
inline I load_scales(const uint8_t* p, bool is_signed) {
  I r;
  for (int i = 0; i < 16; i++) r.v[i] = is_signed ? int8_t(p[i]) : p[i];
  return r;
}
inline I load_pairs(const uint8_t* first, const uint8_t* second, bool is_signed) {  // 16 bits each
  I a = load_scales(first, is_signed);
  const I b = load_scales(second, is_signed);
  for (int i = 0; i < 16; i++) a.v[i] = int32_t(uint32_t(uint16_t(a.v[i])) | uint32_t(b.v[i]) << 16);
  return a;
}
inline I add_pairs(I sum, I pairs, I others) {
  for (int i = 0; i < 16; i++)
    sum.v[i] += int16_t(pairs.v[i]) * int16_t(others.v[i]) + int16_t(pairs.v[i] >> 16) * int16_t(others.v[i] >> 16);
  return sum;
}

inline F load_numbers(const void* p, Dtype dtype, int64_t i) {
  F r;
  for (int n = 0; n < 16; n++) r.v[n] = load_number(p, dtype, i + n);
  return r;
}
inline void store_numbers(void* p, Dtype dtype, int64_t i, F v) {
  for (int n = 0; n < 16; n++) store_number(p, dtype, i + n, v.v[n]);
}
template <int BITS>
inline B planes(const uint8_t* tile, int half) {  // codes of several planes: see kernels.h. half: which 64 of the tile's
  B r{};
  int below = 0;
  for (int bits = 4; bits > 0; tile += BITS & bits ? 16 * bits : 0, below += BITS & bits, bits /= 2)
    for (int i = 0; i < 64 && (BITS & bits) != 0; i++) {
      const int code = 64 * half + i;
      r.v[i] = uint8_t(r.v[i] | (tile[code % (16 * bits)] >> bits * (code / (16 * bits)) & ((1 << bits) - 1)) << below);
    }
  return r;
}
