// 16 rows as two 256-bit vectors. Without VNNI: bytes are multiplied in pairs into 16 bits (vpmaddubsw), which saturates beyond 32767.
struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct B {
  __m256i a, b;
};
constexpr int ACCUMULATORS = 6, S8_ACCUMULATORS = 4, WIDE = 1;  // register tile: rows of x times panels; panels at most
constexpr bool STREAMS = true, STREAMS_PLANES = true,
               FETCH_X = true;  // rows that one tile holds take a strip in one go; the next rows of x are fetched
using LENGTHS = std::integer_sequence<int, 16, 32, 128>;  // of blocks that get loops of their own
constexpr int NARROW = 31;  // tables that span as little are multiplied like integers of 5 bits
constexpr int64_t FEW_S8 = 36, FEW_INTEGERS = 36, FEW_TABLE = 6, FEW_BYTES = 36;  // see multiply.h

inline F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set1_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_f(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline F add_f(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub_f(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline I magnitude_bits(F x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
inline I max_i(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <class Join>  // of all lanes
inline int32_t reduce(__m256i x, const Join& join) {
  __m128i v = join(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  v = join(v, _mm_shuffle_epi32(v, 0x4e));
  return _mm_cvtsi128_si32(join(v, _mm_shuffle_epi32(v, 0xb1)));
}
inline int32_t highest(I x) {
  return reduce(_mm256_max_epi32(x.a, x.b), [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
inline void hold(F&) {}  // registers are GCC's to choose here
inline I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline int32_t total(I x) {
  return reduce(_mm256_add_epi32(x.a, x.b), [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
inline I round_to_s8(F x, int8_t* out) {  // half to even
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);  // packing works within 128-bit lanes
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  return {a, b};
}

inline __m256i load_si(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
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
  const __m256i t = _mm256_broadcastsi128_si256(load_half(table));
  return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}

inline __m256i pairs_to_i32(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
inline __m256i broadcast_4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

template <int LARGEST>
struct DotS8 {  // sums of pairs, as many as fit 16 bits
  static constexpr int FOLD_K = LARGEST < 16 ? 32 : LARGEST < 32 ? 16 : 8, BIAS = 0;
  static_assert(FOLD_K / 4 * (2 * LARGEST * 127) <= INT16_MAX);
  I sum;
  __m256i a, b;
  void start(int32_t value) { sum = set1_i(value), a = b = _mm256_setzero_si256(); }
  void add(B w, const int8_t* x) {
    const __m256i v = broadcast_4(x);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, v)), b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, v));
    __asm__("" : "+x"(a), "+x"(b));  // each in its register: GCC would reorder the sums and spill them, a quarter slower
  }
  void fold() {
    sum = {_mm256_add_epi32(sum.a, pairs_to_i32(a)), _mm256_add_epi32(sum.b, pairs_to_i32(b))};
    a = b = _mm256_setzero_si256();
  }
  F value() const { return to_float(sum); }
};
// Signed values as |w| times x with the sign of w: 2 * 128 * 127 fits. scale: 1, or what multiplies all of them.
inline __m256i signed_dot(__m256i sum, __m256i w, __m256i magnitude, __m256i x, __m256i scale) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w)), scale));
}
struct Signed {
  B value, magnitude;
};
inline Signed less_128(B w) {  // of codes
  const __m256i flip = _mm256_set1_epi8(-128), a = _mm256_xor_si256(w.a, flip), b = _mm256_xor_si256(w.b, flip);
  return {{a, b}, {_mm256_abs_epi8(a), _mm256_abs_epi8(b)}};
}
inline Signed entries(const Weight& w, B index) { return {look_up(w.table_s8, index), look_up(w.table_magnitudes, index)}; }
struct SignedSum {
  static constexpr int FOLD_K = MAX_BLOCK, PIECE = MAX_BLOCK, BIAS = 128;
  I sum;
  void start(int32_t value) { sum = set1_i(value); }
  void add(const Signed& w, const int8_t* x, I scale) {
    const __m256i v = broadcast_4(x);
    sum = {signed_dot(sum.a, w.value.a, w.magnitude.a, v, scale.a), signed_dot(sum.b, w.value.b, w.magnitude.b, v, scale.b)};
    __asm__("" : "+x"(sum.a), "+x"(sum.b));  // as above: six of eight sums would lie on the stack
  }
  void fold() {}
};
template <>
struct DotS8<255> : SignedSum {  // codes minus 128
  void add(const Signed& w, const int8_t* x) { SignedSum::add(w, x, {_mm256_set1_epi16(1), _mm256_set1_epi16(1)}); }
  void add(B w, const int8_t* x) { add(less_128(w), x); }
  F value() const { return to_float(sum); }
};
// Of a block of LONGEST columns at most: codes less the middle of theirs, in 16 bits to the end. What overflows on the way comes back, as the
// whole sum fits: of 6 bits 32 * 127 * 8 products a lane, of 5 bits 16 * 127 * 16.
#define QK_LANES
template <int LARGEST>
struct DotLanes {
  static constexpr int HALF = (LARGEST + 1) / 2, LONGEST = INT16_MAX / (HALF * 127) * 2, FOLD_K = MAX_BLOCK, BIAS = 0;
  __m256i a, b;
  void start(int32_t less) { a = b = _mm256_set1_epi32(less); }  // two 16-bit numbers: see less_of_lanes
  void add(B w, const int8_t* x) {
    const __m256i v = broadcast_4(x);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, v)), b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, v));
    __asm__("" : "+x"(a), "+x"(b));  // as above
  }
  void fold() {}
  F value() const { return to_float({pairs_to_i32(a), pairs_to_i32(b)}); }
};
// Minus `middle` times the sums of a row's values that meet in the two 16-bit lanes of a word: of k % 4 below 2, and of the others.
inline int32_t less_of_lanes(const int8_t* x, int64_t length, int middle) {
  __m128i sum = _mm_setzero_si128();
  for (int64_t i = 0; i < length; i += TILE_K)
    sum = _mm_add_epi16(sum, _mm_maddubs_epi16(_mm_set1_epi8(1), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i))));
  sum = _mm_add_epi16(sum, _mm_srli_si128(sum, 4));
  return _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(int16_t(-middle))));
}
// Sums that integer scales multiply, see scaled.h: a scale lies twice in a word, for the product that adds pairs in any case.
template <class Dot>
struct ScaledDot;
template <int LARGEST>
struct ScaledDot<DotS8<LARGEST>> : DotLanes<LARGEST> {
  static constexpr int PIECE = LARGEST < 16 ? 32 : 16;  // columns; of 6 bits less the middle of theirs, by their start
  static_assert(PIECE / 2 * (LARGEST < 63 ? LARGEST : 32) * 127 <= INT16_MAX);
  I scale;
  I scaled(I total) const { return add_i(total, {_mm256_madd_epi16(this->a, scale.a), _mm256_madd_epi16(this->b, scale.b)}); }
};
template <>
struct ScaledDot<DotS8<255>> : SignedSum {
  I scale;
  void start(int32_t) { sum = zero_i(); }
  void add(const Signed& w, const int8_t* x) { SignedSum::add(w, x, scale); }
  void add(B w, const int8_t* x) { add(less_128(w), x); }
  I scaled(I total) const { return add_i(total, sum); }
};
inline I load_scales(const uint8_t* p, bool is_signed) {
  const __m256i bytes = _mm256_broadcastsi128_si256(load_half(p));
  const auto spread = [&](int first) {  // into the upper halves of 16 bits
    const __m256i up = _mm256_shuffle_epi8(bytes, _mm256_add_epi8(_mm256_set_epi32(0x07800780, 0x06800680, 0x05800580, 0x04800480,
                                                                                   0x03800380, 0x02800280, 0x01800180, 0x00800080),
                                                                  _mm256_set1_epi16(int16_t(first << 8))));
    return is_signed ? _mm256_srai_epi16(up, 8) : _mm256_srli_epi16(up, 8);
  };
  return {spread(0), spread(8)};
}
inline I load_pairs(const uint8_t* first, const uint8_t* second, bool is_signed) {
  const __m128i x = load_half(first), y = load_half(second), low = _mm_unpacklo_epi8(x, y), high = _mm_unpackhi_epi8(x, y);
  if (is_signed) return {_mm256_cvtepi8_epi16(low), _mm256_cvtepi8_epi16(high)};
  return {_mm256_cvtepu8_epi16(low), _mm256_cvtepu8_epi16(high)};
}
inline I load_i(const int32_t* p) { return {load_si(p), load_si(p + 8)}; }
inline void store_i(int32_t* p, I v) { store_b(reinterpret_cast<uint8_t*>(p), {v.a, v.b}); }
inline I add_pairs(I sum, I pairs, I others) {
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(pairs.a, others.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(pairs.b, others.b))};
}

