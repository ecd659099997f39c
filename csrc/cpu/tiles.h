// Tiles for all rows: which of those that are compiled, and how high.

template <class Source>
constexpr int MOST_SUMS = is_s8<Source> ? S8_ACCUMULATORS : ACCUMULATORS;
#ifdef QK_PAIRS
template <>
constexpr int MOST_SUMS<S8Pairs> = PAIR_ACCUMULATORS;
template <>
constexpr int MOST_SUMS<Scaled<S8Pairs>> = PAIR_ACCUMULATORS;
#endif
// A single panel is what remains of N beyond its strips: 8 rows are as many chains of sums as a product's 4 cycles in 2 pipes want (not
// timed), and more would be a share of the build.
template <class Source, int PANELS>
constexpr int HIGHEST = PANELS > 1                                 ? 12
                        : is_scaled<Source> || is_in_tiles<Source> ? 4
                                                                   : 8;
template <class Source, int PANELS>
constexpr int MAX_ROWS = MOST_SUMS<Source> / PANELS < HIGHEST<Source, PANELS> ? MOST_SUMS<Source> / PANELS : HIGHEST<Source, PANELS>;

// Codes of 8 bits would gain as much from one more row, but then the next row would cost a third more.
template <class Source>
constexpr int STREAMED_ROWS = MAX_ROWS<Source, STRIP> + (takes_memory<Source> && Source::TILE_BYTES == 64);

using Tile = void (*)(const Weight&, const Activations&, Chunk&, int64_t m, float* acc);
template <class Source, int PANELS, bool STREAMED, int LENGTH>
constexpr auto TILES = []<int... R>(std::integer_sequence<int, R...>) {  // by height, from 1
  if constexpr (is_scaled<Source>) {
    return std::array<Tile, sizeof...(R)>{scaled_tile<Source, R + 1, PANELS, STREAMED, LENGTH>...};
  } else {
    // What is compiled for a length pays where a block's beginning and end are much of it, and in heights that are often met.
    constexpr bool LONG = LENGTH > 32;
    return std::array<Tile, sizeof...(R)>{tile<Source, R + 1, PANELS, STREAMED, (STREAMED || (R > 1 && !LONG) ? LENGTH : 0)>...};
  }
}(std::make_integer_sequence<int, STREAMED ? STREAMED_ROWS<Source> : MAX_ROWS<Source, PANELS>>{});

// For the blocks of a chunk, which have k columns in all.
template <class Source, int PANELS, bool STREAMED, int... LENGTHS>
Tile tile_of(const Weight& w, const Chunk& chunk, int64_t k, int64_t rows, std::integer_sequence<int, LENGTHS...>) {
  if constexpr (is_scaled<Source> && sizeof...(LENGTHS) == 0) {
    return TILES<Source, PANELS, STREAMED, 0>[size_t(rows - 1)];
  } else if constexpr (is_scaled<Source>) {
    return w.inner == 16 ? TILES<Source, PANELS, STREAMED, 16>[size_t(rows - 1)] : TILES<Source, PANELS, STREAMED, 32>[size_t(rows - 1)];
  } else {
    Tile found = TILES<Source, PANELS, STREAMED, 0>[size_t(rows - 1)];
    const auto take = [&](auto length) {
      if (chunk.block.length == length && k == length * chunk.count) found = TILES<Source, PANELS, STREAMED, length>[size_t(rows - 1)];
    };
    if constexpr (is_s8<Source>) (take(std::integral_constant<int, LENGTHS>{}), ...);
    return found;
  }
}

// All rows m0…m1, in tiles of nearly equal height (so that no M is much dearer than the next).
template <class Source, int PANELS>
void rows_of_tiles(const Weight& w, const Activations& x, Chunk& chunk, int64_t m0, int64_t m1, float* acc) {
  const int64_t tiles = (m1 - m0 + MAX_ROWS<Source, PANELS> - 1) / MAX_ROWS<Source, PANELS>;
  const int64_t tiles_of_k = tiles * chunk.passes * (chunk.k / TILE_K);
  chunk.ahead.per_tile = ((chunk.ahead.end - chunk.ahead.at) / tiles_of_k + 63) / 64 * 64;
  const int64_t least = (m1 - m0) / tiles, higher = (m1 - m0) % tiles;
  for (int64_t t = 0, m = m0, rows; t < tiles; t++, m += rows) {
    rows = least + (t < higher);
    tile_of<Source, PANELS, false>(w, chunk, chunk.k, rows, LENGTHS{})(w, x, chunk, m, acc + (m - m0) * PANELS * PANEL);
  }
}
