// 16 rows as one 512-bit vector, with VNNI; bf16 dots and byte permutations where the unit is compiled for them.
using F = __m512;
using I = __m512i;
struct B {
  __m512i v;
};
#ifdef QKERNELS_SMALL_TILES  // for the sanitizers: a quarter of the code to instrument
constexpr int ACCUMULATORS = 4, WIDE = 4;
#else
constexpr int ACCUMULATORS = 24, WIDE = 4;  // register tile: rows of x times panels; panels at most
#endif
constexpr int S8_ACCUMULATORS = ACCUMULATORS, NARROW = 0;
using LENGTHS = std::integer_sequence<int>;
constexpr bool STREAMS = true, FETCH_X = false;
#ifdef __AVX512BF16__
constexpr bool STREAMS_PLANES = true;
#else
constexpr bool STREAMS_PLANES = false;  // a level for few CPUs: not worth its share of the build
#endif
constexpr int64_t FEW_S8 = ALWAYS, FEW_INTEGERS = ALWAYS, FEW_TABLE = ALWAYS, FEW_BYTES = 72;  // see multiply.h

inline F zero_f() { return _mm512_setzero_ps(); }
inline F set1_f(float x) { return _mm512_set1_ps(x); }
inline F load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add_f(F x, F y) { return _mm512_add_ps(x, y); }
inline F sub_f(F x, F y) { return _mm512_sub_ps(x, y); }
inline F mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }

inline I magnitude_bits(F x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
inline I max_i(I x, I y) { return _mm512_max_epi32(x, y); }
inline int32_t highest(I x) { return _mm512_reduce_max_epi32(x); }
inline I zero_i() { return _mm512_setzero_si512(); }
inline I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline I add_i(I x, I y) { return _mm512_add_epi32(x, y); }
inline int32_t total(I x) { return _mm512_reduce_add_epi32(x); }
inline I round_to_s8(F x, int8_t* out) {  // half to even
  const I q = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(q));
  return q;
}

inline B load_b(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_b(uint8_t* p, B x) { _mm512_storeu_si512(p, x.v); }
inline B nibbles(B x, int high) { return {_mm512_and_si512(high ? _mm512_srli_epi16(x.v, 4) : x.v, _mm512_set1_epi8(15))}; }
inline B look_up(const uint8_t* table, B index) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index.v)};
}
inline B entries(const Weight& w, B index) { return look_up(w.table_u8, index); }
// An accumulator stays in its register: GCC 12 would write it to the stack after every use, at a third of the speed.
#ifdef QKERNELS_EMULATE  // no such registers
template <class V>
inline void hold(V&) {}
#else
template <class V>
[[gnu::always_inline]] inline void hold(V& sum) {
  __asm__("" : "+v"(sum));
}
#endif
inline __m512i broadcast_32_bits(const void* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

template <int LARGEST>
struct DotS8 {
  static constexpr int FOLD_K = MAX_BLOCK, BIAS = 0;
  I sum;
  void start(int32_t value) { sum = _mm512_set1_epi32(value); }
  void add(B w, const int8_t* x) { sum = _mm512_dpbusd_epi32(sum, w.v, broadcast_32_bits(x)), hold(sum); }
  // The instruction itself spreads x: that takes no register, and one more row of sums fits.
  void add_memory(B w, const int8_t* x) {
#ifdef QKERNELS_EMULATE
    add(w, x);
#else
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w.v), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
#endif
  }
  void fold() {}
  F value() const { return to_float(sum); }
};
struct DotF32 {
  static constexpr int FOLD_K = MAX_BLOCK;
  F sum;
  void start(int32_t) { sum = zero_f(); }
  void add(F w, const float* x) { sum = _mm512_fmadd_ps(w, set1_f(*x), sum), hold(sum); }
  void fold() {}
  F value() const { return sum; }
};

