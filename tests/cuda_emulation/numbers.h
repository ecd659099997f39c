// CUDA's small vectors and 16-bit floats, as far as the kernels use them; every operation rounds once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }

inline __nv_bfloat16 to_bfloat16(double v) {
  if (v != v) return {0x7fff};
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  if (f != v) bits = (bits - (std::fabs(double(f)) > std::fabs(v))) | 1;  // cut, and marked: what is rounded next must not be a tie
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {to_bfloat16(a), to_bfloat16(b)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return __floats2bfloat162_rn(a, a); }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }

inline float __half2float(__half v) { return float(v); }
inline __half __ushort_as_half(uint16_t bits) {
  __half v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __half2half2(__half v) { return {v, v}; }

inline double exact(__nv_bfloat16 v) { return __bfloat162float(v); }
inline double exact(__half v) { return double(v); }
inline void round_to(__nv_bfloat16& to, double v) { to = to_bfloat16(v); }
inline void round_to(__half& to, double v) { to = __half(v); }

template <class T, class F>
T by_halves(F f) {
  T result;
  round_to(result.x, f([](const T& v) { return exact(v.x); }));
  round_to(result.y, f([](const T& v) { return exact(v.y); }));
  return result;
}
template <class T>
T __hadd2(T a, T b) {
  return by_halves<T>([&](auto half) { return half(a) + half(b); });
}
template <class T>
T __hsub2(T a, T b) {
  return by_halves<T>([&](auto half) { return half(a) - half(b); });
}
template <class T>
T __hmul2(T a, T b) {
  return by_halves<T>([&](auto half) { return half(a) * half(b); });
}
template <class T>
T __hfma2(T a, T b, T c) {
  return by_halves<T>([&](auto half) { return half(a) * half(b) + half(c); });
}
