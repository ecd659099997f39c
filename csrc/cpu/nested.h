// ggml's nested blocks that are kept as they lie, as their codes alone would take more: indices of points of 4 or 8 weights (IQ1, IQ2, IQ3)
// and five trits a byte (TQ1_0). A block of each row of a strip at a time comes apart into codes of 8 bits, value + 128, in the form of
// S8Bytes, and scales. Source: the layouts of ggml-common.h.

constexpr uint64_t ONES = 0x0101010101010101;  // times a byte: eight of it

template <class T>
inline T load_as(const uint8_t* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(T));
  return v;
}
inline uint64_t negated(uint64_t values, uint32_t signs) {  // those whose bit is set; none may be 0
  const uint64_t bits = signs * ONES & 0x8040201008040201, ones = (bits + 0x7f * ONES) >> 7 & ONES;
  return (values ^ ones * 255) + ones;
}
inline uint32_t even(uint32_t signs) { return signs | uint32_t(__builtin_parity(signs)) << 7; }  // the eighth of 7 signs
inline float odd(uint32_t scale) { return float(2 * scale + 1); }
inline uint64_t moved(uint64_t points, bool down) {  // codes of eighths: 8 * point - 1 or + 1
  const uint64_t codes = (points & 0x1f * ONES) << 3 ^ 0x80 * ONES;
  return codes + ONES - (2 * ONES & -uint64_t(down));  // no branch, which would be guessed wrong every other time
}
inline uint64_t trits(uint64_t bytes, uint32_t power) {  // codes; a byte is a fraction of 256, and the overflow of its threefold is a trit
  constexpr uint64_t EVEN = 0x00ff00ff00ff00ff;
  const uint64_t low = ((bytes & EVEN) * power & EVEN) * 3 >> 8 & EVEN, high = ((bytes >> 8 & EVEN) * power & EVEN) * 3 & ~EVEN;
  return (low | high) + 127 * ONES;
}
inline uint64_t eight_trits(const uint8_t* raw, int octet) {  // runs of 32, 16 and 4 bytes, all first trits of a run before the second ones
  constexpr uint32_t POWERS[] = {1, 3, 9, 27, 81};
  if (octet < 20) return trits(load_as<uint64_t>(raw + octet % 4 * 8), POWERS[octet / 4]);
  if (octet < 30) return trits(load_as<uint64_t>(raw + 32 + octet % 2 * 8), POWERS[(octet - 20) / 2]);
  const uint64_t last = load_as<uint32_t>(raw + 48);
  const int first = (octet - 30) * 2;
  return uint32_t(trits(last, POWERS[first])) | trits(last, POWERS[first + 1]) << 32;
}

