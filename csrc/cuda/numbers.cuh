// Numbers as they are stored: of any type that scales and biases have, and two 16-bit floats in a register.
#pragma once

#include "common/bits.h"

#include <type_traits>

namespace qk {

// The types that scales, zero points and biases have.
enum class Kind { f32, f16, bf16, e4m3, e8m0, u8 };

__host__ __device__ inline int bytes_of(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::f16 || kind == Kind::bf16 ? 2 : 1; }

// A number from its bits, the lowest of a word.
__host__ __device__ inline float number_of(uint32_t raw, Kind kind) {
  const uint32_t byte = raw & 0xff;
  switch (kind) {
    case Kind::f32: return float_of(raw);
    case Kind::bf16: return float_of(raw << 16);
    case Kind::f16: return __half2float(__ushort_as_half(uint16_t(raw)));
    case Kind::e8m0: return float_of(byte == 0xff ? 0x7fc00000 : byte == 0 ? 0x00400000 : byte << 23);
    case Kind::u8: return float(byte);
    default: break;
  }
  // e4m3: sign, exponent and mantissa moved to fp16's place are the value over 2^8; its one NaN has all other bits set
  const float value = 256 * __half2float(__ushort_as_half(uint16_t((byte & 0x80) << 8 | (byte & 0x7f) << 7)));
  return (byte & 0x7f) == 0x7f ? float_of(0x7fc00000) : value;
}

// Where number i is: the aligned word that has it, lest there be a load for every size, and how far up there.
struct Place {
  const uint32_t* word;
  uint32_t shift;
};
__host__ __device__ inline Place place_of(const void* p, int64_t i, Kind kind) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + i * bytes_of(kind);
  return {reinterpret_cast<const uint32_t*>(at & ~uintptr_t(3)), uint32_t(at & 3) * 8};
}

// Its bits, the lowest of `bits()`: the shift would wait for the load, so it is for whoever wants them.
struct Raw {
  uint32_t word = 0, shift = 0;
  __host__ __device__ uint32_t bits() const { return word >> shift; }
};
__host__ __device__ inline Raw raw_at(const void* p, int64_t i, Kind kind) {
  const Place place = place_of(p, i, kind);
  return {load_word(place.word), place.shift};
}

// f(kind), of which the compiler then knows the value: those of scales.
template <class F>
__device__ void of_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::f32: return f(std::integral_constant<Kind, Kind::f32>());
    case Kind::f16: return f(std::integral_constant<Kind, Kind::f16>());
    case Kind::bf16: return f(std::integral_constant<Kind, Kind::bf16>());
    case Kind::e4m3: return f(std::integral_constant<Kind, Kind::e4m3>());
    case Kind::e8m0: return f(std::integral_constant<Kind, Kind::e8m0>());
    default: return;
  }
}

__host__ __device__ inline float number(const void* p, int64_t i, Kind kind) { return number_of(raw_at(p, i, kind).bits(), kind); }

// -- two numbers of 16 bits in a register --------------------------------------------------------------------------------------------------

template <class T>
struct Pair;

template <>
struct Pair<bf16> {
  using Two = __nv_bfloat162;
  static constexpr uint32_t MAGIC = 0x43004300;  // 128 twice, of which the mantissa has 7 bits
  __host__ __device__ static uint32_t of(float a, float b) { return bits(__floats2bfloat162_rn(a, b)); }
  __host__ __device__ static float2 floats(uint32_t pair) { return __bfloat1622float2(two(pair)); }
  __host__ __device__ static Two two(uint32_t pair) { return reinterpret_cast<const Two&>(pair); }
  __host__ __device__ static uint32_t bits(Two v) { return reinterpret_cast<const uint32_t&>(v); }
};

template <>
struct Pair<f16> {
  using Two = __half2;
  static constexpr uint32_t MAGIC = 0x64006400;  // 1024 twice, 10 bits
  __host__ __device__ static uint32_t of(float a, float b) { return bits(__floats2half2_rn(a, b)); }
  __host__ __device__ static float2 floats(uint32_t pair) { return __half22float2(two(pair)); }
  __host__ __device__ static Two two(uint32_t pair) { return reinterpret_cast<const Two&>(pair); }
  __host__ __device__ static uint32_t bits(Two v) { return reinterpret_cast<const uint32_t&>(v); }
};

template <class T>
__host__ __device__ uint32_t subtract(uint32_t a, uint32_t b) {
  return Pair<T>::bits(__hsub2(Pair<T>::two(a), Pair<T>::two(b)));
}
template <class T>
__host__ __device__ uint32_t times(uint32_t a, uint32_t b) {
  return Pair<T>::bits(__hmul2(Pair<T>::two(a), Pair<T>::two(b)));
}
// a · b + c, with one rounding.
template <class T>
__device__ uint32_t times_plus(uint32_t a, uint32_t b, uint32_t c) {
  return Pair<T>::bits(__hfma2(Pair<T>::two(a), Pair<T>::two(b), Pair<T>::two(c)));
}

}  // namespace qk
