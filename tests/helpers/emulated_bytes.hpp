// What the multiplying warps of dense/sm90_multiply_bytes.cuh use, as plain C++ beside `emulated.hpp`: rings that are full
// from the start, products of int8 or e4m3 by a warpgroup, and arrivals that are counted. It ends the process where
//
//     - a register of decoded weights changes while a product reads it
//     - a slot of activations is handed back before the products that read it have ended
//     - a product is waited for that was never committed
#pragma once

#include "emulated.hpp"

#define __CUDACC__

namespace emulated {

struct Product {
    const u32* a;
    u32 was[4], slot;
};
struct Open {  // of a thread
    std::vector<Product> issued;
    std::deque<std::vector<Product>> committed;
};

constexpr u32 kWeightBarriers = 4096;  // those of the weight ring lie behind those of the ring of activations
std::vector<Open> open;
std::vector<int> arrivals;
u32 x_slot_bytes;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "thread %d: %s\n", now, what);
    abort();
}

}  // namespace emulated

namespace ptx {

inline u32 rotate(u32 word, int left) { return word << left | word >> (32 - left); }
inline u32 kept(u32 value) { return value; }
inline void end_reads() {}
inline u32 repeat_signs(u32 bytes) { return (bytes >> 7 & 0x01010101u) * 0xFFu; }
inline void barrier_arrive(u32 barrier) {
    for (const auto& group : emulated::open[now].committed) {
        for (const emulated::Product& one : group) {
            if (barrier / 16 == one.slot) emulated::fail("a slot is handed back while a product reads it");
        }
    }
    ++emulated::arrivals[barrier / 8];
}

// At a barrier of 128 threads that nothing but threads arrives at.
inline void barrier_wait(u32 barrier, u32 parity) {
    while (emulated::arrivals[barrier / 8] / 128 % 2 == static_cast<int>(parity)) emulated::yield();
}

// What other warps, or weights that become floats, would use.
#define TERSOR_UNUSED(NAME)                                                                  \
    template <class... All>                                                                  \
    int NAME(All...) {                                                                       \
        emulated::fail(#NAME);                                                               \
    }
TERSOR_UNUSED(barrier_arrive_at)
TERSOR_UNUSED(barrier_expect)
TERSOR_UNUSED(barrier_init)
TERSOR_UNUSED(bulk_copy)
TERSOR_UNUSED(bulk_copy_once)
TERSOR_UNUSED(copy_async_16_once)
TERSOR_UNUSED(copy_async_8_once)
TERSOR_UNUSED(evict_first_policy)
TERSOR_UNUSED(minimum_pair_f16)
TERSOR_UNUSED(prefetch_map)
TERSOR_UNUSED(tensor_copy)
TERSOR_UNUSED(wait_for_earlier_kernels)
template <bool kBf16>
u32 fused_multiply_add_pair(u32, u32, u32) {
    emulated::fail("pairs of floats");
}
template <int kCtas, class... All>
void tensor_copy_to_all(All...) {
    emulated::fail("a cluster");
}

}  // namespace ptx

namespace ring {

constexpr int kBarrierBytes = 16;

template <int kSlots>
struct Ring {
    u32 base, bytes, barriers;

    struct Place {
        u32 slot, parity;

        explicit Place(u32 use) : slot(use % kSlots), parity(use / kSlots % 2) {}
        void advance() {
            slot = (slot + 1) % kSlots;
            parity ^= slot == 0;
        }
    };

    u32 address(const Place& at) const { return base + at.slot * bytes; }
    u32 filled(const Place& at) const { return barriers + at.slot * kBarrierBytes; }
    u32 emptied(const Place& at) const { return filled(at) + 8; }
    void wait_filled(const Place&) const {}
    void wait_emptied(const Place&) const {}
    void release(const Place& at) const { ptx::barrier_arrive(emptied(at)); }
};

}  // namespace ring

namespace wgmma {

enum Kind { kFloat16, kBfloat16, kE4m3, kE5m2, kInt8 };

inline void fence() {}
inline void commit() {
    emulated::Open& own = emulated::open[emulated::now];
    own.committed.push_back(std::move(own.issued));
    own.issued.clear();
}
template <int kPending>
void wait() {
    emulated::Open& own = emulated::open[emulated::now];
    if (!own.issued.empty()) emulated::fail("a product is not committed");
    for (; static_cast<int>(own.committed.size()) > kPending; own.committed.pop_front()) {
        for (const emulated::Product& one : own.committed.front()) {
            if (!std::equal(one.was, one.was + 4, one.a)) emulated::fail("a register changed under a product");
        }
    }
}
inline u64 describe(u32 shared) { return shared; }
inline u64 offset(int bytes) { return bytes; }

inline float e4m3(u32 byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float magnitude = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return byte & 128 ? -magnitude : magnitude;
}

template <Kind kKind>
struct Multiply {
    // D[64, 2 kSums] (+)= A[64, 32] * B[32, 2 kSums]: PTX ISA 9.0, "Register Fragments for wgmma.mma_async.m64nNk32".
    template <class Sum, int kSums>
    static void run(Sum (&d)[kSums], const u32* a, u64 b, int accumulate) {
        using namespace emulated;
        constexpr bool kFloats = kKind == kE4m3;
        if (kFloats != std::is_same<Sum, float>::value) fail("sums of another type");
        open[now].issued.push_back({a, {a[0], a[1], a[2], a[3]}, static_cast<u32>(b) / x_slot_bytes});
        const int lane = now % 32;
        const auto& given = share({a[0], a[1], a[2], a[3]});
        for (int i = 0; i < kSums; ++i) {
            const int row = i % 4 / 2, token = i / 4 * 8 + lane % 4 * 2 + i % 2;  // of the two rows of this lane
            Sum sum = accumulate ? d[i] : 0;
            for (int k = 0; k < 32; ++k) {
                const u32 word = given[lane / 4 * 4 + k % 16 / 4][row + k / 16 * 2];
                const u32 plain = (static_cast<u32>(b) & ~1023u) + token * 128 + (static_cast<u32>(b) & 127) + k;
                const u32 at = plain ^ (plain >> 7 & 7) << 4;
                const u32 one = word >> k % 4 * 8 & 255, other = attention_memory[at];
                sum += kFloats ? e4m3(one) * e4m3(other)
                               : static_cast<signed char>(one) * static_cast<signed char>(other);
            }
            d[i] = sum;
        }
    }
};

}  // namespace wgmma
