// A processor for many blocks at once, in plain C++ on one thread of the host: every thread of a grid is a fibre, which gives way to the
// others wherever a GPU's thread would wait. Who goes on, and when a copy arrives, is drawn from a seed.
//
// What a GPU does behind a program's back happens late here, too, so that a wait that is missing is seen: memory that a copy fills holds
// garbage until it arrives; products read registers and shared memory when they are waited for, not when they begin; sums that are left
// for other blocks are seen after a fence.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulated {

constexpr int STACK = 64 << 10, GARBAGE = 0x7f;  // huge as a float of any kind
constexpr uint32_t BASE = 1024;                  // the address where a block's shared memory begins

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
};

struct Fibre;

// What one thread knows of a product of its warpgroup.
struct Product {
  void* sums;
  const uint32_t* registers;  // or null, and the left operand is in shared memory
  uint64_t left, right;
  int group;
  void (*run)(Fibre* warpgroup);
};

struct Fibre {
  Block* block;
  unsigned thread;
  std::unique_ptr<uint8_t[]> stack{new uint8_t[STACK]};
  jmp_buf context;
  bool begun = false, ended = false;
  std::deque<Product> products;
  int groups = 0;  // of products
  uint32_t address = 0;
  std::vector<std::function<void()>> stores;
};

inline unsigned seed = 0;
inline std::vector<Fibre> fibres;
inline Fibre* current;
inline jmp_buf host;
inline std::string error;
inline int64_t progress;
inline unsigned threads;  // of a block
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const std::string& why) {
  error = why;
  _longjmp(host, 1);
}

[[gnu::noinline]] inline void give_way() {
  if (!_setjmp(current->context)) _longjmp(host, 1);
}

template <class F>
void wait_until(F ready) {
  while (!ready()) give_way();
}

// -- what threads do -------------------------------------------------------------------------------------------------------------------

inline void meet(int where, int threads) {
  Meeting& m = current->block->meetings[where];
  const int times = m.times;
  ++progress;
  if (++m.came == threads) {
    m.came = 0, ++m.times;
  } else {
    wait_until([&] { return m.times != times; });
  }
}

inline uint8_t* shared(uint32_t at, uint32_t bytes) {
  std::vector<uint8_t>& memory = current->block->shared;
  if (at < BASE || at + bytes > BASE + memory.size() || at % std::min(bytes, 16u)) fail("an address outside of shared memory, or not aligned");
  return &memory[at - BASE];
}

template <class T>
T load(uint32_t at) {
  T value;
  std::memcpy(&value, shared(at, sizeof(T)), sizeof(T));
  return value;
}

inline Barrier& barrier(Block& block, uint32_t at) {
  if (!block.barriers.count(at)) fail("no barrier is there");
  return block.barriers[at];
}

inline void settle(Barrier& b) {
  if (b.pending < 0 || b.bytes < 0) fail("a barrier gets more than it expects");
  if (b.pending == 0 && b.bytes == 0) b.parity ^= 1, b.pending = b.arrivals;
  ++progress;
}

inline void begin_copy(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(uint8_t*)> arrive) {
  if (bytes % 16) fail("a copy of bytes that are no multiple of 16");
  std::memset(shared(to, bytes), GARBAGE, bytes);
  current->block->copies.push_back({to, bytes, barrier, std::move(arrive)});
}

// Those of the groups that began first, all but `pending` of them.
inline void finish_products(int pending) {
  const int thread = int(current->thread), where = -1 - thread / 128;
  meet(where, 128);
  if (thread % 128 == 0) {
    Fibre* warpgroup = current;
    while (!current->products.empty() && current->products.front().group < current->groups - pending) {
      for (int i = 0; i < 128; ++i) {
        const Fibre& other = warpgroup[i];
        if (other.products.empty() || other.groups != current->groups || other.products.front().right != current->products.front().right) {
          fail("threads of a warpgroup disagree about a product");
        }
      }
      current->products.front().run(warpgroup);
      for (int i = 0; i < 128; ++i) warpgroup[i].products.pop_front();
    }
  }
  meet(where, 128);
}

inline void let_stores_be_seen() {
  for (const auto& store : current->stores) store();
  current->stores.clear();
}

// -- who goes on -----------------------------------------------------------------------------------------------------------------------

[[gnu::noinline]] inline void arrive(Block& block, size_t i) {
  if (_setjmp(host)) return;
  std::swap(block.copies[i], block.copies.back());
  const Copy copy = std::move(block.copies.back());
  block.copies.pop_back();
  copy.arrive(&block.shared[copy.to - BASE]);
  Barrier& b = barrier(block, copy.barrier);
  b.bytes -= int(copy.bytes);
  settle(b);
}

inline void enter() {
  kernel();
  let_stores_be_seen();
  if (!current->products.empty()) fail("a thread ends before its products");
  current->ended = true, ++progress;
  _longjmp(host, 1);
}

// Runs a thread until it gives way.
[[gnu::noinline]] inline void resume(Fibre& f) {
  current = &f;
  if (_setjmp(host)) return;
  if (f.begun) _longjmp(f.context, 1);
  f.begun = true;
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = f.stack.get(), start.uc_stack.ss_size = STACK, start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

// Some warps are slow, all of them go on in turns that are drawn anew every time; set_place: threadIdx and the like for the current fibre.
template <class F>
void run_grid(unsigned count, unsigned per_block, size_t shared_bytes, F set_place) {
  std::mt19937 draw(seed);
  threads = per_block;
  std::vector<Block> blocks(count);
  if (fibres.size() < count * threads) fibres.resize(count * threads);
  for (unsigned b = 0; b < count; ++b) {
    blocks[b].index = b, blocks[b].shared.assign(shared_bytes, GARBAGE);
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& f = fibres[b * threads + t];
      f.block = &blocks[b], f.thread = t, f.begun = f.ended = false, f.groups = 0;
      f.products.clear(), f.stores.clear();
    }
  }
  std::vector<unsigned> warps(count * threads / 32), pace(warps.size());
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i, pace[i] = 1u << draw() % 4;
  error.clear(), progress = 0;
  int64_t before = -1;
  for (int idle = 0; error.empty() && !warps.empty(); idle = progress == before ? idle + 1 : 0) {
    before = progress;
    std::shuffle(warps.begin(), warps.end(), draw);
    for (unsigned warp : warps) {
      Fibre* lanes = &fibres[32 * warp];
      Block& block = *lanes->block;
      if (!block.copies.empty() && draw() % 4 == 0) arrive(block, draw() % block.copies.size());
      if (draw() % pace[warp]) continue;
      const unsigned first = draw() % 32;
      for (unsigned i = 0; i < 32 && error.empty(); ++i) {
        Fibre& f = lanes[i ^ first];
        if (f.ended) continue;
        set_place(f);
        resume(f);
      }
    }
    std::erase_if(warps, [](unsigned warp) { return std::all_of(&fibres[32 * warp], &fibres[32 * warp] + 32, [](Fibre& f) { return f.ended; }); });
    if (idle == 1000) error = "all threads wait";
  }
  for (const Block& block : blocks) {
    if (error.empty() && !block.copies.empty()) error = "a block ends before a copy to it";
  }
}

}  // namespace emulated
