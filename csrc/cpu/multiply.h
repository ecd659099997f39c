// The kernels, written once over the 16-row vectors of a simd_*.h. Included inside each level's anonymous namespace.
//
// A register tile is ROWS rows of x by PANELS panels. A block of K is summed in registers (int32, or fp32), then scaled into the fp32
// accumulators in memory: the order of every output element's sum depends on K alone, never on M, on the tile or on the threads.
//
// Weights come straight from their packed form (few rows) or from a scratch panel that is unpacked once for many rows.

// ---- where a tile's weight vectors come from -----------------------------------------------------------------------------------
// STEPS vectors a tile of 8 k, each against K_STEP consecutive activations.

struct S8Bytes {  // 8-bit codes, packed or unpacked into scratch
  static constexpr int STEPS = 2, K_STEP = 4, TILE_BYTES = 128;
  static constexpr bool SMALL = false;
  static B weight(const uint8_t* tile, int step, const Weight&) { return load_b(tile + 64 * step); }
};
struct S8Nibbles {
  static constexpr int STEPS = 2, K_STEP = 4, TILE_BYTES = 64;
  static constexpr bool SMALL = true;
  static B weight(const uint8_t* tile, int step, const Weight&) { return nibbles(load_b(tile), step); }
};
struct S8Table {
  static constexpr int STEPS = 2, K_STEP = 4, TILE_BYTES = 64;
  static constexpr bool SMALL = false;
  static B weight(const uint8_t* tile, int step, const Weight& w) { return look_up(w.table_u8, nibbles(load_b(tile), step)); }
};
struct F32Unpacked {
  static constexpr int STEPS = 8, K_STEP = 1, TILE_BYTES = 512;
  static F weight(const uint8_t* tile, int step, const Weight&) { return load_f(reinterpret_cast<const float*>(tile) + 16 * step); }
};
struct F32Nibbles {
  static constexpr int STEPS = 8, K_STEP = 1, TILE_BYTES = 64;
  static F weight(const uint8_t* tile, int step, const Weight& w) { return nibble_values(tile, 8 * (step & 3) + 4 * (step >> 2), w.table); }
};
struct F32Bytes {  // 8-bit integers
  static constexpr int STEPS = 8, K_STEP = 1, TILE_BYTES = 128;
  static F weight(const uint8_t* tile, int step, const Weight& w) {
    return sub_f(byte_values(tile + 64 * (step >> 2), step & 3), set1_f(float(w.offset)));
  }
};

// ---- one register tile over some blocks of K -------------------------------------------------------------------------------------

inline F scale_of(const Weight& w, int64_t panel, int64_t group) {
  int64_t at = (panel * w.geometry.groups + group) * w.scale_lanes;
  F s = w.scale_lanes == 1 ? set1_f(load_number(w.scales, w.scale_dtype, at)) : load_numbers(w.scales, w.scale_dtype, at);
  return mul(s, set1_f(w.alpha));
}
inline F zero_of(const Weight& w, int64_t panel, int64_t group) {
  return load_numbers(w.zeros, w.zero_dtype, (panel * w.geometry.groups + group) * PANEL);
}

template <class Source>
constexpr bool is_s8 = Source::STEPS == 2;

