// The multiplying warpgroups of sm90_prefill.cuh: 64 queries each, whose products with a block of keys become weights in
// registers, which meet the block's values. The parameters are those of sm90_prefill.cuh.
#pragma once

#include "attention/sinks.cuh"
#include "attention/sm90_pipeline.cuh"

namespace prefill {

constexpr int kSteps = kDim / 16;
constexpr int kTiles = kBlock / 8;  // of 8 tokens, of which a lane has two scores a query
constexpr int kWhole = kDim / 64 * 64, kRest = kDim - kWhole;  // channels of values that one product takes, and another
constexpr int kRestSums = kRest > 0 ? kRest / 2 : 8;

using MultiplyKeys = wgmma::MultiplyKeys<pages::kBf16Products>;
using MultiplyValues = wgmma::MultiplyValues<pages::kBf16Products>;

// Describes a matrix of rows of 128 bytes under a 128-byte swizzle, 1024 bytes between groups of eight: where it starts,
// and where 64 columns more are, which only matters where rows are what a product adds over.
__device__ __forceinline__ u64 describe(u32 shared, u32 to_next_columns) {
    return static_cast<u64>((shared & 0x3FFFF) >> 4) | static_cast<u64>(to_next_columns >> 4) << 16 | u64(64) << 32 |
           u64(1) << 62;
}

// What a distance in shared memory adds to a description.
__device__ __forceinline__ constexpr u64 offset(int bytes) { return bytes >> 4; }

// Of a warp's 16 queries a lane has lane / 4 and lane / 4 + 8, in each half of every four sums.
struct Sums {
    float outputs[kDim / 2];
    float largest[2];
    float weights[2];
};

// What a lane's two queries see: tokens after the first of these, up to the second.
struct Sight {
    int after[2], until[2];
};

__device__ __forceinline__ void multiply_keys(float (&scores)[kBlock / 2], u32 queries, u32 keys) {
    // With many channels ptxas else keeps a description of each step's queries, for which it has no registers.
    const u64 rows = describe(kDim > 192 ? ptx::kept(queries) : queries, 16), columns = describe(keys, 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int within = step % 4 * 32;
        MultiplyKeys::run(
            scores, rows + offset(step / 4 * kQueryPieceBytes + within), columns + offset(step / 4 * kPieceBytes + within),
            step > 0);
    }
}

__device__ __forceinline__ void multiply_values(
    float (&outputs)[kDim / 2], const u32 (&weights)[kBlock / 4], u32 values, bool adds) {
    const u64 whole = describe(values, kPieceBytes), rest = describe(values + (kPieces - 1) * kPieceBytes, kPieceBytes);
#pragma unroll
    for (int step = 0; step < kBlock / 16; ++step) {
        const u64 there = offset(step * 16 * 128);
        auto& sums = reinterpret_cast<float(&)[kWhole / 2]>(outputs);
        MultiplyValues::run(sums, weights + 4 * step, whole + there, adds || step > 0);
        if constexpr (kRest > 0) {
            auto& others = reinterpret_cast<float(&)[kRestSums]>(outputs[kWhole / 2]);
            MultiplyValues::run(others, weights + 4 * step, rest + there, adds || step > 0);
        }
    }
}

// Scaled products become scores in powers of two, as `pages::score` says of a softcap.
__device__ __forceinline__ void cap(float (&scores)[kBlock / 2], float scale, float soft) {
    const float twice = 2.0f * pages::kLog2e * scale;
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
        scores[i] = soft - 2.0f * soft * ptx::inverse(1.0f + ptx::power_of_two(twice * scores[i]));
    }
}

// Scores of tokens that a query does not see become -inf. `start`: the block's first token.
__device__ __forceinline__ void hide(float (&scores)[kBlock / 2], int start, const Sight& sight) {
    const int first = start + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int last = sight.until[half] - first, hidden = sight.after[half] - first;
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (8 * k + i > last || 8 * k + i <= hidden) scores[4 * k + 2 * half + i] = pages::lowest();
            }
        }
    }
}

