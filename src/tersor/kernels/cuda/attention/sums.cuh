// What a warp finds over its tokens, and how that of several warps and splits becomes one result. Scores are in powers of
// two: they have been multiplied by log2(e).
// Parameters: those of decode.cuh.
#pragma once

#include "attention/pages.cuh"
#include "attention/sinks.cuh"
#include "attention/tile.cuh"

namespace decode {

using pages::kDim;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = QUERY_TILES;
constexpr bool kShares = SHARES;
constexpr bool kEarly = kShares && kTiles == 1;  // numbers of pages, and parts, are asked for as soon as they can be
constexpr int kQueries = 8 * kTiles;
constexpr int kSteps = tile::kSteps;
constexpr int kSumStride = kDim + 4;  // floats of a query's sums in shared memory: without bank conflicts
constexpr bool kQueriesStay = kTiles * kSteps * 2 <= 32;  // in registers
constexpr int kChains = kTiles == 1 ? 2 : 1;              // of products that wait for each other
constexpr int kRingBytes = kWarps * STAGES * tile::kBytes;
constexpr int kSumsBytes = kWarps * kQueries * (kSumStride + 2) * 4;
constexpr int kQueriesAt = kRingBytes > kSumsBytes ? kRingBytes : kSumsBytes;
constexpr int kNewAt = kQueriesAt + kQueries * pages::kQueryStride;
constexpr int kNewScalesAt = kNewAt + pages::kMostFew * 2 * pages::kRowStride;
constexpr int kSharedBytes = kNewScalesAt + pages::kMostFew * 2 * 4;
static_assert(kSharedBytes == SHARED_BYTES);

// What remains of sums, largest scores and sums of weights: the result of one head and token, four channels of it.
__device__ __forceinline__ void write(u16* out, float4 sums, float factor) {
    *reinterpret_cast<uint2*>(out) = make_uint2(
        ptx::narrow_pair<BF16>(sums.x * factor, sums.y * factor),
        ptx::narrow_pair<BF16>(sums.z * factor, sums.w * factor));
}

// 0 for -inf, from which nothing may be subtracted.
__device__ __forceinline__ float finite(float largest) { return largest == pages::lowest() ? 0.0f : largest; }

// A warp's sums over its tokens: of S^T and O^T a lane has queries 2 (lane % 4) and the next of every 8.
struct Sums {
    float outputs[kSteps][kTiles][4];
    float largest[kTiles][2];
    float weights[kTiles][2];
};

// Adds 16 tokens from `start` on, for `count` queries. `last`: of a lane's queries, the last token that each sees.
__device__ __forceinline__ void add_tile(
    Sums& sums, u32 place, u32 queries, const u32 (&kept)[kQueriesStay ? kTiles : 1][kSteps][2], int count, int start,
    const int (&last)[kTiles][2], int window, float scale, float soft) {
    const int lane = threadIdx.x % 32;
    float products[kChains][kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        u32 fragment[4];
        tile::keys(fragment, place, step);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            if (t > 0 && 8 * t >= count) continue;
            u32 low, high;
            if constexpr (kQueriesStay) {
                low = kept[t][step][0];
                high = kept[t][step][1];
            } else {
                const u32 from = queries + (8 * t + lane / 4) * pages::kQueryStride + step * 32 + lane % 4 * 4;
                low = ptx::load_shared(from);
                high = ptx::load_shared(from + 16);
            }
            ptx::multiply_add<pages::kBf16Products>(products[step % kChains][t], fragment, low, high);
        }
    }
    float key_scale[2] = {1.0f, 1.0f}, value_scale[2] = {1.0f, 1.0f};
    if constexpr (pages::kE4m3) {
        const u32 from = place + 2 * tile::kHalfBytes + lane / 4 * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            key_scale[i] = ptx::load_shared_float(from + 32 * i) * pages::kUnit;
            value_scale[i] = ptx::load_shared_float(from + 64 + 32 * i) * pages::kUnit;
        }
    }
    u32 weights[kTiles][2];
    bool moved = false;
    float factors[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        float scores[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float product = products[0][t][i];
            if constexpr (kChains == 2) product += products[1][t][i];
            const int token = start + lane / 4 + i / 2 * 8, seen = last[t][i % 2];
            scores[i] = token <= seen && token > seen - window ? pages::score(product * key_scale[i / 2], scale, soft)
                                                               : pages::lowest();
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float largest = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
            largest = fmaxf(largest, sums.largest[t][i]);
            factors[t][i] = ptx::power_of_two(sums.largest[t][i] - finite(largest));
            moved |= largest != sums.largest[t][i];
            sums.largest[t][i] = largest;
            scores[i] = ptx::power_of_two(scores[i] - finite(largest));
            scores[i + 2] = ptx::power_of_two(scores[i + 2] - finite(largest));
            sums.weights[t][i] = sums.weights[t][i] * factors[t][i] + scores[i] + scores[i + 2];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            weights[t][i] = ptx::transpose_8x8(ptx::narrow_pair<pages::kBf16Products>(
                scores[2 * i] * value_scale[i], scores[2 * i + 1] * value_scale[i]));
        }
    }
    if (__any_sync(~0u, moved)) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums.outputs[step][t][i] *= factors[t][i % 2];
            }
        }
    }
    ptx::copy_async_wait<2 * STAGES - 2>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kSteps; step += tile::kFragments) {
        u32 fragments[tile::kFragments][4];
        tile::values(fragments, place + tile::kHalfBytes, step);
#pragma unroll
        for (int i = 0; i < tile::kFragments; ++i) {
            if (step + i >= kSteps) continue;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                if (t > 0 && 8 * t >= count) continue;
                ptx::multiply_add<pages::kBf16Products>(
                    sums.outputs[step + i][t], fragments[i], weights[t][0], weights[t][1]);
            }
        }
    }
}