// put(i, codes 8i…8i+7 of the block), scale(g, that of its group g).
template <Nested TYPE, class Put, class Scale>
inline void apart(const uint8_t* raw, const uint8_t* grid, const Put& put, const Scale& scale) {
  const auto half = [&](int at) { return from_f16(load_as<uint16_t>(raw + at)); };
  const auto nibble = [&](int at, int i) { return uint32_t(raw[at + i / 2] >> 4 * (i & 1) & 15); };
  const auto point = [&](uint32_t i) { return load_as<uint64_t>(grid + 8 * i); };
  const auto two_points = [&](uint32_t i, uint32_t j) {
    return load_as<uint32_t>(grid + 4 * i) | uint64_t(load_as<uint32_t>(grid + 4 * j)) << 32;
  };
  const auto put_signed = [&](int i, uint64_t values, uint32_t signs) { put(i, negated(values, signs) ^ 0x80 * ONES); };
  if constexpr (TYPE == Nested::iq2_xxs || TYPE == Nested::iq3_xxs) {
    constexpr bool TWO = TYPE == Nested::iq2_xxs;
    for (int g = 0; g < 8; g++) {
      const auto word = load_as<uint32_t>(raw + (TWO ? 6 + 8 * g : 66 + 4 * g));
      scale(g, half(0) * (TWO ? 0.125f : 0.25f) * odd(word >> 28));
      for (int j = 0; j < 4; j++) {
        const uint8_t* index = raw + 2 + 8 * g + (TWO ? j : 2 * j);
        put_signed(4 * g + j, TWO ? point(index[0]) : two_points(index[0], index[1]), even(word >> 7 * j & 127));
      }
    }
  } else if constexpr (TYPE == Nested::iq2_xs) {
    for (int g = 0; g < 16; g++) scale(g, half(0) * 0.125f * odd(nibble(66, g)));
    for (int i = 0; i < 32; i++) {
      const auto word = load_as<uint16_t>(raw + 2 + 2 * i);
      put_signed(i, point(word & 511), even(word >> 9));
    }
  } else if constexpr (TYPE == Nested::iq2_s) {
    for (int g = 0; g < 16; g++) scale(g, half(0) * 0.125f * odd(nibble(74, g)));
    for (int i = 0; i < 32; i++) put_signed(i, point(raw[2 + i] | (raw[66 + i / 4] >> 2 * (i & 3) & 3) << 8), raw[34 + i]);
  } else if constexpr (TYPE == Nested::iq3_s) {
    for (int g = 0; g < 8; g++) scale(g, half(0) * odd(nibble(106, g)));
    for (int i = 0; i < 32; i++) {
      const uint32_t high = uint32_t(raw[66 + i / 4]) >> 2 * (i & 3);
      put_signed(i, two_points(raw[2 + 2 * i] | (high & 1) << 8, raw[3 + 2 * i] | (high >> 1 & 1) << 8), raw[74 + i]);
    }
  } else if constexpr (TYPE == Nested::iq1_s) {
    for (int g = 0; g < 8; g++) {
      const auto word = load_as<uint16_t>(raw + 34 + 2 * g);
      scale(g, half(0) * 0.125f * odd(word >> 12 & 7));
      for (int j = 0; j < 4; j++) put(4 * g + j, moved(point(raw[2 + 4 * g + j] | (word >> 3 * j & 7) << 8), word >> 15));
    }
  } else if constexpr (TYPE == Nested::iq1_m) {
    const auto word = [&](int i) { return load_as<uint16_t>(raw + 48 + 2 * i); };
    const uint16_t d = uint16_t(word(0) >> 12 | word(1) >> 12 << 4 | word(2) >> 12 << 8 | word(3) >> 12 << 12);
    for (int g = 0; g < 16; g++) scale(g, from_f16(d) * 0.125f * odd(word(g / 4) >> 3 * (g & 3) & 7));
    for (int i = 0; i < 32; i++) put(i, moved(point(raw[i] | (nibble(32, i) & 7) << 8), nibble(32, i) >> 3));
  } else {
    scale(0, half(52));
    for (int i = 0; i < 32; i++) put(i, eight_trits(raw, i));
  }
}

// The blocks at column k of `panels` panels: codes [32 tiles, panels, 128 bytes], scales [groups of a block, panels, 16].
template <Nested TYPE>
void apart_all(const Weight& w, int64_t panel, int panels, int64_t k, uint8_t* codes, float* scales) {
  const int64_t blocks = w.geometry.k / NESTED_K, groups = NESTED_K / w.geometry.group;
  __builtin_memset(scales, 0, size_t(groups * panels * PANEL * 4));  // those of rows beyond n
  for (int64_t n = panel * PANEL; n < w.n && n < (panel + panels) * PANEL; n++) {
    const int64_t row = n - panel * PANEL, p = row / PANEL, lane = row % PANEL;
    uint8_t* out = codes + p * 128 + 4 * lane;
    apart<TYPE>(
        w.codes + (n * blocks + k / NESTED_K) * nested_bytes(TYPE), w.grid,
        [&](int64_t i, uint64_t eight) {
          const uint32_t first = uint32_t(eight), second = uint32_t(eight >> 32);
          __builtin_memcpy(out + i * panels * 128, &first, 4);
          __builtin_memcpy(out + i * panels * 128 + 64, &second, 4);
        },
        [&](int64_t g, float scale) { scales[(g * panels + p) * PANEL + lane] = scale; });
  }
}
void apart(const Weight& w, int64_t panel, int panels, int64_t k, uint8_t* codes, float* scales) {
  switch (w.nested) {
    case Nested::none: return;
    case Nested::iq1_s: return apart_all<Nested::iq1_s>(w, panel, panels, k, codes, scales);
    case Nested::iq1_m: return apart_all<Nested::iq1_m>(w, panel, panels, k, codes, scales);
    case Nested::iq2_xxs: return apart_all<Nested::iq2_xxs>(w, panel, panels, k, codes, scales);
    case Nested::iq2_xs: return apart_all<Nested::iq2_xs>(w, panel, panels, k, codes, scales);
    case Nested::iq2_s: return apart_all<Nested::iq2_s>(w, panel, panels, k, codes, scales);
    case Nested::iq3_xxs: return apart_all<Nested::iq3_xxs>(w, panel, panels, k, codes, scales);
    case Nested::iq3_s: return apart_all<Nested::iq3_s>(w, panel, panels, k, codes, scales);
    case Nested::tq1_0: return apart_all<Nested::tq1_0>(w, panel, panels, k, codes, scales);
  }
}