// codes: tile (panel, k = first block's k0), panel_stride bytes to the next panel; acc [ROWS][acc_stride]
template <class Source, int ROWS, int PANELS>
void tile(const Weight& w, const Activations& x, int64_t m, int64_t panel, int64_t b0, int64_t b1, const uint8_t* codes, int64_t panel_stride,
          float* acc, int64_t acc_stride) {
  const Geometry& g = w.geometry;
  for (int64_t b = b0; b < b1; b++) {
    const Block block = block_at(g, b);
    if constexpr (is_s8<Source>) {
      const int8_t* rows = x.s8 + m * g.k_padded + block.k0;
      I sum[ROWS][PANELS];
      for (int r = 0; r < ROWS; r++) {
        const int correction = -(w.offset - mac_bias<Source::SMALL>()) * int(x.sums[(m + r) * g.blocks + b]);
        for (int p = 0; p < PANELS; p++) sum[r][p] = set1_i(correction);
      }
      for (int64_t k = 0; k < block.length; k += TILE_K, codes += Source::TILE_BYTES)
#pragma GCC unroll 2
        for (int step = 0; step < 2; step++) {
          B weights[PANELS];
          for (int p = 0; p < PANELS; p++) weights[p] = Source::weight(codes + p * panel_stride, step, w);
          for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PANELS; p++) mac_s8<Source::SMALL>(sum[r][p], weights[p], rows + r * g.k_padded + k + 4 * step);
        }
      for (int p = 0; p < PANELS; p++) {
        const F scale = scale_of(w, panel + p, block.group);
        for (int r = 0; r < ROWS; r++) {
          float* out = acc + r * acc_stride + p * PANEL;
          store_f(out, fma(mul(scale, set1_f(x.scales[(m + r) * g.blocks + b])), to_float(sum[r][p]), load_f(out)));
        }
      }
    } else {
      const float* rows = x.f32 + m * g.k_padded + block.k0;
      F sum[ROWS][PANELS];
      for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) sum[r][p] = zero_f();
      for (int64_t k = 0; k < block.length; k += TILE_K, codes += Source::TILE_BYTES)
#pragma GCC unroll 8
        for (int step = 0; step < 8; step++) {
          F weights[PANELS];
          for (int p = 0; p < PANELS; p++) weights[p] = Source::weight(codes + p * panel_stride, step, w);
          for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PANELS; p++) mac_f(sum[r][p], weights[p], rows[r * g.k_padded + k + step]);
        }
      for (int p = 0; p < PANELS; p++) {
        const F scale = scale_of(w, panel + p, block.group);
        for (int r = 0; r < ROWS; r++) {
          float* out = acc + r * acc_stride + p * PANEL;
          store_f(out, fma(scale, sum[r][p], load_f(out)));
        }
      }
    }
    if (w.zeros != nullptr)  // (code - zero) * scale: the zero's share is the block's sum of activations
      for (int p = 0; p < PANELS; p++) {
        const F shift = mul(mul(scale_of(w, panel + p, block.group), zero_of(w, panel + p, block.group)), set1_f(-1.0f));
        for (int r = 0; r < ROWS; r++) {
          const int64_t at = (m + r) * g.blocks + b;
          float* out = acc + r * acc_stride + p * PANEL;
          store_f(out, fma(shift, set1_f(is_s8<Source> ? x.scales[at] * x.sums[at] : x.sums[at]), load_f(out)));
        }
      }
  }
}

// All rows m0…m1, in tiles of nearly equal height (so that no M is much dearer than the next).
template <class Source, int PANELS>
void rows_of_tiles(const Weight& w, const Activations& x, int64_t m0, int64_t m1, int64_t panel, int64_t b0, int64_t b1, const uint8_t* codes,
                   int64_t panel_stride, float* acc) {
  constexpr int64_t stride = PANELS * PANEL;
  int64_t tiles = (m1 - m0 + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t m = m0; m < m1; tiles--) {
    const int64_t rows = (m1 - m + tiles - 1) / tiles;
    float* out = acc + (m - m0) * stride;
    switch (rows) {
      case 1: tile<Source, 1, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      case 2: tile<Source, 2, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      case 3: tile<Source, 3, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      case 4: tile<Source, 4, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      case 5: if constexpr (MAX_ROWS >= 5) tile<Source, 5, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      case 6: if constexpr (MAX_ROWS >= 6) tile<Source, 6, PANELS>(w, x, m, panel, b0, b1, codes, panel_stride, out, stride); break;
      default: __builtin_unreachable();
    }
    m += rows;
  }
}

// ---- unpacking into scratch ------------------------------------------------------------------------------------------------------

inline void half_codes(const Weight& w, const uint8_t* tile, int half, uint8_t* out) {  // 64 codes, one a byte
  if (w.bits == 8) store_b(out, load_b(tile + 64 * half));
  else if (w.bits == 4) store_b(out, nibbles(load_b(tile), half));
  else expand_bits(tile + 8 * w.bits * half, w.bits, out);
}

inline void unpack_s8(const Weight& w, const uint8_t* codes, int64_t k, uint8_t* out) {  // k columns of a panel to S8Bytes
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * w.bits)
    for (int half = 0; half < 2; half++, out += 64) {
      half_codes(w, codes, half, out);
      if (w.kind == CodeKind::table) store_b(out, look_up(w.table_u8, load_b(out)));
    }
}

