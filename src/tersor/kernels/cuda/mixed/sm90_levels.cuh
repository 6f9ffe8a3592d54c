// All levels of a mix, each with its code (sm90_level.cuh), and what a kernel asks of all of them. The parameters are those
// of sm90_mixed.cuh.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/tensor_map.cuh"
#include "mixed/sm90_call.cuh"

#define LEVEL 0
#include "mixed/sm90_level.cuh"
#undef LEVEL
#if LEVELS > 1
#define LEVEL 1
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 2
#define LEVEL 2
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 3
#define LEVEL 3
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 4
#define LEVEL 4
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 5
#define LEVEL 5
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 6
#define LEVEL 6
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif
#if LEVELS > 7
#define LEVEL 7
#include "mixed/sm90_level.cuh"
#undef LEVEL
#endif

// Calls EACH(level) for every level.
#define TERSOR_LEVELS_1(EACH) EACH(0)
#define TERSOR_LEVELS_2(EACH) TERSOR_LEVELS_1(EACH) EACH(1)
#define TERSOR_LEVELS_3(EACH) TERSOR_LEVELS_2(EACH) EACH(2)
#define TERSOR_LEVELS_4(EACH) TERSOR_LEVELS_3(EACH) EACH(3)
#define TERSOR_LEVELS_5(EACH) TERSOR_LEVELS_4(EACH) EACH(4)
#define TERSOR_LEVELS_6(EACH) TERSOR_LEVELS_5(EACH) EACH(5)
#define TERSOR_LEVELS_7(EACH) TERSOR_LEVELS_6(EACH) EACH(6)
#define TERSOR_LEVELS_8(EACH) TERSOR_LEVELS_7(EACH) EACH(7)
#define TERSOR_ALL(EACH) TERSOR_NUMBERED(TERSOR_LEVELS, LEVELS)(EACH)

namespace mixed {

constexpr int most(int one, int other) { return one > other ? one : other; }
constexpr int most_barriers() {
    int found = 0;
#define TERSOR_EACH(NUMBER) found = most(found, level_##NUMBER::linear::kSetBarriers);
    TERSOR_ALL(TERSOR_EACH)
#undef TERSOR_EACH
    return found;
}

}  // namespace mixed
