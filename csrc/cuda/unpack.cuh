// A word of qkernels/kernels/triton/layout.py as pairs of 16-bit floats, in the order in which the tensor core takes a left operand.
//
// Lane 4 g + c has of a row, in a tile, the words 4 c … 4 c + 3, and word s' holds J products of 16 columns (J = 2 where codes have 4 bits, 1
// where they have 8). Pair 2 s + h of it has columns 16 (J s' + s) + 8 h + 2 c + {0, 1} of the tile: register 2 h + r of product s, where the
// row is g + 8 r.
//
// A kind of codes K<T>, T bf16 or f16, has
//     COLUMNS, PAIRS        columns of a tile; pairs of a word
//     K<T>(values)          what `unpack` needs besides, in registers: of a table, which is given as 16 floats
//     zero(z)               a zero point of codes as `unpack` takes it
//     unpack(to, word, z)   the pairs of code - zero, exactly; of a table: of its entries
//
// Integers: a code OR-ed into the mantissa of a power of two is that power plus the code; one subtraction takes both power and zero point
// away. Tables: a byte permutation looks four codes up in eight bytes, so two, and a choice by the codes' highest bits, in sixteen; once for
// the high bytes of the values and once for the low ones. Of a table of floats the highest bits are signs, and one does.
//
// Source: the magic numbers are FasterTransformer's, looking up by byte permutations an old trick of table-driven kernels. Written from scratch.
#pragma once

#include "cuda/numbers.cuh"

namespace qk {

// -- codes -----------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Int4 {
  static constexpr int COLUMNS = 128, PAIRS = 4;
  __host__ __device__ explicit Int4(const float*) {}
  __host__ __device__ static uint32_t zero(uint32_t z) { return Pair<T>::MAGIC + z * 0x10001; }
  __host__ __device__ void unpack(uint32_t (&to)[PAIRS], uint32_t word, uint32_t z) const {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) to[i] = subtract<T>(masked<0x000f000f, Pair<T>::MAGIC>(word >> 4 * i), z);
  }
};

template <class T>
struct Int8 {
  static constexpr int COLUMNS = 64, PAIRS = 2;
  static constexpr bool NARROW = std::is_same_v<T, bf16>;  // its mantissa holds 7 of the 8 bits
  __host__ __device__ explicit Int8(const float*) {}
  __host__ __device__ static uint32_t zero(uint32_t z) {
    return NARROW ? Pair<T>::of(float(z) - 128, float(z) - 128) : Pair<T>::MAGIC + z * 0x10001;
  }
  __host__ __device__ void unpack(uint32_t (&to)[PAIRS], uint32_t word, uint32_t z) const {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const uint32_t codes = word >> 8 * i;
      if constexpr (NARROW) {  // the highest bit chooses between 256 and 128, which are taken away
        const uint32_t seven = masked<0x007f007f, Pair<T>::MAGIC>(codes), away = (codes & 0x00800080) ^ 0x43804380;
        to[i] = subtract<T>(subtract<T>(seven, away), z);
      } else {
        to[i] = subtract<T>(masked<0x00ff00ff, Pair<T>::MAGIC>(codes), z);
      }
    }
  }
};

// A table of 16 values, the same for all lanes. MIRRORED: the last eight are the first ones with the other sign.
template <class T, bool MIRRORED = false>
struct Table {
  static constexpr int COLUMNS = 128, PAIRS = 4;
  uint32_t low[4], high[4];  // bytes of values 4 i … 4 i + 3

  __host__ __device__ explicit Table(const float* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t left = Pair<T>::of(values[4 * i], values[4 * i + 1]), right = Pair<T>::of(values[4 * i + 2], values[4 * i + 3]);
      low[i] = permute_bytes(left, right, 0x6420), high[i] = permute_bytes(left, right, 0x7531);
    }
  }
  __host__ __device__ static uint32_t zero(uint32_t) { return 0; }
  __host__ __device__ void unpack(uint32_t (&to)[PAIRS], uint32_t word, uint32_t) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // four codes each
      const uint32_t codes = word >> 16 * half, upper = permute_bytes(codes << 4, codes, 0xd9c8);  // ff where a code's highest bit is set
      const uint32_t at = codes & 0x7777;
      uint32_t l = permute_bytes(low[0], low[1], at), h = permute_bytes(high[0], high[1], at);
      if constexpr (MIRRORED) {
        h = choose_bits(0x80808080, upper, h);
      } else {
        l = choose_bits(upper, permute_bytes(low[2], low[3], at), l);
        h = choose_bits(upper, permute_bytes(high[2], high[3], at), h);
      }
      to[2 * half] = permute_bytes(l, h, 0x5140), to[2 * half + 1] = permute_bytes(l, h, 0x7362);
    }
  }
};

// -- int8: of a word, four codes in the lower halves of its bytes, or 16 times those in the upper ones; `flip` says which bits are turned -----

constexpr uint32_t HIGHEST = 0x80808080;  // bit of each

__host__ __device__ inline uint32_t lower_halves(uint32_t word, uint32_t flip) { return (word & 0x0f0f0f0f) ^ flip; }
__host__ __device__ inline uint32_t upper_halves(uint32_t word, uint32_t flip) { return (word & 0xf0f0f0f0) ^ flip; }

// Codes whose highest bit was turned, less zero points of at most 128: that bit keeps a subtraction from borrowing of the next byte, and
// turning it back takes 128 off.
__host__ __device__ inline uint32_t less_zeros(uint32_t four, uint32_t zeros) { return (four - zeros) ^ HIGHEST; }

}  // namespace qk