inline void unpack_f32(const Weight& w, const uint8_t* codes, int64_t k, float* out) {  // k columns of a panel to [k][16]
  alignas(64) uint8_t half[64];
  for (int64_t i = 0; i < k; i += TILE_K, codes += 16 * w.bits)
    for (int h = 0; h < 2; h++) {
      if (w.bits == 4) {
        for (int j = 0; j < 4; j++, out += 16) store_f(out, nibble_values(codes, 8 * j + 4 * h, w.table));
        continue;
      }
      half_codes(w, codes, h, half);
      for (int j = 0; j < 4; j++, out += 16) {
        switch (w.kind) {
          case CodeKind::integer: store_f(out, sub_f(byte_values(half, j), set1_f(float(w.offset)))); break;
          case CodeKind::table: store_f(out, nibble_values(half, 8 * j, w.table)); break;
          case CodeKind::e4m3: store_f(out, e4m3_values(half, j)); break;
          case CodeKind::e5m2: store_f(out, e5m2_values(half, j)); break;
        }
      }
    }
}

// ---- epilogue ----------------------------------------------------------------------------------------------------------------------

inline void write_rows(const Weight& w, const Output& out, int64_t m0, int64_t m1, int64_t panel, int panels, const float* acc) {
  const int64_t n0 = panel * PANEL, columns = w.n - n0 < panels * PANEL ? w.n - n0 : panels * PANEL;
  for (int64_t m = m0; m < m1; m++, acc += panels * PANEL)
    for (int64_t j = 0; j < columns; j++) {
      const float y = acc[j] + (out.bias ? out.bias[n0 + j] : 0.0f);
      const int64_t at = m * w.n + n0 + j;
      if (out.dtype == Dtype::f32) static_cast<float*>(out.y)[at] = y;
      else if (out.dtype == Dtype::bf16) static_cast<uint16_t*>(out.y)[at] = to_bf16(y);
      else static_cast<uint16_t*>(out.y)[at] = to_f16(y);
    }
}

// ---- rows x panels -------------------------------------------------------------------------------------------------------------------

constexpr int64_t ROW_CHUNK = 256;                    // rows whose accumulators lie in scratch at a time
constexpr int64_t SCRATCH_WEIGHTS = 256 * 1024;       // bytes of unpacked weights: they are to stay in L2
constexpr int64_t SCRATCH_ACC = ROW_CHUNK * WIDE * PANEL * 4;

template <class Source, int PANELS>
void direct(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t panel, float* acc) {
  const int64_t stride = w.geometry.k_padded * 2 * w.bits;
  __builtin_memset(acc, 0, size_t((m1 - m0) * PANELS * PANEL * 4));
  rows_of_tiles<Source, PANELS>(w, x, m0, m1, panel, 0, w.geometry.blocks, w.codes + panel * stride, stride, acc);
  write_rows(w, out, m0, m1, panel, PANELS, acc);
}

template <class Unpacked, int PANELS>
void through_scratch(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t panel, float* acc, uint8_t* unpacked) {
  const Geometry& g = w.geometry;
  const int64_t bytes_per_k = Unpacked::TILE_BYTES / TILE_K, stride = g.k_padded * 2 * w.bits;
  const int64_t most_k = SCRATCH_WEIGHTS / (bytes_per_k * WIDE);
  __builtin_memset(acc, 0, size_t((m1 - m0) * PANELS * PANEL * 4));
  for (int64_t b0 = 0, b1; b0 < g.blocks; b0 = b1) {
    const int64_t k0 = block_at(g, b0).k0;
    int64_t k1 = k0;
    for (b1 = b0; b1 < g.blocks; b1++) {
      const Block next = block_at(g, b1);
      if (next.k0 + next.length - k0 > most_k) break;
      k1 = next.k0 + next.length;
    }
    const int64_t panel_bytes = (k1 - k0) * bytes_per_k;
    for (int p = 0; p < PANELS; p++) {
      const uint8_t* codes = w.codes + (panel + p) * stride + k0 * 2 * w.bits;
      if constexpr (is_s8<Unpacked>) unpack_s8(w, codes, k1 - k0, unpacked + p * panel_bytes);
      else unpack_f32(w, codes, k1 - k0, reinterpret_cast<float*>(unpacked + p * panel_bytes));
    }
    rows_of_tiles<Unpacked, PANELS>(w, x, m0, m1, panel, b0, b1, unpacked, panel_bytes, acc);
  }
  write_rows(w, out, m0, m1, panel, PANELS, acc);
}

