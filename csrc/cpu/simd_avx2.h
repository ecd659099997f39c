// 16 rows as two 256-bit vectors. Without VNNI: bytes are multiplied in pairs into 16 bits (vpmaddubsw), which saturates beyond 32767.
struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };
constexpr int MAX_ROWS = 4, WIDE = 1;

inline F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set1_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_f(float* p, F v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F sub_f(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline void mac_f(F& acc, F w, float x) { acc = fma(w, set1_f(x), acc); }
inline I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i load_si(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline B load_b(const uint8_t* p) { return {load_si(p), load_si(p + 32)}; }
inline void store_b(uint8_t* p, B v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
}
inline B nibbles(B x, int high) {
  const __m256i mask = _mm256_set1_epi8(15);
  if (high) x = {_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)};
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline B look_up(const uint8_t* table, B index) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
// Small: weights below 128, for which the pair sums fit. Others are taken minus 128, as |w| times x with the sign of w: 128*127*2 fits.
template <bool Small> constexpr int mac_bias() { return Small ? 0 : 128; }
template <bool Small>
inline __m256i dot_s8(__m256i acc, __m256i w, __m256i x) {
  if constexpr (!Small) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
template <bool Small>
inline void mac_s8(I& acc, B w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  __m256i v = _mm256_set1_epi32(four);
  acc = {dot_s8<Small>(acc.a, w.a, v), dot_s8<Small>(acc.b, w.b, v)};
}
inline __m256 look_up_16(__m256i v, int shift, const float* table) {
  __m256i index = _mm256_srl_epi32(v, _mm_cvtsi32_si128(shift));
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F nibble_values(const uint8_t* tile, int shift, const float* table) {
  B v = load_b(tile);
  return {look_up_16(v.a, shift, table), look_up_16(v.b, shift, table)};
}
inline I byte_lanes(const uint8_t* half, int i) {
  B v = load_b(half);
  __m128i shift = _mm_cvtsi32_si128(8 * i);
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srl_epi32(v.a, shift), mask), _mm256_and_si256(_mm256_srl_epi32(v.b, shift), mask)};
}
inline F byte_values(const uint8_t* half, int i) { return to_float(byte_lanes(half, i)); }
inline __m256 from_e4m3_8(__m256i c) {
  __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi32(0x7f)), sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(0x80)), 24);
  __m256 f = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p120f));
  __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  return _mm256_or_ps(_mm256_or_ps(f, _mm256_castsi256_ps(nan)), _mm256_castsi256_ps(sign));
}
inline F e4m3_values(const uint8_t* half, int i) { I c = byte_lanes(half, i); return {from_e4m3_8(c.a), from_e4m3_8(c.b)}; }
inline F load_f16(const void* p, int64_t i) {
  const auto* h = static_cast<const uint16_t*>(p) + i;
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h))), _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + 8)))};
}
inline F e5m2_values(const uint8_t* half, int i) {  // the upper byte of a half
  uint16_t h[16];
  for (int n = 0; n < 16; n++) h[n] = uint16_t(half[4 * n + i] << 8);
  return load_f16(h, 0);
}
inline F load_numbers(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return load_f(static_cast<const float*>(p) + i);
  if (dtype == Dtype::f16) return load_f16(p, i);
  float r[16];
  for (int n = 0; n < 16; n++) r[n] = load_number(p, dtype, i + n);
  return load_f(r);
}
inline void expand_bits(const uint8_t* stream, int bits, uint8_t* codes) {
  const uint64_t mask = 0x0101010101010101ull * ((1u << bits) - 1);
  for (int o = 0; o < 8; o++, stream += bits, codes += 8) {
    uint64_t word = 0;
    __builtin_memcpy(&word, stream, unsigned(bits));
    word = _pdep_u64(word, mask);
    __builtin_memcpy(codes, &word, 8);
  }
}
