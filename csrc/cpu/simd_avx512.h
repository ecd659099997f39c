// 16 rows as one 512-bit vector, with VNNI.
using F = __m512;
using I = __m512i;
struct B { __m512i v; };
constexpr int MAX_ROWS = 6, WIDE = 4;  // 24 accumulators of the 32 registers

inline F zero_f() { return _mm512_setzero_ps(); }
inline F set1_f(float x) { return _mm512_set1_ps(x); }
inline F load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F sub_f(F x, F y) { return _mm512_sub_ps(x, y); }
inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline void mac_f(F& acc, F w, float x) { acc = _mm512_fmadd_ps(w, _mm512_set1_ps(x), acc); }
inline I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline B load_b(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_b(uint8_t* p, B x) { _mm512_storeu_si512(p, x.v); }
inline B nibbles(B x, int high) {
  return {_mm512_and_si512(high ? _mm512_srli_epi16(x.v, 4) : x.v, _mm512_set1_epi8(15))};
}
inline B look_up(const uint8_t* table, B index) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index.v)};
}
template <bool Small> constexpr int mac_bias() { return 0; }
template <bool Small>
inline void mac_s8(I& acc, B w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  acc = _mm512_dpbusd_epi32(acc, w.v, _mm512_set1_epi32(four));
}
inline F nibble_values(const uint8_t* tile, int shift, const float* table) {  // vpermps looks at the low 4 bits of a lane: no mask
  __m512i index = _mm512_srl_epi32(_mm512_loadu_si512(tile), _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}
inline I byte_lanes(const uint8_t* half, int i) {
  return _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(half), _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255));
}
inline F byte_values(const uint8_t* half, int i) { return to_float(byte_lanes(half, i)); }
inline F from_e4m3_16(I c) {
  I magnitude = _mm512_and_si512(c, _mm512_set1_epi32(0x7f)), sign = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(0x80)), 24);
  F f = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)), _mm512_set1_ps(0x1p120f));
  f = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)), f, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(f), sign));
}
inline F e4m3_values(const uint8_t* half, int i) { return from_e4m3_16(byte_lanes(half, i)); }
inline F e5m2_values(const uint8_t* half, int i) {  // the upper byte of a half
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_slli_epi32(byte_lanes(half, i), 8)));
}
inline F load_numbers(const void* p, Dtype dtype, int64_t i) {
  const auto* h = static_cast<const uint16_t*>(p) + i;
  const auto* c = static_cast<const uint8_t*>(p) + i;
  switch (dtype) {
    case Dtype::f32: return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    case Dtype::f16: return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
    case Dtype::bf16: return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h))), 16));
    default: break;
  }
  __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
  if (dtype == Dtype::u8) return to_float(lanes);
  if (dtype == Dtype::e4m3) return from_e4m3_16(lanes);
  F f = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(lanes, 23), _mm512_set1_epi32(0x00400000)));  // code 0 is 2^-127
  return _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(lanes, _mm512_set1_epi32(255)), f, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
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
