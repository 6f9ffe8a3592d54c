// PTX that attention alone uses, as in common/ptx.cuh: one function an instruction.
#pragma once

#include "common/ptx.cuh"

namespace ptx {

// 2 to the power of x, to about 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounds two floats to 16 bits, the first in the low half.
template <bool kBf16>
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
    u32 pair;
    if constexpr (kBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// Two e4m3 numbers become fp16, the low byte in the low half: from compute capability 8.9 on.
__device__ __forceinline__ u32 widen_e4m3_pair(u16 pair) {
    u32 wide;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(pair));
    return wide;
}

__device__ __forceinline__ u32 load_shared(u32 shared) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
    return word;
}

__device__ __forceinline__ float load_shared_float(u32 shared) { return __uint_as_float(load_shared(shared)); }

__device__ __forceinline__ void store_shared(u32 shared, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}

__device__ __forceinline__ void store_shared_16(u32 shared, u16 half) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(half) : "memory");
}

__device__ __forceinline__ uint4 load_shared_four(u32 shared) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(shared)
                 : "memory");
    return words;
}

__device__ __forceinline__ void store_shared_four(u32 shared, uint4 words) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}

}  // namespace ptx
