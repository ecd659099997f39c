// Scalar conversions between number formats, for tails and for levels without an instruction. Included inside each level's anonymous
// namespace: nothing here may be shared between files that are compiled for different instruction sets.

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
inline uint16_t to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);  // keep NaN a NaN
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  float f = bits_to_float(magnitude) * 0x1p112f;  // rebias; subnormals come out right
  if (magnitude >= 0x0f800000u) f = bits_to_float(magnitude | 0x7f800000u);
  return bits_to_float(float_to_bits(f) | sign);
}
inline uint16_t to_f16(float f) {
  uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (u < 0x38800000u) {  // subnormal half: let the float adder round at the right place
    float r = bits_to_float(u) + 0.5f;
    return uint16_t(sign | (float_to_bits(r) - 0x3f000000u));
  }
  return uint16_t(sign | ((u - 0x38000000u + 0xfff + (u >> 13 & 1)) >> 13));
}
inline float from_e4m3(uint8_t c) {
  float f = bits_to_float(uint32_t(c & 0x7f) << 20) * 0x1p120f;
  if ((c & 0x7f) == 0x7f) f = bits_to_float(0x7fc00000u);
  return bits_to_float(float_to_bits(f) | uint32_t(c & 0x80) << 24);
}
inline float from_e8m0(uint8_t c) { return c == 255 ? bits_to_float(0x7fc00000u) : c ? bits_to_float(uint32_t(c) << 23) : 0x1p-127f; }

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::bf16 || dtype == Dtype::f16 ? 2 : 1; }
inline float load_number(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32: return static_cast<const float*>(p)[i];
    case Dtype::bf16: return from_bf16(static_cast<const uint16_t*>(p)[i]);
    case Dtype::f16: return from_f16(static_cast<const uint16_t*>(p)[i]);
    case Dtype::e4m3: return from_e4m3(static_cast<const uint8_t*>(p)[i]);
    case Dtype::e8m0: return from_e8m0(static_cast<const uint8_t*>(p)[i]);
    case Dtype::u8: return float(static_cast<const uint8_t*>(p)[i]);
    case Dtype::i8: return float(static_cast<const int8_t*>(p)[i]);
  }
  return 0;
}
inline void store_number(void* p, Dtype dtype, int64_t i, float v) {
  if (dtype == Dtype::f32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = dtype == Dtype::bf16 ? to_bf16(v) : to_f16(v);
}