inline F nibble_values(const uint8_t* tile, int shift, const float* table) {  // vpermps looks at the low 4 bits of a lane: no mask
  const I index = _mm512_srl_epi32(_mm512_loadu_si512(tile), _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}
inline F nibble_integers(const uint8_t* tile, int shift, const float* table) { return nibble_values(tile, shift, table); }
inline F byte_integers(const uint8_t* half, int i) {  // code - 128: the code becomes the last bits of 2^23, which then goes, exactly
  const I lanes = _mm512_srl_epi32(_mm512_loadu_si512(half), _mm_cvtsi32_si128(8 * i));
  const I number = _mm512_ternarylogic_epi32(lanes, _mm512_set1_epi32(255), _mm512_set1_epi32(0x4b000000), 0xea);  // lanes & 255 | 2^23
  return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(0x1p23f + 128));
}
inline I byte_lanes(const uint8_t* half, int i) {
  return _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(half), _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255));
}
inline F from_e4m3_16(I c) {
  const I magnitude = _mm512_and_si512(c, _mm512_set1_epi32(0x7f)),
          sign = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(0x80)), 24);
  // What e4m3 has below its least exponent is no such number here: Intel's CPUs would take a hundred cycles over each vector.
  F f = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
  const __mmask16 least = _mm512_cmpeq_epi32_mask(_mm512_and_si512(c, _mm512_set1_epi32(0x78)), _mm512_setzero_si512());
  f = _mm512_mask_blend_ps(least, f, _mm512_fmadd_ps(f, _mm512_set1_ps(2), _mm512_set1_ps(-0x1p-6f)));
  f = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)), f,
                           _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(f), sign));
}
inline F e4m3_values(const uint8_t* half, int i) { return from_e4m3_16(byte_lanes(half, i)); }
inline F e5m2_values(const uint8_t* half, int i) {  // the upper byte of a half
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_slli_epi32(byte_lanes(half, i), 8)));
}

#ifdef __AVX512BF16__
// Half the products for codes c below 16: with activations x of -120…120, and k in pairs (i, j),
//
//     (x_i + 120 + c_j) · (x_j - 8 + c_i)  =  x_i c_i + x_j c_j  +  (x_i + 120) (x_j - 8)  +  (c_j + 120) c_i - 8 c_j
//
// where the first factor is an unsigned byte and the second a signed one, always. The two last terms belong to a row of x and to a row of
// the weight, and are subtracted once a block. It takes two additions of bytes a product: it pays where those run beside the products,
// as on Zen4 and Zen5, whose products have two of four ports (pairs_pay). Those have BF16 too: the unit without it keeps to plain products.
// Source: S. Winograd, A New Algorithm for Inner Product, 1968.
#define QK_PAIRS
constexpr int PAIR_ACCUMULATORS = ACCUMULATORS < 16 ? ACCUMULATORS : 16;
struct Pair {  // bytes 4n…4n+3: codes of row n at k0…k0+3, and at k0+4…k0+7
  B i, j;
};
struct DotPairs {
  static constexpr int FOLD_K = MAX_BLOCK, BIAS = 0;
  I sum;
  void start(int32_t row, const int32_t* column) { sum = _mm512_sub_epi32(_mm512_set1_epi32(row), _mm512_loadu_si512(column)); }
  void add(Pair c, const int8_t* x) {
    const I first = _mm512_add_epi8(broadcast_32_bits(x), c.j.v), second = _mm512_add_epi8(broadcast_32_bits(x + 4), c.i.v);
    sum = _mm512_dpbusd_epi32(sum, first, second), hold(sum);
  }
  void fold() {}
  F value() const { return to_float(sum); }