template <int PANELS>
void multiply_s8_panels(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t panel, float* acc, uint8_t* unpacked) {
  constexpr int64_t few = 2 * MAX_ROWS;  // up to here, unpacking in registers again for every tile is cheaper than a trip through scratch
  if (w.bits == 8) direct<S8Bytes, PANELS>(w, x, out, m0, m1, panel, acc);
  else if (w.bits == 4 && m1 - m0 <= few && w.kind == CodeKind::integer) direct<S8Nibbles, PANELS>(w, x, out, m0, m1, panel, acc);
  else if (w.bits == 4 && m1 - m0 <= few) direct<S8Table, PANELS>(w, x, out, m0, m1, panel, acc);
  else through_scratch<S8Bytes, PANELS>(w, x, out, m0, m1, panel, acc, unpacked);
}

template <int PANELS>
void multiply_f32_panels(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t panel, float* acc, uint8_t* unpacked) {
  constexpr int64_t few = 4;
  if (w.bits == 4 && m1 - m0 <= few) direct<F32Nibbles, PANELS>(w, x, out, m0, m1, panel, acc);
  else if (w.bits == 8 && w.kind == CodeKind::integer && m1 - m0 <= few) direct<F32Bytes, PANELS>(w, x, out, m0, m1, panel, acc);
  else through_scratch<F32Unpacked, PANELS>(w, x, out, m0, m1, panel, acc, unpacked);
}

template <bool S8>
void multiply(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch) {
  float* acc = reinterpret_cast<float*>(scratch);
  uint8_t* unpacked = reinterpret_cast<uint8_t*>(scratch + SCRATCH_ACC);
  for (int64_t m = m0; m < m1; m += ROW_CHUNK) {
    const int64_t end = m + ROW_CHUNK < m1 ? m + ROW_CHUNK : m1;
    int64_t p = p0;
    for (; p + WIDE <= p1; p += WIDE)
      if constexpr (S8) multiply_s8_panels<WIDE>(w, x, out, m, end, p, acc, unpacked);
      else multiply_f32_panels<WIDE>(w, x, out, m, end, p, acc, unpacked);
    for (; p < p1; p++)
      if constexpr (S8) multiply_s8_panels<1>(w, x, out, m, end, p, acc, unpacked);
      else multiply_f32_panels<1>(w, x, out, m, end, p, acc, unpacked);
  }
}

void dequantize(const Weight& w, int64_t p0, int64_t p1, float* out) {
  const Geometry& g = w.geometry;
  alignas(64) float values[TILE_K * PANEL], lanes[PANEL];
  for (int64_t panel = p0; panel < p1; panel++)
    for (int64_t group = 0; group < g.groups; group++) {
      const int64_t start = group * g.group, length = g.k - start < g.group ? g.k - start : g.group;
      const F scale = scale_of(w, panel, group), zero = w.zeros ? zero_of(w, panel, group) : zero_f();
      const uint8_t* codes = w.codes + (panel * g.k_padded + group * g.group_padded) * 2 * w.bits;
      for (int64_t k = 0; k < length; k++) {
        if (k % TILE_K == 0) unpack_f32(w, codes + k * 2 * w.bits, TILE_K, values);
        store_f(lanes, mul(sub_f(load_f(values + k % TILE_K * PANEL), zero), scale));
        for (int64_t n = panel * PANEL; n < w.n && n < (panel + 1) * PANEL; n++) out[n * g.k + start + k] = lanes[n % PANEL];
      }
    }
}

// ---- activations -----------------------------------------------------------------------------------------------------------------------

inline void load_row(const void* x, Dtype dtype, int64_t at, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_f(out + i, load_numbers(x, dtype, at + i));
  for (; i < count; i++) out[i] = load_number(x, dtype, at + i);
}

inline void load_block(const void* x, Dtype dtype, int64_t row, const Geometry& g, const Block& block, float* out) {  // zero-padded
  const int64_t in_group = block.k0 - block.group * g.group_padded, start = block.group * g.group + in_group;
  int64_t count = g.group - in_group;
  if (count > block.length) count = block.length;
  if (count > g.k - start) count = g.k - start;
  if (count < 0) count = 0;
  load_row(x, dtype, row + start, count, out);
  for (int64_t i = count; i < block.length; i++) out[i] = 0;
}

