// PTX of NVIDIA's GPUs from sm_75 on, a function each; what only some have says so. Hopper's own instructions are in cuda/hopper.cuh, what a
// host can do as well in bits.h. No other file has a line of it: tests/cuda_emulation has the same functions in plain C++.
#pragma once

#include "common/bits.h"

namespace qk {

// -- shared memory, by address -----------------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Where what a launch gave the block begins.
__device__ inline uint32_t shared_memory() {
  extern __shared__ __align__(1024) uint8_t shared[];
  return shared_address(shared);
}

__device__ inline void load_shared(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ inline void load_shared(uint32_t (&to)[2], uint32_t at) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(at) : "memory");
}
__device__ inline void load_shared(uint32_t (&to)[1], uint32_t at) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(at) : "memory");
}
__device__ inline uint32_t load_shared_u8(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}
__device__ inline uint16_t load_shared_u16(uint32_t at) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at));
  return value;
}
__device__ inline float load_shared_f32(uint32_t at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at));
  return value;
}
__device__ inline void store_shared(uint32_t at, const uint32_t (&from)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
}
__device__ inline void store_shared_u32(uint32_t at, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
__device__ inline void store_shared_f32(uint32_t at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}

// Of some warps of a block; barrier 0 is __syncthreads's.
__device__ inline void sync_warps(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// -- global to shared memory behind the program's back (before sm_80: at once), in groups of one thread -------------------------------------

// 4 bytes.
__device__ inline void copy_async_word(uint32_t to, const uint32_t* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
  store_shared_u32(to, *from);
#endif
}

// 16 bytes; zeros where nothing is `there`: `from` is then not read. Without a hint to the cache: with one ptxas 13.0 at times takes the
// address, from sm_90 on, out of uniform registers that nobody wrote, which ended in an error on an H200. tests/test_cuda.py looks for it.
__device__ inline void copy_async(uint32_t to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
#else
  const uint4 v = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  store_shared(to, {v.x, v.y, v.z, v.w});
#endif
}
__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last PENDING groups have arrived; other threads see them after a barrier.
template <int PENDING>
__device__ inline void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// -- global memory -----------------------------------------------------------------------------------------------------------------------

// What the L2 cache does with bytes that are read: keeps them like any others, or drops them first (sm_80).
__device__ inline uint64_t cache_policy(bool once) {
  uint64_t policy;
  if (once) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// 16 bytes that nothing writes, and that nobody reads again soon.
__device__ inline uint4 load_once(const void* from) {
  uint4 v;
#if __CUDA_ARCH__ >= 800
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(cache_policy(true)));
#else
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
#endif
  return v;
}

// Flags: what was written before one is raised is seen by those that waited for it.
__device__ inline void raise_flag(int* flag) { asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory"); }

__device__ inline void wait_for_flag(const int* flag) {
  int raised;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  while (raised == 0);
}

// -- launches that overlap, on Hopper and newer --------------------------------------------------------------------------------------------

// Wait until the kernel before this one has ended and its writes are seen; let the next one begin.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Registers keep their value up to here: a product reads and writes them while the program goes on.
__device__ inline void keep(uint32_t& r) { asm volatile("" : "+r"(r)::"memory"); }
__device__ inline void keep(float& r) { asm volatile("" : "+f"(r)::"memory"); }
__device__ inline void keep(int& r) { asm volatile("" : "+r"(r)::"memory"); }

// -- products of a warp. Lane 4 g + c has of d [16, 8] rows g and g + 8, columns 2 c and 2 c + 1 ------------------------

// Four 8 x 8 matrices of 16 bits; `at`, of lane 8 j + r: row r of matrix j, 16 bytes. Lane 4 g + c gets of each row g, numbers 2 c and 2 c + 1.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}

// An 8 x 8 matrix of 16 bits, turned over: lane 4 g + c has numbers 2 c and 2 c + 1 of row g, before and after.
__device__ inline uint32_t turn(uint32_t pair) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// d [16, 8] += a [16, 16] · b [16, 8] (bf16: sm_80). Lane 4 g + c: a[2 h + r] has row g + 8 r, b[h] column g, both numbers 8 h + 2 c
// and the next.
#define QK_MULTIPLY(T, NAME)                                                                                                          \
  __device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {                                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                          \
  }
QK_MULTIPLY(bf16, "bf16")
#if __CUDA_ARCH__ >= 800
QK_MULTIPLY(f16, "f16")
#else
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
  }
}
#endif
#undef QK_MULTIPLY

// d [16, 8] += a [16, 32] · b [32, 8] of int8 (sm_80), likewise: numbers 16 h + 4 c and the next three.
__device__ inline void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace qk
