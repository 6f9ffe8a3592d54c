// A pruned weight as it is stored (docs/formats.md) to a dense 16-bit matrix [rows, IC], with zeros for what is pruned, for
// a product by cuBLAS: values of any format, scales and zero points in groups are applied, and a weight is rounded once.
//
// One warp takes a row, 1,024 channels at a time, a lane 32 of them, whose bits are a word of its mask: how many weights
// are left ahead of a lane's tells a scan over the warp, and so where its values begin.
//
// Parameters: NUMBER_BITS of a value; NUMBER (0: codes, whose meaning is TABLE, 1: fp16, 2: bf16, 3: float32), SCALE_TYPE
// (scales.cuh; codes alone), ZERO_POINTS, BF16.
#pragma once

#include "common/ptx.cuh"

namespace stored {

constexpr int kWarps = 4;  // rows of a CTA
constexpr int kLane = 32;  // channels of a lane
constexpr int kBits = NUMBER_BITS;
constexpr bool kCodes = NUMBER == 0;
constexpr int kMeanings = kCodes ? 1 << kBits : 1;

static_assert(kCodes ? kBits <= 8 : kBits == 16 || kBits == 32, "codes of a byte at most, or floats");

__device__ const float kTable[kMeanings] = {TABLE};

__device__ __forceinline__ float scale_at(const void* scales, long long index) {
    if constexpr (SCALE_TYPE == 0) return static_cast<const float*>(scales)[index];
    if constexpr (SCALE_TYPE == 3) {  // e8m0: the byte is float32's exponent field; 2^-127 is a subnormal
        const u32 bits = static_cast<u32>(static_cast<const unsigned char*>(scales)[index]) << 23;
        return __uint_as_float(bits > 0x00400000u ? bits : 0x00400000u);
    }
    return ptx::widen<SCALE_TYPE == 2>(static_cast<const u16*>(scales)[index]);
}

// The words of a row's values, two of which are at hand.
struct Numbers {
    const u32* words;
    long long last;  // word of the weight, behind which there is none
    long long at = -1;
    u32 low = 0, high = 0;

    __device__ __forceinline__ u32 take(long long bit) {
        const long long word = bit >> 5;
        if (word != at) {
            low = word == at + 1 && at >= 0 ? high : words[word];
            high = word < last ? words[word + 1] : 0;
            at = word;
        }
        const u64 both = static_cast<u64>(high) << 32 | low;
        return static_cast<u32>(both >> (bit & 31)) & (kBits == 32 ? ~0u : (1u << kBits % 32) - 1);
    }
};

__device__ __forceinline__ float number(u32 bits, const float* table) {
    if constexpr (kCodes) return table[bits];
    if constexpr (NUMBER == 3) return __uint_as_float(bits);
    return ptx::widen<NUMBER == 2>(static_cast<u16>(bits));
}

}  // namespace stored

extern "C" __global__ void __launch_bounds__(32 * stored::kWarps) TERSOR_ENTRY(
    const unsigned char* __restrict__ mask,  // [OC, ceil(IC / 8)]
    const u32* __restrict__ words,           // of all rows' values
    const long long* __restrict__ starts,    // [OC + 1], the first word of every row
    const void* __restrict__ scale,          // [OC, groups] or null
    const unsigned char* __restrict__ zero,  // [OC, groups] or null
    u16* __restrict__ dense,                 // [rows, IC]
    int first_row,
    int rows,
    int ic,
    int groups,
    int group,                               // channels of a scale
    long long count) {                       // words
    using namespace stored;
    __shared__ float table[kMeanings];
    for (int i = threadIdx.x; i < kMeanings; i += 32 * kWarps) table[i] = kTable[i];
    __syncthreads();
    const int lane = threadIdx.x % 32, own = blockIdx.x * kWarps + threadIdx.x / 32, octets = (ic + 7) / 8;
    if (own >= rows) return;
    const long long row = static_cast<long long>(first_row) + own;
    const unsigned char* bits = mask + row * octets;
    Numbers numbers{words + starts[row], count - 1 - starts[row]};
    u16* target = dense + static_cast<long long>(own) * ic;
    int before = 0;  // weights left in channels ahead
#pragma unroll 1
    for (int first = 0; first < ic; first += 32 * kLane) {
        const int channel = first + lane * kLane;
        u32 left = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (channel / 8 + i < octets) left |= static_cast<u32>(bits[channel / 8 + i]) << 8 * i;
        }
        int sum = __popc(left);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_sync(~0u, sum, lane < step ? lane : lane - step);
            sum += lane < step ? 0 : other;
        }
        long long bit = static_cast<long long>(before + sum - __popc(left)) * kBits;
        before += __shfl_sync(~0u, sum, 31);
        if (channel >= ic) continue;
        float own_scale = 1.0f, own_zero = 0.0f;
        int until = 0;  // channels of this lane that the scale at hand is of
        u32 pairs[kLane / 2];
#pragma unroll
        for (int i = 0; i < kLane; ++i) {
            float value = 0.0f;
            if (left >> i & 1) {
                if (kCodes && i >= until) {
                    const int at = (channel + i) / group;
                    own_scale = scale_at(scale, row * groups + at);
                    if constexpr (ZERO_POINTS) own_zero = zero[row * groups + at];
                    until = (at + 1) * group - channel;
                }
                value = number(numbers.take(bit), table);
                if constexpr (ZERO_POINTS) value -= own_zero;
                if constexpr (kCodes) value *= own_scale;
                bit += kBits;
            }
            const u32 half = ptx::narrow<BF16>(value);
            if (i % 2 == 0) {
                pairs[i / 2] = half;
            } else {
                pairs[i / 2] |= half << 16;
            }
        }
#pragma unroll
        for (int piece = 0; piece < kLane / 8; ++piece) {
            const int at = channel + 8 * piece;
            if (ic % 8 == 0 && at < ic) {
                const uint4 four = {pairs[4 * piece], pairs[4 * piece + 1], pairs[4 * piece + 2], pairs[4 * piece + 3]};
                *reinterpret_cast<uint4*>(target + at) = four;
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (at + i < ic) target[at + i] = static_cast<u16>(pairs[4 * piece + i / 2] >> 16 * (i % 2));
                }
            }
        }
    }
}
