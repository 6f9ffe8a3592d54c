// The numbers that decide which token is drawn, the same to the last bit as in ops/sampling_reference.py: every float32
// product and sum is rounded by itself, none is fused.
#pragma once

#include "common/ptx.cuh"

namespace numbers {

constexpr float kLeastTemperature = 1e-5f;  // below it the most probable token is taken
constexpr float kLog2E = 1.44269504f;
constexpr u64 kGolden = 0x9e3779b97f4a7c15ull;
constexpr u32 kNone = 0;               // the key of nothing: less than that of any number
constexpr u32 kHidden = 0x007fffffu;   // the key of minus infinity
constexpr u64 kWrong = ~0ull;          // says that a logit is NaN or infinity: above what any number and token make

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }

// Keys in the order of values; -0 counts as 0.
__device__ __forceinline__ u32 key_of(float value) {
    const u32 bits = __float_as_uint(__fadd_rn(value, 0.0f));
    return bits ^ (static_cast<int>(bits) < 0 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(static_cast<int>(key) < 0 ? key ^ 0x80000000u : ~key);
}

// Greater for a greater value, and of equal values for the lower token.
__device__ __forceinline__ u64 pair_of(float value, int token) {
    return static_cast<u64>(key_of(value)) << 32 | ~static_cast<u32>(token);
}
__device__ __forceinline__ int token_of(u64 pair) { return static_cast<int>(~static_cast<u32>(pair)); }

// a + b * x, and so on inwards.
template <int kTerms>
__device__ __forceinline__ float polynomial(const float (&terms)[kTerms], float x) {
    float sum = terms[kTerms - 1];
#pragma unroll
    for (int i = kTerms - 2; i >= 0; --i) sum = __fadd_rn(__fmul_rn(sum, x), terms[i]);
    return sum;
}

// 2^-x of x >= 0 in units of 2^-40, rounded down; 2^40 of 0, and 0 from 41 on.
__device__ __forceinline__ u64 weight_of(float x) {
    constexpr float kTerms[] = {0.6931459903717041f, -0.24020171165466309f, 0.05536210909485817f, -0.00928252749145031f,
                                0.0009762839181348681f};
    x = fminf(x, 41.0f);
    const int whole = __float2int_rz(x);
    const float part = __fsub_rn(x, static_cast<float>(whole));
    const float power = __fsub_rn(1.0f, __fmul_rn(part, polynomial(kTerms, part)));
    return (static_cast<u64>(__float2uint_rz(__fmul_rn(power, 16777216.0f))) << 16) >> whole;
}

// The mixing of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
__device__ __forceinline__ u64 mixed(u64 word) {
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    return word ^ word >> 31;
}
__device__ __forceinline__ u64 stream_of(long long seed, int position) {
    return mixed(mixed(static_cast<u64>(seed) + kGolden) + (static_cast<u64>(static_cast<long long>(position)) + 1) * kGolden);
}
__device__ __forceinline__ u64 word_of(u64 stream, int token) {
    return mixed(stream + (static_cast<u64>(token) + 1) * kGolden);
}

// Noise is -log2 of an exponential number: zeros ahead of the upper half, which are n with probability 2^-(n + 1), plus
// a part below 1 that the lower half makes by -log2(1 - y / 2); small numbers have all of their bits.
__device__ __forceinline__ float noise_of(u64 word) {
    constexpr float kPart[] = {0.721348226070404f,    0.18027079105377197f, 0.06111815571784973f, 0.016909509897232056f,
                               0.023567546159029007f, -0.014380085282027721f, 0.011164899915456772f};
    constexpr float kLogarithm[] = {1.4426847696304321f, -0.7209243774414062f, 0.475799024105072f, -0.33270955085754395f,
                                    0.20469112694263458f, -0.0873480886220932f, 0.017807774245738983f};
    const float zeros = static_cast<float>(__clz(static_cast<int>(word >> 32)));
    const float y = __fmul_rn(__uint2float_rn(static_cast<u32>(word) | 1u), 2.3283064365386963e-10f);
    const u32 bits = __float_as_uint(__fadd_rn(zeros, __fmul_rn(y, polynomial(kPart, y))));
    const float fraction = __fsub_rn(__uint_as_float((bits & 0x007fffffu) | 0x3f800000u), 1.0f);
    const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 127);
    return -__fadd_rn(__fmul_rn(fraction, polynomial(kLogarithm, fraction)), exponent);
}

// Bounds of the noise that a word makes. Where its upper half begins with a one, the noise is as much as there are zeros
// ahead of the lower half, and 1.6 more at most; else it is at most 0.1, and no noise is less than kLeastNoise.
constexpr float kLeastNoise = -5.1f;
__device__ __forceinline__ float zeros_of(u64 word) {
    return static_cast<float>(__clz(static_cast<int>(static_cast<u32>(word))));
}
__device__ __forceinline__ float most_noise(u64 word) {
    return static_cast<int>(word >> 32) < 0 ? zeros_of(word) + 1.6f : 0.1f;
}
__device__ __forceinline__ float least_noise(u64 word) {
    return static_cast<int>(word >> 32) < 0 ? zeros_of(word) - 0.1f : kLeastNoise;
}

// Who has a score less than this cannot win over one whose score is at least `reached`, however both are rounded; NaN,
// which nothing is less than, where infinity is reached.
__device__ __forceinline__ float floor_below(float reached) { return reached - 0.1f - fabsf(reached) * 1e-6f; }

}  // namespace numbers
