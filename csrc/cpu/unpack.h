// Codes unpacked into scratch, once for many rows of x, and whole weights into floats.

template <int BITS>
[[gnu::always_inline]] inline B codes_of(const uint8_t* tile, int half) {  // 64, one a byte
  if constexpr (BITS == 8) return load_b(tile + 64 * half);
  else if constexpr (BITS == 4) return nibbles(load_b(tile), half);
  else return planes<BITS>(tile, half);
}
// The same: where they lie, or in `room`. bits is a number of the caller's own: a byte stored to memory might change w's,
// and all that follows from them would be worked out again each time.
[[gnu::always_inline]] inline const uint8_t* half_codes(int bits, const uint8_t* tile, int half, uint8_t* room) {
  switch (bits) {
    case 1: return store_b(room, codes_of<1>(tile, half)), room;
    case 2: return store_b(room, codes_of<2>(tile, half)), room;
    case 3: return store_b(room, codes_of<3>(tile, half)), room;
    case 4: return store_b(room, codes_of<4>(tile, half)), room;
    case 5: return store_b(room, codes_of<5>(tile, half)), room;
    case 6: return store_b(room, codes_of<6>(tile, half)), room;
    case 7: return store_b(room, codes_of<7>(tile, half)), room;
  }
  return tile + 64 * half;
}

// Values of column j of a half tile whose codes lie one a byte.
template <CodeKind KIND>
inline F half_values(int bits, const float* table, const uint8_t* half, int j) {
  switch (KIND) {
    case CodeKind::integer: return add_f(byte_integers(half, j), set1_f(float(128 - (1 << (bits - 1)))));
    case CodeKind::table: return nibble_values(half, 8 * j, table);
    case CodeKind::e4m3: return e4m3_values(half, j);
    case CodeKind::e5m2: return e5m2_values(half, j);
  }
  __builtin_unreachable();
}

template <class Work>  // work(value of a column: F of j), two for every tile
inline void for_halves(const Weight& w, const uint8_t* codes, int64_t k, const Work& work) {
  const int bits = w.bits;
  const auto all = [&](auto kind) {
    alignas(64) uint8_t room[64];
    for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * bits)
      for (int h = 0; h < 2; h++) {
        const uint8_t* half = half_codes(bits, codes, h, room);
        work([&](int j) { return half_values<kind>(bits, w.table, half, j); });
      }
  };
  switch (w.kind) {
    case CodeKind::integer: return all(std::integral_constant<CodeKind, CodeKind::integer>{});
    case CodeKind::table: return all(std::integral_constant<CodeKind, CodeKind::table>{});
    case CodeKind::e4m3: return all(std::integral_constant<CodeKind, CodeKind::e4m3>{});
    case CodeKind::e5m2: return all(std::integral_constant<CodeKind, CodeKind::e5m2>{});
  }
}

// Tiles that lie one after the other, k columns in all, in the form of S8Bytes and S8Unpacked; 8-bit codes have it already.
template <int LARGEST>
inline void unpack(S8<LARGEST>, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  const int bits = w.bits;
  const uint8_t* table = w.kind != CodeKind::table ? nullptr : LARGEST < 255 ? w.table_low : w.table_u8;
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * bits)
    for (int half = 0; half < 2; half++, out += 64) {
      half_codes(bits, codes, half, out);
      if (table != nullptr) store_b(out, look_up(table, load_b(out)));
    }
}

#ifdef QK_PAIRS
// A block of a strip in the form of S8Pairs; and what its pairs add among themselves, [PANELS, 16].
template <int PANELS>
inline void unpack_pairs(int bits, const uint8_t* codes, int64_t k, uint8_t* out, int32_t* columns) {
  DotPairs::Column sums[PANELS];
  for (int64_t i = 0; i < k; i += TILE_K)
    each<PANELS>(QK_WITH(p) {
      sums[p].add({load_b(half_codes(bits, codes, 0, out)), load_b(half_codes(bits, codes, 1, out + 64))});
      codes += 16 * bits, out += 128;
    });
  each<PANELS>(QK_WITH(p) { sums[p].store(columns + p * PANEL); });
}
#endif

