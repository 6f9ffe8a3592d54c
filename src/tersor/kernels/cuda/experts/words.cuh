// Words by which one CTA tells another a number: 0 as long as there is none. A word is the number and the news of it in
// one, so nothing else has to be in order.
#pragma once

#include "common/ptx.cuh"

namespace words {

__device__ __forceinline__ void put(u32* place, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(place), "r"(word) : "memory");
}

__device__ __forceinline__ u32 look(const u32* place) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(place) : "memory");
    return word;
}

}  // namespace words
