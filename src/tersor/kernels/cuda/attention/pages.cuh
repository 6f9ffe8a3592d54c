// Pages of keys and values, [P, 2, kv heads, 64, HEAD_DIM], their rows in shared memory, and numbers in e4m3.
//
// A row of shared memory is an odd number of 16 bytes long: eight rows that follow each other then lie in all banks once,
// which is what ldmatrix reads at a time. Numbers in e4m3 become fp16 where they are multiplied: before compute capability
// 8.9, which has an instruction for it, divided by 256, so that their token's scale is taken 256 times as large. Their
// pairs of bytes are found without moving any: within 16 channels, those that a lane has of one 16-bit product are 4j to
// 4j + 3, and `place_of` is where queries put theirs to meet them.
// Parameters: HEAD_DIM (a multiple of 16), BF16 (1: bf16 activations, 0: fp16), E4M3 (1: pages in e4m3, 0: as activations).
#pragma once

#include "attention/instructions.cuh"

namespace pages {

constexpr int kTokens = 64;  // of a page
constexpr int kDim = HEAD_DIM;
constexpr bool kE4m3 = E4M3;
constexpr bool kBf16 = BF16;
constexpr bool kBf16Products = kBf16 && !kE4m3;  // e4m3 is exact in fp16 alone
constexpr int kElementBytes = kE4m3 ? 1 : 2;
constexpr int kRowBytes = kDim * kElementBytes;  // of a token in a page
constexpr int kRowPieces = kRowBytes / 16;
constexpr int kRowStride = (kRowPieces | 1) * 16;  // of a token in shared memory
constexpr int kQueryStride = (kDim / 8 | 1) * 16;  // of a query there
#if __CUDA_ARCH__ >= 890
constexpr bool kWidens = true;  // the GPU has an instruction
#else
constexpr bool kWidens = false;
#endif
constexpr float kUnit = kE4m3 && !kWidens ? 256.0f : 1.0f;
constexpr int kMostFew = 8;  // new tokens that a row of few has at most
constexpr float kLog2e = 1.4426950408889634f;
static_assert(kDim % 16 == 0 && kDim <= 256);

__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }

// The token `slot` of a page, of keys (half 0) or values (half 1): its number among rows of pages.
__device__ __forceinline__ long long row_of(int page, int half, int kv_heads, int kv_head, int slot) {
    return ((static_cast<long long>(page) * 2 + half) * kv_heads + kv_head) * kTokens + slot;
}

// Where a pair of channels, the first of which is even, stands in a query that meets keys of a page.
__device__ __forceinline__ int place_of(int channel) {
    if constexpr (kE4m3) {
        return channel / 16 * 16 + channel % 16 / 4 * 2 + channel % 4 / 2 * 8;
    } else {
        return channel;
    }
}

// Two bytes of a word become fp16, which is to be multiplied with kUnit: bytes kFirst and kSecond.
template <int kFirst, int kSecond>
__device__ __forceinline__ u32 widen_e4m3(u32 word) {
    if constexpr (!kWidens) {
        const u32 high = __byte_perm(word, 0, 0x0404 | kFirst << 4 | kSecond << 12);
        return (high & 0x80008000u) | ((high & 0x7f007f00u) >> 1);
    } else if constexpr (kFirst % 2 == 0 && kSecond == kFirst + 1) {
        return ptx::widen_e4m3_pair(static_cast<u16>(word >> 8 * kFirst));
    } else {
        return ptx::widen_e4m3_pair(static_cast<u16>(__byte_perm(word, 0, kFirst | kSecond << 4)));
    }
}

// The nearest e4m3 number, of two the even one; beyond 448 it is 448, NaN stays NaN.
__device__ __forceinline__ u32 to_e4m3(float value) {
    const u32 bits = __float_as_uint(value), size = bits & 0x7fffffffu;
    u32 code;
    if (size < 0x3c800000u) {  // below 2^-6: a multiple of 2^-9
        code = __float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u;
    } else {
        code = min((size + 0x7ffffu + (size >> 20 & 1) >> 20) - (120u << 3), 0x7eu);
    }
    if (size > 0x7f800000u) code = 0x7f;
    return code | (bits >> 24 & 0x80);
}

// Two of them, the first in the low byte.
__device__ __forceinline__ u32 to_e4m3_pair(float low, float high) {
    if constexpr (kWidens) {
        return ptx::to_e4m3(low, high);
    } else {
        return to_e4m3(low) | to_e4m3(high) << 8;
    }
}

// A scaled product becomes a score in powers of two: `soft` is softcap * log2(e) or 0, and then `scale` has its inverse.
__device__ __forceinline__ float score(float product, float scale, float soft) {
    const float x = product * scale;
    if (soft == 0.0f) return x;
    return soft - 2.0f * soft / (1.0f + ptx::power_of_two(2.0f * kLog2e * x));  // soft * tanh(x)
}

}  // namespace pages