inline void unpack(F32, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  auto* values = reinterpret_cast<float*>(out);
  if (w.bits == 4) {
    const bool integers = w.kind == CodeKind::integer;
    for (int64_t i = 0; i < k; i += TILE_K, codes += 64)
      for (int j = 0; j < TILE_K; j++, values += 16) {
        const int shift = 8 * (j & 3) + 4 * (j >> 2);
        store_f(values, integers ? nibble_integers(codes, shift, w.table) : nibble_values(codes, shift, w.table));
      }
    return;
  }
  for_halves(w, codes, k, [&](const auto& column) {
    for (int j = 0; j < 4; j++, values += 16) store_f(values, column(j));
  });
}

#ifdef QK_BF16_DOT
inline void unpack(Bf16, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  const auto all = [&](int tile_bytes, const auto& weight) {
    for (int64_t i = 0; i < k; i += TILE_K, codes += tile_bytes)
      for (int step = 0; step < 4; step++, out += 64) store_b(out, weight(step));
  };
  if (w.bits == 4) return all(64, [&](int step) { return Bf16Nibbles::weight(codes, step, w); });
  if (w.kind == CodeKind::e4m3) return all(128, [&](int step) { return Bf16E4m3::weight(codes, step, w); });
  if (w.kind == CodeKind::e5m2) return all(128, [&](int step) { return e5m2_pairs(codes + 64 * (step >> 1), step & 1); });
  for_halves(w, codes, k, [&](const auto& column) {
    for (int j = 0; j < 2; j++, out += 64) store_b(out, bf16_pair(column(j), column(j + 2)));
  });
}
#endif

inline F scale_of(const Weight& w, int64_t panel, int64_t group) {
  const Place place = place_of(w, panel);
  const int64_t at = numbers_at(w, place, group) * w.scale_lanes;
  const F s = w.scale_lanes == 1 ? set1_f(load_number(w.scales, w.scale_dtype, at)) : load_numbers(w.scales, w.scale_dtype, at);
  const F scale = mul(s, set1_f(w.alpha));
  return w.outer ? mul(scale, load_numbers(outer_at(w, place, group, false), Dtype::f16, 0)) : scale;
}
inline F zero_of(const Weight& w, int64_t panel, int64_t group) {
  if (w.zeros == nullptr) return zero_f();
  const Place place = place_of(w, panel);
  const F zero = load_numbers(w.zeros, w.zero_dtype, numbers_at(w, place, group) * PANEL);
  return w.outer ? mul(zero, load_numbers(outer_at(w, place, group, true), Dtype::f16, 0)) : zero;
}

void dequantize(const Weight& w, int64_t p0, int64_t p1, float* out) {
  const Geometry& g = w.geometry;
  alignas(64) float values[TILE_K * PANEL], lanes[PANEL], nested[NESTED_K];
  alignas(64) uint8_t codes[NESTED_K * PANEL];
  for (int64_t panel = p0; panel < p1; panel++)
    for (int64_t group = 0; group < g.groups; group++) {
      const int64_t start = group * g.group, length = g.k - start < g.group ? g.k - start : g.group;
      const bool kept = w.nested != Nested::none;
      if (kept && start % NESTED_K == 0) apart(w, panel, 1, start, codes, nested);
      const F scale = kept ? mul(load_f(nested + start % NESTED_K / g.group * PANEL), set1_f(w.alpha)) : scale_of(w, panel, group);
      const F shift = zero_of(w, panel, group), none = zero_f();
      const F zero = sub_f(w.minima ? none : shift, set1_f(w.centre)), minimum = w.minima ? shift : none;
      for (int64_t k = 0; k < length; k++) {
        const uint8_t* tile = kept ? codes + (start + k) % NESTED_K * PANEL : codes_at(w, panel, group * g.group_padded + k);
        if (k % TILE_K == 0) unpack(F32{}, w, tile, TILE_K, reinterpret_cast<uint8_t*>(values));
        store_f(lanes, add_f(mul(sub_f(load_f(values + k % TILE_K * PANEL), zero), scale), minimum));
        for (int64_t n = panel * PANEL; n < w.n && n < (panel + 1) * PANEL; n++) out[n * g.k + start + k] = lanes[n % PANEL];
      }
    }
}
