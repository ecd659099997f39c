// The kernels compiled for one instruction set; everything in an anonymous namespace, so that no symbol is shared with other levels.
#include <immintrin.h>
#include <array>
#include <cstddef>
#include <utility>

#include "cpu/kernels.h"

#define QK_FETCH_TWICE  // AMD has no CPU that stops at this level
namespace qk {
namespace {
#include "cpu/numbers.h"
#include "cpu/simd_avx512.h"
#include "cpu/multiply.h"
}  // namespace
extern const Level level_avx512vnni;
const Level level_avx512vnni = QK_LEVEL("avx512vnni");
}  // namespace qk
