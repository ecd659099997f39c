// The kernels, written once over the 16-row vectors of a simd_*.h. Included inside each level's anonymous namespace.
//
// Weights come straight from their packed form (few rows) or from a scratch panel that is unpacked once for many rows.
#include "cpu/tile.h"
#include "cpu/unpack.h"
#include "cpu/rows.h"
#include "cpu/probe.h"
#include "cpu/search.h"

constexpr int64_t ROW_CHUNK = 256;  // rows whose accumulators lie in scratch at a time
constexpr int64_t SCRATCH_WEIGHTS = WIDE * MAX_BLOCK * PANEL * 4;  // bytes: a block of floats, or several of shorter numbers; near L1's size
constexpr int64_t SCRATCH_ACC = ROW_CHUNK * WIDE * PANEL * 4;

struct Job {  // rows m0…m1 times PANELS panels from `panel` on
  const Weight& w;
  const Activations& x;
  const Output& out;
  int64_t m0, m1, panel;
  float* acc;
  uint8_t* unpacked;
  int64_t rows() const { return m1 - m0; }
};

template <class Source, int PANELS>
void direct(const Job& j) {
  const int64_t stride = j.w.geometry.k_padded * 2 * j.w.bits;
  __builtin_memset(j.acc, 0, size_t(j.rows() * PANELS * PANEL * 4));
  rows_of_tiles<Source, PANELS>(j.w, j.x, j.m0, j.m1, j.panel, 0, j.w.geometry.blocks, j.w.codes + j.panel * stride, stride, j.acc);
  write_rows(j.w, j.out, j.m0, j.m1, j.panel, PANELS, j.acc);
}

template <class Unpacked, int PANELS>
void through_scratch(const Job& j) {
  const Geometry& g = j.w.geometry;
  const int64_t bytes_per_k = Unpacked::TILE_BYTES / TILE_K, stride = g.k_padded * 2 * j.w.bits;
  const int64_t most_k = SCRATCH_WEIGHTS / (bytes_per_k * WIDE);
  __builtin_memset(j.acc, 0, size_t(j.rows() * PANELS * PANEL * 4));
  for (int64_t b0 = 0, b1; b0 < g.blocks; b0 = b1) {
    const int64_t k0 = block_at(g, b0).k0;
    int64_t k1 = k0;
    for (b1 = b0; b1 < g.blocks; b1++) {
      const Block next = block_at(g, b1);
      if (next.k0 + next.length - k0 > most_k) break;
      k1 = next.k0 + next.length;
    }
    const int64_t panel_bytes = (k1 - k0) * bytes_per_k;
    for (int p = 0; p < PANELS; p++)
      unpack(Unpacked{}, j.w, j.w.codes + (j.panel + p) * stride + k0 * 2 * j.w.bits, k1 - k0, j.unpacked + p * panel_bytes);
    rows_of_tiles<Unpacked, PANELS>(j.w, j.x, j.m0, j.m1, j.panel, b0, b1, j.unpacked, panel_bytes, j.acc);
  }
  write_rows(j.w, j.out, j.m0, j.m1, j.panel, PANELS, j.acc);
}

// Up to a few rows (FEW_…, of the level), unpacking in registers again for every tile is cheaper than a trip through scratch.

struct ByS8 {
  template <int PANELS>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 8) direct<S8Bytes, PANELS>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_S8) integers ? direct<S8Nibbles, PANELS>(j) : direct<S8Table, PANELS>(j);
    else if (j.w.bits <= 4 && integers) through_scratch<S8Unpacked, PANELS>(j);
    else through_scratch<S8Bytes, PANELS>(j);
  }
};

struct ByF32 {
  template <int PANELS>
  static void panels(const Job& j) {
    const bool integers = j.w.kind == CodeKind::integer;
    if (j.w.bits == 4 && integers && j.rows() <= FEW_INTEGERS) direct<F32Integers, PANELS>(j);
    else if (j.w.bits == 4 && j.rows() <= FEW_TABLE) direct<F32Table, PANELS>(j);
    else if (j.w.bits == 8 && integers && j.rows() <= FEW_INTEGERS) direct<F32Bytes, PANELS>(j);
    else through_scratch<F32Unpacked, PANELS>(j);
  }
};

#ifdef QK_BF16_DOT
struct ByBf16 {
  template <int PANELS>
  static void panels(const Job& j) {
    if (j.w.bits == 4 && j.rows() <= FEW_INTEGERS) direct<Bf16Nibbles, PANELS>(j);
    else if (j.w.bits == 8 && j.rows() <= FEW_INTEGERS && j.w.kind == CodeKind::integer) direct<Bf16Bytes, PANELS>(j);
    else through_scratch<Bf16Unpacked, PANELS>(j);
  }
};
#endif

template <class By>
void multiply(const Weight& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch) {
  for (int64_t m = m0; m < m1; m += ROW_CHUNK) {
    Job j{w, x, out, m, m + ROW_CHUNK < m1 ? m + ROW_CHUNK : m1, p0, reinterpret_cast<float*>(scratch), reinterpret_cast<uint8_t*>(scratch + SCRATCH_ACC)};
    // Rows that would make two wide tiles, but one tall one: the tall one unpacks once.
    if (j.rows() > MAX_ROWS<WIDE> && j.rows() <= MAX_ROWS<TALL>)
      for (; j.panel + TALL <= p1; j.panel += TALL) By::template panels<TALL>(j);
    for (; j.panel + WIDE <= p1; j.panel += WIDE) By::template panels<WIDE>(j);
    for (; j.panel < p1; j.panel++) By::template panels<1>(j);
  }
}

constexpr Arithmetic S8_ARITHMETIC = {1, rows_to_s8, multiply<ByS8>, probe<S8Unpacked>};
constexpr Arithmetic F32_ARITHMETIC = {4, rows_to_f32, multiply<ByF32>, probe<F32Unpacked>};
#ifdef QK_BF16_DOT
constexpr Arithmetic BF16_ARITHMETIC = {2, rows_to_bf16, multiply<ByBf16>, probe<Bf16Unpacked>};
#else
constexpr Arithmetic BF16_ARITHMETIC = {};
#endif

#define QK_LEVEL(NAME) \
  {NAME, S8_ARITHMETIC, F32_ARITHMETIC, BF16_ARITHMETIC, int(SCRATCH_ACC + SCRATCH_WEIGHTS), dequantize, to_floats, best_scales, encode, read_bytes}
