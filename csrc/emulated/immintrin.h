// The AVX-512 and AMX intrinsics that our levels use, in plain C++ for GCC and Clang, to Intel's documented results. `make emulate` puts this
// folder before the compiler's own headers: the levels then compile unchanged, and are tested, on machines that could not run them.
// An intrinsic that a kernel uses for the first time is an error of that compilation until it has its lines here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

using __m128i __attribute__((vector_size(16))) = long long;
using __m256i __attribute__((vector_size(32))) = long long;
using __m512i __attribute__((vector_size(64))) = long long;
using __m512 __attribute__((vector_size(64))) = float;
using __m256bh __attribute__((vector_size(32))) = uint16_t;
using __m512bh __attribute__((vector_size(64))) = uint16_t;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;
constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _CMP_UNORD_Q = 3;

namespace {
namespace emulated {

using i8x16 __attribute__((vector_size(16))) = int8_t;
using u8x16 __attribute__((vector_size(16))) = uint8_t;
using u8x64 __attribute__((vector_size(64))) = uint8_t;
using i8x64 __attribute__((vector_size(64))) = int8_t;
using u16x16 __attribute__((vector_size(32))) = uint16_t;
using u16x32 __attribute__((vector_size(64))) = uint16_t;
using i32x16 __attribute__((vector_size(64))) = int32_t;
using u32x16 __attribute__((vector_size(64))) = uint32_t;
using u64x2 __attribute__((vector_size(16))) = uint64_t;
using u64x8 __attribute__((vector_size(64))) = uint64_t;

template <class To, class From>
inline To bits(From from) {  // the same bits as another type
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class Lane>
inline V lanes(Lane lane) {  // lane 0 is the lowest
  V v{};
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); i++) v[i] = lane(i);
  return v;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  uint32_t f = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);  // the exponents' biases are 112 apart
  if (magnitude >= 0x0f800000) f = magnitude | 0x7f800000;  // infinity, NaN
  if (magnitude > 0x0f800000) f |= 0x00400000;  // a NaN comes out quiet
  return bits<float>(sign | f);
}

inline uint16_t float_to_half(float f) {  // to nearest even
  const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (u >> 13 & 0x1ff));
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and beyond
  if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(__builtin_rintf(bits<float>(magnitude) * 0x1p24f)));  // units of 2^-24
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

