// Rows of activations become int8: codes, a scale each, and the sum of its codes.
//
// As qkernels/kernels/triton/jit/int8.py has it: the scale is the largest magnitude / 127, codes are to the nearest, ties to even, and the
// product that is rounded is exact. A row that is not finite gets the scale NaN, and codes 0; one of at most 2^-118 counts as zeros: its scale
// would have lost bits. Divisions are to the nearest, too, which Triton's need not be: scales may differ in their last bits. A block has a row.

#include "cuda/tile.cuh"

namespace qk {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, EACH = 8;  // columns of a thread at a time
constexpr uint32_t INFINITE = 0x7f800000;
constexpr float WHOLE = 12582912.0f;  // 1.5 · 2^23: floats next to it are whole numbers, and their last bits an integer

struct Arguments {
  const uint8_t* x;  // [M, K], `stride` bytes from row to row
  int8_t* codes;     // [M, padded]
  float* rows;       // scales [M], then sums of codes [M]
  int64_t stride;
  int m, k, padded;
  bool aligned;  // addresses of all rows: multiples of 16
};

// Columns `first` and up of a row, zeros beyond the last.
template <Kind KIND>
__device__ void load(float (&to)[EACH], const Arguments& a, const uint8_t* row, int first) {
  constexpr int PER_WORD = KIND == Kind::f32 ? 1 : 2;
  if (a.aligned && first + EACH <= a.k) {
    uint4 words[2 / PER_WORD];
#pragma unroll
    for (int i = 0; i < 2 / PER_WORD; ++i) words[i] = reinterpret_cast<const uint4*>(row)[first / EACH * (2 / PER_WORD) + i];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(words)[i / PER_WORD];
      to[i] = number_of(PER_WORD == 1 ? word : word >> 16 * (i % 2) & 0xffff, KIND);
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) to[i] = first + i < a.k ? number(row, first + i, KIND) : 0.0f;
  }
}

// What `combine` makes of all threads' values; `shared`: where every warp leaves its own.
template <class F>
__device__ uint32_t of_all(uint32_t value, uint32_t shared, F combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lanes));
  store_shared_u32(shared + threadIdx.x / 32 * 4, value);
  __syncthreads();
  uint32_t warps[2][4];
  load_shared(warps[0], shared), load_shared(warps[1], shared + 16);
  value = warps[0][0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) value = combine(value, warps[i / 4][i % 4]);
  return value;
}

template <Kind KIND>
__global__ void __launch_bounds__(THREADS) quantize(const __grid_constant__ Arguments a) {
  const uint32_t shared = shared_memory();
  const uint8_t* row = a.x + blockIdx.x * a.stride;
  float x[EACH];
  wait_for_previous();
  let_next_begin();
  uint32_t largest = 0;  // of the bits of magnitudes, which are in the order of their values; infinity and NaN come last
  for (int first = threadIdx.x * EACH; first < a.k; first += THREADS * EACH) {
    load<KIND>(x, a, row, first);
#pragma unroll
    for (int i = 0; i < EACH; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
  }
  largest = of_all(largest, shared, [](uint32_t a, uint32_t b) { return max(a, b); });
  const float amax = __uint_as_float(largest);
  const bool usable = amax > 3.0e-36f && largest < INFINITE;
  const float inverse = usable ? 127.0f / amax : 0.0f;
  uint32_t total = 0;
  for (int first = threadIdx.x * EACH; first < a.padded; first += THREADS * EACH) {
    load<KIND>(x, a, row, first);
    uint32_t codes[EACH / 4] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint32_t code = usable ? __float_as_uint(fmaf(x[i], inverse, WHOLE)) - __float_as_uint(WHOLE) : 0;
      codes[i / 4] |= (code & 0xff) << 8 * (i % 4);
      total += code;
    }
    *reinterpret_cast<uint2*>(a.codes + int64_t(blockIdx.x) * a.padded + first) = make_uint2(codes[0], codes[1]);
  }
  total = of_all(total, shared + 4 * WARPS, [](uint32_t a, uint32_t b) { return a + b; });
  if (threadIdx.x == 0) {
    a.rows[blockIdx.x] = usable ? amax / 127.0f : largest < INFINITE ? 0.0f : __uint_as_float(0x7fc00000);
    a.rows[a.m + blockIdx.x] = float(int(total));
  }
}

// codes int8 [M, padded], padded a multiple of 16, and rows [2, M] of x [M, K].
void s8_quantize(Tensor x, Tensor codes, Tensor rows, bool early, int64_t stream) {
  Arguments a{};
  const Kind kind = kind_of(x);
  a.m = int(x.size(0)), a.k = int(x.size(1)), a.padded = int(codes.size(1));
  a.x = static_cast<const uint8_t*>(x.const_data_ptr()), a.stride = x.stride(0) * bytes_of(kind);
  a.codes = static_cast<int8_t*>(codes.mutable_data_ptr()), a.rows = static_cast<float*>(rows.mutable_data_ptr());
  a.aligned = (reinterpret_cast<uintptr_t>(a.x) | uintptr_t(a.stride)) % 16 == 0;
  STD_TORCH_CHECK(a.m > 0 && x.stride(1) == 1 && codes.is_contiguous() && codes.size(0) == a.m && a.padded % 16 == 0 && a.padded >= a.k &&
                      rows.is_contiguous() && rows.numel() == 2 * a.m,
                  "codes [", codes.size(0), ", ", a.padded, "] and ", rows.numel(), " numbers do not fit x [", a.m, ", ", a.k, "]");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(a.m)), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = 2 * 4 * WARPS;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = early;
  const auto kernel = kind == Kind::f32 ? quantize<Kind::f32> : kind == Kind::f16 ? quantize<Kind::f16> : quantize<Kind::bf16>;
  check(cudaLaunchKernelEx(&config, kernel, a));
}

}  // namespace
}  // namespace qk

STABLE_TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def("s8_quantize(Tensor x, Tensor(a!) codes, Tensor(b!) rows, bool early, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("s8_quantize", TORCH_BOX(&qk::s8_quantize)); }
