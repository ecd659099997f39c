#include "machine.h"

#include <ucontext.h>

#include <random>

namespace emulated {

unsigned seed = 0, threads;
std::vector<Late> late;
std::string error;
Fibre* current;
bool previous_ended;
int64_t progress;

namespace {

std::vector<Fibre> fibres;
std::function<void()> entry;
jmp_buf host;

Barrier& barrier_of(Block& block, uint32_t at) {
  const auto found = block.barriers.find(at);
  if (found == block.barriers.end()) fail("no barrier is there");
  return found->second;
}

void settle(Barrier& b) {
  if (b.pending < 0 || b.bytes < 0) fail("a barrier gets more than it expects");
  if (b.pending == 0 && b.bytes == 0) b.parity ^= 1, b.pending = b.arrivals;
  ++progress;
}

}  // namespace

void fail(const char* why) {
  error = why;
  _longjmp(host, 1);
}

[[gnu::noinline]] void give_way() {
  if (!_setjmp(current->context)) _longjmp(host, 1);
}

// -- what threads do -------------------------------------------------------------------------------------------------------------------

bool came_last(int where, int count) {
  Meeting& m = current->block->meetings[where];
  const int times = m.times;
  ++progress;
  if (++m.came == count) return true;
  wait_until([&] { return m.times != times; });
  return false;
}

void part(int where) {
  Meeting& m = current->block->meetings[where];
  m.came = 0, ++m.times;
}

void meet(int where, int count) {
  if (came_last(where, count)) current->doing = nullptr, part(where);
}

uint8_t* shared(uint32_t at, uint32_t bytes) {
  std::vector<uint8_t>& memory = current->block->shared;
  if (at < BASE || at + bytes > BASE + memory.size()) fail("an address outside of shared memory");
  if (at % std::min(bytes, 16u)) fail("an address in shared memory that is not aligned");
  return &memory[at - BASE];
}

void make_barrier(uint32_t at, int arrivals) {
  shared(at, 8);
  current->block->barriers[at] = {arrivals, arrivals};
}

const Barrier& barrier(uint32_t at) { return barrier_of(*current->block, at); }

void arrive_at(uint32_t barrier, int bytes) {
  Barrier& b = barrier_of(*current->block, barrier);
  b.bytes += bytes, --b.pending;
  settle(b);
}

void begin_copy(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(uint8_t*)> arrive) {
  if (bytes % 16) fail("a copy of bytes that are no multiple of 16");
  std::memset(shared(to, bytes), GARBAGE, bytes);
  current->block->copies.push_back({to, bytes, barrier, std::move(arrive)});
}

void begin_piece(uint32_t to, const void* from, uint32_t bytes) {
  std::memset(shared(to, bytes), GARBAGE, bytes);
  current->pieces.push_back({to, bytes, from, current->piece_groups});
}

namespace {

void land(Block& block, const Piece& p) {
  uint8_t* to = &block.shared[p.to - BASE];
  if (p.from) std::memcpy(to, p.from, p.bytes);
  else std::memset(to, 0, p.bytes);
}

// Some piece of some lane may arrive at any time after its commit.
void land_some(Fibre& f, unsigned draw) {
  if (f.pieces.empty()) return;
  const auto piece = f.pieces.begin() + draw % f.pieces.size();
  if (piece->group >= f.piece_groups) return;
  land(*f.block, *piece);
  f.pieces.erase(piece);
}

}  // namespace

void finish_pieces(int pending) {
  while (!current->pieces.empty() && current->pieces.front().group < current->piece_groups - pending) {
    land(*current->block, current->pieces.front());
    current->pieces.pop_front();
  }
}

void begin_product(Product p) {
  p.group = current->groups;
  current->products.push_back(p);
}

void finish_products(int pending) {
  const int where = -1 - int(current->thread) / 128;
  meet(where, 128);
  if (current->thread % 128 == 0) {
    Fibre* warpgroup = current;
    while (!current->products.empty() && current->products.front().group < current->groups - pending) {
      const Product first = current->products.front();
      const bool together = std::all_of(warpgroup, warpgroup + 128, [&](const Fibre& f) {
        return f.groups == current->groups && !f.products.empty() && f.products.front().right == first.right;
      });
      if (!together) fail("threads of a warpgroup disagree about a product");
      first.run(warpgroup);
      for (int i = 0; i < 128; ++i) warpgroup[i].products.pop_front();
    }
  }
  meet(where, 128);
}

void leave(std::function<void()> store) { current->stores.push_back(std::move(store)); }

void let_stores_be_seen() {
  for (const auto& store : current->stores) store();
  current->stores.clear();
}

// -- who goes on -----------------------------------------------------------------------------------------------------------------------

namespace {

void run_thread() {
  entry();
  let_stores_be_seen();
  if (!current->products.empty()) fail("a thread ends before its products");
  if (!current->pieces.empty()) fail("a thread ends before its copies");
  current->ended = true, ++progress;
  _longjmp(host, 1);
}

// Runs a thread until it gives way.
[[gnu::noinline]] void resume(Fibre& f) {
  static ucontext_t start;
  current = &f;
  if (_setjmp(host)) return;
  if (f.begun) _longjmp(f.context, 1);
  f.begun = true;
  getcontext(&start);
  start.uc_stack.ss_sp = f.stack.get(), start.uc_stack.ss_size = STACK, start.uc_link = nullptr;
  makecontext(&start, run_thread, 0);
  setcontext(&start);
}

[[gnu::noinline]] void finish_copy(Block& block, size_t i) {
  if (_setjmp(host)) return;
  std::swap(block.copies[i], block.copies.back());
  const Copy copy = std::move(block.copies.back());
  block.copies.pop_back();
  copy.arrive(&block.shared[copy.to - BASE]);
  Barrier& b = barrier_of(block, copy.barrier);
  b.bytes -= int(copy.bytes);
  settle(b);
}

void end_previous() {
  for (const Late& l : late) std::memcpy(l.to, l.from, l.bytes);
  late.clear();
  previous_ended = true, ++progress;
}

std::vector<Block> make_blocks(unsigned count, size_t shared_bytes) {
  std::vector<Block> blocks(count);
  fibres.resize(count * threads);
  for (unsigned i = 0; i < fibres.size(); ++i) fibres[i].block = &blocks[i / threads], fibres[i].thread = i % threads;
  for (unsigned i = 0; i < count; ++i) blocks[i].index = i, blocks[i].shared.assign(shared_bytes, GARBAGE);
  return blocks;
}

}  // namespace

// Some blocks are slow, and some warpgroups of them; warps go on in turns that are drawn anew every time.
void run_grid(unsigned count, unsigned per_block, size_t shared_bytes, std::function<void()> kernel, void (*set_place)(const Fibre&)) {
  threads = per_block, entry = std::move(kernel);
  error.clear(), progress = 0, previous_ended = false;
  const std::vector<Block> blocks = make_blocks(count, shared_bytes);
  std::mt19937 draw(seed);
  const auto some = [&] { return 1u << draw() % 4; };
  std::vector<unsigned> warps(fibres.size() / 32), pace(warps.size());
  for (unsigned i = 0, of_block = 1, of_warpgroup = 1; i < warps.size(); ++i) {
    if (32 * i % threads == 0) of_block = some();
    if (i % 4 == 0) of_warpgroup = some();
    warps[i] = i, pace[i] = of_block * of_warpgroup;
  }
  int64_t before = -1;
  for (int idle = 0; error.empty() && !warps.empty(); idle = progress == before ? idle + 1 : 0) {
    before = progress;
    if (idle == 5000) error = "all threads wait";
    if (!previous_ended && draw() % 64 == 0) end_previous();
    std::shuffle(warps.begin(), warps.end(), draw);
    for (unsigned warp : warps) {
      Fibre* lanes = &fibres[32 * warp];
      Block& block = *lanes->block;
      if (!block.copies.empty() && draw() % 4 == 0) finish_copy(block, draw() % block.copies.size());
      if (draw() % pace[warp]) continue;
      const unsigned first = draw() % 32;
      land_some(lanes[draw() % 32], draw());
      for (unsigned i = 0; i < 32 && error.empty(); ++i) {
        Fibre& f = lanes[i ^ first];
        if (f.ended) continue;
        set_place(f);
        resume(f);
      }
    }
    const auto ended = [](const Fibre& f) { return f.ended; };
    std::erase_if(warps, [&](unsigned warp) { return std::all_of(&fibres[32 * warp], &fibres[32 * warp] + 32, ended); });
  }
  const bool complete = std::all_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.copies.empty(); });
  if (error.empty() && !complete) error = "a block ends before a copy to it";
  fibres.clear(), late.clear();
}

}  // namespace emulated
