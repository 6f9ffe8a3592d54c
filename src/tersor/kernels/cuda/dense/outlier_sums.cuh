// out[t, j] = sum over the outliers k of row j of value[k] * x[t, column[k]] + residual[t, j], in float32, rounded once:
// what a dense product has for its residual where the weight keeps outliers. A CTA has 64 rows and a tile of tokens, a
// warp eight of these rows, a lane every 32nd outlier of each of them; the order of sums depends on no other token.
// Parameters: BF16 (1: activations and results are bf16, 0: fp16), VALUE_BF16 (the same of outliers), TOKENS (of a tile:
// 1, 2 or 4, read where they stand, or 8, which come turned.cuh's way).
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "small/pieces.cuh"

namespace outliers {

constexpr int kTokens = TOKENS;
constexpr bool kTurned = kTokens == 8;
constexpr int kWarps = 8, kRowsOfWarp = 8, kRows = kWarps * kRowsOfWarp;
constexpr int kThreads = 32 * kWarps;
constexpr int kLanesOfToken = 32 / kTokens;  // that have the same sum in the end

// The activations of all tokens of a tile in one channel.
struct Column {
    float of[kTokens] = {};

    __device__ __forceinline__ Column(const u16* x, long long stride, int channel, int first, int n) {
        if constexpr (kTurned) {
            const pieces::Piece eight = pieces::load(x + channel * stride, first / kTokens);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) of[t] = ptx::widen<BF16>(eight.values[t]);
        } else {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (first + t < n) of[t] = ptx::widen<BF16>(__ldcg(x + (first + t) * stride + channel));
            }
        }
    }
};

// Returns the sum over all lanes for token lane / kLanesOfToken: while a lane has several tokens it hands half of them
// over, so that a sum is the same tree of lanes whatever the number of tokens.
__device__ __forceinline__ float over_lanes(float (&of)[kTokens], int lane) {
#pragma unroll
    for (int lanes = 16, tokens = kTokens / 2; lanes > 0; lanes /= 2, tokens /= 2) {
        const bool upper = lane & lanes;
#pragma unroll
        for (int t = 0; t < (tokens > 0 ? tokens : 1); ++t) {
            const float given = tokens > 0 && !upper ? of[t + tokens] : of[t];
            const float own = tokens > 0 && upper ? of[t + tokens] : of[t];
            of[t] = own + __shfl_xor_sync(0xffffffffu, given, lanes);
        }
    }
    return of[0];
}

}  // namespace outliers

extern "C" __global__ void __launch_bounds__(outliers::kThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,      // [n, IC], or where tokens are turned [IC, n padded to 8]
    const u32* __restrict__ words,  // [oc, count]: a column in the lower 16 bits, the value in the upper
    const u16* residual,            // [n, oc] or null
    u16* out,                       // [n, oc]
    long long stride,               // of x, in elements
    int count,                      // outliers of a row
    int oc,
    int n) {
    using namespace outliers;
    __shared__ float sums[kTokens][kRows];
    launch::start_next();
    launch::wait_for_earlier();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = blockIdx.x * kRows, first_token = blockIdx.y * kTokens;
    float own[kRowsOfWarp][kTokens] = {};
#pragma unroll 1
    for (int place = lane; place < count; place += 32) {
        u32 word[kRowsOfWarp];
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
            const int row = first_row + warp * kRowsOfWarp + i;
            word[i] = row < oc ? words[static_cast<long long>(row) * count + place] : 0;
        }
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
            const Column column(x, stride, word[i] & 0xffff, first_token, n);
            const float value = ptx::widen<VALUE_BF16>(static_cast<u16>(word[i] >> 16));
#pragma unroll
            for (int t = 0; t < kTokens; ++t) own[i][t] = __fmaf_rn(value, column.of[t], own[i][t]);
        }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
        const float sum = over_lanes(own[i], lane);
        if (lane % kLanesOfToken == 0) sums[lane / kLanesOfToken][warp * kRowsOfWarp + i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
        const int token = first_token + i / kRows, row = first_row + i % kRows;
        if (token >= n || row >= oc) continue;
        const long long at = static_cast<long long>(token) * oc + row;
        const float added = residual == nullptr ? 0.0f : ptx::widen<BF16>(__ldcg(residual + at));
        out[at] = ptx::narrow<BF16>(sums[i / kRows][i % kRows] + added);
    }
}
