// The functions of csrc/cuda/hopper.cuh in plain C++, on the machine of ../machine.h. Fragments and swizzles are those of the PTX manual.
#pragma once

#include "../common/ptx.h"

namespace qk {

inline void store_turned(uint32_t to, const uint32_t (&pairs)[4]) {
  emulated::current->address = to;
  __syncwarp();
  const int lane = threadIdx.x % 32;
  const emulated::Fibre* lanes = emulated::current - lane;
  for (int j = 0; j < 4; ++j) {
    for (int e = 0; e < 2; ++e) {
      const uint16_t value = uint16_t(pairs[j] >> 16 * e);
      std::memcpy(emulated::shared(lanes[8 * j + lane % 4 * 2 + e].address, 16) + lane / 4 * 2, &value, 2);
    }
  }
}

// -- barriers and copies -----------------------------------------------------------------------------------------------------------------

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulated::make_barrier(barrier, int(arrivals)); }
inline void barriers_made() {}
inline void barrier_arrive(uint32_t barrier) { emulated::arrive_at(barrier, 0); }
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) { emulated::arrive_at(barrier, int(bytes)); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const emulated::Barrier& b = emulated::barrier(barrier);
  emulated::wait_until([&] { return b.parity != parity; });
}
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const CUtensorMap& from, int column, int row, uint32_t barrier) {
  if (to % 1024) emulated::fail("a swizzled box has to lie at a multiple of 1024");
  emulated::begin_copy(to, from.box_rows * 128, barrier, [=](uint8_t* box) {
    for (int r = 0; r < from.box_rows; ++r) {
      for (int i = 0; i < 128; ++i) {
        const int c = column + i / from.size;
        const bool inside = row + r < from.rows && c < from.columns;
        box[swizzled(r * 128 + i)] = inside ? from.from[(row + r) * from.stride + c * from.size + i % from.size] : 0;
      }
    }
  });
}
inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copy of bytes begins at a multiple of 16");
  emulated::begin_copy(to, bytes, barrier, [=](uint8_t* there) { std::memcpy(there, from, bytes); });
}

// -- what changes no result here --------------------------------------------------------------------------------------------------------

template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}
inline void product_fence() {}

// -- products: operands have 32 bytes of a row ------------------------------------------------------------------------------------------

inline uint64_t swizzled_rows(uint32_t address) { return address; }
inline void product_commit() { ++emulated::current->groups; }
template <int PENDING>
void product_wait() {
  emulated::finish_products(PENDING);
}

// Row `row` of an operand in shared memory.
inline void read_row(uint8_t (&to)[32], uint64_t operand, int row) {
  for (uint32_t i = 0; i < 32; i += 16) {
    std::memcpy(to + i, emulated::shared(swizzled(uint32_t(operand) + row * 128 + i), 16), 16);
  }
}

// Of a warpgroup, all at once. Lane 4 g + c of a warp has rows g and g + 8 of its 16.
template <class T, class Sum, int SIZE, bool ADD>
void run_product(emulated::Fibre* threads) {
  constexpr int TOKENS = 2 * SIZE, BYTES = std::is_same_v<T, int8_t> ? 1 : 2, K = 32 / BYTES;
  static Sum left[64][K], right[K][TOKENS], sums[64][TOKENS];
  const auto every_sum = [&](auto f) {
    for (int t = 0; t < 128; ++t) {
      Sum* d = static_cast<Sum*>(threads[t].products.front().sums);
      const int row = t / 32 * 16 + t % 32 / 4, token = t % 4 * 2;
      for (int i = 0; i < SIZE; ++i) f(d[i], sums[row + i / 2 % 2 * 8][token + i / 4 * 8 + i % 2]);
    }
  };
  uint8_t rows[64][32], row[32];
  const emulated::Product& first = threads->products.front();
  for (int t = 0; t < 128 && first.registers; ++t) {
    for (int r = 0; r < 4; ++r) {
      std::memcpy(&rows[t / 32 * 16 + t % 32 / 4 + r % 2 * 8][t % 4 * 4 + r / 2 * 16], &threads[t].products.front().registers[r], 4);
    }
  }
  for (int n = 0; n < 64; ++n) {
    if (!first.registers) read_row(rows[n], first.left, n);
    for (int k = 0; k < K; ++k) left[n][k] = number_at<T>(rows[n] + BYTES * k);
  }
  for (int m = 0; m < TOKENS; ++m) {
    read_row(row, first.right, m);
    for (int k = 0; k < K; ++k) right[k][m] = number_at<T>(row + BYTES * k);
  }
  every_sum([](const Sum& d, Sum& sum) { sum = ADD ? d : 0; });
  for (int n = 0; n < 64; ++n) {
    for (int k = 0; k < K; ++k) {
      for (int m = 0; m < TOKENS; ++m) sums[n][m] += left[n][k] * right[k][m];
    }
  }
  every_sum([](Sum& d, const Sum& sum) { d = sum; });
}

template <bool ADD, int SIZE, class T>
void multiply(float (&d)[SIZE], const uint32_t (&a)[4], uint64_t b, T) {
  emulated::begin_product({d, a, 0, b, run_product<T, float, SIZE, ADD>});
}
template <bool ADD, int SIZE>
void multiply(int (&d)[SIZE], const uint32_t (&a)[4], uint64_t b) {
  emulated::begin_product({d, a, 0, b, run_product<int8_t, int, SIZE, ADD>});
}
template <bool ADD, int SIZE>
void multiply(int (&d)[SIZE], uint64_t a, uint64_t b) {
  emulated::begin_product({d, nullptr, a, b, run_product<int8_t, int, SIZE, ADD>});
}

}  // namespace qk
