// Hopper's own instructions (sm_90a), a function each: barriers in shared memory, the copy engine, warpgroup products, registers by role.
// Those of older GPUs, too, are in common/ptx.h; tests/cuda_emulation has the same functions in plain C++.
#pragma once

#include "common/ptx.h"

#include <cuda.h>

namespace qk {

// -- barriers: addresses are those of shared memory ------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// The copy engine sees the barriers that were made.
__device__ inline void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// -- shared memory -----------------------------------------------------------------------------------------------------------------------

// Of a warp: four 8 x 8 matrices of 16 bits, held as products hold their sums, each turned over. Lane 8 j + r says where row r of the
// turned matrix j goes, 16 bytes.
__device__ inline void store_turned(uint32_t to, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pairs[0]), "r"(pairs[1]),
               "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// -- the copy engine: global to shared memory, counted in bytes by a barrier -------------------------------------------------------------

// A box of a matrix; what lies outside of the matrix arrives as zeros.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& from, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(&from), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// Bytes in a row, multiples of 16.
__device__ inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

// -- registers by role: all warps of a warpgroup ask together ------------------------------------------------------------------------------

template <int COUNT>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// -- products of a warpgroup: d [64, N] += a · b, a [64, 16 or 32] in registers or shared memory, b [16 or 32, N] in shared memory ----------

// An operand in shared memory: rows of 128 bytes along K, their 16-byte pieces swizzled as the copy engine does it for 128 bytes.
__device__ inline uint64_t swizzled_rows(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// PTX wants every register named. SIZE sums of a thread belong to products with 2 SIZE tokens; the operands after them have the next numbers.
#define QK_D4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define QK_D16(C, i) QK_D4(C, i), QK_D4(C, i + 4), QK_D4(C, i + 8), QK_D4(C, i + 12)
#define QK_D64(C) QK_D16(C, 0), QK_D16(C, 16), QK_D16(C, 32), QK_D16(C, 48)
#define QK_D128(C) QK_D64(C), QK_D16(C, 64), QK_D16(C, 80), QK_D16(C, 96), QK_D16(C, 112)
#define QK_N64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define QK_N128 QK_N64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92," \
  "%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117," \
  "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QK_FLOAT(r) "+f"(r)
#define QK_INT(r) "+r"(r)
#define QK_ASM(SHAPE, NAMES, D, AFTER, LAST, ...)                                                                              \
  asm volatile("{\n.reg .pred adding;\nsetp.ne.u32 adding, " LAST ", 0;\nwgmma.mma_async.sync.aligned." SHAPE " {" NAMES "}, " AFTER "\n}" \
               : D                                                                                                             \
               : __VA_ARGS__, "l"(b), "n"(ADD))
#define QK_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// ADD: to the sums that are there; else they begin.
#define QK_FLOATS(T, NAME, SIZE, N, A, B, LAST)                                                                                    \
  template <bool ADD>                                                                                                              \
  __device__ inline void multiply(float (&d)[SIZE], const uint32_t (&a)[4], uint64_t b, T) {                                        \
    QK_ASM("m64n" #N "k16.f32." NAME "." NAME, QK_N##SIZE, QK_D##SIZE(QK_FLOAT), A ", " B ", adding, 1, 1, 0;", LAST, QK_REGISTERS); \
  }
#define QK_INTS(SIZE, N, A, B, LAST, SHARED_B, SHARED_LAST)                                                                        \
  template <bool ADD>                                                                                                              \
  __device__ inline void multiply(int (&d)[SIZE], const uint32_t (&a)[4], uint64_t b) {                                             \
    QK_ASM("m64n" #N "k32.s32.s8.s8", QK_N##SIZE, QK_D##SIZE(QK_INT), A ", " B ", adding;", LAST, QK_REGISTERS);                    \
  }                                                                                                                                \
  template <bool ADD>                                                                                                              \
  __device__ inline void multiply(int (&d)[SIZE], uint64_t a, uint64_t b) {                                                        \
    QK_ASM("m64n" #N "k32.s32.s8.s8", QK_N##SIZE, QK_D##SIZE(QK_INT), "%" #SIZE ", " SHARED_B ", adding;", SHARED_LAST, "l"(a));    \
  }
#define QK_SIZES(F, ...)                                                \
  F(__VA_ARGS__, 64, 128, "{%64, %65, %66, %67}", "%68", "%69")          \
  F(__VA_ARGS__, 128, 256, "{%128, %129, %130, %131}", "%132", "%133")
QK_SIZES(QK_FLOATS, bf16, "bf16")
QK_SIZES(QK_FLOATS, f16, "f16")
QK_INTS(64, 128, "{%64, %65, %66, %67}", "%68", "%69", "%65", "%66")
QK_INTS(128, 256, "{%128, %129, %130, %131}", "%132", "%133", "%129", "%130")

}  // namespace qk