// Scores, which `factor` brings to powers of two, become weights; returns by what sums so far are to be multiplied.
__device__ __forceinline__ float2 weigh(Sums& sums, float (&scores)[kBlock / 2], float factor) {
    float of_old[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = sums.largest[half];
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
            largest = fmaxf(largest, fmaxf(scores[4 * k + 2 * half], scores[4 * k + 2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float least = largest == pages::lowest() ? 0.0f : largest * factor;
        of_old[half] = ptx::power_of_two(sums.largest[half] * factor - least);
        sums.largest[half] = largest;
        float total = 0.0f;
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
#pragma unroll
            for (int i = 4 * k + 2 * half; i < 4 * k + 2 * half + 2; ++i) {
                scores[i] = ptx::power_of_two(scores[i] * factor - least);
                total += scores[i];
            }
        }
        sums.weights[half] = sums.weights[half] * of_old[half] + total;
    }
    return make_float2(of_old[0], of_old[1]);
}

// Brings outputs to a new largest score.
__device__ __forceinline__ void rescale(float (&outputs)[kDim / 2], float2 of_old) {
    if (!__any_sync(~0u, of_old.x != 1.0f || of_old.y != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kDim / 2; i += 1) outputs[i] *= i % 4 < 2 ? of_old.x : of_old.y;
}

// Weights as first operands of products: a fragment of 16 tokens after the other.
__device__ __forceinline__ void narrow(u32 (&narrowed)[kBlock / 4], const float (&weights)[kBlock / 2]) {
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
        narrowed[i] = ptx::narrow_pair<pages::kBf16Products>(weights[2 * i], weights[2 * i + 1]);
    }
}

// Values of tokens from `there` on, which no text has, become zeros: no weight of 0 meets what an older text left.
__device__ __forceinline__ void clear_values(u32 values, int there, int group) {
    constexpr int kRowPieces = kPieces * 8;
    for (int i = there * kRowPieces + threadIdx.x % 128; i < kBlock * kRowPieces; i += 128) {
        const int token = i / kRowPieces, piece = i % kRowPieces;
        const u32 to = values + piece / 8 * kPieceBytes + token * 128 + piece % 8 * 16;
        ptx::store_shared_four(to, make_uint4(0, 0, 0, 0));
    }
    ptx::end_reads();  // and writes, which the tensor cores are to see
    ptx::sync_one_of<kGroupBarriers, 128>(group);
}

// Brings what a warpgroup has of a tile together with the other parts: to memory and, where this part comes last, back
// again in the order of the parts. Tells whether it came last. `parts`: float4 [parts][kPartFours][128]. `last` is a word
// of shared memory.
constexpr int kPartFours = kDim / 8 + 1;

__device__ __forceinline__ bool join(
    Sums& sums, float4* parts, int part, int count, u32* arrived, u32 last, int group, float factor) {
    const int thread = threadIdx.x % 128;
    const auto place = [&](int part, int i) { return parts + (part * kPartFours + i) * 128 + thread; };
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
        const float* four = sums.outputs + 4 * i;
        *place(part, i) = make_float4(four[0], four[1], four[2], four[3]);
    }
    *place(part, kDim / 8) = make_float4(sums.largest[0], sums.largest[1], sums.weights[0], sums.weights[1]);
    ptx::sync_one_of<kGroupBarriers, 128>(group);
    if (thread == 0) {
        const bool comes_last = ptx::arrive(arrived) == static_cast<u32>(count - 1);
        if (comes_last) *arrived = 0;
        ptx::store_shared(last, comes_last);
    }
    ptx::sync_one_of<kGroupBarriers, 128>(group);
    if (ptx::load_shared(last) == 0) return false;
    for (int i = 0; i < count; ++i) {
        const float4 four = __ldcg(place(i, kDim / 8));
        sums.largest[0] = fmaxf(sums.largest[0], four.x);
        sums.largest[1] = fmaxf(sums.largest[1], four.y);
    }
    sums.weights[0] = sums.weights[1] = 0.0f;
    constexpr int kFours = 4;  // so many at a time, where registers are few
#pragma unroll
    for (int k = 0; k < kDim / 8; k += kFours) {
        float found[4 * kFours] = {};
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const float4 four = __ldcg(place(i, kDim / 8));
            const float low = ptx::power_of_two((four.x - sums.largest[0]) * factor);
            const float high = ptx::power_of_two((four.y - sums.largest[1]) * factor);
            if (k == 0) sums.weights[0] += low * four.z, sums.weights[1] += high * four.w;
#pragma unroll
            for (int j = 0; j < kFours; ++j) {
                if (k + j >= kDim / 8) continue;
                const float4 of_part = __ldcg(place(i, k + j));
                found[4 * j] += low * of_part.x;
                found[4 * j + 1] += low * of_part.y;
                found[4 * j + 2] += high * of_part.z;
                found[4 * j + 3] += high * of_part.w;
            }
        }
#pragma unroll
        for (int j = 0; j < 4 * kFours; ++j) {
            if (4 * k + j < kDim / 2) sums.outputs[4 * k + j] = found[j];
        }
    }
    return true;
}

// Where a query's results go, or nowhere, and by what they are multiplied.
struct Target {
    u16* to;
    float factor;
};

// Pairs of channels of a tile of eight, of the first query (half 0) or the second.
__device__ __forceinline__ u32 result(const float (&outputs)[kDim / 2], int tile, int half, float factor) {
    const int at = 4 * tile + 2 * half;
    return ptx::narrow_pair<BF16>(outputs[at] * factor, outputs[at + 1] * factor);
}

// Stores results. The four lanes of a quad have two channels in eight each: of 32 channels they exchange them, so that
// each stores 16 bytes.
__device__ __forceinline__ void store(const float (&outputs)[kDim / 2], const Target (&targets)[2]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile + 4 <= kDim / 8; tile += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = result(outputs, tile + i, half, targets[half].factor);
#pragma unroll
            for (int bit = 0; bit < 2; ++bit) {  // a 4x4 matrix over lanes and words is transposed
                const bool upper = lane >> bit & 1;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    u32 &low = words[bit == 0 ? 2 * i : i], &high = words[bit == 0 ? 2 * i + 1 : i + 2];
                    const u32 other = __shfl_xor_sync(~0u, upper ? low : high, 1 << bit);
                    low = upper ? other : low;
                    high = upper ? high : other;
                }
            }
            if (targets[half].to == nullptr) continue;
            u16* to = targets[half].to + 8 * (tile + lane);
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
#pragma unroll
    for (int tile = kDim / 32 * 4; tile < kDim / 8; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (targets[half].to == nullptr) continue;
            u16* to = targets[half].to + 8 * tile + 2 * lane;
            *reinterpret_cast<u32*>(to) = result(outputs, tile, half, targets[half].factor);
        }
    }
}

}  // namespace prefill
