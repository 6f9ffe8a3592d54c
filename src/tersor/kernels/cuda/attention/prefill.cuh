// Attention of rows with many new tokens, whose keys and values are in pages already (append.cuh): FlashAttention-2 (Dao,
// arXiv 2307.08691). A CTA has 64 * ROW_TILES queries of one head; they stand on the rows of products, 16 * ROW_TILES of
// them a warp, and pages of keys and values pass by in a ring. Pages that no query of the CTA sees are left out.
// Parameters: those of pages.cuh, ROW_TILES (1 or 2), STAGES of a ring, SHARED_BYTES.
#pragma once

#include "attention/pages.cuh"
#include "attention/sinks.cuh"
#include "common/launch.cuh"

namespace prefill {

using pages::kDim;
using pages::kRowStride;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = ROW_TILES;  // of 16 queries, of a warp
constexpr int kQueries = 16 * kTiles * kWarps;
constexpr int kSteps = kDim / 16;
constexpr int kParts = kTiles == 2 && kDim > 96 ? 2 : 1;  // of a page, one after the other, where registers are few
constexpr int kPartTokens = pages::kTokens / kParts;
constexpr int kKeyTiles = kPartTokens / 8;
constexpr int kHalfBytes = pages::kTokens * kRowStride;
constexpr int kScaleBytes = pages::kE4m3 ? pages::kTokens * 4 : 0;
constexpr int kSlotBytes = kHalfBytes + kScaleBytes;  // keys or values of a page, then their scales
constexpr int kQueriesAt = 2 * STAGES * kSlotBytes;
constexpr int kSharedBytes = kQueriesAt + kQueries * pages::kQueryStride;
static_assert(kSharedBytes == SHARED_BYTES);

// Starts copies of a page's keys (half 0) or values (1), of its first `there` tokens; others become zeros.
__device__ __forceinline__ void fetch(
    u32 place, const unsigned char* all, const float* scales, int page, int half, int kv_heads, int kv_head, int there) {
    const long long row = pages::row_of(page, half, kv_heads, kv_head, 0);
    const unsigned char* from = all + row * pages::kRowBytes;
    constexpr int kPieces = pages::kTokens * pages::kRowPieces;
#pragma unroll
    for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
        const int piece = threadIdx.x + kThreads * i, token = piece / pages::kRowPieces;
        if (kPieces % kThreads != 0 && piece >= kPieces) continue;
        const u32 to = place + token * kRowStride + piece % pages::kRowPieces * 16;
        ptx::copy_async_16_zero_fill(to, from + piece * 16, token < there ? 16 : 0);
    }
    if (pages::kE4m3 && threadIdx.x < pages::kTokens / 4) {
        const int token = threadIdx.x * 4;
        const u32 bytes = 4 * max(min(there - token, 4), 0);
        ptx::copy_async_16_zero_fill(place + kHalfBytes + token * 4, scales + row + token, bytes);
    }
}

// Keys of 16 tokens and 16 channels as the second operands of two products: [tokens 0-7, 8-15][channels].
__device__ __forceinline__ void keys(u32 (&fragment)[4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        const u32 from = place + lane / 4 * kRowStride + step * 16 + lane % 4 * 4;
        const u32 one = ptx::load_shared(from), other = ptx::load_shared(from + 8 * kRowStride);
        fragment[0] = pages::widen_e4m3<0, 1>(one);
        fragment[1] = pages::widen_e4m3<2, 3>(one);
        fragment[2] = pages::widen_e4m3<0, 1>(other);
        fragment[3] = pages::widen_e4m3<2, 3>(other);
    } else {
        const int token = lane % 8 + lane / 16 * 8;
        ptx::load_matrices(fragment, place + token * kRowStride + (2 * step + lane / 8 % 2) * 16);
    }
}

// Values of 16 tokens as the second operands of two products for every 16 channels: of channels 0-7 and 8-15 or, where
// a byte is a number, even and odd ones.
constexpr int kFragments = pages::kE4m3 ? 2 : 1;

__device__ __forceinline__ void values(u32 (&fragments)[kFragments][4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        u32 words[4];
        ptx::load_matrices_turned(words, place + lane % 16 * kRowStride + min(step + lane / 16, kSteps - 1) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            fragments[i][0] = pages::widen_e4m3<0, 2>(words[2 * i]);
            fragments[i][1] = pages::widen_e4m3<0, 2>(words[2 * i + 1]);
            fragments[i][2] = pages::widen_e4m3<1, 3>(words[2 * i]);
            fragments[i][3] = pages::widen_e4m3<1, 3>(words[2 * i + 1]);
        }
    } else {
        ptx::load_matrices_turned(fragments[0], place + lane % 16 * kRowStride + (2 * step + lane / 16) * 16);
    }
}

// Of a warp's queries: a lane has rows lane / 4 and lane / 4 + 8 of each tile.
struct Sums {
    float outputs[kTiles][2 * kSteps][4];
    float largest[kTiles][2];
    float weights[kTiles][2];
};

