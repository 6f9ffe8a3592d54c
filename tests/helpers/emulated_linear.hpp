// What linear kernels of sm_90a use beside `emulated_sm90.hpp`: static shared memory, which a CTA finds as the one before
// left it, weights in registers of a product, and the exchange of split sums through memory. No clusters.
#pragma once

#include <cstddef>

alignas(1024) thread_local char slots[256 << 10];
#define attention_memory reinterpret_cast<unsigned char (&)[256 << 10]>(::slots)

#include "emulated_sm90.hpp"

#undef __shared__
#define __shared__ thread_local
#define __restrict__
#define __CUDACC__

inline float __fadd_rn(float a, float b) { return a + b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
template <class T> void __stcg(T* place, T value) { *place = value; }
inline void __threadfence() {}

namespace wgmma {

enum Kind { kFloat16, kBfloat16 };
template <Kind kKind> struct Multiply {
    template <int kSums> static void run(float (&d)[kSums], const u32* a, u64 b, int accumulate) {
        emulated::multiply<kKind == kBfloat16>(d, a, 0, b, false, accumulate);
    }
};
inline u64 describe(u32 shared) { return u64((shared & 0x3FFFF) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62); }
inline constexpr u64 offset(int bytes) { return bytes >> 4; }

}  // namespace wgmma

namespace ptx {

inline u64 evict_first_policy() { return 0; }
inline void bulk_copy_once(u32 shared, const void* global, u32 bytes, u32 barrier, u64) {
    bulk_copy(shared, global, bytes, barrier);
}
inline void launch_dependents() {}
inline void wait_for_earlier_kernels() {}
inline int cluster_ctas() { return 1; }
inline u32 rotate(u32 word, int left) { return word << left | word >> (32 - left); }
template <bool kBf16> u32 fused_multiply_add_pair(u32 a, u32 b, u32 c) {
    const auto half = [&](int i) {
        const float exact = fmaf(wide<kBf16>(half_of(a, i)), wide<kBf16>(half_of(b, i)), wide<kBf16>(half_of(c, i)));
        return static_cast<u32>(narrow<kBf16>(exact));
    };
    return half(0) | half(1) << 16;
}
inline u32 minimum_pair_f16(u32 a, u32 b) {
    const auto half = [&](int i) -> u32 {
        const float x = half_to_float(half_of(a, i)), y = half_to_float(half_of(b, i));
        return y != y || x < y ? half_of(a, i) : half_of(b, i);
    };
    return half(0) | half(1) << 16;
}

inline u32 permute(u32 low, u32 high, u32 selectors) { return __byte_perm(low, high, selectors); }
inline u32 shift(u32 low, u32 high, u32 by) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by < 32 ? by : 32));
}
inline u32 shift_around(u32 low, u32 high, u32 by) { return shift(low, high, by % 32); }

// What clusters and tiles of many tokens would use.
#define TERSOR_UNUSED(NAME)                     \
    template <class... All>                     \
    u32 NAME(All...) {                          \
        fail(#NAME);                            \
    }
TERSOR_UNUSED(copy_async_16_once)
TERSOR_UNUSED(copy_async_8_once)
TERSOR_UNUSED(prefetch)
TERSOR_UNUSED(address_in)
TERSOR_UNUSED(barrier_arrive_at)
TERSOR_UNUSED(store_in)
TERSOR_UNUSED(arrive_cluster)
TERSOR_UNUSED(wait_cluster)
TERSOR_UNUSED(tensor_copy_to_all)
TERSOR_UNUSED(store_matrices_turned)
#undef TERSOR_UNUSED
template <int kCtas> void tensor_copy_to_all(u32, const void*, int, int, u32) { fail("tensor_copy_to_all"); }

}  // namespace ptx