struct DotF32 {
  static constexpr int FOLD_K = MAX_BLOCK;
  F sum;
  void start(int32_t) { sum = zero_f(); }
  void add(F w, const float* x) { sum = ::qk::fma(w, set1_f(*x), sum); }
  void fold() {}
  F value() const { return sum; }
};

// The code in `bits` bits at `shift` of every 32-bit lane, minus half the range: flipping its top bit makes it two's complement.
template <int BITS>
inline F centred(B v, int shift) {
  const __m256i flip = _mm256_set1_epi32(BITS == 4 ? int(0x88888888u) : int(0x80808080u));
  const __m128i up = _mm_cvtsi32_si128(32 - BITS - shift);
  const __m256i a = _mm256_sll_epi32(_mm256_xor_si256(v.a, flip), up), b = _mm256_sll_epi32(_mm256_xor_si256(v.b, flip), up);
  return to_float({_mm256_srai_epi32(a, 32 - BITS), _mm256_srai_epi32(b, 32 - BITS)});
}
inline __m256 look_up_16(__m256i v, int shift, const float* table) {
  const __m256i index = _mm256_srl_epi32(v, _mm_cvtsi32_si128(shift));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index),
               high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F nibble_integers(const uint8_t* tile, int shift, const float*) { return centred<4>(load_b(tile), shift); }
