// A norm's arithmetic on eight channels, the same bits in norm.cuh and in norm_rows.cuh. They stay packed in words, of
// which numbers are made wherever they are read.
// Parameters: BF16 (1: bf16, 0: fp16), BYTES (1: the largest magnitude is asked for), INT8 (1: for int8, 0: for e4m3).
#pragma once

#include "common/quantized.cuh"
#include "small/pieces.cuh"

namespace norms {

using pieces::kChannels;

struct Words {
    u32 pairs[kChannels / 2];
};

__device__ __forceinline__ Words words_of(const uint4& words) { return {{words.x, words.y, words.z, words.w}}; }

// Read past L1, as pieces are.
__device__ __forceinline__ Words load(const u16* row, int piece) {
    return words_of(__ldcg(reinterpret_cast<const uint4*>(row) + piece));
}

__device__ __forceinline__ void store(u16* row, int piece, const Words& words) {
    reinterpret_cast<uint4*>(row)[piece] = {words.pairs[0], words.pairs[1], words.pairs[2], words.pairs[3]};
}

// From here on the compiler makes numbers of words again: across a sum of all it would keep all of them wide.
__device__ __forceinline__ void keep(Words& words) {
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) asm volatile("" : "+r"(words.pairs[i]));
}

// Number k of eight.
__device__ __forceinline__ float widen(const Words& words, int k) {
    const u32 pair = words.pairs[k / 2];
    if constexpr (BF16) return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
    return ptx::widen<BF16>(static_cast<u16>(k % 2 ? pair >> 16 : pair));
}

__device__ __forceinline__ void add_values(const Words& words, float& sum) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum += widen(words, k);
}

__device__ __forceinline__ void add_squares(const Words& words, float mean, float& sum) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
        const float value = widen(words, k) - mean;
        sum += value * value;
    }
}

// 1 / sqrt(variance + eps)
__device__ __forceinline__ float factor(float sum, int channels, float eps) {
    return 1.0f / sqrtf(sum / static_cast<float>(channels) + eps);
}

// What weights are multiplied by.
__device__ __forceinline__ void widen_weights(const Words& words, float offset, float (&weights)[kChannels]) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) weights[k] = widen(words, k) + offset;
}

// The result, with kAdds `added` to it: the bias or the residual. `largest` becomes that of all before it is rounded.
template <bool kAdds>
__device__ __forceinline__ Words finish(
    const Words& words, const float (&weights)[kChannels], const Words& added, float mean, float by, float& largest) {
    Words result;
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
        float values[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float value = (widen(words, 2 * i + k) - mean) * by;
            values[k] = value * weights[2 * i + k] + (kAdds ? widen(added, 2 * i + k) : 0.0f);
            if constexpr (BYTES) largest = quantized::largest(values[k], largest);
        }
        result.pairs[i] = ptx::narrow<BF16>(values[0]) | u32{ptx::narrow<BF16>(values[1])} << 16;
    }
    return result;
}

// The largest magnitude of rounded numbers: rounding keeps their order.
__device__ __forceinline__ float rounded(float largest) { return ptx::widen<BF16>(ptx::narrow<BF16>(largest)); }

__device__ __forceinline__ uint2 encode(const Words& words, float factor) {
    float wide[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) wide[i] = widen(words, i);
    return {
        quantized::encode(wide[0], wide[1], wide[2], wide[3], factor),
        quantized::encode(wide[4], wide[5], wide[6], wide[7], factor)};
}

}  // namespace norms
