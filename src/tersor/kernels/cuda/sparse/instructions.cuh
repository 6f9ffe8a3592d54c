// The instructions that sparse/expand.cuh needs beside those of common/ptx.cuh.
#pragma once

#include "common/ptx.cuh"

namespace ptx {

// The 32 bits of two words from bit `by` % 32 on.
__device__ __forceinline__ u32 shift_around(u32 low, u32 high, u32 by) {
    u32 result;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(by));
    return result;
}

// The same from bit `by` on, which is 32 at most.
__device__ __forceinline__ u32 shift(u32 low, u32 high, u32 by) {
    u32 result;
    asm("shf.r.clamp.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(by));
    return result;
}

// Four e4m3, the first in the lowest byte, as two pairs of fp16.
__device__ __forceinline__ void widen_e4m3_four(u32 four, u32& low, u32& high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high)
        : "r"(four));
}

// A word of shared memory that no copy is on its way to.
__device__ __forceinline__ u32 word(const char* at) { return *reinterpret_cast<const u32*>(at); }

// What other CTAs have counted up to by `arrive`; what they wrote ahead of that is there for whoever reads it after this.
__device__ __forceinline__ u32 arrived_at(const u32* counter) {
    u32 count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}

}  // namespace ptx