inline F nibble_values(const uint8_t* tile, int shift, const float* table) {
  const B v = load_b(tile);
  return {look_up_16(v.a, shift, table), look_up_16(v.b, shift, table)};
}
inline F byte_integers(const uint8_t* half, int i) { return centred<8>(load_b(half), 8 * i); }
inline I byte_lanes(const uint8_t* half, int i) {
  const B v = load_b(half);
  const __m128i shift = _mm_cvtsi32_si128(8 * i);
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srl_epi32(v.a, shift), mask), _mm256_and_si256(_mm256_srl_epi32(v.b, shift), mask)};
}
inline __m256 from_e4m3_8(__m256i c) {
  const __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi32(0x7f)),
                sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(0x80)), 24);
  // What e4m3 has below its least exponent is no such number here: Intel's CPUs would take a hundred cycles over each vector.
  __m256 f = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  const __m256i least = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  f = _mm256_blendv_ps(f, _mm256_fmadd_ps(f, _mm256_set1_ps(2), _mm256_set1_ps(-0x1p-6f)), _mm256_castsi256_ps(least));
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  return _mm256_or_ps(_mm256_or_ps(f, _mm256_castsi256_ps(nan)), _mm256_castsi256_ps(sign));
}
inline __m256 from_e8m0_8(__m256i c) {  // code 0 is 2^-127, 255 is NaN
  const __m256i f = _mm256_max_epi32(_mm256_slli_epi32(c, 23), _mm256_set1_epi32(0x00400000));
  return _mm256_castsi256_ps(_mm256_or_si256(f, _mm256_cmpeq_epi32(c, _mm256_set1_epi32(255))));
}
inline F e4m3_values(const uint8_t* half, int i) {
  I c = byte_lanes(half, i);
  return {from_e4m3_8(c.a), from_e4m3_8(c.b)};
}
inline __m256 from_f16_8(const uint16_t* h) { return _mm256_cvtph_ps(load_half(h)); }
inline F e5m2_values(const uint8_t* half, int i) {  // the upper byte of a half
  uint16_t h[16];
  for (int n = 0; n < 16; n++) h[n] = uint16_t(half[4 * n + i] << 8);
  return {from_f16_8(h), from_f16_8(h + 8)};
}
inline __m256 from_bf16_8(const uint16_t* h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(h)), 16)); }
inline F load_numbers(const void* p, Dtype dtype, int64_t i) {
  const auto* h = static_cast<const uint16_t*>(p) + i;
  if (dtype == Dtype::f32) return load_f(static_cast<const float*>(p) + i);
  if (dtype == Dtype::f16) return {from_f16_8(h), from_f16_8(h + 8)};
  if (dtype == Dtype::bf16) return {from_bf16_8(h), from_bf16_8(h + 8)};
  const __m128i bytes = load_half(static_cast<const uint8_t*>(p) + i);
  const __m128i upper = _mm_unpackhi_epi64(bytes, bytes);
  if (dtype == Dtype::i8) return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(upper)});
  const I lanes = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(upper)};
  if (dtype == Dtype::u8) return to_float(lanes);
  if (dtype == Dtype::e4m3) return {from_e4m3_8(lanes.a), from_e4m3_8(lanes.b)};
  return {from_e8m0_8(lanes.a), from_e8m0_8(lanes.b)};
}
inline __m256i to_bf16_8(__m256 f) {  // in the low half of each lane
  const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
}
inline void store_numbers(void* p, Dtype dtype, int64_t i, F v) {
  if (dtype == Dtype::f32) return store_f(static_cast<float*>(p) + i, v);
  auto* h = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i);
  if (dtype == Dtype::f16) {
    _mm_storeu_si128(h, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(h + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
  } else {  // packing works within 128-bit lanes, so the middle quarters have to change places
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16_8(v.a), to_bf16_8(v.b)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), packed);
  }
}

