// The kernels compiled for one instruction set; everything in an anonymous namespace, so that no symbol is shared with other levels.
#include <immintrin.h>
#include <array>
#include <cstddef>
#include <utility>

#include "cpu/kernels.h"

namespace qk {
namespace {
#define QK_FETCH_NEAR  // Zen3 reads alike at all distances, if all lines are fetched; Intel's CPUs want them near
#include "cpu/numbers.h"
#include "cpu/simd_avx2.h"
#include "cpu/multiply.h"
}  // namespace
extern const Level level_avx2;
const Level level_avx2 = QK_LEVEL("avx2");
}  // namespace qk
