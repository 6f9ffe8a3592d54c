// The end of an item of sm90_linear.cuh: sums of channel groups and of splits are added, scaled, rounded and stored.
#pragma once

#include "sm90_pipeline.cuh"

namespace linear {

// Adds the sums of the other channel groups to those of group 0; returns true in the threads of group 0.
__device__ __forceinline__ bool add_channel_groups(float (&sums)[kSums], float* exchange, int count, bool is_first) {
    if constexpr (kChannelGroups == 1) return true;
    const int group = threadIdx.x / kFinishers, thread = threadIdx.x % kFinishers;
    float* parts = exchange + thread;
    if (group > 0) {
        if (!is_first) ptx::sync_threads<kPartsRead, kConsumers>();
        if (group < count) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) parts[((group - 1) * kSums + i) * kFinishers] = sums[i];
        }
        ptx::arrive_threads<kPartsReady, kConsumers>();
        return false;
    }
    if (!is_first) ptx::arrive_threads<kPartsRead, kConsumers>();
    ptx::sync_threads<kPartsReady, kConsumers>();
    for (int other = 1; other < min(kChannelGroups, count); ++other) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += parts[((other - 1) * kSums + i) * kFinishers];
    }
    return true;
}

// Hands this CTA's sums to the first of its cluster; returns true there, where then the sum of all splits is. `arrived`
// is the barrier that counts the bytes.
__device__ __forceinline__ bool gather_splits(
    float (&sums)[kSums], const Item& item, u32 gathered, const char* parts, u32 arrived) {
    constexpr int kFours = kSums / 4;
    if (item.part > 0) {
        const u32 first = gathered + (item.part - 1) * kPartBytes + threadIdx.x * 16;
        const u32 there = ptx::address_in(first, 0), barrier = ptx::address_in(arrived, 0);
#pragma unroll
        for (int i = 0; i < kFours; ++i) ptx::store_in(there + i * kFinishers * 16, sums + 4 * i, barrier);
        return false;
    }
    ptx::barrier_wait(arrived, 0);
    for (int part = 1; part < item.parts; ++part, parts += kPartBytes) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float4 four = reinterpret_cast<const float4*>(parts)[i * kFinishers + threadIdx.x];
            sums[4 * i] += four.x;
            sums[4 * i + 1] += four.y;
            sums[4 * i + 2] += four.z;
            sums[4 * i + 3] += four.w;
        }
    }
    return true;
}

// Hands this CTA's sums over through memory; returns true in the one CTA that then holds the sum of all splits.
__device__ __forceinline__ bool add_splits(
    float (&sums)[kSums], const Work& work, const Item& item, int rank, float* partial, u32* arrived) {
    __shared__ bool is_last;
    const int splits = item.parts, output = (item.tile - work.whole_tiles) * kCluster + rank;
    float* parts = partial + static_cast<long long>(output) * splits * kSums * kFinishers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(parts + (item.part * kSums + i) * kFinishers, sums[i]);
    __threadfence();
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
    if (threadIdx.x == 0) {
        is_last = ptx::arrive(arrived + output) == splits - 1;
        if (is_last) arrived[output] = 0;
    }
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
    if (!is_last) return false;
    __threadfence();
    // A load from L2 takes about a microsecond: as many as registers hold are under way at a time.
    constexpr int kChunk = kSums < 64 ? kSums : 64;
    constexpr int kTogether = kChunk < 16 ? 16 / kChunk : 1;
#pragma unroll
    for (int chunk = 0; chunk < kSums; chunk += kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sums[chunk + i] = 0.0f;
        for (int split = 0; split < splits; split += kTogether) {
            float loaded[kTogether][kChunk];
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) {
                    loaded[s][i] =
                        split + s < splits ? __ldcg(parts + ((split + s) * kSums + chunk + i) * kFinishers) : 0.0f;
                }
            }
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) sums[chunk + i] += loaded[s][i];
            }
        }
    }
    return true;
}

// The scales of the two tokens that a lane has of a group of eight: 1 for 16-bit activations.
struct TokenScales {
    float even = 1.0f, odd = 1.0f;

    __device__ __forceinline__ TokenScales(const float* x_scale, int first_token, int n) {
        if constexpr (kFp8) {
            const int token = first_token + threadIdx.x % 4 * 2;
            if (token < n) even = x_scale[token];
            if (token + 1 < n) odd = x_scale[token + 1];
        }
    }
};

// The scales and biases of this lane's two rows of a tile.
struct RowTerms {
    float scale[2], bias[2];
    int first_row;

