// The functions of csrc/common/ptx.h in plain C++, on the machine of ../machine.h: with this folder's parent first on the include path the
// kernels' sources are compiled unchanged for the host. Fragments are those of the PTX manual.
#pragma once

#include "../runtime.h"

#include <type_traits>

namespace qk {

struct bf16;  // of bits.h
struct f16;

// -- shared memory -----------------------------------------------------------------------------------------------------------------------

inline uint8_t shared[1] __attribute__((aligned(1024)));  // what a kernel declares; it is used by its address alone
inline uint32_t shared_address(const void*) { return emulated::BASE; }
inline uint32_t shared_memory() { return emulated::BASE; }

template <int WORDS>
void load_shared(uint32_t (&to)[WORDS], uint32_t at) {
  std::memcpy(to, emulated::shared(at, 4 * WORDS), 4 * WORDS);
}
inline uint32_t load_shared_u8(uint32_t at) { return emulated::load<uint8_t>(at); }
inline uint16_t load_shared_u16(uint32_t at) { return emulated::load<uint16_t>(at); }
inline float load_shared_f32(uint32_t at) { return emulated::load<float>(at); }
inline void store_shared(uint32_t at, const uint32_t (&from)[4]) { std::memcpy(emulated::shared(at, 16), from, 16); }
inline void store_shared_u32(uint32_t at, uint32_t value) { std::memcpy(emulated::shared(at, 4), &value, 4); }
inline void store_shared_f32(uint32_t at, float value) { std::memcpy(emulated::shared(at, 4), &value, 4); }
inline void sync_warps(int barrier, int threads) { emulated::meet(barrier, threads); }

inline void copy_async_word(uint32_t to, const uint32_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % 4) emulated::fail("a copy of 4 bytes begins at a multiple of 4");
  emulated::begin_piece(to, from, 4);
}
inline void copy_async(uint32_t to, const void* from, bool there) {
  if (there && reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copy of 16 bytes begins at a multiple of 16");
  emulated::begin_piece(to, there ? from : nullptr, 16);
}
inline void copy_async_commit() { ++emulated::current->piece_groups; }
template <int PENDING>
void copy_async_wait() {
  emulated::finish_pieces(PENDING);
}

// -- global memory and launches ------------------------------------------------------------------------------------------------------------

inline uint64_t cache_policy(bool) { return 0; }
inline uint4 load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("16 bytes are loaded from a multiple of 16");
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}

inline void raise_flag(int* flag) { *flag = 1, ++emulated::progress; }
inline void wait_for_flag(const int* flag) {
  emulated::wait_until([&] { return *static_cast<const volatile int*>(flag) != 0; });
}
inline void wait_for_previous() {
  emulated::wait_until([] { return emulated::previous_ended; });
}
inline void let_next_begin() {}

template <class T>
void keep(T&) {}

// -- products of a warp --------------------------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&to)[4], uint32_t at) {
  struct Lane {
    uint32_t (&to)[4];
    uint32_t at;
  } lane{to, at};
  emulated::together(lane, [](Lane* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < 4; ++j) std::memcpy(&lanes[l]->to[j], emulated::shared(lanes[8 * j + l / 4]->at, 16) + l % 4 * 4, 4);
    }
  });
}

inline uint32_t turn(uint32_t pair) {
  struct Lane {
    uint32_t pair, turned;
  } lane{pair, 0};
  emulated::together(lane, [](Lane* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 2; ++e) lanes[l]->turned |= (lanes[4 * (l % 4 * 2 + e) + l / 8]->pair >> 16 * (l / 4 % 2) & 0xffff) << 16 * e;
    }
  });
  return lane.turned;
}

// One number of an operand.
template <class T>
auto number_at(const uint8_t* p) {
  if constexpr (std::is_same_v<T, int8_t>) {
    return int(int8_t(*p));
  } else {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(__ushort_as_bfloat16(bits));
    else return __half2float(__ushort_as_half(bits));
  }
}

// Sums are added to in the order of K.
template <class T, class Sum>
void multiply_warp(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    Sum (&d)[4];
    const uint32_t (&a)[4], (&b)[2];
  } lane{d, a, b};
  emulated::together(lane, [](Lane* const* lanes) {
    constexpr int BYTES = std::is_same_v<T, int8_t> ? 1 : 2, EACH = 4 / BYTES, K = 32 / BYTES;
    Sum left[16][K], right[K][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, c = l % 4;
      for (int e = 0; e < EACH; ++e) {
        for (int i = 0; i < 4; ++i) {
          left[g + i % 2 * 8][i / 2 * K / 2 + EACH * c + e] = number_at<T>(reinterpret_cast<const uint8_t*>(&lanes[l]->a[i]) + e * BYTES);
        }
        for (int h = 0; h < 2; ++h) {
          right[h * K / 2 + EACH * c + e][g] = number_at<T>(reinterpret_cast<const uint8_t*>(&lanes[l]->b[h]) + e * BYTES);
        }
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < K; ++k) lanes[l]->d[i] += left[l / 4 + i / 2 * 8][k] * right[k][l % 4 * 2 + i % 2];
      }
    }
  });
}
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  multiply_warp<T>(d, a, b);
}
inline void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply_warp<int8_t>(d, a, b); }

}  // namespace qk
