// The torch ops over the CPU kernels, through the LibTorch stable ABI: checks, buffers, threads. No arithmetic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace qk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Float8_e4m3fn: return Dtype::e4m3;
    case ScalarType::Byte: return Dtype::u8;
    case ScalarType::Char: return Dtype::i8;
    default: STD_TORCH_CHECK(false, what, " has a dtype that the CPU kernels do not know");
  }
}

bool is_activation(Dtype d) { return d == Dtype::f32 || d == Dtype::bf16 || d == Dtype::f16; }

// Memory of one thread that grows and is kept: calls are short, and fresh pages would cost more than the work.
class Buffer {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(p_);
      size_ = (bytes + (1 << 16)) & ~size_t(4095);
      p_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (p_ == nullptr) size_ = 0;
      STD_TORCH_CHECK(p_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
    }
    return p_;
  }
  ~Buffer() { std::free(p_); }

 private:
  char* p_ = nullptr;
  size_t size_ = 0;
};

Nested nested_of(const std::string& code) {
  const char* names[] = {"", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0"};
  const auto found = std::find(std::begin(names), std::end(names), code);
  return found == std::end(names) ? Nested::none : Nested(found - names);
}

CodeKind kind_of(const std::string& code) {
  if (code == "int") return CodeKind::integer;
  if (code == "table") return CodeKind::table;
  if (code == "e4m3") return CodeKind::e4m3;
  STD_TORCH_CHECK(code == "e5m2", "code is int, table, e4m3 or e5m2, not ", code);
  return CodeKind::e5m2;
}

uint16_t nearest_bf16(float f) {  // of a finite number
  const auto u = std::bit_cast<uint32_t>(f);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

void check_dense(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), what, " must be contiguous on the CPU");
}

// What is kept as it lies: its values come apart as codes of 8 bits.
void set_nested(Weight& w, const Tensor& qweight, const std::optional<Tensor>& scales, const std::optional<Tensor>& grid) {
  const int64_t points[] = {0, 2048, 2048, 256, 512, 1024, 256, 512, 0}, of_point = w.nested < Nested::iq3_xxs ? 8 : 4;
  const int64_t count = points[int(w.nested)] * of_point, bytes = w.n * (w.geometry.k / NESTED_K) * nested_bytes(w.nested);
  STD_TORCH_CHECK(w.geometry.k % NESTED_K == 0 && NESTED_K % w.geometry.group == 0 && w.geometry.group % PANEL == 0 && w.bits == 8 &&
                      w.offset == 128 && !scales,
                  "nested blocks have 256 columns, groups of 16 to 256, 8 bits, 128 for 0, and hold their scales");
  STD_TORCH_CHECK(qweight.scalar_type() == ScalarType::Byte && qweight.numel() == bytes, "qweight must hold ", bytes,
                  " bytes for this n and k; it has ", qweight.numel());
  STD_TORCH_CHECK(grid.has_value() == (count > 0), "vector codebooks go with a table, others without");
  if (grid) {
    check_dense(*grid, "table");
    STD_TORCH_CHECK(grid->scalar_type() == ScalarType::Char && grid->numel() == count, "table must hold ", count, " of int8");
    w.grid = static_cast<const uint8_t*>(grid->const_data_ptr());
  }
}

// tensor_scale: one float for the whole weight, or halves for the scales of every few groups.
void set_outer(Weight& w, const Tensor& tensor_scale) {
  check_dense(tensor_scale, "tensor_scale");
  if (tensor_scale.scalar_type() == ScalarType::Float && tensor_scale.numel() == 1) {
    w.alpha *= *static_cast<const float*>(tensor_scale.const_data_ptr());
    return;
  }
  const int64_t one = panels_of(w.n) * PANEL * (w.minima ? 2 : 1), count = tensor_scale.numel() / one, groups = w.geometry.groups;
  STD_TORCH_CHECK(
      tensor_scale.scalar_type() == ScalarType::Half && count >= 1 && tensor_scale.numel() == count * one && groups % count == 0,
      "tensor_scale is one float, or ", one, " halves for every so many of the ", groups, " groups; it holds ", tensor_scale.numel());
  const auto is_byte = [](Dtype d) { return d == Dtype::u8 || d == Dtype::i8; };
  STD_TORCH_CHECK(is_byte(w.scale_dtype) && w.scale_lanes == PANEL && (w.zeros == nullptr || (w.minima && is_byte(w.zero_dtype))),
                  "scales that have scales, and minima, are bytes, one a row");
  w.outer = static_cast<const uint16_t*>(tensor_scale.const_data_ptr()), w.per_outer = groups / count;
}

