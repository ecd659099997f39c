// Codes unpacked into scratch, once for many rows of x, and whole weights into floats.

inline void half_codes(const Weight& w, const uint8_t* tile, int half, uint8_t* out) {  // 64 codes, one a byte
  if (w.bits == 8) store_b(out, load_b(tile + 64 * half));
  else if (w.bits == 4) store_b(out, nibbles(load_b(tile), half));
  else expand_bits(tile + 8 * w.bits * half, w.bits, out);
}

// Values of column j of a half tile whose codes lie one a byte.
inline F half_values(const Weight& w, const uint8_t* half, int j) {
  switch (w.kind) {
    case CodeKind::integer: return add_f(byte_integers(half, j), set1_f(float(128 - (1 << (w.bits - 1)))));
    case CodeKind::table: return nibble_values(half, 8 * j, w.table);
    case CodeKind::e4m3: return e4m3_values(half, j);
    case CodeKind::e5m2: return e5m2_values(half, j);
  }
  __builtin_unreachable();
}

// k columns of a panel, in the form of S8Bytes and S8Unpacked
inline void unpack(S8<true>, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * w.bits)
    for (int half = 0; half < 2; half++, out += 64) half_codes(w, codes, half, out);
}
inline void unpack(S8<false>, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  unpack(S8<true>{}, w, codes, k, out);
  if (w.kind == CodeKind::table)
    for (int64_t i = 0; i < k * PANEL; i += 64) store_b(out + i, look_up(w.table_u8, load_b(out + i)));
}

inline void unpack(F32, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  alignas(64) uint8_t half[64];
  auto* values = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * w.bits)
    for (int h = 0; h < 2; h++) {
      if (w.bits != 4) half_codes(w, codes, h, half);
      for (int j = 0; j < 4; j++, values += 16) {
        if (w.bits != 4) store_f(values, half_values(w, half, j));
        else if (w.kind == CodeKind::integer) store_f(values, nibble_integers(codes, 8 * j + 4 * h, w.table));
        else store_f(values, nibble_values(codes, 8 * j + 4 * h, w.table));
      }
    }
}

#ifdef QK_BF16_DOT
inline void unpack(Bf16, const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {
  alignas(64) uint8_t half[64];
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * w.bits)
    for (int h = 0; h < 2; h++) {
      if (w.bits != 4) half_codes(w, codes, h, half);
      for (int j = 0; j < 2; j++, out += 64) {
        if (w.bits == 4) store_b(out, nibble_pairs(codes, 8 * j + 4 * h, w.table_bf16));
        else store_b(out, bf16_pair(half_values(w, half, j), half_values(w, half, j + 2)));
      }
    }
}
#endif

inline F scale_of(const Weight& w, int64_t panel, int64_t group) {
  const int64_t at = (panel * w.geometry.groups + group) * w.scale_lanes;
  const F s = w.scale_lanes == 1 ? set1_f(load_number(w.scales, w.scale_dtype, at)) : load_numbers(w.scales, w.scale_dtype, at);
  return mul(s, set1_f(w.alpha));
}
inline F zero_of(const Weight& w, int64_t panel, int64_t group) {
  return w.zeros == nullptr ? zero_f() : load_numbers(w.zeros, w.zero_dtype, (panel * w.geometry.groups + group) * PANEL);
}

void dequantize(const Weight& w, int64_t p0, int64_t p1, float* out) {
  const Geometry& g = w.geometry;
  alignas(64) float values[TILE_K * PANEL], lanes[PANEL];
  for (int64_t panel = p0; panel < p1; panel++)
    for (int64_t group = 0; group < g.groups; group++) {
      const int64_t start = group * g.group, length = g.k - start < g.group ? g.k - start : g.group;
      const F scale = scale_of(w, panel, group), zero = sub_f(zero_of(w, panel, group), set1_f(w.centre));
      const uint8_t* codes = w.codes + (panel * g.k_padded + group * g.group_padded) * 2 * w.bits;
      for (int64_t k = 0; k < length; k++) {
        if (k % TILE_K == 0) unpack(F32{}, w, codes + k * 2 * w.bits, TILE_K, reinterpret_cast<uint8_t*>(values));
        store_f(lanes, mul(sub_f(load_f(values + k % TILE_K * PANEL), zero), scale));
        for (int64_t n = panel * PANEL; n < w.n && n < (panel + 1) * PANEL; n++) out[n * g.k + start + k] = lanes[n % PANEL];
      }
    }
}