    __device__ __forceinline__ RowTerms(const Work& work, const Item& item, const float* scales, float factor)
        : first_row(item.first_row + threadIdx.x % kFinishers / 32 * tile::kRows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            scale[half] = kGroups > 0 ? factor : (row < work.oc ? scales::of_row(scales, row) * factor : 0.0f);
        }
    }
    __device__ __forceinline__ void add_bias(const Work& work, const u16* biases) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            bias[half] = biases != nullptr && row < work.oc ? ptx::widen<kBf16>(biases[row]) : 0.0f;
        }
    }
    // Tokens 2 (lane % 4) and the next of the `tokens`-th group of eight.
    __device__ __forceinline__ u32 round(
        const float (&sums)[kSums], int tokens, int half, const TokenScales& token_scales) const {
        const float* pair = sums + 4 * tokens + 2 * half;
        const u32 even = ptx::narrow<kBf16>(pair[0] * token_scales.even * scale[half] + bias[half]);
        const u32 odd = ptx::narrow<kBf16>(pair[1] * token_scales.odd * scale[half] + bias[half]);
        return even | odd << 16;
    }
};

// Rounds and stores few tokens: fragments are turned so that stores run along the rows.
__device__ __forceinline__ void store_few(
    const float (&sums)[kSums], const Work& work, const Item& item, const RowTerms& terms, const float* x_scale,
    u16* y) {
    const int lane = threadIdx.x % 32, oc = work.oc;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
        const TokenScales token_scales(x_scale, item.first_token + i * 8, work.n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // rows 2 (lane % 4) and the next, token lane / 4
            const u32 turned = ptx::transpose_8x8(terms.round(sums, i, half, token_scales));
            const int token = item.first_token + i * 8 + lane / 4;
            const int row = terms.first_row + 8 * half + lane % 4 * 2;
            if (token >= work.n || row >= oc) continue;
            u16* target = y + static_cast<long long>(token) * oc + row;
            if (oc % 2 == 0) {
                *reinterpret_cast<u32*>(target) = turned;
            } else {
                target[0] = static_cast<u16>(turned);
                if (row + 1 < oc) target[1] = static_cast<u16>(turned >> 16);
            }
        }
    }
}

// Rounds and stores many tokens: a warpgroup turns kStoreTokens of them at a time in shared memory, so that every store
// writes 16 bytes and a warp's fill whole lines. A token's 64 rows are 8 pieces of 16 bytes, swizzled by the token.
__device__ __forceinline__ void store_many(
    const float (&sums)[kSums], const Work& work, const Item& item, const RowTerms& terms, const float* x_scale,
    u16* y, char* turned) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    char* tokens = turned + group * kStoreBytes;
    const u32 shared = ptx::shared_address(tokens);
    const int group_row = item.first_row + group * tile::kUnitRows;
    // Of the four 8x8 matrices of 16 tokens and 16 rows, this lane addresses row lane % 8 of matrix lane / 8.
    const int own_token = lane / 16 * 8 + lane % 8, own_piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int first = 0; first < kTokens; first += kStoreTokens) {
        ptx::sync_one_of<kGroupBarriers, 128>(group);  // the pieces before have been read
#pragma unroll
        for (int i = 0; i < kStoreTokens; i += 16) {
            const int at = first / 8 + i / 8;
            const TokenScales low(x_scale, item.first_token + at * 8, work.n);
            const TokenScales high(x_scale, item.first_token + at * 8 + 8, work.n);
            const u32 parts[4] = {
                terms.round(sums, at, 0, low), terms.round(sums, at, 1, low), terms.round(sums, at + 1, 0, high),
                terms.round(sums, at + 1, 1, high)};
            const int token = i + own_token;
            ptx::store_matrices_turned(shared + token * 128 + (own_piece ^ token % 8) * 16, parts);
        }
        ptx::sync_one_of<kGroupBarriers, 128>(group);
#pragma unroll
        for (int i = 0; i < kStoreTokens; i += 16) {
            const int token = i + threadIdx.x % 128 / 8, piece = lane % 8;
            const int row = group_row + piece * 8, y_token = item.first_token + first + token;
            if (y_token >= work.n || row >= work.oc) continue;
            const char* source = tokens + token * 128 + (piece ^ token % 8) * 16;
            u16* target = y + static_cast<long long>(y_token) * work.oc + row;
            if (work.oc % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
            } else {
                for (int j = 0; j < min(8, work.oc - row); ++j) target[j] = reinterpret_cast<const u16*>(source)[j];
            }
        }
    }
}

}  // namespace linear
