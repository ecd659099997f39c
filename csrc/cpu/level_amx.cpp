// The kernels compiled for one instruction set; everything in an anonymous namespace, so that no symbol is shared with other levels.
#include <immintrin.h>
#include <array>
#include <cstddef>
#include <utility>

#include "cpu/kernels.h"

#define QK_AMX
#define QK_FETCH_TWICE
#define QK_BASE level_avx512bf16
namespace qk {
extern const Level level_avx512bf16;
namespace {
#include "cpu/numbers.h"
#include "cpu/simd_avx512.h"
#include "cpu/multiply.h"
}  // namespace
extern const Level level_amx;
const Level level_amx = QK_LEVEL("amx");
}  // namespace qk
