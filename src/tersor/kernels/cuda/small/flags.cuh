// Flags between GPUs: words in memory that peers map, each written by one of them.
#pragma once

#include "common/ptx.cuh"

namespace flags {

// Sets a flag of a peer. What the CTA wrote before a barrier ahead of this is there for whoever then reads it.
__device__ __forceinline__ void set(u32* flag, u32 value) {
    asm volatile("fence.acq_rel.sys;\n\tst.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ u32 read(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

}  // namespace flags