  struct Column {  // of 16 rows of the weight: the last two terms, without the second's sign
    I products = _mm512_setzero_si512(), less = _mm512_setzero_si512();
    void add(Pair c) {
      products = _mm512_dpbusd_epi32(products, _mm512_add_epi8(c.j.v, _mm512_set1_epi8(120)), c.i.v);
      less = _mm512_dpbusd_epi32(less, c.j.v, _mm512_set1_epi8(8));
    }
    void store(int32_t* out) const { _mm512_storeu_si512(out, _mm512_sub_epi32(products, less)); }
  };
  static int32_t rows(int8_t* x, int64_t k) {  // add 120 and -8, in place; returns the sum of their products
    const I add = _mm512_set1_epi64(int64_t(0xf8f8f8f878787878));
    I sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 64) {
      const __mmask64 some = k - i < 64 ? (uint64_t(1) << (k - i)) - 1 : ~uint64_t(0);
      const I v = _mm512_maskz_add_epi8(some, _mm512_maskz_loadu_epi8(some, x + i), add);
      _mm512_mask_storeu_epi8(x + i, some, v);
      sum = _mm512_dpbusd_epi32(sum, v, _mm512_srli_epi64(v, 32));
    }
    return _mm512_reduce_add_epi32(sum);
  }
};

#define QK_BF16_DOT
struct DotBf16 {  // lane n: two k of row n
  static constexpr int FOLD_K = MAX_BLOCK;
  F sum;
  void start(int32_t) { sum = zero_f(); }
  void add(B w, const uint16_t* x) { sum = _mm512_dpbf16_ps(sum, (__m512bh)w.v, (__m512bh)broadcast_32_bits(x)), hold(sum); }
  void fold() {}
  F value() const { return sum; }
};
inline B bf16_pair(F first, F second) {  // of values that are bf16 already
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second))};
}
inline F member_of(B pair, bool second) {
  return _mm512_castsi512_ps(second ? _mm512_and_si512(pair.v, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(pair.v, 16));
}
inline void store_bf16_tiles(uint16_t* p, F x) {  // of values that are bf16 already: two tiles of 8, each in the order 0 2 1 3 4 6 5 7
  const __m512i order = _mm512_set_epi32(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  const __m512i top = _mm512_srli_epi32(_mm512_permutexvar_epi32(order, _mm512_castps_si512(x)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
// Codes at `shift` of every 16-bit half lane, which are two apart in k. vpermw looks at 5 bits: the table holds everything twice.
inline B nibble_pairs(const uint8_t* tile, int shift, const uint16_t* table) {
  const I index = _mm512_srl_epi16(_mm512_loadu_si512(tile), _mm_cvtsi32_si128(shift));
  return {_mm512_permutexvar_epi16(index, _mm512_loadu_si512(table))};
}
// Bytes j and j + 2 of the lanes of half a tile, which hold FP8, as bf16: shifted and with another bias of the exponent, but for subnormal
// numbers, of which a table has the few, and what is not finite.
struct Fp8Halves {
  I codes, magnitudes, values;
};
inline Fp8Halves fp8_halves(const uint8_t* half, int j, int shift, int bias) {
  const I v = _mm512_loadu_si512(half), codes = j ? _mm512_srli_epi16(v, 8) : v, m = _mm512_and_si512(codes, _mm512_set1_epi16(127));
  return {codes, m, _mm512_add_epi16(_mm512_sll_epi16(m, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(short(bias << 7)))};
}
inline B with_sign(I values, I codes) {
  return {_mm512_ternarylogic_epi32(values, _mm512_slli_epi16(codes, 8), _mm512_set1_epi16(short(0x8000)), 0xf8)};  // values | codes & sign
}
inline B e4m3_pairs(const uint8_t* half, int j) {
  const auto [codes, m, normal] = fp8_halves(half, j, 4, 120);
  const I table = _mm512_set4_epi32(0x3c603c40, 0x3c203c00, 0x3bc03b80, 0x3b000000);  // 7 … 0 times 2^-9
  const I some = _mm512_mask_permutexvar_epi16(normal, _mm512_cmplt_epu16_mask(m, _mm512_set1_epi16(8)), m, table);
  return with_sign(_mm512_mask_blend_epi16(_mm512_cmpeq_epi16_mask(m, _mm512_set1_epi16(127)), some, _mm512_set1_epi16(0x7fc0)), codes);
}
inline B e5m2_pairs(const uint8_t* half, int j) {
  const auto [codes, m, normal] = fp8_halves(half, j, 5, 112);
  const I table = _mm512_set4_epi32(0, 0, 0x38403800, 0x37800000);  // 3 … 0 times 2^-16
  const I some = _mm512_mask_permutexvar_epi16(normal, _mm512_cmplt_epu16_mask(m, _mm512_set1_epi16(4)), m, table);
  const __mmask32 infinite = _mm512_cmplt_epu16_mask(_mm512_set1_epi16(0x7b), m);  // or NaN
  return with_sign(_mm512_mask_add_epi16(some, infinite, some, _mm512_set1_epi16(112 << 7)), codes);
}
#endif

inline I mul_i(I x, I y) { return _mm512_mullo_epi32(x, y); }
inline I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_i(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
inline I load_scales(const uint8_t* p, bool is_signed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
}
inline I load_pairs(const uint8_t* first, const uint8_t* second, bool is_signed) {  // 16 bits each
  const I low = _mm512_and_si512(load_scales(first, is_signed), _mm512_set1_epi32(0xffff));
  return _mm512_or_si512(low, _mm512_slli_epi32(load_scales(second, is_signed), 16));
}
inline I add_pairs(I sum, I pairs, I others) { return _mm512_dpwssd_epi32(sum, pairs, others); }

inline F load_numbers(const void* p, Dtype dtype, int64_t i) {
  const auto* h = static_cast<const uint16_t*>(p) + i;
  const auto* c = static_cast<const uint8_t*>(p) + i;
  switch (dtype) {
    case Dtype::f32: return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    case Dtype::f16: return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
    case Dtype::bf16:
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h))), 16));
    default: break;
  }
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(c));
  if (dtype == Dtype::i8) return to_float(_mm512_cvtepi8_epi32(bytes));
  const I lanes = _mm512_cvtepu8_epi32(bytes);
  if (dtype == Dtype::u8) return to_float(lanes);
  if (dtype == Dtype::e4m3) return from_e4m3_16(lanes);
  const F f = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(lanes, 23), _mm512_set1_epi32(0x00400000)));  // e8m0: code 0 is 2^-127
  return _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(lanes, _mm512_set1_epi32(255)), f,
                              _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}
