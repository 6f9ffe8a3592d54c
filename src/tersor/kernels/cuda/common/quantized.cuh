// Tokens as bytes with a scale each, by the largest magnitude m of a token. As e4m3: scale = m / 448, code = x * (448 / m),
// rounded twice; as int8: scale = m / 127, code = x * (127 / m), which is rounded once, ties to even. A token with an
// infinity or a NaN gets NaNs: e4m3 has those in its codes, or an infinite scale and codes of zeros and NaNs; of int8 the
// scale is NaN. With scales in groups each 128 channels of a token are as a token of their own: 16 lanes beside each other
// have them, eight numbers each, and scales of a group stand behind each other, those of all tokens.
// Parameters: BF16 (1: bf16, 0: fp16), INT8 (1: int8, 0: e4m3), X_GROUPS (1: scales in groups, 0: one a token).
#pragma once

#include "common/ptx.cuh"

namespace quantized {

constexpr bool kInt8 = INT8;
constexpr bool kGroups = X_GROUPS;
constexpr float kMax = kInt8 ? 127.0f : 448.0f;

// From here on the compiler takes numbers out of packed words again: across a barrier it would keep all of them wide.
__device__ __forceinline__ void keep_packed(u16 (&values)[8]) {
    u32* const words = reinterpret_cast<u32*>(values);
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(words[i]));
}

// The larger of two magnitudes; NaN is larger than infinity.
__device__ __forceinline__ float larger(float one, float other) {
    return __int_as_float(max(__float_as_int(one), __float_as_int(other)));
}

// The larger of a number's magnitude and of those before; NaN, which a code of e4m3 keeps, counts for nothing there.
__device__ __forceinline__ float largest(float value, float before) {
    return kInt8 ? larger(fabsf(value), before) : fmaxf(before, fabsf(value));
}

// The largest magnitude of eight numbers and of those before.
__device__ __forceinline__ float largest(const u16 (&values)[8], float before) {
#pragma unroll
    for (int i = 0; i < 8; ++i) before = largest(ptx::widen<BF16>(values[i]), before);
    return before;
}

// The largest of what the lanes of a warp have, which all of them get.
__device__ __forceinline__ float largest_of_warp(float magnitude) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        magnitude = larger(magnitude, __shfl_xor_sync(~0u, magnitude, lanes));
    }
    return magnitude;
}

// The same of the 16 lanes that have a group.
__device__ __forceinline__ float largest_of_group(float magnitude) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
        magnitude = larger(magnitude, __shfl_xor_sync(~0u, magnitude, lanes));
    }
    return magnitude;
}

// Where the scale of a group of eight-channel pieces stands, of one of so many tokens: whole 16 bytes a group.
__device__ __forceinline__ long long scale_at(int piece, int token, int tokens) {
    return static_cast<long long>(piece / 16) * ((tokens + 3) / 4 * 4) + token;
}

__device__ __forceinline__ float scale(float magnitude) {
    constexpr u32 kNan = 0x7FFFFFFFu, kInfinity = 0x7F800000u;
    if (kInt8 && __float_as_uint(magnitude) >= kInfinity) return __uint_as_float(kNan);
    return magnitude / kMax;
}

// What numbers are multiplied by before they are rounded. Where float32 has no such number int8 codes are zeros.
__device__ __forceinline__ float factor(float magnitude) {
    constexpr float kMost = 3.402823466e38f;
    const float found = magnitude > 0.0f ? kMax / magnitude : 0.0f;
    return !kInt8 || found <= kMost ? found : 0.0f;
}

// The bits of a float whose lowest byte is a number times `factor`, rounded to int8.
__device__ __forceinline__ u32 rounded(float value, float factor) {
    return __float_as_uint(__fmaf_rn(value, factor, 12582912.0f));  // 1.5 * 2^23: a mantissa's last place counts ones
}

// Four numbers as bytes, the first in the lowest.
__device__ __forceinline__ u32 encode(float a, float b, float c, float d, float factor) {
    if constexpr (kInt8) {
        const u32 low = __byte_perm(rounded(a, factor), rounded(b, factor), 0x0040);
        const u32 high = __byte_perm(rounded(c, factor), rounded(d, factor), 0x0040);
        return __byte_perm(low, high, 0x5410);
    } else {
        return ptx::to_e4m3(a * factor, b * factor) | ptx::to_e4m3(c * factor, d * factor) << 16;
    }
}

// Eight numbers as bytes.
__device__ __forceinline__ uint2 encode(const u16 (&values)[8], float factor) {
    float wide[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) wide[i] = ptx::widen<BF16>(values[i]);
    return {encode(wide[0], wide[1], wide[2], wide[3], factor), encode(wide[4], wide[5], wide[6], wide[7], factor)};
}

}  // namespace quantized
