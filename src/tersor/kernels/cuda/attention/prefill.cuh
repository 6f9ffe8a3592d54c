// Attention of rows with many new tokens, whose keys and values are in pages already (append.cuh). A CTA has 64 * ROW_TILES
// queries of one head (wide.cuh). Pages that no query of the CTA sees are left out.
// Parameters: those of wide.cuh, SHARED_BYTES.
#pragma once

#include "attention/pages.cuh"
#include "attention/rows.cuh"
#include "attention/sinks.cuh"
#include "attention/wide.cuh"
#include "common/launch.cuh"

namespace prefill {

using namespace wide;

static_assert(kWideBytes == SHARED_BYTES);

// Products become scores, of tokens that a query does not see -inf. `seen`: the last token that a lane's first row sees,
// row r + 1 one more; rows beyond the last query see what that one does.
__device__ __forceinline__ void hide(
    float (&scores)[kTiles][kKeyTiles][4], int start, int seen, int last, int window) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int until = min(seen + 16 * t + i / 2 * 8, last);
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
                const int token = start + 8 * k + 2 * (lane % 4) + i % 2;
                if (token > until || token <= until - window) scores[t][k][i] = pages::lowest();
            }
        }
    }
}

}  // namespace prefill

extern "C" __global__ void __launch_bounds__(prefill::kThreads) TERSOR_ENTRY(
    const unsigned char* all,             // as in decode.cuh, like all that has its name
    const float* scales,
    const int* __restrict__ starts,
    const int* __restrict__ lengths,
    const int* __restrict__ table,
    const void* __restrict__ sink_scores,
    u16* out,                             // holds the queries, and gets the results
    int rows,
    int table_stride,
    int heads,
    int kv_heads,
    int window,
    int wide_sinks,
    float scale,
    float soft) {
    using namespace prefill;
    extern __shared__ __align__(16) unsigned char attention_memory[];
    launch::start_next();
    launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto [row, base] = rows::tile_of(starts, lengths, rows, kQueries, blockIdx.x);
    if (row < 0) return;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const int first = __ldcg(starts + row), fresh = __ldcg(starts + row + 1) - first, length = __ldcg(lengths + row);
    const int known = length - fresh, queries = min(fresh - base, kQueries);
    const int first_seen = known + base, last_seen = first_seen + queries - 1;  // by the first query, by the last
    const int first_page = max(first_seen + 1 - window, 0) / pages::kTokens;
    const int count = last_seen / pages::kTokens + 1 - first_page;
    const u32 memory = ptx::shared_address(attention_memory), placed = memory + kQueriesAt;
    const int token = first + base;
    const auto place_in_out = [&](int query) {  // found anew where it is needed: registers are few in between
        return out + (static_cast<long long>(token + query) * heads + head) * kDim;
    };

    constexpr int kQueryPieces = kDim / 8;
    for (int i = threadIdx.x; i < kQueries * kQueryPieces; i += kThreads) {
        const int query = i / kQueryPieces, piece = i % kQueryPieces;
        const u16* from = place_in_out(min(query, queries - 1)) + piece * 8;
        ptx::copy_async_16_zero_fill(placed + query * pages::kQueryStride + piece * 16, from, query < queries ? 16 : 0);
    }
    const int from_first_page = length - first_page * pages::kTokens;  // tokens
    const int* row_table = table + static_cast<long long>(row) * table_stride + first_page;
    const auto place_of = [&](int i, int half) { return memory + (i % STAGES * 2 + half) * kSlotBytes; };
    const auto fetch_half = [&](int i, int half) {
        if (i < count) {
            const int there = from_first_page - i * pages::kTokens;
            fetch(place_of(i, half), all, scales, __ldcg(row_table + i), half, kv_heads, kv_head, there);
        }
        ptx::copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < 2 * STAGES - 1; ++i) fetch_half(i / 2, i % 2);

    Sums sums = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) sums.largest[t][0] = sums.largest[t][1] = pages::lowest();
    const float factor = soft == 0.0f ? scale : 1.0f;
    const int warp_queries = warp * 16 * kTiles;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        ptx::copy_async_wait<2 * STAGES - 2>();
        __syncthreads();
        fetch_half(i + STAGES - 1, 1);
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
            const int start = (first_page + i) * pages::kTokens + part * kPartTokens;
            const int within = part * kPartTokens * kRowStride, scales_at = kHalfBytes + part * kPartTokens * 4;
            float scores[kTiles][kKeyTiles][4] = {};
            multiply_keys(scores, place_of(i, 0) + within, placed + warp_queries * pages::kQueryStride);
            if constexpr (pages::kE4m3) scale_by_token(scores, place_of(i, 0) + scales_at);
            if (soft != 0.0f) {
#pragma unroll
                for (int j = 0; j < kTiles * kKeyTiles * 4; ++j) {
                    float& one = scores[j / (kKeyTiles * 4)][j / 4 % kKeyTiles][j % 4];
                    one = pages::score(one, scale, soft);
                }
            }
            if (start + kPartTokens - 1 > first_seen || start <= last_seen - window) {
                hide(scores, start, first_seen + warp_queries + lane / 4, last_seen, window);
            }
            weigh(sums, scores, factor);
            if (part == 0) ptx::copy_async_wait<2 * STAGES - 2>();
            if (part == 0 || part == kParts - 1) __syncthreads();  // values are there; keys have been read
            if (part == kParts - 1) fetch_half(i + STAGES, 0);
            if constexpr (pages::kE4m3) scale_by_token(scores, place_of(i, 1) + scales_at);
            multiply_values(sums, scores, place_of(i, 1) + within);
        }
    }

    const float sink = sinks::Sinks{sink_scores, wide_sinks}.of(head);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weights = sums.weights[t][half];
            weights += __shfl_xor_sync(~0u, weights, 1);
            weights += __shfl_xor_sync(~0u, weights, 2);
            const float last = sinks::last_factor(sums.largest[t][half] * factor, weights, sink);
            const int query = warp_queries + 16 * t + 8 * half + lane / 4;
            if (query >= queries) continue;
            u16* to = place_in_out(query);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const float* low = sums.outputs[t][2 * step] + 2 * half;
                const float* high = sums.outputs[t][2 * step + 1] + 2 * half;
                if constexpr (pages::kE4m3) {
                    *reinterpret_cast<uint2*>(to + 16 * step + 4 * (lane % 4)) = make_uint2(
                        ptx::narrow_pair<BF16>(low[0] * last, high[0] * last),
                        ptx::narrow_pair<BF16>(low[1] * last, high[1] * last));
                } else {
                    u32* pair = reinterpret_cast<u32*>(to + 16 * step + 2 * (lane % 4));
                    pair[0] = ptx::narrow_pair<BF16>(low[0] * last, low[1] * last);
                    pair[4] = ptx::narrow_pair<BF16>(high[0] * last, high[1] * last);
                }
            }
        }
    }
}