bool holds_sums_in_16_bits(const Weight& w, int64_t group) {  // of a group's products, at every level
  if (w.kind == CodeKind::table) return w.bits == 4;
  if (w.bits == 5) return w.offset == 0;
  if (w.bits == 6) return w.offset == 32 && group == 16;
  return w.bits <= 4 && w.offset < 16;
}

// Integer scales, to multiply integer sums by; where 16 bits do not hold those, they are as good as floats.
void set_inner(Weight& w) {
  const int64_t group = w.geometry.group;
  if (w.outer == nullptr || group * w.per_outer != MAX_BLOCK || (group != 16 && group != 32)) return;
  if (!holds_sums_in_16_bits(w, group)) return;
  w.inner = group, w.per_outer = 1, w.geometry = make_geometry(w.geometry.k, MAX_BLOCK);
}

void set_packed(Weight& w, const Tensor& qweight, const std::optional<Tensor>& scales, const std::optional<Tensor>& zeros) {
  const int64_t panels = panels_of(w.n), bytes = panels * w.geometry.k_padded * 2 * w.bits, numbers = panels * w.geometry.groups;
  STD_TORCH_CHECK(qweight.scalar_type() == ScalarType::Byte && qweight.numel() == bytes, "qweight must hold ", bytes,
                  " bytes for this n, k, bits and group; it has ", qweight.numel());
  STD_TORCH_CHECK(scales.has_value(), "scales are missing");
  check_dense(*scales, "scales");
  STD_TORCH_CHECK(scales->numel() == numbers || scales->numel() == numbers * PANEL, "scales must hold ", numbers, " or ", numbers * PANEL,
                  " numbers for this n, k and group; they hold ", scales->numel());
  w.scales = scales->const_data_ptr(), w.scale_dtype = dtype_of(*scales, "scales");
  w.scale_lanes = int(scales->numel() / numbers);
  if (zeros) {
    check_dense(*zeros, "zeros");
    STD_TORCH_CHECK(zeros->numel() == numbers * PANEL, "zeros must hold ", numbers * PANEL, " numbers for this n, k and group; they hold ",
                    zeros->numel());
    w.zeros = zeros->const_data_ptr(), w.zero_dtype = dtype_of(*zeros, "zeros");
  }
}

void set_table(Weight& w, const Tensor& table, bool int8) {
  check_dense(table, "table");
  STD_TORCH_CHECK(w.bits <= 4 && table.numel() == 16 && table.scalar_type() == ScalarType::Float,
                  "a table is 16 floats, for codes of up to 4 bits");
  const auto* t = static_cast<const float*>(table.const_data_ptr());
  float largest = 0;
  for (int i = 0; i < 16; i++) w.table[i] = t[i], largest = std::max(largest, std::fabs(t[i]));
  if (!int8) return;
  // Entries as int8 + 128; alpha brings them back. Half-integer tables (e2m1: up to 6) come out exact.
  bool halves = largest <= 63;
  for (int i = 0; i < 16; i++) halves = halves && t[i] * 2 == std::nearbyint(t[i] * 2);
  const float unit = halves ? 0.5f : largest / 127;
  for (int i = 0; i < 16; i++) w.table_u8[i] = uint8_t(int(std::nearbyint(t[i] / unit)) + 128);
  const auto [lowest, highest] = std::minmax_element(w.table_u8, w.table_u8 + 16);
  w.lowest = *lowest, w.span = *highest - *lowest;
  for (int i = 0; i < 16; i++) {
    const int value = w.table_u8[i] - 128;
    w.table_low[i] = uint8_t(w.table_u8[i] - w.lowest), w.table_s8[i] = uint8_t(value), w.table_magnitudes[i] = uint8_t(std::abs(value));
  }
  w.offset = 128, w.alpha *= unit;
}