void quantize_rows(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, int8_t* codes, float* scales, float* sums) {
  alignas(64) float v[MAX_BLOCK];
  for (int64_t m = m0; m < m1; m++)
    for (int64_t b = 0; b < g.blocks; b++) {
      const Block block = block_at(g, b);
      load_block(x, dtype, m * stride, g, block, v);
      uint32_t largest = 0;  // of the bits of |v|: a NaN is larger than all, so it reaches the scale and the whole row
      for (int64_t i = 0; i < block.length; i++) {
        const uint32_t bits = float_to_bits(v[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
      }
      const float absmax = bits_to_float(largest), inverse = absmax > 0x1p-120f ? 127.0f / absmax : 0.0f;
      int8_t* out = codes + m * g.k_padded + block.k0;
      int32_t sum = 0;
      if (largest >= 0x7f800000u) {
        for (int64_t i = 0; i < block.length; i++) out[i] = 1;  // any code: the scale below makes the row NaN or infinite
      } else {
        for (int64_t i = 0; i < block.length; i++) {
          const int32_t q = int32_t((v[i] * inverse + 0x1.8p23f) - 0x1.8p23f);  // round half to even
          out[i] = int8_t(q);
          sum += q;
        }
      }
      scales[m * g.blocks + b] = largest >= 0x7f800000u ? bits_to_float(0x7fc00000u) : absmax / 127.0f;
      sums[m * g.blocks + b] = float(sum);
    }
}

void convert_rows(const void* x, Dtype dtype, int64_t stride, const Geometry& g, int64_t m0, int64_t m1, float* out, float* sums) {
  for (int64_t m = m0; m < m1; m++)
    for (int64_t b = 0; b < g.blocks; b++) {
      const Block block = block_at(g, b);
      float* v = out + m * g.k_padded + block.k0;
      load_block(x, dtype, m * stride, g, block, v);
      float sum = 0;
      for (int64_t i = 0; i < block.length; i++) sum += v[i];
      sums[m * g.blocks + b] = sum;
    }
}

// ---- roofline probes -------------------------------------------------------------------------------------------------------------------

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

int64_t dot_s8_rounds(int64_t rounds) {
  const Weight none{};
  alignas(64) uint8_t bytes[128];
  alignas(64) int8_t x[64];
  for (int i = 0; i < 128; i++) bytes[i] = uint8_t(i);
  for (int i = 0; i < 64; i++) x[i] = int8_t(i - 32);
  I sum[MAX_ROWS][WIDE];
  for (auto& row : sum) for (auto& s : row) s = set1_i(0);
  for (int64_t i = 0; i < rounds; i++) {
    B weights[WIDE];
    for (int p = 0; p < WIDE; p++) weights[p] = S8Bytes::weight(bytes + 16 * p, 0, none);
    for (int r = 0; r < MAX_ROWS; r++)
      for (int p = 0; p < WIDE; p++) mac_s8<true>(sum[r][p], weights[p], x + 4 * r);
    __asm__ volatile("" : : "r"(bytes), "r"(x) : "memory");
  }
  alignas(64) float out[16];
  int64_t total = 0;
  for (auto& row : sum) for (auto& s : row) { store_f(out, to_float(s)); total += int64_t(out[0]); }
  return total;
}

int64_t fma_f32_rounds(int64_t rounds) {
  alignas(64) float w[80], x[16];
  for (int i = 0; i < 80; i++) w[i] = float(i) * 1e-3f;
  for (int i = 0; i < 16; i++) x[i] = float(i) * 1e-3f;
  F sum[MAX_ROWS][WIDE];
  for (auto& row : sum) for (auto& s : row) s = zero_f();
  for (int64_t i = 0; i < rounds; i++) {
    F weights[WIDE];
    for (int p = 0; p < WIDE; p++) weights[p] = load_f(w + 16 * p);
    for (int r = 0; r < MAX_ROWS; r++)
      for (int p = 0; p < WIDE; p++) mac_f(sum[r][p], weights[p], x[r]);
    __asm__ volatile("" : : "r"(w), "r"(x) : "memory");
  }
  alignas(64) float out[16];
  float total = 0;
  for (auto& row : sum) for (auto& s : row) { store_f(out, s); total += out[0]; }
  return int64_t(total);
}

#define QK_LEVEL(NAME) \
  {NAME, quantize_rows, convert_rows, multiply<true>, multiply<false>, dequantize, best_scales, encode, read_bytes, dot_s8_rounds, fma_f32_rounds, int(SCRATCH_ACC + SCRATCH_WEIGHTS)}