// AVX512_BF16 has its own arithmetic, whatever the process has set: round to nearest even; subnormals, in and out, are zeros.
inline float flush(float f) { return __builtin_fabsf(f) < 0x1p-126f ? __builtin_copysignf(0.0f, f) : f; }
inline float fma_bf16(uint32_t x, uint32_t y, float sum) {
  return flush(__builtin_fmaf(flush(bits<float>(x << 16)), flush(bits<float>(y << 16)), flush(sum)));
}
inline uint16_t float_to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(flush(f));
  return uint16_t(f != f ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace emulated

// ---- memory and constants

inline __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
inline __m256i _mm256_loadu_si256(const void* p) { return emulated::load<__m256i>(p); }
inline __m128i _mm_loadu_si128(const void* p) { return emulated::load<__m128i>(p); }
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm256_storeu_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm_storeu_si128(__m128i* p, __m128i v) { std::memcpy(p, &v, sizeof(v)); }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) {
  return emulated::lanes<__m512>([=](size_t) { return x; });
}
inline __m512i _mm512_set1_epi8(char x) {
  return (__m512i)emulated::lanes<emulated::u8x64>([=](size_t) { return uint8_t(x); });
}
inline __m512i _mm512_set1_epi16(short x) {
  return (__m512i)emulated::lanes<emulated::u16x32>([=](size_t) { return uint16_t(x); });
}
inline __m512i _mm512_set1_epi32(int x) {
  return (__m512i)emulated::lanes<emulated::i32x16>([=](size_t) { return x; });
}
inline __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
  return (__m512i)emulated::lanes<emulated::i32x16>([=](size_t i) { return i % 4 == 0 ? a : i % 4 == 1 ? b : i % 4 == 2 ? c : d; });
}
inline __m512i _mm512_set_epi32(int p, int o, int n, int m, int l, int k, int j, int i, int h, int g, int f, int e, int d, int c, int b,
                                int a) {
  return (__m512i)emulated::i32x16{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}
inline __m512i _mm512_set1_epi64(long long x) { return __m512i{x, x, x, x, x, x, x, x}; }
inline __m512i _mm512_set_epi64(long long h, long long g, long long f, long long e, long long d, long long c, long long b, long long a) {
  return __m512i{a, b, c, d, e, f, g, h};
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {  // what is masked out is not touched
  return (__m512i)emulated::lanes<emulated::u8x64>(
      [=](size_t i) { return mask >> i & 1 ? static_cast<const uint8_t*>(p)[i] : uint8_t(0); });
}
inline void _mm512_mask_storeu_epi8(void* p, __mmask64 mask, __m512i v) {  // likewise
  const auto bytes = (emulated::u8x64)v;
  for (int i = 0; i < 64; i++)
    if (mask >> i & 1) static_cast<uint8_t*>(p)[i] = bytes[i];
}
inline __m128i _mm_cvtsi32_si128(int x) { return __m128i{static_cast<long long>(uint32_t(x)), 0}; }
inline __m512i _mm512_broadcast_i64x4(__m256i v) { return __m512i{v[0], v[1], v[2], v[3], v[0], v[1], v[2], v[3]}; }
inline __m512i _mm512_broadcast_i32x4(__m128i v) { return __m512i{v[0], v[1], v[0], v[1], v[0], v[1], v[0], v[1]}; }

// ---- bits and integers

inline __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }
inline __m512i _mm512_castps_si512(__m512 v) { return (__m512i)v; }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i v, unsigned count) {
  return count > 31 ? __m512i{} : (__m512i)((emulated::u32x16)v << uint32_t(count));
}
inline __m512i _mm512_srli_epi16(__m512i v, unsigned count) {
  return count > 15 ? __m512i{} : (__m512i)((emulated::u16x32)v >> uint16_t(count));
}
inline __m512i _mm512_slli_epi16(__m512i v, unsigned count) {
  return count > 15 ? __m512i{} : (__m512i)((emulated::u16x32)v << uint16_t(count));
}
inline __m512i _mm512_srl_epi32(__m512i v, __m128i count) {  // by the low 64 bits of count
  const uint64_t n = ((emulated::u64x2)count)[0];
  return n > 31 ? __m512i{} : (__m512i)((emulated::u32x16)v >> uint32_t(n));
}
inline __m512i _mm512_srl_epi16(__m512i v, __m128i count) {
  const uint64_t n = ((emulated::u64x2)count)[0];
  return n > 15 ? __m512i{} : (__m512i)((emulated::u16x32)v >> uint16_t(n));
}
inline __m512i _mm512_sll_epi16(__m512i v, __m128i count) {
  const uint64_t n = ((emulated::u64x2)count)[0];
  return n > 15 ? __m512i{} : (__m512i)((emulated::u16x32)v << uint16_t(n));
}
inline __m512i _mm512_sll_epi32(__m512i v, __m128i count) {
  const uint64_t n = ((emulated::u64x2)count)[0];
  return n > 31 ? __m512i{} : (__m512i)((emulated::u32x16)v << uint32_t(n));
}
inline __m512i _mm512_srli_epi32(__m512i v, unsigned count) {
  return count > 31 ? __m512i{} : (__m512i)((emulated::u32x16)v >> uint32_t(count));
}
inline __m512i _mm512_srli_epi64(__m512i v, unsigned count) {
  return count > 63 ? __m512i{} : (__m512i)((emulated::u64x8)v >> uint64_t(count));
}
inline __m512i _mm512_srai_epi32(__m512i v, unsigned count) { return (__m512i)((emulated::i32x16)v >> int32_t(count > 31 ? 31 : count)); }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i _mm512_add_epi8(__m512i a, __m512i b) { return (__m512i)((emulated::u8x64)a + (emulated::u8x64)b); }
inline __m512i _mm512_maskz_add_epi8(__mmask64 mask, __m512i a, __m512i b) {
  const auto sum = (emulated::u8x64)_mm512_add_epi8(a, b);
  return (__m512i)emulated::lanes<emulated::u8x64>([&](size_t i) { return mask >> i & 1 ? sum[i] : uint8_t(0); });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::u32x16)a - (emulated::u32x16)b); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::u32x16)a + (emulated::u32x16)b); }
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) { return (__m512i)((emulated::u8x64)a - (emulated::u8x64)b); }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((emulated::u16x32)a + (emulated::u16x32)b); }
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return (__m512i)((emulated::u16x32)a - (emulated::u16x32)b); }
inline __m512i _mm512_mullo_epi16(__m512i a, __m512i b) { return (__m512i)((emulated::u16x32)a * (emulated::u16x32)b); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::u32x16)a * (emulated::u32x16)b); }
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  const auto x = (emulated::i32x16)a, y = (emulated::i32x16)b;
  return (__m512i)emulated::lanes<emulated::i32x16>([&](size_t i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline int _mm512_reduce_max_epi32(__m512i v) {
  const auto x = (emulated::i32x16)v;
  int most = x[0];
  for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
  return most;
}
inline int _mm512_reduce_add_epi32(__m512i v) {
  const auto x = (emulated::u32x16)v;
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return int(sum);
}
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {  // bit of the table that the bits of a, b, c name
  __m512i result{};
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline __mmask32 _mm512_cmpeq_epi16_mask(__m512i a, __m512i b) {
  const auto x = (emulated::u16x32)a, y = (emulated::u16x32)b;
  __mmask32 mask = 0;
  for (int i = 0; i < 32; i++) mask |= __mmask32(x[i] == y[i]) << i;
  return mask;
}
inline __mmask32 _mm512_cmplt_epu16_mask(__m512i a, __m512i b) {
  const auto x = (emulated::u16x32)a, y = (emulated::u16x32)b;
  __mmask32 mask = 0;
  for (int i = 0; i < 32; i++) mask |= __mmask32(x[i] < y[i]) << i;
  return mask;
}
inline __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  const auto x = (emulated::u32x16)a, y = (emulated::u32x16)b;
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned(x[i] == y[i]) << i;
  return __mmask16(mask);
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) { return __mmask16(~_mm512_cmpeq_epi32_mask(a & b, __m512i{})); }
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {  // unsigned a, signed b; the sum wraps around
  const auto s = (emulated::u32x16)sum;
  const auto x = (emulated::u8x64)a;
  const auto y = (emulated::i8x64)b;
  return (__m512i)emulated::lanes<emulated::u32x16>([&](size_t i) {
    int four = 0;
    for (size_t j = 4 * i; j < 4 * i + 4; j++) four += x[j] * y[j];
    return s[i] + uint32_t(four);
  });
}
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {  // signed pairs; the sum wraps around
  const auto s = (emulated::u32x16)sum;
  const auto x = (emulated::u16x32)a;
  const auto y = (emulated::u16x32)b;
  return (__m512i)emulated::lanes<emulated::u32x16>([&](size_t i) {
    const auto product = [&](size_t j) { return uint32_t(int16_t(x[j]) * int16_t(y[j])); };
    return s[i] + product(2 * i) + product(2 * i + 1);
  });
}

// ---- lanes to other places: of an index, its low bits count

inline __m512i _mm512_shuffle_epi8(__m512i v, __m512i index) {  // in each 128 bits by themselves; zero where the index is negative
  const auto x = (emulated::u8x64)v, at = (emulated::u8x64)index;
  return (__m512i)emulated::lanes<emulated::u8x64>([&](size_t i) { return at[i] & 0x80 ? uint8_t(0) : x[(i & 48) | (at[i] & 15)]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) {
  const auto x = (emulated::u16x32)v, at = (emulated::u16x32)index;
  return (__m512i)emulated::lanes<emulated::u16x32>([&](size_t i) { return x[at[i] & 31]; });
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i v) {
  const auto x = (emulated::u32x16)v, at = (emulated::u32x16)index;
  return (__m512i)emulated::lanes<emulated::u32x16>([&](size_t i) { return x[at[i] & 15]; });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 v) {
  const auto at = (emulated::u32x16)index;
  return emulated::lanes<__m512>([&](size_t i) { return v[at[i] & 15]; });
}
inline __m512i _mm512_rolv_epi64(__m512i v, __m512i counts) {
  const auto x = (emulated::u64x8)v;
  const auto by = (emulated::u64x8)counts;
  return (__m512i)emulated::lanes<emulated::u64x8>([&](size_t i) { return x[i] << (by[i] & 63) | x[i] >> (-by[i] & 63); });
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 zeros, __m512 ones) {
  return emulated::lanes<__m512>([&](size_t i) { return mask >> i & 1 ? ones[i] : zeros[i]; });
}

inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i zeros, __m512i ones) {
  const auto x = (emulated::u16x32)zeros, y = (emulated::u16x32)ones;
  return (__m512i)emulated::lanes<emulated::u16x32>([&](size_t i) { return mask >> i & 1 ? y[i] : x[i]; });
}
inline __m512i _mm512_mask_add_epi16(__m512i old, __mmask32 mask, __m512i a, __m512i b) {
  return _mm512_mask_blend_epi16(mask, old, _mm512_add_epi16(a, b));
}
inline __m512i _mm512_mask_permutexvar_epi16(__m512i old, __mmask32 mask, __m512i index, __m512i v) {
  return _mm512_mask_blend_epi16(mask, old, _mm512_permutexvar_epi16(index, v));
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i zeros, __m512i ones) {
  return (__m512i)_mm512_mask_blend_ps(mask, (__m512)zeros, (__m512)ones);
}

// ---- conversions

inline __m512 _mm512_cvtepi32_ps(__m512i v) { return __builtin_convertvector((emulated::i32x16)v, __m512); }
inline __m512i _mm512_cvtps_epi32(__m512 v) {  // to nearest even; what does not fit is the least number
  return (__m512i)emulated::lanes<emulated::i32x16>(
      [&](size_t i) { return v[i] >= -0x1p31f && v[i] < 0x1p31f ? int32_t(__builtin_rintf(v[i])) : INT32_MIN; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) { return (__m128i) __builtin_convertvector((emulated::i32x16)v, emulated::i8x16); }
inline __m512i _mm512_cvtepu8_epi32(__m128i v) { return (__m512i) __builtin_convertvector((emulated::u8x16)v, emulated::u32x16); }
inline __m512i _mm512_cvtepi8_epi32(__m128i v) { return (__m512i) __builtin_convertvector((emulated::i8x16)v, emulated::i32x16); }
inline __m512i _mm512_cvtepu16_epi32(__m256i v) { return (__m512i) __builtin_convertvector((emulated::u16x16)v, emulated::u32x16); }
inline __m256i _mm512_cvtepi32_epi16(__m512i v) { return (__m256i) __builtin_convertvector((emulated::u32x16)v, emulated::u16x16); }
inline __m512 _mm512_cvtph_ps(__m256i v) {
  const auto x = (emulated::u16x16)v;
  return emulated::lanes<__m512>([&](size_t i) { return emulated::half_to_float(x[i]); });
}
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  return (__m256i)emulated::lanes<emulated::u16x16>([&](size_t i) { return emulated::float_to_half(v[i]); });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  return emulated::lanes<__m256bh>([&](size_t i) { return emulated::float_to_bf16(v[i]); });
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return emulated::lanes<__m512bh>([&](size_t i) { return emulated::float_to_bf16(i < 16 ? low[i] : high[i - 16]); });
}

// ---- floats

inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::lanes<__m512>([&](size_t i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {  // _CMP_UNORD_Q: one of them is NaN
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned(a[i] != a[i] || b[i] != b[i]) << i;
  return __mmask16(mask);
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {  // two roundings: the odd product is added first
  return emulated::lanes<__m512>(
      [&](size_t i) { return emulated::fma_bf16(a[2 * i], b[2 * i], emulated::fma_bf16(a[2 * i + 1], b[2 * i + 1], sum[i])); });
}

// ---- AMX: a thread's tiles, as it has configured them; what the CPU would refuse is a trap

namespace emulated {
struct Tiles {
  uint8_t bytes[8][16][64];
  int rows[8], row_bytes[8];
};
inline Tiles& tiles() {
  static thread_local Tiles all{};
  return all;
}
template <class B>  // the type of b's bytes
inline void dot_tiles(int sum, int a, int b) {  // sum [M, N] += a [M, K] · b [K / 4, N, 4]
  Tiles& t = tiles();
  const int m = t.rows[sum], n = t.row_bytes[sum] / 4, k = t.row_bytes[a];
  if (m == 0 || n == 0 || k == 0 || t.rows[a] != m || t.row_bytes[b] != 4 * n || t.rows[b] * 4 != k) __builtin_trap();
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      auto total = load<uint32_t>(&t.bytes[sum][i][4 * j]);
      for (int l = 0; l < k; l++) total += uint32_t(int8_t(t.bytes[a][i][l]) * B(t.bytes[b][l / 4][4 * j + l % 4]));
      std::memcpy(&t.bytes[sum][i][4 * j], &total, 4);
    }
}
}  // namespace emulated

inline void _tile_loadconfig(const void* p) {  // palette, first row, 14 reserved; bytes of a row, 16 bits each; rows
  const auto* config = static_cast<const uint8_t*>(p);
  emulated::Tiles& t = emulated::tiles();
  t = {};
  if (config[0] != 1) __builtin_trap();
  for (int i = 0; i < 8; i++) {
    t.row_bytes[i] = emulated::load<uint16_t>(config + 16 + 2 * i), t.rows[i] = config[48 + i];
    if (t.row_bytes[i] > 64 || t.rows[i] > 16 || (t.rows[i] == 0) != (t.row_bytes[i] == 0)) __builtin_trap();
  }
}
inline void _tile_release() { emulated::tiles() = {}; }
inline void _tile_zero(int tile) { std::memset(emulated::tiles().bytes[tile], 0, sizeof(emulated::Tiles::bytes[0])); }
inline void _tile_loadd(int tile, const void* p, long stride) {
  emulated::Tiles& t = emulated::tiles();
  if (t.rows[tile] == 0) __builtin_trap();
  _tile_zero(tile);
  for (int i = 0; i < t.rows[tile]; i++) std::memcpy(t.bytes[tile][i], static_cast<const char*>(p) + i * stride, size_t(t.row_bytes[tile]));
}
inline void _tile_stored(int tile, void* p, long stride) {
  emulated::Tiles& t = emulated::tiles();
  if (t.rows[tile] == 0) __builtin_trap();
  for (int i = 0; i < t.rows[tile]; i++) std::memcpy(static_cast<char*>(p) + i * stride, t.bytes[tile][i], size_t(t.row_bytes[tile]));
}
inline void _tile_dpbf16ps(int sum, int a, int b) {  // sum [M, N] += a [M, K, 2] · b [K, N, 2]
  emulated::Tiles& t = emulated::tiles();
  const int m = t.rows[sum], n = t.row_bytes[sum] / 4, k = t.row_bytes[a] / 4;
  if (m == 0 || n == 0 || k == 0 || t.rows[a] != m || t.row_bytes[b] != 4 * n || t.rows[b] != k) __builtin_trap();
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float chains[2] = {};
      for (int l = 0; l < 2 * k; l++)
        chains[l % 2] = emulated::fma_bf16(emulated::load<uint16_t>(&t.bytes[a][i][2 * l]),
                                           emulated::load<uint16_t>(&t.bytes[b][l / 2][4 * j + 2 * (l % 2)]), chains[l % 2]);
      const float total = emulated::flush(emulated::load<float>(&t.bytes[sum][i][4 * j]) + emulated::flush(chains[0] + chains[1]));
      std::memcpy(&t.bytes[sum][i][4 * j], &total, 4);
    }
}
inline void _tile_dpbssd(int sum, int a, int b) { emulated::dot_tiles<int8_t>(sum, a, b); }
inline void _tile_dpbsud(int sum, int a, int b) { emulated::dot_tiles<uint8_t>(sum, a, b); }

}  // namespace