// Check everything that the kernels will rely on: a packed weight may come from anywhere.
Weight weight_of(const Tensor& qweight, const std::optional<Tensor>& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& table, const std::optional<Tensor>& tensor_scale, int64_t n, int64_t k, int64_t bits,
                 int64_t group, const std::string& code, int64_t offset, bool minima, bool int8) {
  STD_TORCH_CHECK(n >= 1 && k >= 1 && group >= 1 && bits >= 1 && bits <= 8, "n, k and group are at least 1, bits 1 to 8; got ", n, ", ", k,
                  ", ", group, ", ", bits);
  Weight w{};
  w.geometry = make_geometry(k, group), w.n = n, w.bits = int(bits), w.offset = int(offset), w.minima = minima && zeros, w.alpha = 1;
  w.nested = nested_of(code), w.kind = w.nested != Nested::none ? CodeKind::integer : kind_of(code);
  check_dense(qweight, "qweight");
  w.codes = static_cast<const uint8_t*>(qweight.const_data_ptr());
  STD_TORCH_CHECK(!int8 || w.kind == CodeKind::integer || w.kind == CodeKind::table,
                  "int8 activations go with integer codes and tables, not ", code);
  if (w.kind == CodeKind::integer) {
    const int middle = 1 << (bits - 1);
    w.centre = float(middle - w.offset);
    for (int i = 0; i < 16; i++) w.table[i] = float(i - middle);
  }
  if (w.nested != Nested::none) {
    set_nested(w, qweight, scales, table);
  } else {
    set_packed(w, qweight, scales, zeros);
    STD_TORCH_CHECK(table.has_value() == (w.kind == CodeKind::table), "code = table goes with a table, others without");
    if (table) set_table(w, *table, int8);
  }
  for (int i = 0; i < 32; i++) w.table_bf16[i] = nearest_bf16(w.table[i % 16]);
  if (tensor_scale) set_outer(w, *tensor_scale);
  if (int8) set_inner(w);
  // The stable ABI has no such dtype yet: its bytes come instead.
  if (w.outer == nullptr && w.scale_dtype == Dtype::u8) w.scale_dtype = Dtype::e8m0;
  return w;
}

constexpr size_t L2_BYTES = 2 << 20;  // of the CPUs with AMX

struct alignas(64) Run {  // of tasks
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Every thread has a run of the tasks 0…count, and takes what others have left of theirs when its own is done: on a shared machine one CPU
// may be a third slower than the next for a while.
template <class Work>
void share(int64_t count, bool small, const Work& work) {
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  const auto first_of = [&](int64_t thread) { return count * thread / threads; };
  std::vector<Run> runs(static_cast<size_t>(threads));
  for (int64_t t = 0; Run& run : runs) run.next = first_of(t), run.end = first_of(++t);
  const auto work_from = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t i = 0; i < threads; i++) {
        Run& run = runs[size_t((t + i) % threads)];
        while (run.next < run.end)
          if (const int64_t task = run.next++; task < run.end) work(task);
      }
  };
  threads == 1 ? work_from(0, 1) : torch::stable::parallel_for(0, threads, 1, work_from);
}

// work(m0, m1, p0, p1) for all the rows, cut as much as memory and the threads ask for, and every strip of panels, up to `together` at a time.
template <class Work>
void share_strips(int64_t m, int64_t n, int64_t together, bool small, const Work& work) {
  const int64_t panels = panels_of(n), strips = (panels + STRIP - 1) / STRIP, threads = torch::stable::get_num_threads();
  const int64_t idle = std::clamp<int64_t>(threads / strips, 1, std::max<int64_t>(1, m / 16));
  const int64_t parts = std::max(idle, (m + MOST_ROWS - 1) / MOST_ROWS);
  const int64_t taken = std::clamp<int64_t>(parts * strips / (4 * threads), 1, together);  // so that every thread has several tasks
  const int64_t tasks = (strips + taken - 1) / taken;
  share(parts * tasks, small, [&](int64_t task) {
    const int64_t part = task / tasks, panel = task % tasks * taken * STRIP;
    work(m * part / parts, m * (part + 1) / parts, panel, std::min<int64_t>(panel + taken * STRIP, panels));
  });
}

template <class Work>
void share_rows(int64_t m, bool small, const Work& work) {
  if (small || torch::stable::get_num_threads() == 1) return work(0, m);
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, m / torch::stable::get_num_threads()), work);
}

