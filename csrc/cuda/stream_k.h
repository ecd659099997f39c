// How a grid of blocks, one for every processor, shares the tiles of a product: whole tiles in waves, and what is left of them in runs along K.
// Plain C++, so that a test can look at it without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#ifndef __device__
#define __device__
#endif

namespace qk {

// Some steps [begin, end) of K of one tile of the result.
struct Work {
  int tile, n, m, begin, end;
};

// With T tiles and B blocks every block gets the same number of whole tiles, while two tiles a block or more are left. Those, fewer than
// 2 B, are one line of steps, cut into B runs of equal length. A run ends, in general, within a tile: that part's sums are left in memory.
// It begins within another: the block that has a tile's last steps adds what the others left, in the order of K. A block works first at
// the part that it leaves, last at the one that it completes: nobody waits for long, and only for blocks that began earlier.
class StreamK {
 public:
  // whole: no tile is cut, though some blocks get one more than others.
  __device__ StreamK(int tiles_n, int tiles_m, int steps, int raster, bool whole, int block, int blocks)
      : tiles_n_(tiles_n), tiles_m_(tiles_m), steps_(steps), raster_(raster), block_(block), blocks_(blocks) {
    const int tiles = tiles_n * tiles_m;
    first_ = whole ? tiles : std::max(0, tiles / blocks - 1) * blocks;
    units_ = (tiles - first_) * steps;
    begin_ = run_begin(block_), end_ = run_begin(block_ + 1);
    left_ = std::max(begin_, end_ / steps * steps);  // from here on: a part that somebody else completes
    completes_ = begin_ < left_ ? (steps - begin_ % steps) % steps : 0;
    cursor_ = std::min(begin_ + completes_, left_);
  }

  __device__ bool next(Work& work) {
    if (!began_) {
      began_ = true;
      if (left_ < end_) return place(work, first_ + end_ / steps_, left_ % steps_, end_ % steps_);
    }
    if (wave_ * blocks_ + block_ < first_) return place(work, wave_++ * blocks_ + block_, 0, steps_);
    if (cursor_ < left_) {
      cursor_ += steps_;
      return place(work, first_ + cursor_ / steps_ - 1, 0, steps_);
    }
    if (completes_ == 0) return false;
    const int from = steps_ - completes_;
    completes_ = 0;
    return place(work, first_ + begin_ / steps_, from, steps_);
  }

  // Of the blocks that left parts of a tile which this one completes, the first; the last is the one before this.
  __device__ int first_helper(const Work& work) const {
    const int start = (work.tile - first_) * steps_;
    int helper = block_ - 1;
    while (run_begin(helper) > start) --helper;
    return helper;
  }

  __device__ int block() const { return block_; }

 private:
  __device__ int run_begin(int block) const { return int(int64_t(block) * units_ / blocks_); }

  // RASTER tiles of tokens side by side, for all tiles of weights, for the cache's sake.
  __device__ bool place(Work& work, int tile, int begin, int end) const {
    const int band = tile / (raster_ * tiles_n_), within = tile - band * raster_ * tiles_n_;
    const int beside = std::min(raster_, tiles_m_ - band * raster_);
    work = {tile, within / beside, band * raster_ + within % beside, begin, end};
    return true;
  }

  int tiles_n_, tiles_m_, steps_, raster_, block_, blocks_;
  int first_, units_, begin_, end_, left_, completes_, cursor_, wave_ = 0;
  bool began_ = false;
};

}  // namespace qk
