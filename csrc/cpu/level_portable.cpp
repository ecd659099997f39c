// The kernels compiled for one instruction set; everything in an anonymous namespace, so that no symbol is shared with other levels.

#include <array>
#include <cstddef>
#include <utility>

#include "cpu/kernels.h"

namespace qk {
namespace {
#include "cpu/numbers.h"
#include "cpu/simd_portable.h"
#include "cpu/multiply.h"
}  // namespace
extern const Level level_portable;
const Level level_portable = QK_LEVEL("portable");
}  // namespace qk
