// A processor for many blocks at once, in plain C++ on one thread of the host: every thread of a grid is a fibre, which gives way to the
// others wherever a GPU's thread would wait. Who goes on, and when a copy arrives, is drawn from a seed.
//
// What a GPU does behind a program's back happens late here, too, so that a wait that is missing is seen: memory that a copy fills holds
// garbage until it arrives; products of warpgroups read registers and shared memory when they are waited for, not when they begin; sums that are left
// for other blocks are seen after a fence; the kernel before this one ends while this one runs.
//
// Not here: fences between the ways to memory, and the order in which other processors see what was written without one.
#pragma once

#include <setjmp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulated {

constexpr int STACK = 64 << 10, GARBAGE = 0x7f;  // huge as a float of any kind
constexpr uint32_t BASE = 1024;  // the address where a block's shared memory begins

struct Barrier {
  int arrivals, pending, bytes = 0;
  uint32_t parity = 0;
};

struct Meeting {
  int came = 0, times = 0;
};

struct Copy {
  uint32_t to, bytes, barrier;
  std::function<void(uint8_t*)> arrive;
};

struct Block {
  unsigned index;
  std::vector<uint8_t> shared;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::vector<Copy> copies;
  bool any = false;  // whether some thread has given true: __syncthreads_or
};

// Bytes that one thread has copied to shared memory, in groups of its own; from: or null, and they are zeros.
struct Piece {
  uint32_t to, bytes;
  const void* from;
  int group;
};

struct Fibre;

// What one thread knows of a product of its warpgroup.
struct Product {
  void* sums;
  const uint32_t* registers;  // or null, and the left operand is in shared memory
  uint64_t left, right;
  void (*run)(Fibre* warpgroup);
  int group = 0;
};

struct Fibre {
  Block* block;
  unsigned thread;
  std::unique_ptr<uint8_t[]> stack{new uint8_t[STACK]};
  jmp_buf context;
  bool begun = false, ended = false;
  std::deque<Product> products;
  int groups = 0;  // of products
  uint32_t address = 0;  // where this lane's row of a matrix goes
  std::deque<Piece> pieces;
  int piece_groups = 0;
  void* given = nullptr;  // what this lane brings to what the warp does together
  const void* doing = nullptr;  // which that is
  std::vector<std::function<void()>> stores;
};

// What the kernel before this one writes before it ends.
struct Late {
  void* to;
  const void* from;
  size_t bytes;
};

extern unsigned seed;
extern std::vector<Late> late;
extern std::string error;  // what stopped the last grid, or nothing
extern Fibre* current;
extern unsigned threads;  // of a block
extern bool previous_ended;
extern int64_t progress;

[[noreturn]] void fail(const char* why);
void give_way();

template <class F>
void wait_until(F ready) {
  while (!ready()) give_way();
}

// All `count` threads of a block that meet at a place of that number; whether this one is the last of them, who has to `part` them then.
bool came_last(int where, int count);
void part(int where);
void meet(int where, int count);

// All lanes of a warp bring something; the last one to come does the work of all.
template <class Given>
void together(Given& given, void (*work)(Given* const* lanes)) {
  const int where = 16 + int(current->thread) / 32;
  current->given = &given, current->doing = reinterpret_cast<const void*>(work);
  if (!came_last(where, 32)) return;
  Given* lanes[32];
  for (int i = 0; i < 32; ++i) {
    const Fibre& f = current[i - int(current->thread) % 32];
    if (f.doing != current->doing) fail("lanes of a warp do different things");
    lanes[i] = static_cast<Given*>(f.given);
  }
  work(lanes);
  part(where);
}
template <class Given, class F>
void together(Given& given, F work) {
  together(given, static_cast<void (*)(Given* const*)>(work));
}

uint8_t* shared(uint32_t at, uint32_t bytes);

template <class T>
T load(uint32_t at) {
  T value;
  std::memcpy(&value, shared(at, sizeof(T)), sizeof(T));
  return value;
}

void make_barrier(uint32_t at, int arrivals);
const Barrier& barrier(uint32_t at);
void arrive_at(uint32_t barrier, int bytes);
void begin_copy(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(uint8_t*)> arrive);

void begin_piece(uint32_t to, const void* from, uint32_t bytes);
void finish_pieces(int pending);  // those of the groups that this thread began first, all but so many

void begin_product(Product p);
void finish_products(int pending);  // those of the groups that began first, all but so many

void leave(std::function<void()> store);
void let_stores_be_seen();

// set_place: threadIdx and the like, for a fibre.
void run_grid(unsigned blocks, unsigned per_block, size_t shared_bytes, std::function<void()> kernel, void (*set_place)(const Fibre&));

}  // namespace emulated