const int32_t* checked_perm(const std::optional<Tensor>& perm, int64_t k) {
  if (!perm) return nullptr;
  check_dense(*perm, "perm");
  STD_TORCH_CHECK(perm->scalar_type() == ScalarType::Int && perm->numel() == k, "perm must hold ", k, " of int32");
  const auto* p = static_cast<const int32_t*>(perm->const_data_ptr());
  uint32_t beyond = 0;
  for (int64_t i = 0; i < k; i++) beyond |= uint32_t(uint32_t(p[i]) >= uint32_t(k));
  STD_TORCH_CHECK(beyond == 0, "perm holds numbers that are no columns of x");
  return p;
}

const float* bias_floats(const std::optional<Tensor>& bias, int64_t n, const Level& level, Buffer& buffer) {
  if (!bias) return nullptr;
  check_dense(*bias, "bias");
  STD_TORCH_CHECK(bias->numel() == n, "bias must have ", n, " elements, not ", bias->numel());
  const Dtype dtype = dtype_of(*bias, "bias");
  STD_TORCH_CHECK(is_activation(dtype), "bias must be float32, bfloat16 or float16");
  if (dtype == Dtype::f32) return static_cast<const float*>(bias->const_data_ptr());
  auto* out = reinterpret_cast<float*>(buffer.at_least(size_t(n) * 4));
  level.to_floats(bias->const_data_ptr(), dtype, 0, n, out);
  return out;
}

// [..., n] like x [..., k]. Not new_empty: a way through the dispatcher takes a fifth of the call of a small layer.
Tensor empty_rows(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = n;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  AtenTensorHandle y = nullptr;
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

template <bool S8>
Tensor linear(Tensor x, Tensor qweight, std::optional<Tensor> scales, std::optional<Tensor> zeros, std::optional<Tensor> table,
              std::optional<Tensor> tensor_scale, std::optional<Tensor> perm, std::optional<Tensor> bias, int64_t n, int64_t bits,
              int64_t group, std::string code, int64_t offset, bool minima) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x must be a CPU tensor of at least one dimension");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(is_activation(dtype), "x must be float32, bfloat16 or float16");
  const int64_t k = x.size(x.dim() - 1);
  const Weight w = weight_of(qweight, scales, zeros, table, tensor_scale, n, k, bits, group, code, offset, minima, S8);
  if (!(x.dim() == 2 && x.stride(1) == 1) && !x.is_contiguous()) x = torch::stable::contiguous(x);
  Tensor y = empty_rows(x, n);
  const int64_t m = k == 0 ? 0 : x.numel() / k;
  if (m == 0) return y;
  const int64_t stride = x.dim() == 2 ? x.stride(0) : k;
  const Geometry& g = w.geometry;
  const Level& level = *best_level();

  // bf16 products are exact in fp32: for bf16 activations the levels that have them lose nothing, but for tables that bf16 rounds.
  const bool pairs = m >= PAIRS_FROM && has_few_codes(w) && level.pairs.multiply && pairs_pay();
  const Arithmetic& by = S8 ? pairs ? level.pairs : level.s8 : dtype == Dtype::bf16 && level.bf16.multiply ? level.bf16 : level.f32;

  static thread_local Buffer activations, bias_buffer;
  const size_t values = (size_t(m) * g.k_padded * by.value_bytes + 63) / 64 * 64, blocks = size_t(m) * g.blocks;
  const size_t starts = w.inner != 0 ? blocks * size_t(MAX_BLOCK / w.inner) : blocks, inner = w.inner != 0 ? blocks * MOST_INNER : 0;
  char* memory = activations.at_least(values + (2 * blocks + starts) * 4 + inner * 2);
  auto* of_blocks = reinterpret_cast<float*>(memory + values);
  auto* first = reinterpret_cast<int32_t*>(of_blocks + 2 * blocks);
  const Activations a{m, memory, of_blocks, of_blocks + blocks, first, reinterpret_cast<int16_t*>(first + starts)};
  const Rows rows{x.const_data_ptr(), dtype, stride, checked_perm(perm, k)};
  share_rows(m, m * k < 64 * 1024, [&](int64_t m0, int64_t m1) { by.prepare_rows(rows, w, m0, m1, a); });
  const Output out{y.mutable_data_ptr(), dtype, bias_floats(bias, n, level, bias_buffer)};
  const int64_t together = values > L2_BYTES / 2 ? by.strips : 1;
  share_strips(m, n, together, m * n * k < 256 * 1024, [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
    static thread_local Buffer scratch;
    by.multiply(w, a, out, m0, m1, p0, p1, scratch.at_least(size_t(level.scratch_bytes)));
  });
  return y;
}

