// Roofline probes: what this level can do at most, with its own instructions and register tile.

template <int STREAMS, bool FETCH>
int64_t read_streams(const char* p, int64_t bytes) {
  constexpr int STEP = 64;
  const int64_t stride = bytes / STREAMS / STEP * STEP;
  uint64_t sum[STREAMS][STEP / 8] = {};
  for (int64_t i = 0; i < stride; i += STEP)
    for (int s = 0; s < STREAMS; s++) {
      if (FETCH) fetch_ahead(reinterpret_cast<const uint8_t*>(p) + s * stride + i);
      for (int j = 0; j < STEP / 8; j++) {
        uint64_t word;
        __builtin_memcpy(&word, p + s * stride + i + 8 * j, 8);
        sum[s][j] ^= word;
      }
    }
  for (int s = 0; s < STREAMS; s++)
    for (int j = 0; j < STEP / 8; j++) sum[0][0] ^= sum[s][j];
  return int64_t(sum[0][0]);
}

// Which gets more from memory depends on the machine, and on the day where it is shared.
int64_t read_bytes(const char* p, int64_t bytes, Read how) {
  if (how == Read::fetched) return read_streams<1, true>(p, bytes);
  return how == Read::four ? read_streams<4, false>(p, bytes) : read_streams<1, false>(p, bytes);
}

template <class Source>
int64_t probe(int64_t rounds) {
  constexpr int ROWS = MAX_ROWS<Source, WIDE>;
  constexpr int64_t K = 32;
  alignas(64) uint8_t codes[WIDE * (K / TILE_K) * Source::TILE_BYTES] = {};
  alignas(64) typename Source::X x[ROWS * K] = {};
  Weight w{};
  F total = zero_f();
  Ahead none{};
  for (int64_t i = 0; i < rounds; i += MAX_BLOCK / K) {
    Sums<Source, ROWS, WIDE> sums;
    each<ROWS>(QK_WITH(r) { each<WIDE>(QK_WITH(p) { sums.dot[r][p].start(0); }); });
    for (int64_t block = 0; block < MAX_BLOCK; block += K) {
      const uint8_t* tiles = codes;
      __asm__ volatile("" : "+r"(tiles) : "r"(x) : "memory");  // may have changed: nothing is computed beforehand
      sums.template add_block<0>(w, tiles, WIDE * Source::TILE_BYTES, x, K, none);
    }
    each<ROWS>(QK_WITH(r) { each<WIDE>(QK_WITH(p) { total = add_f(total, sums.dot[r][p].value()); }); });
  }
  __asm__ volatile("" : : "r"(&total) : "memory");  // somebody may look at it
  return (rounds + MAX_BLOCK / K - 1) / (MAX_BLOCK / K) * MAX_BLOCK * ROWS * WIDE * PANEL;
}