// Adds what others found for `count` queries, as it lies in a part, to a warp's sums.
__device__ __forceinline__ void add_part(Sums& sums, const float* part, int part_queries, int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int query = 8 * t + 2 * (lane % 4) + i;
            if (query >= count) continue;
            const float* from = part + query * kDim;
            float found[kSteps][2];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                found[step][0] = __ldcg(from + 16 * step + tile::channel_of(0));
                found[step][1] = __ldcg(from + 16 * step + tile::channel_of(1));
            }
            const float other = __ldcg(part + part_queries * kDim + query);
            const float weight = __ldcg(part + part_queries * (kDim + 1) + query);
            const float largest = fmaxf(sums.largest[t][i], other);
            const float factor = ptx::power_of_two(sums.largest[t][i] - finite(largest));
            const float of_other = ptx::power_of_two(other - finite(largest));
            sums.largest[t][i] = largest;
            sums.weights[t][i] = sums.weights[t][i] * factor + (lane < 4 ? weight * of_other : 0.0f);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                sums.outputs[step][t][i] = sums.outputs[step][t][i] * factor + found[step][0] * of_other;
                sums.outputs[step][t][i + 2] = sums.outputs[step][t][i + 2] * factor + found[step][1] * of_other;
            }
        }
    }
}

// Adds up what `count` splits of a row found, by one warp for one query, and writes the result. Of each split there are
// sums of `part_queries` queries, then their largest scores, then their sums of weights.
__device__ __forceinline__ void merge(
    const float* partial, int part_queries, int query, int count, float sink, u16* out) {
    const int lane = threadIdx.x % 32;
    const long long part = part_queries * (kDim + 2);
    const float* scores = partial + part_queries * kDim + query;
    constexpr int kTurns = (kDim + 127) / 128;
    constexpr int kAhead = 8 / kTurns;  // splits whose sums are under way while their scores are
    struct Piece {
        float4 turns[kTurns];
    };
    const auto load = [&](int split) {
        Piece piece = {};
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int channel = 4 * lane + 128 * turn;
            const float* from = partial + split * part + query * kDim + channel;
            if (channel < kDim) piece.turns[turn] = __ldcg(reinterpret_cast<const float4*>(from));
        }
        return piece;
    };
    Piece sums = {};
    const auto add = [&](float factor, const Piece& piece) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            sums.turns[turn].x += factor * piece.turns[turn].x;
            sums.turns[turn].y += factor * piece.turns[turn].y;
            sums.turns[turn].z += factor * piece.turns[turn].z;
            sums.turns[turn].w += factor * piece.turns[turn].w;
        }
    };
    Piece ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = i < count ? load(i) : Piece{};
    const auto score_of = [&](int split) { return split < count ? __ldcg(scores + split * part) : pages::lowest(); };
    const auto weight_of = [&](int split) { return split < count ? __ldcg(scores + split * part + part_queries) : 0.0f; };
    float score = score_of(lane), weight = weight_of(lane), largest = score, weights = 0.0f;
    for (int split = lane + 32; split < count; split += 32) largest = fmaxf(largest, score_of(split));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    for (int base = 0; base < count; base += 32) {
        if (base > 0) {
            score = score_of(base + lane);
            weight = weight_of(base + lane);
        }
        const float factor = ptx::power_of_two(score - largest);
        weights += weight * factor;
        if (base == 0) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) add(__shfl_sync(~0u, factor, i), ahead[i]);
        }
        const int some = min(count - base, 32);
#pragma unroll 4
        for (int i = base == 0 ? kAhead : 0; i < some; ++i) add(__shfl_sync(~0u, factor, i), load(base + i));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) weights += __shfl_xor_sync(~0u, weights, lanes);
    const float last = sinks::last_factor(largest, weights, sink);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
        const int channel = 4 * lane + 128 * turn;
        if (channel < kDim) write(out + channel, sums.turns[turn], last);
    }
}

}  // namespace decode