inline void store_numbers(void* p, Dtype dtype, int64_t i, F v) {
  if (dtype == Dtype::f32) return store_f(static_cast<float*>(p) + i, v);
  auto* h = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i);
  if (dtype == Dtype::f16) return _mm256_storeu_si256(h, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  const I u = _mm512_castps_si512(v), top = _mm512_srli_epi32(u, 16), odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const I nan = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(h, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, nan)));
}

// Codes of several planes, or of another than one of 4 or 8 bits: see kernels.h. half: which 64 of the tile's.
template <int BITS>
[[gnu::always_inline]] inline B planes(const uint8_t* tile, int half) {
  constexpr int FOUR = BITS & 4, LAST = BITS - 1;
  // Every 64 bits go round by so many; what is wanted of a byte comes to its place there.
  const auto join = [](I to, I from, I by, int mask) {
    return _mm512_ternarylogic_epi32(_mm512_rolv_epi64(from, by), _mm512_set1_epi8(char(mask)), to, 0xea);  // from & mask | to
  };
  I v = FOUR ? nibbles(load_b(tile), half).v : zero_i();
  if constexpr ((BITS & 2) != 0) {
    const I two = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 16 * FOUR)));
    const int64_t first = FOUR - 4 * half, second = first - 2;
    v = join(v, two, _mm512_set_epi64(second, second, second, second, first, first, first, first), 3 << FOUR);
  }
  if constexpr ((BITS & 1) != 0) {
    const I one = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * LAST)));
    const int64_t by = LAST - 4 * half;
    v = join(v, one, _mm512_set_epi64(by - 3, by - 3, by - 2, by - 2, by - 1, by - 1, by, by), 1 << LAST);
  }
  return {v};
}
