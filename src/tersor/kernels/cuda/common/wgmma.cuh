// Warpgroup matrix multiply, sm_90a: D[64, N] += A[64, 16] * B[16, N] in float32 with A in registers (the fragment of
// mma.m16n8k16 for each warp's 16 rows) and B in shared memory, rows of 64 channels under a 128-byte swizzle
// (PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions"). Of bytes there are twice as many channels; those of
// int8 add up in int32, which wraps. One overload a width: operands cannot be counted, so lists of them grow by eight sums,
// which are 16 columns.
#pragma once

#include "common/ptx.cuh"

namespace wgmma {

// Orders this warpgroup's register writes before the products that read them.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups of products are under way.
template <int kPending>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes B: start address, 1024 bytes between groups of eight rows, 128-byte swizzle.
__device__ __forceinline__ u64 describe(u32 shared) {
    return static_cast<u64>((shared & 0x3FFFF) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

// What a distance in shared memory adds to a description.
__device__ __forceinline__ constexpr u64 offset(int bytes) { return bytes >> 4; }

// Types of the operands: weights in registers and activations in shared memory, 16-bit of one type, 8-bit of two: the
// names are those of the weights, beside 8-bit floats activations are e4m3.
enum Kind { kFloat16, kBfloat16, kE4m3, kE5m2, kInt8 };

// run(d, a, b, accumulate) adds when `accumulate`, else overwrites d. A step is 16 channels of 16-bit floats or 32 of
// 8-bit ones: 32 bytes.
template <Kind kKind>
struct Multiply;

// Names of the first so many sums, %0 on, in the text of an instruction.
#define TERSOR_NAMES_4 "%0, %1, %2, %3"
#define TERSOR_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TERSOR_NAMES_16 TERSOR_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TERSOR_NAMES_24 TERSOR_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TERSOR_NAMES_32 TERSOR_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TERSOR_NAMES_40 TERSOR_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TERSOR_NAMES_48 TERSOR_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TERSOR_NAMES_56 TERSOR_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TERSOR_NAMES_64 TERSOR_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TERSOR_NAMES_72 TERSOR_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define TERSOR_NAMES_80 TERSOR_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define TERSOR_NAMES_88 TERSOR_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TERSOR_NAMES_96 TERSOR_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TERSOR_NAMES_104 TERSOR_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define TERSOR_NAMES_112 TERSOR_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define TERSOR_NAMES_120 TERSOR_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define TERSOR_NAMES_128 TERSOR_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

// The sums themselves, float32 but where TERSOR_SUM says otherwise.
#define TERSOR_SUM "+f"
#define TERSOR_SUMS_AT(i) TERSOR_SUM(d[i]), TERSOR_SUM(d[i + 1]), TERSOR_SUM(d[i + 2]), TERSOR_SUM(d[i + 3])
#define TERSOR_SUMS_4 TERSOR_SUMS_AT(0)
#define TERSOR_SUMS_8 TERSOR_SUMS_AT(0), TERSOR_SUMS_AT(4)
#define TERSOR_SUMS_16 TERSOR_SUMS_8, TERSOR_SUMS_AT(8), TERSOR_SUMS_AT(12)
#define TERSOR_SUMS_24 TERSOR_SUMS_16, TERSOR_SUMS_AT(16), TERSOR_SUMS_AT(20)
#define TERSOR_SUMS_32 TERSOR_SUMS_24, TERSOR_SUMS_AT(24), TERSOR_SUMS_AT(28)
#define TERSOR_SUMS_40 TERSOR_SUMS_32, TERSOR_SUMS_AT(32), TERSOR_SUMS_AT(36)
#define TERSOR_SUMS_48 TERSOR_SUMS_40, TERSOR_SUMS_AT(40), TERSOR_SUMS_AT(44)
#define TERSOR_SUMS_56 TERSOR_SUMS_48, TERSOR_SUMS_AT(48), TERSOR_SUMS_AT(52)
#define TERSOR_SUMS_64 TERSOR_SUMS_56, TERSOR_SUMS_AT(56), TERSOR_SUMS_AT(60)
#define TERSOR_SUMS_72 TERSOR_SUMS_64, TERSOR_SUMS_AT(64), TERSOR_SUMS_AT(68)
#define TERSOR_SUMS_80 TERSOR_SUMS_72, TERSOR_SUMS_AT(72), TERSOR_SUMS_AT(76)
#define TERSOR_SUMS_88 TERSOR_SUMS_80, TERSOR_SUMS_AT(80), TERSOR_SUMS_AT(84)
#define TERSOR_SUMS_96 TERSOR_SUMS_88, TERSOR_SUMS_AT(88), TERSOR_SUMS_AT(92)
#define TERSOR_SUMS_104 TERSOR_SUMS_96, TERSOR_SUMS_AT(96), TERSOR_SUMS_AT(100)
#define TERSOR_SUMS_112 TERSOR_SUMS_104, TERSOR_SUMS_AT(104), TERSOR_SUMS_AT(108)
#define TERSOR_SUMS_120 TERSOR_SUMS_112, TERSOR_SUMS_AT(112), TERSOR_SUMS_AT(116)
#define TERSOR_SUMS_128 TERSOR_SUMS_120, TERSOR_SUMS_AT(120), TERSOR_SUMS_AT(124)

// The overload of one width: COLUMNS, SUMS (half as many) and the names of the operands behind the sums.
#define TERSOR_RUN(SUM, K, TYPES, LAST, COLUMNS, SUMS, A, B, ADDS)                                                   \
    static __device__ __forceinline__ void run(SUM (&d)[SUMS], const u32* a, u64 b, int accumulate) {                \
        asm volatile(                                                                                                \
            "{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k" K "."       \
            TYPES " {" TERSOR_NAMES_##SUMS "}, {" A "}, " B ", p" LAST "; }"                                         \
            : TERSOR_SUMS_##SUMS                                                                                     \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                  \
    }

#define TERSOR_MULTIPLY(KIND, SUM, K, TYPES, LAST)                                                                   \
template <>                                                                                                          \
struct Multiply<KIND> {                                                                                              \
    TERSOR_RUN(SUM, K, TYPES, LAST, 8, 4, "%4, %5, %6, %7", "%8", "%9")                                              \
    TERSOR_RUN(SUM, K, TYPES, LAST, 16, 8, "%8, %9, %10, %11", "%12", "%13")                                         \
    TERSOR_RUN(SUM, K, TYPES, LAST, 32, 16, "%16, %17, %18, %19", "%20", "%21")                                      \
    TERSOR_RUN(SUM, K, TYPES, LAST, 48, 24, "%24, %25, %26, %27", "%28", "%29")                                      \
    TERSOR_RUN(SUM, K, TYPES, LAST, 64, 32, "%32, %33, %34, %35", "%36", "%37")                                      \
    TERSOR_RUN(SUM, K, TYPES, LAST, 80, 40, "%40, %41, %42, %43", "%44", "%45")                                      \
    TERSOR_RUN(SUM, K, TYPES, LAST, 96, 48, "%48, %49, %50, %51", "%52", "%53")                                      \
    TERSOR_RUN(SUM, K, TYPES, LAST, 112, 56, "%56, %57, %58, %59", "%60", "%61")                                     \
    TERSOR_RUN(SUM, K, TYPES, LAST, 128, 64, "%64, %65, %66, %67", "%68", "%69")                                     \
    TERSOR_RUN(SUM, K, TYPES, LAST, 144, 72, "%72, %73, %74, %75", "%76", "%77")                                     \
    TERSOR_RUN(SUM, K, TYPES, LAST, 160, 80, "%80, %81, %82, %83", "%84", "%85")                                     \
    TERSOR_RUN(SUM, K, TYPES, LAST, 176, 88, "%88, %89, %90, %91", "%92", "%93")                                     \
    TERSOR_RUN(SUM, K, TYPES, LAST, 192, 96, "%96, %97, %98, %99", "%100", "%101")                                   \
    TERSOR_RUN(SUM, K, TYPES, LAST, 208, 104, "%104, %105, %106, %107", "%108", "%109")                              \
    TERSOR_RUN(SUM, K, TYPES, LAST, 224, 112, "%112, %113, %114, %115", "%116", "%117")                              \
    TERSOR_RUN(SUM, K, TYPES, LAST, 240, 120, "%120, %121, %122, %123", "%124", "%125")                              \
    TERSOR_RUN(SUM, K, TYPES, LAST, 256, 128, "%128, %129, %130, %131", "%132", "%133")                              \
};

TERSOR_MULTIPLY(kFloat16, float, "16", "f32.f16.f16", ", 1, 1, 0")
TERSOR_MULTIPLY(kBfloat16, float, "16", "f32.bf16.bf16", ", 1, 1, 0")
TERSOR_MULTIPLY(kE4m3, float, "32", "f32.e4m3.e4m3", ", 1, 1")
TERSOR_MULTIPLY(kE5m2, float, "32", "f32.e5m2.e4m3", ", 1, 1")
#undef TERSOR_SUM
#define TERSOR_SUM "+r"
TERSOR_MULTIPLY(kInt8, int, "32", "s32.s8.s8", "")
#undef TERSOR_SUM
#define TERSOR_SUM "+f"
#undef TERSOR_MULTIPLY
#undef TERSOR_RUN

}  // namespace wgmma
