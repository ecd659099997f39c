// Roofline probes: what this level can do at most, with its own instructions and register tile.

int64_t read_bytes(const char* p, int64_t bytes) {
  uint64_t sum[32] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 32; j++) {
      uint64_t word;
      __builtin_memcpy(&word, p + i + 8 * j, 8);
      sum[j] ^= word;
    }
  for (int j = 1; j < 32; j++) sum[0] ^= sum[j];
  return int64_t(sum[0]);
}

template <class Source>
int64_t probe(int64_t rounds) {
  constexpr int64_t K = 32;
  alignas(64) uint8_t codes[WIDE * (K / TILE_K) * Source::TILE_BYTES] = {};
  alignas(64) typename Source::X x[MAX_ROWS<WIDE> * K] = {};
  Weight w{};
  F total = zero_f();
  for (int64_t i = 0; i < rounds; i += MAX_BLOCK / K) {
    typename Source::Dot dot[MAX_ROWS<WIDE>][WIDE];
    for (auto& row : dot) for (auto& d : row) d.start(0);
    for (int64_t block = 0; block < MAX_BLOCK; block += K) {
      const uint8_t* tiles = codes;
      __asm__ volatile("" : "+r"(tiles) : "r"(x) : "memory");  // may have changed: nothing is computed beforehand
      for (int64_t k = 0; k < K; k += TILE_K, tiles += Source::TILE_BYTES)
#pragma GCC unroll 8
        for (int step = 0; step < Source::STEPS; step++) {
          decltype(Source::weight(tiles, step, w)) weights[WIDE];
          for (int p = 0; p < WIDE; p++) weights[p] = Source::weight(tiles + p * (K / TILE_K) * Source::TILE_BYTES, step, w);
          for (int r = 0; r < MAX_ROWS<WIDE>; r++)
            for (int p = 0; p < WIDE; p++) dot[r][p].add(weights[p], x + r * K + k + TILE_K / Source::STEPS * step);
        }
      for (auto& row : dot) for (auto& d : row) d.fold();
    }
    for (auto& row : dot) for (auto& d : row) total = add_f(total, d.value());
  }
  __asm__ volatile("" : : "r"(&total) : "memory");  // somebody may look at it
  return (rounds + MAX_BLOCK / K - 1) / (MAX_BLOCK / K) * MAX_BLOCK * MAX_ROWS<WIDE> * WIDE * PANEL;
}
