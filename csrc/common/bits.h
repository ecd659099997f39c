// Bits and bytes of words, one text for a GPU and for a host: PTX where there is an instruction for it, plain C++ elsewhere. What else is PTX
// is in ptx.h, and in cuda/hopper.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qk {

struct bf16 {};  // names of types, by which a product is chosen
struct f16 {};

__host__ __device__ inline uint32_t bits_of(float number) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(number);
#else
  return reinterpret_cast<const uint32_t&>(number);
#endif
}
__host__ __device__ inline float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return reinterpret_cast<const float&>(bits);
#endif
}

// (word & MASK) | BITS, which the compiler makes two instructions of.
template <uint32_t MASK, uint32_t BITS>
__host__ __device__ inline uint32_t masked(uint32_t word) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(MASK), "n"(BITS));
  return result;
#else
  return (word & MASK) | BITS;
#endif
}

// a where the mask has ones, b elsewhere.
__host__ __device__ inline uint32_t choose_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
#else
  return (mask & a) | (~mask & b);
#endif
}

// Four of the eight bytes of a and b, a's first: 4 bits of the selector each; one with its bit 3 set repeats the byte's sign.
__host__ __device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
#ifdef __CUDA_ARCH__
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
#else
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i;
    const uint8_t byte = uint8_t((uint64_t(b) << 32 | a) >> 8 * (s & 7));
    result |= uint32_t(s & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
#endif
  return result;
}

// sum + a · b, of four int8 each.
__host__ __device__ inline int dot4(uint32_t a, uint32_t b, int sum) {
#ifdef __CUDA_ARCH__
  return __dp4a(int(a), int(b), sum);
#else
  for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
  return sum;
#endif
}

// A word that nothing writes.
__host__ __device__ inline uint32_t load_word(const uint32_t* from) {
#ifdef __CUDA_ARCH__
  return __ldg(from);
#else
  return *from;
#endif
}

}  // namespace qk
