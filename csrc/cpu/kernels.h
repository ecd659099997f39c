// What a level (one instruction set) offers to the ops, and the plain data that passes between them. No torch, no SIMD types here.
//
// Packed weight, for every width of 1 to 8 bits: panels of 16 output rows; in a panel, tiles of 16 rows x 8 k. Four panels are a strip, and
// a strip holds its tiles in order of k, then of panels: a kernel reads one run of memory. The panels that remain are strips of one.
// A tile's 128 codes in the order of k / 4, row, k % 4 lie in planes, their lowest bits first: of 8 bits or of 4, of 2 and of 1, whose sum is
// the width. In a plane of b bits code c is in byte c % 16b, from bit b * (c / 16b) on. So 32-bit lane n of 64 bytes is row n's, always.
// Every group of K is padded to a multiple of 8 (with code 0 against activations of 0). Groups longer than MAX_BLOCK are worked
// through in blocks: an int8 activation scale serves one block, and int32 sums stay exact in fp32.
#pragma once
#include <cstdint>

namespace qk {

constexpr int PANEL = 16, TILE_K = 8, STRIP = 4, MAX_BLOCK = 256;
constexpr int64_t LEAST_INNER = 16, MOST_INNER = MAX_BLOCK / LEAST_INNER;  // columns with one integer scale; such groups of a block
constexpr int64_t MOST_ROWS = 512;  // of x at a time: their sums with a strip take 128 KiB of scratch
constexpr int64_t ALWAYS = INT64_MAX;

enum class Dtype { f32, bf16, f16, e4m3, e8m0, u8, i8 };
// Nested blocks that are kept as they lie, of 256 columns; see nested.h.
enum class Nested { none, iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, tq1_0 };
constexpr int64_t NESTED_K = 256;
static inline constexpr int64_t nested_bytes(Nested type) {
  constexpr int64_t BYTES[] = {0, 50, 56, 66, 74, 82, 98, 110, 54};
  return BYTES[int(type)];
}

enum class CodeKind { integer, table, e4m3, e5m2 };

struct Geometry {  // how K is cut: real k, groups, blocks
  int64_t k, group, group_padded, groups, k_padded, blocks;
};

static inline Geometry make_geometry(int64_t k, int64_t group) {
  auto up8 = [](int64_t v) { return (v + TILE_K - 1) / TILE_K * TILE_K; };
  Geometry g{};
  g.k = k;
  g.group = group < k ? group : k;
  g.group_padded = up8(g.group);
  g.groups = (k + g.group - 1) / g.group;
  g.k_padded = (g.groups - 1) * g.group_padded + up8(k - (g.groups - 1) * g.group);
  const int64_t last = g.k_padded - (g.groups - 1) * g.group_padded;
  g.blocks = (g.groups - 1) * ((g.group_padded + MAX_BLOCK - 1) / MAX_BLOCK) + (last + MAX_BLOCK - 1) / MAX_BLOCK;
  return g;
}

struct Block {  // [k0, k0 + length) of the padded K, all in `group`
  int64_t group, k0, length, group_end;
};

static inline Block block_from(const Geometry& g, int64_t group, int64_t k0) {
  const int64_t end = group + 1 < g.groups ? (group + 1) * g.group_padded : g.k_padded;
  return {group, k0, end - k0 < MAX_BLOCK ? end - k0 : MAX_BLOCK, end};
}
static inline Block first_block(const Geometry& g) { return block_from(g, 0, 0); }
static inline Block block_after(const Geometry& g, const Block& b) {
  const int64_t k0 = b.k0 + b.length;
  return block_from(g, b.group + (k0 == b.group_end), k0);
}

struct Weight {
  Geometry geometry;
  int64_t n;
  int bits;
  CodeKind kind;
  int offset;  // integer: value = code - offset;  int8 tables: value = entry - offset
  const uint8_t* codes;  // [strips, k_padded / 8, panels of the strip, 16 * bits]; nested: [n, k / 256, bytes of a block], without scales
  Nested nested;
  const uint8_t* grid;  // [points, 4 or 8] int8, what the indices of nested blocks name; or null
  const void* scales;  // [strips, groups, panels of the strip, scale_lanes]
  Dtype scale_dtype;
  int scale_lanes;  // 16: one a row; 1: one for the panel
  const void* zeros;  // like scales, or null
  Dtype zero_dtype;
  bool minima;  // the zeros are added to a value times its scale, as they are
  // f16 [strips, groups / per_outer, 1 or with minima 2, panels of the strip, 16], or null: what the scales of per_outer groups are
  // multiplied by, and then the minima
  const uint16_t* outer;
  int64_t per_outer;
  // int8 kernels, where scales and minima are integers of so many columns each (see scaled.h): the geometry's groups are then those of the
  // outer scales, all of MAX_BLOCK. Else 0.
  int64_t inner;
  // Codes of up to 4 bits. Float kernels: the value of each code; integers are centred, that is code - 2^(bits - 1), and `centre` is
  // what a zero point has to be lessened by: the products cancel less, and the shortest conversion gives it.
  alignas(64) float table[16];
  alignas(64) uint16_t table_bf16[32];  // the same, twice over
  alignas(64) uint8_t table_u8[16];  // as int8 + 128, for the int8 kernels, in units of 1/127 of the largest or exact
  alignas(16) uint8_t table_s8[16], table_magnitudes[16];  // as int8 without the 128; and their magnitudes
  alignas(16) uint8_t table_low[16];  // table_u8 less the lowest of it
  int lowest, span;  // of table_u8
  float centre;
  float alpha;  // multiplies everything
};

static inline int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

struct Place {  // of a panel: how many there are before its strip, and before it in its strip, which has so many
  int64_t before, in_strip, panels;
};
static inline Place place_of(const Weight& w, int64_t panel) {
  const int64_t before = panel / STRIP * STRIP;
  return before + STRIP <= panels_of(w.n) ? Place{before, panel - before, STRIP} : Place{panel, 0, 1};
}
// Of the tile at column k: k_padded * 2 * bits is what one panel takes.
static inline const uint8_t* codes_at(const Weight& w, int64_t panel, int64_t k) {
  const Place p = place_of(w, panel);
  return w.codes + (p.before * w.geometry.k_padded + k * p.panels + p.in_strip * TILE_K) * 2 * w.bits;
}
// How many panels' scales, or zeros, of one group there are before these.
static inline int64_t numbers_at(const Weight& w, const Place& p, int64_t group) {
  return p.before * w.geometry.groups + group * p.panels + p.in_strip;
}
static inline const uint16_t* outer_at(const Weight& w, const Place& p, int64_t group, bool of_minima) {
  const int64_t levels = w.minima ? 2 : 1, at = group / w.per_outer * levels + of_minima;
  return w.outer + (p.before * (w.geometry.groups / w.per_outer * levels) + at * p.panels + p.in_strip) * PANEL;
}

// Of the integer scales, or minima, of some panels: those of a block's inner group.
static inline int64_t inner_at(const Weight& w, const Place& p, int64_t block, int64_t group) {
  const int64_t inner_groups = MAX_BLOCK / w.inner;
  return p.before * w.geometry.groups * inner_groups + (block * inner_groups + group) * p.panels + p.in_strip;
}

static inline bool has_few_codes(const Weight& w) { return w.kind == CodeKind::integer && w.bits <= 4; }  // below 16

struct Activations {  // block by block: what a tile reads lies together, and rows are no power of two apart, which would share cache sets
  int64_t m;
  void* values;  // per block [m, length]: int8, float or bf16. bf16: the 8 of a tile in the order 0 2 1 3 4 6 5 7, see Bf16Nibbles
  float* sums;  // [m, blocks]  sum of the values, times their scale
  float* scales;  // [blocks, m]  int8 only
  // int8 only: what a block's sum of products starts from, as codes are unsigned [blocks, m]; where scales are integers, an inner group's
  // [blocks, MAX_BLOCK / inner, m]
  int32_t* starts;
  int16_t* inner_sums;  // [blocks, m, MOST_INNER]  of the values of every inner group, where scales are integers
};

struct Output {
  void* y;  // [m, n]
  Dtype dtype;
  const float* bias;  // [n] or null
};

struct Rows {  // x [m, k]
  const void* x;
  Dtype dtype;
  int64_t stride;  // elements
  const int32_t* perm;  // [k] or null: column j of the weight goes with column perm[j] of x
};

struct Arithmetic {  // one way to multiply; a level that lacks it has nulls
  int value_bytes;  // of an activation
  void (*prepare_rows)(const Rows&, const Weight&, int64_t m0, int64_t m1, const Activations&);  // rows m0…m1
  // rows m0…m1, MOST_ROWS at most, times panels p0…p1, some strips or what remains of them; scratch: scratch_bytes of this thread, 64-byte
  // aligned
  void (*multiply)(const Weight&, const Activations&, const Output&, int64_t m0, int64_t m1, int64_t p0, int64_t p1, char* scratch);
  // roofline probe: `rounds` register tiles of independent multiply-adds; returns how many multiply-adds that was
  int64_t (*probe)(int64_t rounds);
  int64_t strips;  // that multiply() takes at most, side by side: the activations then come from beyond L2 once for them all
};

constexpr int MAX_CANDIDATES = 64;

struct Grid {  // the values of a code, to round to
  float low, high;  // integers: the ends
  int count;  // tables: values in ascending order; a number beyond thresholds[i] belongs to values[i + 1] or a later one
  const float *values, *thresholds;  // null for integers
  const uint8_t* codes;  // of each value
  int sign;  // tables of magnitudes: the bit of the code that negates; else 0
};

struct Grouped {  // a weight before it is quantised, with one scale and zero per group, or several to choose from
  const void* weight;  // [n, k]
  Dtype dtype;
  int64_t n, k, group_n, group_k, groups_k, groups;  // groups_k of the `groups` lie side by side
  const float *scales, *zeros;  // [groups, candidates]; zeros may be null
  int64_t candidates;
  Grid grid;
};

enum class Read { one, four, fetched };  // streams; or one whose lines are fetched beforehand, as kernels do

struct Level {
  const char* name;
  Arithmetic s8, pairs, f32, bf16;  // pairs: s8 with half the products (see DotPairs), for weights that has_few_codes
  int scratch_bytes;
  void (*dequantize)(const Weight&, int64_t p0, int64_t p1, float* out);  // panels p0…p1 to floats [n, k]
  void (*to_floats)(const void* x, Dtype, int64_t first, int64_t count, float* out);
  // of groups g0…g1 the best candidate and its error; the codes [n, k] of rows r0…r1
  void (*best_scales)(const Grouped&, int64_t g0, int64_t g1, int64_t* best, float* errors);
  void (*encode)(const Grouped&, int64_t r0, int64_t r1, uint8_t* codes);
  int64_t (*read_bytes)(const char* p, int64_t bytes, Read how);  // roofline probe: read, and return a checksum
};

const Level* best_level();  // the highest that this machine has, or the one that was forced
bool set_level(const char* name);  // "" takes the highest; false when this machine lacks it
bool has_level(const char* name);
bool pairs_pay();  // this CPU adds bytes beside its products; where both share their ports, pairs are slower
constexpr int64_t PAIRS_FROM = 24;  // rows of x from which they make up for a trip of the codes through scratch: measured on Zen4

}  // namespace qk
