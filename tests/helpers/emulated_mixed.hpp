// What kernels on the rings of dense/sm90_pipeline.cuh use beside `emulated_sm90.hpp`, but for clusters: static shared
// memory, decoding, products whose first operand is in registers, and results that are turned. Nobody reads a word of a
// pruned weight's values that a copy is on its way to.
#pragma once

#include "emulated_sm90.hpp"

#undef __shared__
#define __shared__ static
#define __CUDACC__

inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline void __stcg(float* p, float x) { *p = x; }
template <class T> T __ldg(const T* p) { return *p; }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace ptx {

struct Never {
    template <class T> operator T() const { fail("a cluster"); }
};
#define NEVER(name) template <int kCtas = 0, class... T> Never name(T...) { fail(#name); }
NEVER(address_in) NEVER(arrive_cluster) NEVER(barrier_arrive_at) NEVER(store_in) NEVER(sync_cluster)
NEVER(tensor_copy_to_all) NEVER(wait_cluster)
#undef NEVER

const bool scales_come_first = announced_late = true;

inline int cluster_ctas() { return 1; }
inline void launch_dependents() {}
inline void prefetch(const void* place) { *static_cast<const volatile char*>(place); }
inline void wait_for_earlier_kernels() {}
inline u64 evict_first_policy() { return 0; }
inline void copy_async_16_once(u32 shared, const void* global, u64) { copy(shared, global, 16, 16); }
inline void copy_async_8_once(u32 shared, const void* global, u64) { copy(shared, global, 8, 8); }
inline void bulk_copy_once(u32 shared, const void* global, u32 bytes, u32 barrier, u64) {
    bulk_copy(shared, global, bytes, barrier);
}
template <int kId, int kThreads> void arrive_threads() { come(kId, kThreads); }
inline u32 shift(u32 low, u32 high, u32 by) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by < 32 ? by : 32));
}
inline void widen_e4m3_four(u32 four, u32& low, u32& high) {
    low = widen_e4m3_pair(half_of(four, 0));
    high = widen_e4m3_pair(half_of(four, 1));
}
inline u32 word(const char* at) {
    const u32 place = shared_address(at);
    for (const Box& one : boxes) {
        if (one.map.rows == 0 && place - one.shared < one.map.columns) fail("a word that a copy is on its way to", place);
    }
    return word_at(place);
}
inline u32 arrived_at(const u32* counter) { return *counter; }
inline u32 shift_around(u32 low, u32 high, u32 by) { return shift(low, high, by % 32); }
inline u32 rotate(u32 word, int left) { return word << left | word >> (32 - left); }
inline u32 repeat_signs(u32 bytes) { return (bytes >> 7 & 0x01010101u) * 0xFFu; }
template <bool kBf16> u32 fused_multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 halves[2];
    for (int i = 0; i < 2; ++i) {
        const double product = static_cast<double>(wide<kBf16>(half_of(a, i))) * wide<kBf16>(half_of(b, i));
        halves[i] = narrow<kBf16>(static_cast<float>(product + wide<kBf16>(half_of(c, i))));
    }
    return halves[0] | halves[1] << 16;
}
inline u32 equal_halves(u32 a, u32 b) {
    u32 mask = 0;
    for (int i = 0; i < 2; ++i) {
        if ((half_of(a, i) | half_of(b, i)) >> 10 >= 31) fail("a half that is negative or no number");
        if (half_of(a, i) == half_of(b, i)) mask |= 0xffffu << 16 * i;
    }
    return mask;
}
inline u32 minimum_pair_f16(u32 a, u32 b) {
    u32 halves[2];
    for (int i = 0; i < 2; ++i) halves[i] = float_to_half(fminf(half_to_float(half_of(a, i)), half_to_float(half_of(b, i))));
    return halves[0] | halves[1] << 16;
}
inline void store_matrices_turned(u32 shared, const u32 (&fragment)[4]) {
    const auto& rows = share({shared});
    const int lane = now % 32;
    for (int m = 0; m < 4; ++m) {
        for (int i = 0; i < 2; ++i) {
            const u16 half = half_of(fragment[m], i);
            memcpy(attention_memory + rows[8 * m + 2 * (lane % 4) + i][0] + lane / 4 * 2, &half, 2);
        }
    }
    share({});
}

}  // namespace ptx

namespace wgmma {

inline u64 describe(u32 shared) { return (shared & 0x3FFFF) >> 4 | u64(1) << 16 | u64(64) << 32 | u64(1) << 62; }
constexpr u64 offset(int bytes) { return bytes >> 4; }
enum Kind { kFloat16, kBfloat16, kE4m3, kE5m2, kInt8 };
template <Kind kKind> struct Multiply {
    template <class Sum, int kSums> static void run(Sum (&d)[kSums], const u32* a, u64 b, int accumulate) {
        emulated::multiply<kKind == kInt8 ? emulated::kBytes : kKind == kE4m3 ? emulated::kFloats : kKind == kBfloat16>(d, a, 0, b, false, accumulate);
    }
};

}  // namespace wgmma

namespace linear {

template <class Work> void fetch_experts(const Work&, const char*, long long) { emulated::fail("L2 has nothing to fetch"); }

}  // namespace linear