// Codes of several planes, or of another than one of 4 or 8 bits: see kernels.h. half: which 64 of the tile's.
template <int BITS>
[[gnu::always_inline]] inline B planes(const uint8_t* tile, int half) {
  constexpr int FOUR = BITS & 4, LAST = BITS - 1;
  const auto join = [](__m256i to, __m256i from, int mask) {
    return _mm256_or_si256(to, _mm256_and_si256(from, _mm256_set1_epi8(char(mask))));
  };
  B v = FOUR ? nibbles(load_b(tile), half) : B{_mm256_setzero_si256(), _mm256_setzero_si256()};
  if constexpr ((BITS & 2) != 0) {
    const __m256i two = load_si(tile + 16 * FOUR);
    const auto up = [&](int by) { return by < 0 ? _mm256_srli_epi16(two, -by) : _mm256_slli_epi16(two, by); };
    v = {join(v.a, up(FOUR - 4 * half), 3 << FOUR), join(v.b, up(FOUR - 4 * half - 2), 3 << FOUR)};
  }
  if constexpr ((BITS & 1) != 0) {
    const __m256i one = _mm256_broadcastsi128_si256(load_half(tile + 16 * LAST));
    const auto up = [&](int by) {  // by one less in the upper half; both lead one way, as LAST and `by` are even
      return by > 0 ? _mm256_sllv_epi64(one, _mm256_set_epi64x(by - 1, by - 1, by, by))
                    : _mm256_srlv_epi64(one, _mm256_set_epi64x(1 - by, 1 - by, -by, -by));
    };
    v = {join(v.a, up(LAST - 4 * half), 1 << LAST), join(v.b, up(LAST - 4 * half - 2), 1 << LAST)};
  }
  return v;
}
