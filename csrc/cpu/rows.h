// Rows of activations in, rows of results out.

void to_floats(const void* x, Dtype dtype, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_f(out + i, load_numbers(x, dtype, first + i));
  for (; i < count; i++) out[i] = load_number(x, dtype, first + i);
}

inline void load_block(const void* x, Dtype dtype, int64_t row, const Geometry& g, const Block& block, float* out) {  // zero-padded
  const int64_t in_group = block.k0 - block.group * g.group_padded, start = block.group * g.group + in_group;
  int64_t count = g.group - in_group;
  if (count > block.length) count = block.length;
  if (count > g.k - start) count = g.k - start;
  if (count < 0) count = 0;
  to_floats(x, dtype, row + start, count, out);
  for (int64_t i = count; i < block.length; i++) out[i] = 0;
}

template <class Work>  // work(padded floats, length, position in values, position in scales and sums)
inline void for_blocks(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, int64_t m_all, const Work& work) {
  alignas(64) float v[MAX_BLOCK];
  for (int64_t m = m0; m < m1; m++) {
    Block block = first_block(g);
    for (int64_t b = 0; b < g.blocks; b++, block = block_after(g, block)) {
      load_block(x, dtype, m * stride, g, block, v);
      work(v, block.length, m_all * block.k0 + m * block.length, b * m_all + m);
    }
  }
}

void rows_to_s8(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, const Activations& a) {
  for_blocks(x, dtype, stride, g, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t block) {
    uint32_t largest = 0;  // of the bits of |v|: a NaN is larger than all, so it reaches the scale and the whole row
    for (int64_t i = 0; i < length; i++) {
      const uint32_t bits = float_to_bits(v[i]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    const float absmax = bits_to_float(largest), inverse = absmax > 0x1p-120f ? 127.0f / absmax : 0.0f;
    int8_t* out = static_cast<int8_t*>(a.values) + at;
    int32_t sum = 0;
    if (largest >= 0x7f800000u) {
      for (int64_t i = 0; i < length; i++) out[i] = 1;  // any code: the scale below makes the row NaN
    } else {
      for (int64_t i = 0; i < length; i++) {
        const int32_t q = int32_t((v[i] * inverse + 0x1.8p23f) - 0x1.8p23f);  // round half to even
        out[i] = int8_t(q);
        sum += q;
      }
    }
    a.scales[block] = largest >= 0x7f800000u ? bits_to_float(0x7fc00000u) : absmax / 127.0f;
    a.sums[block] = float(sum);
  });
}

inline float sum_of(const float* v, int64_t length) {
  float sum = 0;
  for (int64_t i = 0; i < length; i++) sum += v[i];
  return sum;
}

void rows_to_f32(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, const Activations& a) {
  for_blocks(x, dtype, stride, g, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t block) {
    __builtin_memcpy(static_cast<float*>(a.values) + at, v, size_t(length) * 4);
    a.sums[block] = sum_of(v, length);
  });
}

#ifdef QK_BF16_DOT
void rows_to_bf16(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, const Activations& a) {
  for_blocks(x, dtype, stride, g, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t block) {
    constexpr int ORDER[TILE_K] = {0, 2, 1, 3, 4, 6, 5, 7};
    uint16_t* out = static_cast<uint16_t*>(a.values) + at;
    for (int64_t k = 0; k < length; k += TILE_K)
      for (int i = 0; i < TILE_K; i++) out[k + i] = uint16_t(float_to_bits(v[k + ORDER[i]]) >> 16);  // exact: x is bf16
    a.sums[block] = sum_of(v, length);
  });
}
#endif

inline void write_rows(const Weight& w, const Output& out, int64_t m0, int64_t m1, int64_t panel, int panels, const float* acc) {
  for (int64_t m = m0; m < m1; m++)
    for (int p = 0; p < panels; p++, acc += PANEL) {
      const int64_t n0 = (panel + p) * PANEL, columns = w.n - n0 < PANEL ? w.n - n0 : PANEL;
      if (columns == PANEL) store_numbers(out.y, out.dtype, m * w.n + n0, out.bias ? add_f(load_f(acc), load_f(out.bias + n0)) : load_f(acc));
      else for (int64_t j = 0; j < columns; j++) store_number(out.y, out.dtype, m * w.n + n0 + j, acc[j] + (out.bias ? out.bias[n0 + j] : 0.0f));
    }
}