Tensor dequantize(Tensor qweight, std::optional<Tensor> scales, std::optional<Tensor> zeros, std::optional<Tensor> table,
                  std::optional<Tensor> tensor_scale, int64_t n, int64_t k, int64_t bits, int64_t group, std::string code, int64_t offset,
                  bool minima) {
  const Weight w = weight_of(qweight, scales, zeros, table, tensor_scale, n, k, bits, group, code, offset, minima, false);
  Tensor out = torch::stable::new_empty(qweight, {n, k}, ScalarType::Float);
  auto* p = static_cast<float*>(out.mutable_data_ptr());
  share_strips(1, n, 1, n * k < 64 * 1024, [&](int64_t, int64_t, int64_t p0, int64_t p1) { best_level()->dequantize(w, p0, p1, p); });
  return out;
}

bool set_level_op(std::string name) {
  STD_TORCH_CHECK(set_level(name.c_str()), "this machine does not have the level ", name);
  return true;
}
bool has_level_op(std::string name) { return has_level(name.c_str()); }
std::string level_op() { return best_level()->name; }

// Roofline probes: the rate of all threads together, 0 where the level lacks the arithmetic. what: "read", "read4" and "fetch": bytes of
// buffer a second, each thread in one stream, in four, or in one whose lines are fetched beforehand; "s8", "f32", "bf16": multiply-adds a second.
double probe(std::string what, Tensor buffer, int64_t rounds) {
  constexpr int64_t PIECE = 256 << 10;  // bytes that a thread reads at a time
  const Level& level = *best_level();
  const int64_t threads = torch::stable::get_num_threads(), bytes = buffer.numel();
  check_dense(buffer, "buffer");
  STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Byte, "buffer must be uint8");
  const Read how = what == "read4" ? Read::four : what == "fetch" ? Read::fetched : Read::one;
  const bool reads = how != Read::one || what == "read";
  STD_TORCH_CHECK(reads || what == "s8" || what == "f32" || what == "bf16", "what is read, read4, fetch, s8, f32 or bf16, not ", what);
  const char* p = static_cast<const char*>(buffer.const_data_ptr());
  const auto run = what == "s8" ? level.s8.probe : what == "f32" ? level.f32.probe : level.bf16.probe;
  if (!reads && run == nullptr) return 0;
  std::atomic<int64_t> done{0};
  const auto start = std::chrono::steady_clock::now();
  share(reads ? (bytes + PIECE - 1) / PIECE : threads, false, [&](int64_t task) {
    if (!reads) return void(done += run(rounds));
    const int64_t first = task * PIECE, length = std::min(PIECE, bytes - first), sum = level.read_bytes(p + first, length, how);
    __asm__ volatile("" : : "r"(sum));  // somebody may look at it
    done += length;
  });
  return double(done) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace
}  // namespace qk

#define QK_WEIGHT "Tensor qweight, Tensor? scales, Tensor? zeros, Tensor? table, Tensor? tensor_scale"
#define QK_CODE "int bits, int group, str code, int offset, bool minima"

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def("cpu_linear_s8(Tensor x, " QK_WEIGHT ", Tensor? perm, Tensor? bias, int n, " QK_CODE ") -> Tensor");
  m.def("cpu_linear_f32(Tensor x, " QK_WEIGHT ", Tensor? perm, Tensor? bias, int n, " QK_CODE ") -> Tensor");
  m.def("cpu_dequantize(" QK_WEIGHT ", int n, int k, " QK_CODE ") -> Tensor");
  m.def("cpu_set_level(str name) -> bool");
  m.def("cpu_has_level(str name) -> bool");
  m.def("cpu_level() -> str");
  m.def("cpu_probe(str what, Tensor buffer, int rounds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("cpu_linear_s8", TORCH_BOX(&qk::linear<true>));
  m.impl("cpu_linear_f32", TORCH_BOX(&qk::linear<false>));
  m.impl("cpu_dequantize", TORCH_BOX(&qk::dequantize));
  m.impl("cpu_probe", TORCH_BOX(&qk::probe));
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_set_level", TORCH_BOX(&qk::set_level_op));
  m.impl("cpu_has_level", TORCH_BOX(&qk::has_level_op));
  m.impl("cpu_level", TORCH_BOX(&qk::level_op));
}
