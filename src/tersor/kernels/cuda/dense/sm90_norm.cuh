// RMS norms around the products of sm90_linear.cuh, without a kernel of their own. With g the weights of a norm over
// the channels of y = x W^T + residual, and r = 1 / sqrt(mean(y^2) + eps) of a token:
//
//     the product ahead (NORM 2) stores    y     and    y * g,    and sums of y^2 over every 64 channels of a token
//     the product behind (NORM 1) makes    (y * g) V^T * r    of the norm's result (y * g * r) times V
//
// The first has a token's channels in many CTAs, so the last sum is left to the second: a warp that copies nothing has
// it long before the products are there to be multiplied by r. All sums are added in one order.
#ifndef TERSOR_DENSE_SM90_NORM  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_NORM

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

static_assert(!kNormIn || !kBytewise, "the scales of 8-bit activations are elsewhere");
static_assert(!(kNormIn || kNormOut) || !kMany, "norms are folded into products of few tokens");

// What a launch has of the norms around it.
struct Norms {
    const float* weight;  // [oc] of the norm behind (NORM 2)
    u16* scaled;          // [n, oc]: y times it
    float* squares;       // [n, squares_stride]: sums of squares of y (NORM 2) or of what x is made of (NORM 1)
    float scale, eps;     // r = 1 / sqrt(sum of squares * scale + eps) (NORM 1)
};

// Floats from one token's sums of squares to the next: whole 16 bytes.
__device__ __forceinline__ int squares_stride(int channels) { return (channels + 255) / 256 * 4; }

// One warp: the weights of an item's rows go to L2, which has read many others since the step before.
__device__ __forceinline__ void fetch_weights(const Norms& norms, const Item& item, int rows) {
    constexpr int kOfSector = 8;
    const int row = item.first_row + threadIdx.x % 32 * kOfSector;
    static_assert(kRows <= 32 * kOfSector, "a lane has one sector");
    if (row < min(rows, item.first_row + kRows)) ptx::prefetch(norms.weight + row);
}

// One warp: the r of every token of the only token tile, to `shared` [kTokens]. Eight lanes have a token.
__device__ __forceinline__ void scale_tokens(float* shared, const Norms& norms, int channels, int n) {
    constexpr int kLanes = 8, kStep = 32 / kLanes;
    constexpr int kAtOnce = kTokens < 16 ? 2 : 4;  // tokens of a lane whose loads are under way together
    const int lane = threadIdx.x % 32, stride = squares_stride(channels);
    const int count = (channels + tile::kUnitRows - 1) / tile::kUnitRows;
#pragma unroll 1
    for (int base = 0; base < n; base += kStep * kAtOnce) {
        float totals[kAtOnce] = {};
#pragma unroll 1
        for (int first = lane % kLanes * 4; first < count; first += kLanes * 4) {
            float4 loaded[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int token = min(base + lane / kLanes + i * kStep, n - 1);
                loaded[i] = __ldcg(reinterpret_cast<const float4*>(norms.squares + token * stride + first));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {  // behind the last sum there is anything
                totals[i] += loaded[i].x;
                if (first + 1 < count) totals[i] += loaded[i].y;
                if (first + 2 < count) totals[i] += loaded[i].z;
                if (first + 3 < count) totals[i] += loaded[i].w;
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) totals[i] += __shfl_xor_sync(~0u, totals[i], lanes);
            const int token = base + lane / kLanes + i * kStep;
            if (lane % kLanes == 0) shared[token] = 1.0f / sqrtf(__fmaf_rn(totals[i], norms.scale, norms.eps));
        }
    }
}

// The squares of a tile's results, as `store_few` has them: of token lane / 4 of each group of eight.
struct Squares {
    float of[kTokens / 8] = {};

    // Adds those of two channels of a token of the `tokens`-th group, rounded as they are stored.
    __device__ __forceinline__ void add(int tokens, u32 pair) {
        const float low = ptx::widen<kBf16>(static_cast<u16>(pair));
        const float high = ptx::widen<kBf16>(static_cast<u16>(pair >> 16));
        of[tokens] = __fmaf_rn(high, high, __fmaf_rn(low, low, of[tokens]));
    }

    // Adds up what the lanes and warps of each warpgroup have, 64 rows, and stores it. There is little memory: where sums
    // of all tokens and warps but the first do not fit, warps add in turn, to the sums of as many tokens as do.
    __device__ __forceinline__ void store(const Item& item, int rows, const Norms& norms) {
        constexpr int kWarps = 4, kFloats = 96;
        constexpr bool kFit = kRowGroups * (kWarps - 1) * kTokens <= kFloats;
        constexpr int kAtOnce = kTokens < 32 ? kTokens : 32;
        __shared__ float sums[kNormOut ? kRowGroups * (kFit ? (kWarps - 1) * kTokens : kAtOnce) : 1];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps, group = threadIdx.x / 128;
        const int unit = item.first_row / tile::kUnitRows + group;
        const auto put = [&](int token, float sum) {
            token += item.first_token;
            if (token < item.end_token && unit * tile::kUnitRows < rows) {
                norms.squares[token * squares_stride(rows) + unit] = sum;
            }
        };
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
            of[i] += __shfl_xor_sync(~0u, of[i], 1);
            of[i] += __shfl_xor_sync(~0u, of[i], 2);
        }
        if constexpr (kFit) {
            float* own = sums + group * (kWarps - 1) * kTokens + lane / 4;
            // Those of the item before have been read: all have met since where warpgroups hand their sums over.
            if constexpr (kTurns == 1) ptx::sync_one_of<kGroupBarriers, 128>(group);
            if (warp > 0 && lane % 4 == 0) {
#pragma unroll
                for (int i = 0; i < kTokens / 8; ++i) own[(warp - 1) * kTokens + i * 8] = of[i];
            }
            ptx::sync_one_of<kGroupBarriers, 128>(group);
            if (warp == 0 && lane % 4 == 0) {
#pragma unroll
                for (int i = 0; i < kTokens / 8; ++i) {
                    float sum = of[i];
#pragma unroll
                    for (int other = 0; other < kWarps - 1; ++other) sum += own[other * kTokens + i * 8];
                    put(i * 8 + lane / 4, sum);
                }
            }
        } else {
            float* own = sums + group * kAtOnce;
#pragma unroll
            for (int first = 0; first < kTokens; first += kAtOnce) {
#pragma unroll
                for (int turn = 0; turn < kWarps; ++turn) {
                    ptx::sync_one_of<kGroupBarriers, 128>(group);
                    if (warp != turn || lane % 4 != 0) continue;
#pragma unroll
                    for (int i = 0; i < kAtOnce / 8 && first / 8 + i < kTokens / 8; ++i) {
                        float& sum = own[i * 8 + lane / 4];
                        const float added = turn > 0 ? sum + of[first / 8 + i] : of[first / 8 + i];
                        if (turn + 1 < kWarps) {
                            sum = added;
                        } else {
                            put(first + i * 8 + lane / 4, added);
                        }
                    }
                }
            }
        }
    }
};

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_NORM
