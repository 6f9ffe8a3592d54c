// Kernels as plain C++: every thread of a CTA is a fiber, every instruction of PTX a function that does what its
// description says. Copies that are under way land as late as they may, and till then there is NaN where they go; fibers
// take turns in a random order. So a lane that has a wrong element, or a missing wait, gives a wrong result here, too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __align__(bytes)
#define __shared__

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct int4 { int x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Dim { unsigned x, y, z; };
Dim threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) unsigned char attention_memory[256 << 10];

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
template <class T> T __ldcg(const T* p) { return *p; }
inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int x) { return __uint_as_float(static_cast<u32>(x)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<u32>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

namespace emulated {

struct Copy { unsigned char* to; const unsigned char* from; u32 bytes, all; };
struct Barrier { int here = 0, turn = 0; };
struct Exchange { Barrier barrier; u64 words[2][32][8]; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
    bool done = true;
};

std::vector<Fiber> fibers;
std::vector<Exchange> warps;
Barrier block;
ucontext_t scheduler;
int now;
std::function<void()> body;
std::mt19937 random;
std::function<void()> before_block = [] {}, after_block = [] {};
std::function<void(const unsigned char*, const void*, int)> before_write;  // where, of what, how many bytes
std::function<void()> before_landing = [] {};
bool last_waits = false;  // the last block, for what the others write

inline void yield() { swapcontext(&fibers[now].context, &scheduler); }
inline int meet(Barrier& barrier, int all) {
    const int turn = barrier.turn;
    if (++barrier.here == all) { barrier.here = 0; ++barrier.turn; }
    while (barrier.turn == turn) yield();
    return turn;
}
// What every lane of the warp gave.
inline const u64 (&share(std::initializer_list<u64> given))[32][8] {
    Exchange& warp = warps[now / 32];
    int i = 0;
    for (u64 one : given) warp.words[warp.barrier.turn % 2][now % 32][i++] = one;
    return warp.words[meet(warp.barrier, 32) % 2];
}
inline void start() { body(); fibers[now].done = true; swapcontext(&fibers[now].context, &scheduler); }

inline void run_block(int threads) {
    if (static_cast<int>(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
    warps = std::vector<Exchange>(threads / 32);
    block = {};
    before_block();
    memset(attention_memory, 255, sizeof attention_memory);
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.done = false;
        fiber.groups.clear();
        fiber.open.clear();
        makecontext(&fiber.context, start, 0);
    }
    for (int left = threads; left > 0;) {
        const int offset = random() % threads;
        left = 0;
        for (int i = 0; i < threads; ++i) {
            now = (i * 37 + offset) % threads;  // 37 is prime to any number of warps' threads
            if (fibers[now].done) continue;
            threadIdx = {static_cast<unsigned>(now), 0, 0};
            swapcontext(&scheduler, &fibers[now].context);
            left += !fibers[now].done;
        }
    }
    after_block();
}
inline void run(Dim grid, int threads, unsigned seed, std::function<void()> kernel) {
    random.seed(seed);
    body = std::move(kernel);
    gridDim = grid;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    std::vector<Dim> blocks;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), random);
    if (last_waits) std::stable_partition(blocks.begin(), blocks.end(), [&](const Dim& one) { return one.x < grid.x - 1; });
    for (const Dim& one : blocks) { blockIdx = one; run_block(threads); }
}

inline float half_to_float(u16 h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? ldexpf(1024 + mantissa, exponent - 25)
                                      : ldexpf(mantissa, -24);
    return h >> 15 ? -size : size;
}
inline u16 float_to_half(float x) {
    const u16 sign = __float_as_uint(x) >> 31 << 15;
    if (x != x) return 0x7fff;
    const float size = fabsf(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < ldexpf(1, -14)) return sign | static_cast<u16>(nearbyintf(ldexpf(size, 24)));
    const u32 bits = __float_as_uint(size);
    return sign | static_cast<u16>((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}
inline u16 float_to_bfloat(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <bool kBf16> float wide(u16 x) { return kBf16 ? __uint_as_float(static_cast<u32>(x) << 16) : half_to_float(x); }
inline u16 half_of(u32 word, int i) { return static_cast<u16>(word >> 16 * i); }
inline void write(unsigned char* to, const void* from, int bytes) {
    if (before_write) before_write(to, from, bytes);
    memcpy(to, from, bytes);
}
inline void put(u32 shared, const void* from, int bytes) { write(attention_memory + shared, from, bytes); }
inline u32 word_at(u32 shared) {
    if (shared % 4) { fprintf(stderr, "a word at %u\n", shared); abort(); }
    u32 word;
    memcpy(&word, attention_memory + shared, 4);
    return word;
}

}  // namespace emulated

inline void __syncwarp() { emulated::share({}); }
inline void __syncthreads() { emulated::meet(emulated::block, blockDim.x); }
inline bool __syncthreads_or(bool given) {
    static bool any[2];
    const int turn = emulated::block.turn % 2;
    if (emulated::block.here == 0) any[turn] = false;
    any[turn] |= given;
    emulated::meet(emulated::block, blockDim.x);
    return any[turn];
}
template <class T> T __shfl_sync(u32, T value, int lane) {
    u64 word = 0;
    memcpy(&word, &value, sizeof value);
    word = emulated::share({word})[lane % 32][0];
    memcpy(&value, &word, sizeof value);
    return value;
}
template <class T> T __shfl_xor_sync(u32 mask, T value, int lanes) {
    return __shfl_sync(mask, value, emulated::now % 32 ^ lanes);
}
inline bool __any_sync(u32, bool given) {
    const auto& words = emulated::share({given});
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= words[lane][0] != 0;
    return any;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __ballot_sync(u32, bool given) {
    const auto& words = emulated::share({given});
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<u32>(words[lane][0] != 0) << lane;
    return bits;
}

namespace launch {
inline void start_next() {}
inline void wait_for_earlier() {}
}  // namespace launch

// Between GPUs that are threads of this process; whoever waits lets the others of its CTA go on.
namespace flags {
inline void set(u32* flag, u32 value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline u32 read(const u32* flag) {
    emulated::yield();
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
}  // namespace flags

namespace ptx {
using namespace emulated;

inline u32 permute(u32 low, u32 high, u32 selectors) { return __byte_perm(low, high, selectors); }
inline u32 shared_address(const void* p) { return static_cast<const unsigned char*>(p) - attention_memory; }
template <bool kBf16> float widen(u16 x) { return wide<kBf16>(x); }
template <bool kBf16> u16 narrow(float x) { return kBf16 ? float_to_bfloat(x) : float_to_half(x); }
template <bool kBf16> u32 narrow_pair(float low, float high) {
    return narrow<kBf16>(low) | static_cast<u32>(narrow<kBf16>(high)) << 16;
}
inline u32 widen_e4m3_pair(u16 pair) {
    u32 halves[2];
    for (int i = 0; i < 2; ++i) {
        const int code = pair >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
        const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
        halves[i] = float_to_half((code & 127) == 127 ? NAN : code >> 7 ? -size : size);
    }
    return halves[0] | halves[1] << 16;
}
inline u32 to_e4m3(float low, float high) {
    u32 codes[2];
    for (int i = 0; i < 2; ++i) {
        const float x = i ? high : low, size = fabsf(x);
        const int least = size < ldexpf(1, -6) ? -9 : ilogbf(size) - 3;  // power of the last place
        const int places = static_cast<int>(nearbyintf(ldexpf(size, -least)));  // 16 carries into the exponent
        codes[i] = size >= 448.0f ? 0x7e : least == -9 ? places : (least + 9) * 8 + places;
        codes[i] = x != x ? 0x7f : codes[i] | __float_as_uint(x) >> 31 << 7;
    }
    return codes[0] | codes[1] << 8;
}
inline float power_of_two(float x) { return exp2f(x); }
inline u32 load_shared(u32 shared) { return word_at(shared); }
inline float load_shared_float(u32 shared) { return __uint_as_float(word_at(shared)); }
inline void store_shared(u32 shared, u32 word) { put(shared, &word, 4); }
inline void store_shared_16(u32 shared, u16 half) { put(shared, &half, 2); }
inline uint4 load_shared_four(u32 shared) {
    return {word_at(shared), word_at(shared + 4), word_at(shared + 8), word_at(shared + 12)};
}
inline void store_shared_four(u32 shared, uint4 words) { put(shared, &words, 16); }
inline void copy(u32 shared, const void* global, u32 bytes, u32 all) {
    if (shared % all || reinterpret_cast<u64>(global) % all) { fprintf(stderr, "a copy is not aligned\n"); abort(); }
    memset(attention_memory + shared, 255, all);
    fibers[now].open.push_back({attention_memory + shared, static_cast<const unsigned char*>(global), bytes, all});
}
inline void copy_async_16_zero_fill(u32 shared, const void* global, u32 bytes) { copy(shared, global, bytes, 16); }
inline void copy_async_commit() {
    fibers[now].groups.push_back(std::move(fibers[now].open));
    fibers[now].open.clear();
}
template <int kPending> void copy_async_wait() {
    before_landing();
    auto& groups = fibers[now].groups;
    while (static_cast<int>(groups.size()) > kPending) {
        for (const Copy& one : groups.front()) {
            unsigned char landed[16] = {};
            memcpy(landed, one.from, one.bytes);
            write(one.to, landed, one.all);
        }
        groups.pop_front();
    }
}
template <bool kTurned> void matrices(u32 (&fragment)[4], u32 shared) {
    const auto& rows = share({shared});
    const int lane = now % 32;
    for (int m = 0; m < 4; ++m) {
        u32 halves[2];
        for (int i = 0; i < 2; ++i) {
            const int row = kTurned ? 2 * (lane % 4) + i : lane / 4, column = kTurned ? lane / 4 : 2 * (lane % 4) + i;
            const u32 at = static_cast<u32>(rows[8 * m + row][0]);
            if (at % 16) { fprintf(stderr, "a row of a matrix at %u\n", at); abort(); }
            u16 half;
            memcpy(&half, attention_memory + at + 2 * column, 2);
            halves[i] = half;
        }
        fragment[m] = halves[0] | halves[1] << 16;
    }
    share({});
}
inline void load_matrices(u32 (&fragment)[4], u32 shared) { matrices<false>(fragment, shared); }
inline void load_matrices_turned(u32 (&fragment)[4], u32 shared) { matrices<true>(fragment, shared); }
inline u32 transpose_8x8(u32 pair) {
    const auto& words = share({pair});
    const int row = now % 32 / 4, column = now % 32 % 4 * 2;
    const u32 low = half_of(static_cast<u32>(words[4 * column + row / 2][0]), row % 2);
    const u32 high = half_of(static_cast<u32>(words[4 * (column + 1) + row / 2][0]), row % 2);
    return low | high << 16;
}
template <bool kBf16> void multiply_add(float (&d)[4], const u32* a, u32 b0, u32 b1) {
    const auto& words = share({a[0], a[1], a[2], a[3], b0, b1});
    const int lane = now % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k) {
            const u64* left = words[row % 8 * 4 + k % 8 / 2];
            const u64* right = words[column * 4 + k % 8 / 2];
            const float x = wide<kBf16>(half_of(static_cast<u32>(left[row / 8 + k / 8 * 2]), k % 2));
            d[i] += x * wide<kBf16>(half_of(static_cast<u32>(right[4 + k / 8]), k % 2));
        }
    }
}
inline u32 arrive(u32* counter) { return (*counter)++; }

}  // namespace ptx
