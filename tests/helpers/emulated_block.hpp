// What kernels of norms, rows and sampling use beside `emulated.hpp`: static shared memory, which a CTA finds as the one
// before left it, sums and maxima over a warp, and atomics.
#pragma once

#include "emulated.hpp"

#undef __shared__
#define __shared__ static
#define __restrict__

struct int2 { int x, y; };

inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline u64 max(u64 a, u64 b) { return a > b ? a : b; }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint2float_rn(u32 x) { return static_cast<float>(x); }
inline u32 __float2uint_rz(float x) { return static_cast<u32>(x); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline double __ull2double_rn(u64 x) { return static_cast<double>(x); }
inline u64 __double2ull_ru(double x) { return static_cast<u64>(ceil(x)); }
template <class T> T atomicAdd(T* place, T value) {
    const T before = *place;
    *place += value;
    return before;
}
template <class T> T atomicMax(T* place, T value) {
    const T before = *place;
    *place = std::max(before, value);
    return before;
}

template <class F> u32 over_warp(u32 value, const F& join) {
    const auto& words = emulated::share({value});
    u32 all = static_cast<u32>(words[0][0]);
    for (int lane = 1; lane < 32; ++lane) all = join(all, static_cast<u32>(words[lane][0]));
    return all;
}
inline u32 __reduce_max_sync(u32, u32 value) {
    return over_warp(value, [](u32 a, u32 b) { return max(a, b); });
}
inline u32 __reduce_min_sync(u32, u32 value) {
    return over_warp(value, [](u32 a, u32 b) { return min(a, b); });
}
inline u32 __reduce_add_sync(u32, u32 value) {
    return over_warp(value, [](u32 a, u32 b) { return a + b; });
}
template <class T> T __shfl_up_sync(u32 mask, T value, int lanes) {
    const int lane = emulated::now % 32;
    return __shfl_sync(mask, value, lane < lanes ? lane : lane - lanes);
}
inline u32 __match_any_sync(u32, int value) {
    const auto& words = emulated::share({static_cast<u32>(value)});
    u32 peers = 0;
    for (int lane = 0; lane < 32; ++lane) peers |= (words[lane][0] == static_cast<u32>(value)) << lane;
    return peers;
}
inline int __syncthreads_count(bool given) {
    static int counts[2];
    const int turn = emulated::block.turn % 2;
    if (emulated::block.here == 0) counts[turn] = 0;
    counts[turn] += given;
    emulated::meet(emulated::block, blockDim.x);
    return counts[turn];
}

// Between CTAs of a launch, of which the last one waits and, here, is run when all others have ended.
namespace words {
inline void put(u32* place, u32 word) { *place = word; }
inline u32 look(const u32* place) {
    if (*place == 0) { fprintf(stderr, "a CTA waits for a word that does not come\n"); abort(); }
    return *place;
}
}  // namespace words
