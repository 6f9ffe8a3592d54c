// Instructions of sm_90a that attention alone uses: products of a warpgroup beside those of common/wgmma.cuh (PTX ISA 9.0,
// "Asynchronous Warpgroup Level Matrix Instructions"), a barrier that is told apart at run time, copies and arithmetic.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"

namespace ptx {

// Tells one of several barriers, kFirst + index, that this warp has come, as `arrive_threads` does.
template <int kFirst, int kThreads>
__device__ __forceinline__ void arrive_one_of(int index) {
    asm volatile("bar.arrive %0, %1;" ::"r"(kFirst + index), "n"(kThreads) : "memory");
}

// Elementwise a * b of two packed fp16 numbers.
__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// 1 / x, to about 1 unit in the last place; 0 for infinity.
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace ptx

namespace wgmma {

// D[64, N] (+)= A[64, 16] * B[16, N] in float32: run(d, a, b, accumulate) adds when `accumulate`, else overwrites d.
// MultiplyKeys: A and B in shared memory, their rows 16 channels each. MultiplyValues: A in registers, and of B the 16
// rows are tokens, whose channels are columns.
template <bool kBf16>
struct MultiplyKeys;
template <bool kBf16>
struct MultiplyValues;

#define TERSOR_KEYS(TYPES, COLUMNS, SUMS, A, B, ADDS)                                                                \
    static __device__ __forceinline__ void run(float (&d)[SUMS], u64 a, u64 b, int accumulate) {                     \
        asm volatile(                                                                                                \
            "{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32."      \
            TYPES " {" TERSOR_NAMES_##SUMS "}, " A ", " B ", p, 1, 1, 0, 0; }"                                       \
            : TERSOR_SUMS_##SUMS                                                                                     \
            : "l"(a), "l"(b), "r"(accumulate));                                                                      \
    }

#define TERSOR_VALUES(TYPES, COLUMNS, SUMS, A, B, ADDS)                                                              \
    static __device__ __forceinline__ void run(float (&d)[SUMS], const u32* a, u64 b, int accumulate) {              \
        asm volatile(                                                                                                \
            "{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32."      \
            TYPES " {" TERSOR_NAMES_##SUMS "}, {" A "}, " B ", p, 1, 1, 1; }"                                        \
            : TERSOR_SUMS_##SUMS                                                                                     \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                  \
    }

#define TERSOR_MULTIPLY_BOTH(BF16_TYPES, TYPES)                                                                      \
template <>                                                                                                          \
struct MultiplyKeys<BF16_TYPES> {                                                                                    \
    TERSOR_KEYS(TYPES, 64, 32, "%32", "%33", "%34")                                                                  \
    TERSOR_KEYS(TYPES, 128, 64, "%64", "%65", "%66")                                                                 \
};                                                                                                                   \
template <>                                                                                                          \
struct MultiplyValues<BF16_TYPES> {                                                                                  \
    TERSOR_VALUES(TYPES, 16, 8, "%8, %9, %10, %11", "%12", "%13")                                                    \
    TERSOR_VALUES(TYPES, 32, 16, "%16, %17, %18, %19", "%20", "%21")                                                 \
    TERSOR_VALUES(TYPES, 48, 24, "%24, %25, %26, %27", "%28", "%29")                                                 \
    TERSOR_VALUES(TYPES, 64, 32, "%32, %33, %34, %35", "%36", "%37")                                                 \
    TERSOR_VALUES(TYPES, 128, 64, "%64, %65, %66, %67", "%68", "%69")                                                \
    TERSOR_VALUES(TYPES, 192, 96, "%96, %97, %98, %99", "%100", "%101")                                              \
    TERSOR_VALUES(TYPES, 256, 128, "%128, %129, %130, %131", "%132", "%133")                                         \
};

TERSOR_MULTIPLY_BOTH(false, "f16.f16")
TERSOR_MULTIPLY_BOTH(true, "bf16.bf16")
#undef TERSOR_MULTIPLY_BOTH
#undef TERSOR_VALUES
#undef TERSOR_KEYS

}  // namespace wgmma
