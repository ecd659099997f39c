// CUDA's language and the part of its runtime and driver that launches the kernels, on the machine of machine.h.
#pragma once

#include "machine.h"
#include "numbers.h"

#include <torch/csrc/stable/library.h>

#include <utility>

// One frame holds all of a thread's variables, and each has its place for itself, as registers have: products still read them afterwards.
#define __device__ __attribute__((always_inline))
#define __host__
#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__
#define __CUDA_ARCH_FEAT_SM90_ALL 1

// The operators are the CPU's, in a namespace of their own.
#define EMULATED_FRAGMENT(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(ns, m, C10_UID)
#define EMULATED_IMPL(ns, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_FRAGMENT
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) EMULATED_FRAGMENT(EMULATED_AS, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) EMULATED_IMPL(EMULATED_AS, m)

// For tests: what decides the order of threads; memory that holds its contents only when the kernel before the next one has ended.
#define EMULATED_FOR_TESTS extern "C" inline __attribute__((visibility("default"), used))
EMULATED_FOR_TESTS void set_seed(unsigned seed) { emulated::seed = seed, emulated::late.clear(); }  // a launch may have been refused
EMULATED_FOR_TESTS void set_late(void* to, const void* from, size_t bytes) { emulated::late.push_back({to, from, bytes}); }

// -- in a kernel -------------------------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, gridDim, blockDim;
using std::max;
using std::min;

inline void __syncthreads() { emulated::meet(0, int(emulated::threads)); }
inline void __syncwarp() { emulated::meet(16 + int(threadIdx.x) / 32, 32); }
inline void __trap() { emulated::fail("a trap"); }
inline bool __syncthreads_or(bool given) {
  bool& any = emulated::current->block->any;
  any |= given;
  __syncthreads();
  const bool result = any;
  __syncthreads();
  any = false;
  __syncthreads();
  return result;
}
inline void __threadfence() { emulated::let_stores_be_seen(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  struct Lane {
    T value, result;
    int other;
  } lane{value, value, other};
  emulated::together(lane, [](Lane* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[i ^ lanes[i]->other]->value;
  });
  return lane.result;
}

template <class T>
T __shfl_sync(unsigned, T value, int from, int width) {
  struct Lane {
    T value, result;
    int from;
  } lane{value, value, from + int(threadIdx.x) % 32 / width * width};
  emulated::together(lane, [](Lane* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->from]->value;
  });
  return lane.result;
}

inline int atomicAdd(int* p, int value) {
  ++emulated::progress;
  return std::exchange(*p, *p + value);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  emulated::leave([p, value] { *p = value; });
}

// -- launching --------------------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return emulated::error.c_str(); }

constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class F>
cudaError_t cudaFuncSetAttribute(F, int, int) {
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  const auto set_place = [](const emulated::Fibre& f) {
    const unsigned i = f.block->index;
    threadIdx.x = f.thread, blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
  };
  emulated::run_grid(gridDim.x * gridDim.y * gridDim.z, blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); }, set_place);
  return emulated::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// -- the driver's description of a matrix ---------------------------------------------------------------------------------------------

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr int cudaEnableDefault = 0;

struct CUtensorMap {
  const uint8_t* from = nullptr;
  int columns = 0, rows = 0, size = 0, box_rows = 0;  // columns of `size` bytes; a box has 128 bytes of a row
  int64_t stride = 0;  // bytes
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* from, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* every, int, int swizzle, int,
                                       int) {
  const int size = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && strides[0] % 16 == 0;
  const bool of_a_box = box[0] * size == 128 && box[1] <= 256 && every[0] == 1 && every[1] == 1;
  if (rank != 2 || !aligned || !swizzled || !of_a_box || !sizes[0] || !sizes[1]) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(from), int(sizes[0]), int(sizes[1]), size, int(box[1]), int64_t(strides[0])};
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, int, int, cudaDriverEntryPointQueryResult* result) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