__device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][kKeyTiles][4], u32 place, u32 queries) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        u32 rows[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const u32 from = queries + (16 * t + lane % 16) * pages::kQueryStride;
            ptx::load_matrices(rows[t], from + (2 * step + lane / 16) * 16);
        }
#pragma unroll
        for (int k = 0; k < kKeyTiles; k += 2) {
            u32 fragment[4];
            keys(fragment, place + 8 * k * kRowStride, step);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                ptx::multiply_add<pages::kBf16Products>(scores[t][k], rows[t], fragment[0], fragment[1]);
                ptx::multiply_add<pages::kBf16Products>(scores[t][k + 1], rows[t], fragment[2], fragment[3]);
            }
        }
    }
}

__device__ __forceinline__ void multiply_values(
    Sums& sums, const float (&weights)[kTiles][kKeyTiles][4], u32 place) {
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
        u32 rows[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = weights[t][k + i / 2] + i % 2 * 2;
                rows[t][i] = ptx::narrow_pair<pages::kBf16Products>(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int step = 0; step < kSteps; step += kFragments) {
            u32 fragments[kFragments][4];
            values(fragments, place + 8 * k * kRowStride, step);
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                if (step + i >= kSteps) continue;
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    float(&low)[4] = sums.outputs[t][2 * (step + i)];
                    float(&high)[4] = sums.outputs[t][2 * (step + i) + 1];
                    ptx::multiply_add<pages::kBf16Products>(low, rows[t], fragments[i][0], fragments[i][1]);
                    ptx::multiply_add<pages::kBf16Products>(high, rows[t], fragments[i][2], fragments[i][3]);
                }
            }
        }
    }
}

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

// Scores, which `factor` brings to powers of two, become weights; sums so far are brought to the new largest score.
__device__ __forceinline__ void weigh(Sums& sums, float (&scores)[kTiles][kKeyTiles][4], float factor) {
    float of_old[kTiles][2];
    bool moved = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = sums.largest[t][half];
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
                largest = fmaxf(largest, fmaxf(scores[t][k][2 * half], scores[t][k][2 * half + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const float least = largest == pages::lowest() ? 0.0f : largest * factor;
            of_old[t][half] = ptx::power_of_two(sums.largest[t][half] * factor - least);
            moved |= largest != sums.largest[t][half];
            sums.largest[t][half] = largest;
            float total = 0.0f;
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[t][k][i] = ptx::power_of_two(scores[t][k][i] * factor - least);
                    total += scores[t][k][i];
                }
            }
            sums.weights[t][half] = sums.weights[t][half] * of_old[t][half] + total;
        }
    }
    if (!__any_sync(~0u, moved)) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int step = 0; step < 2 * kSteps; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.outputs[t][step][i] *= of_old[t][i / 2];
        }
    }
}

// Multiplies what belongs to a page's tokens with their scales.
__device__ __forceinline__ void scale_by_token(float (&scores)[kTiles][kKeyTiles][4], u32 scales) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float scale = ptx::load_shared_float(scales + (8 * k + 2 * (lane % 4) + i) * 4) * pages::kUnit;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                scores[t][k][i] *= scale;
                scores[t][k][i + 2] *= scale;
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
    const int row = blockIdx.z, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const int base = (gridDim.x - 1 - blockIdx.x) * kQueries;  // those that see most tokens come first
    const int first = __ldcg(starts + row), fresh = __ldcg(starts + row + 1) - first, length = __ldcg(lengths + row);
    if (length == 0 || fresh <= pages::kMostFew || base >= fresh) return;
    const int known = length - fresh, queries = min(fresh - base, kQueries);
    const int first_seen = known + base, last_seen = first_seen + queries - 1;  // by the first query, by the last
    const int first_page = max(first_seen + 1 - window, 0) / pages::kTokens;
    const int count = last_seen / pages::kTokens + 1 - first_page;
    const u32 memory = ptx::shared_address(attention_memory), placed = memory + kQueriesAt;
    u16* of_head = out + (static_cast<long long>(first + base) * heads + head) * kDim;
    const long long token_stride = static_cast<long long>(heads) * kDim;

    constexpr int kQueryPieces = kDim / 8;
    for (int i = threadIdx.x; i < kQueries * kQueryPieces; i += kThreads) {
        const int query = i / kQueryPieces, piece = i % kQueryPieces;
        const u16* from = of_head + min(query, queries - 1) * token_stride + piece * 8;
        ptx::copy_async_16_zero_fill(placed + query * pages::kQueryStride + piece * 16, from, query < queries ? 16 : 0);
    }
    const int* row_table = table + static_cast<long long>(row) * table_stride + first_page;
    const auto place_of = [&](int i, int half) { return memory + (i % STAGES * 2 + half) * kSlotBytes; };
    const auto fetch_half = [&](int i, int half) {
        if (i < count) {
            const int there = length - (first_page + i) * pages::kTokens;
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
            u16* to = of_head + query * token_stride;
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
