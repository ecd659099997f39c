// Rows of activations in, rows of results out.

template <Dtype DTYPE>
inline void floats_of(const void* x, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_f(out + i, load_numbers(x, DTYPE, first + i));
  for (; i < count; i++) out[i] = load_number(x, DTYPE, first + i);
}

void to_floats(const void* x, Dtype dtype, int64_t first, int64_t count, float* out) {
  if (dtype == Dtype::f32) floats_of<Dtype::f32>(x, first, count, out);
  else if (dtype == Dtype::bf16) floats_of<Dtype::bf16>(x, first, count, out);
  else floats_of<Dtype::f16>(x, first, count, out);
}

template <class T>
inline void gather(const void* x, const int32_t* columns, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i++) out[i] = static_cast<const T*>(x)[columns[i]];
}

inline void load_block(const Rows& rows, int64_t row, const Geometry& g, const Block& block, float* out) {  // zeros up to a multiple of 16
  const int64_t in_group = block.k0 - block.group * g.group_padded, start = block.group * g.group + in_group;
  int64_t count = g.group - in_group;
  if (count > block.length) count = block.length;
  if (count > g.k - start) count = g.k - start;
  if (count < 0) count = 0;
  if (rows.perm == nullptr) to_floats(rows.x, rows.dtype, row + start, count, out);
  else if (rows.dtype == Dtype::f32) gather(static_cast<const float*>(rows.x) + row, rows.perm + start, count, out);
  else {
    uint16_t numbers[MAX_BLOCK];
    gather(static_cast<const uint16_t*>(rows.x) + row, rows.perm + start, count, numbers);
    to_floats(numbers, rows.dtype, 0, count, out);
  }
  for (int64_t i = count; i < (block.length + 15) / 16 * 16; i++) out[i] = 0;
}

inline int32_t round_to_s8(const float* v, int64_t count, float times, int8_t* out) {  // count: of 8; returns the sum
  const F factor = set1_f(times);
  I sum = zero_i();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sum = add_i(sum, round_to_s8(mul(load_f(v + i), factor), out + i));
  if (i < count) {
    int8_t last[16];
    sum = add_i(sum, round_to_s8(mul(load_f(v + i), factor), last));
    __builtin_memcpy(out + i, last, TILE_K);
  }
  return total(sum);
}

template <class Work>  // work(floats, length, position in values, in what a block has one of, in sums)
inline void for_blocks(const Rows& rows, const Geometry& g, int64_t m0, int64_t m1, int64_t m_all, const Work& work) {
  alignas(64) float v[MAX_BLOCK];
  for (int64_t m = m0; m < m1; m++) {
    Block block = first_block(g);
    for (int64_t b = 0; b < g.blocks; b++, block = block_after(g, block)) {
      load_block(rows, m * rows.stride, g, block, v);
      work(v, block.length, m_all * block.k0 + m * block.length, b * m_all + m, m * g.blocks + b);
    }
  }
}

// PAIRS: stored as DotPairs wants them.
template <bool PAIRS>
void rows_to_s8(const Rows& rows, const Weight& w, int64_t m0, int64_t m1, const Activations& a) {
  const bool few_codes = has_few_codes(w);
  const float largest_code = few_codes ? 120 : 127;  // the same for every kernel and level, that all may give the same bits
  const int32_t less = bias_of(w) - w.offset;
#ifdef QK_LANES
  const int middle = middle_of(w);
#endif
  for_blocks(rows, w.geometry, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t block, int64_t sum_at) {
    I most = magnitude_bits(load_f(v));  // as integers, where a NaN is larger than all: it reaches the scale and the whole row
    for (int64_t i = 16; i < length; i += 16) most = max_i(most, magnitude_bits(load_f(v + i)));
    const float absmax = bits_to_float(uint32_t(highest(most)));
    const bool finite = absmax < __builtin_inff();
    const float times = absmax > 0x1p-120f ? largest_code / absmax : 0.0f;
    int8_t* out = static_cast<int8_t*>(a.values) + at;
    const int64_t run = w.inner != 0 ? w.inner : length, runs = length / run;  // columns of which the sums have a start
    int32_t total = 0;
    for (int64_t r = 0; r < runs; r++, out += run) {
      int32_t sum = 0;
      if (finite) sum = round_to_s8(v + r * run, run, times, out);
      else __builtin_memset(out, 1, size_t(run));  // any code: the scale makes the row NaN
      int32_t& start = a.starts[w.inner != 0 ? (block / a.m * runs + r) * a.m + block % a.m : block];
      start = less * sum, total += sum;
      if (w.inner != 0) a.inner_sums[block * MOST_INNER + r] = int16_t(sum);
#ifdef QK_LANES
      if (middle != 0) start = less_of_lanes(out, run, middle);
#endif
#ifdef QK_PAIRS
      if constexpr (PAIRS) start -= DotPairs::rows(out, run);
#endif
    }
    a.scales[block] = finite ? absmax / largest_code : bits_to_float(0x7fc00000u);
    a.sums[sum_at] = a.scales[block] * float(total);
  });
}

inline float sum_of(const float* v, int64_t length) {
  F sum = load_f(v);
  for (int64_t i = 16; i < length; i += 16) sum = add_f(sum, load_f(v + i));
  alignas(64) float lanes[16];
  store_f(lanes, sum);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  return lanes[0];
}

void rows_to_f32(const Rows& rows, const Weight& w, int64_t m0, int64_t m1, const Activations& a) {
  for_blocks(rows, w.geometry, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t, int64_t sum_at) {
    __builtin_memcpy(static_cast<float*>(a.values) + at, v, size_t(length) * 4);
    a.sums[sum_at] = sum_of(v, length);
  });
}

#ifdef QK_BF16_DOT
void rows_to_bf16(const Rows& rows, const Weight& w, int64_t m0, int64_t m1, const Activations& a) {
  for_blocks(rows, w.geometry, m0, m1, a.m, [&](const float* v, int64_t length, int64_t at, int64_t, int64_t sum_at) {
    uint16_t* out = static_cast<uint16_t*>(a.values) + at;
    int64_t i = 0;
    for (; i + 16 <= length; i += 16) store_bf16_tiles(out + i, load_f(v + i));
    if (i < length) {
      uint16_t last[16];
      store_bf16_tiles(last, load_f(v + i));
      __builtin_memcpy(out + i, last, TILE_K * 2);
    }
    a.sums[sum_at] = sum_of(v, length);
  });
}
#endif

inline void write_rows(const Weight& w, const Output& out, int64_t m0, int64_t m1, int64_t panel, int panels, bool shifted, float* acc) {
  for (int64_t m = m0; m < m1; m++)
    for (int p = 0; p < panels; p++, acc += PANEL) {
      if (shifted) store_f(acc, add_f(load_f(acc), load_f(acc + SHIFT_SUMS)));
      const int64_t n0 = (panel + p) * PANEL, columns = w.n - n0 < PANEL ? w.n - n0 : PANEL;
      if (columns == PANEL)
        store_numbers(out.y, out.dtype, m * w.n + n0, out.bias ? add_f(load_f(acc), load_f(out.bias + n0)) : load_f(acc));
      else
        for (int64_t j = 0; j < columns; j++)
          store_number(out.y, out.dtype, m * w.n + n0 + j, acc[j] + (out.bias ? out.bias[n0 + j] : 0.0f));
    }
}
