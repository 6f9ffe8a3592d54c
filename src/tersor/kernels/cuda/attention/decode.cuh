// Attention of rows with few new tokens over pages of keys and values (Flash-Decoding: Dao et al. 2023, online softmax by
// Milakov and Gimelshein, arXiv 1805.02867). A CTA has one row, one head of keys, up to 8 * QUERY_TILES queries of the
// heads and tokens that share it, and a part of the text (a split); its four warps have every fourth 16 tokens of it,
// each with a ring of its own, so that none waits for another before the end. What the splits of a row found meets in
// `partial`, where the last one to arrive adds it up in the order of the splits.
//
// Tokens that were in pages before the launch are fetched while the kernel ahead still runs, where `settled` says that
// no kernel which may still run writes them, nor the tables of rows. Keys and values of new tokens come from qkv:
// each CTA whose split has some puts them among its 16 tokens, and one writes them to their page, which nobody reads in
// this launch. A split without a token leaves at once, and so do rows of more tokens, which prefill.cuh serves. Where some
// rows read pages together (SHARES), shared.cuh has left parts of them in `partial`, ahead of those of the splits: the
// first split adds them up while its pages are under way, whose numbers have been asked for beside the row's lengths.
// Parameters: those of pages.cuh, QUERY_TILES (1, 2 or 4), CTAS of a multiprocessor, STAGES of a ring, SHARES (0 or 1),
// SHARED_BYTES.
#pragma once

#include "attention/head.cuh"
#include "attention/pages.cuh"
#include "attention/plan.cuh"
#include "attention/sinks.cuh"
#include "attention/sums.cuh"
#include "attention/tile.cuh"
#include "common/launch.cuh"

namespace decode {

// One row's part of the text, the same in every CTA of the row.
struct Split {
    int first, end;  // pages of this split
    int count;       // splits of the row that have any
};

__device__ __forceinline__ Split split_of(
    int length, int known, int window, int own, int splits, int split, int split_pages) {
    const int first_token = max(known + 1 - window, 0);  // the first that the first new token sees
    const int first = max(first_token / pages::kTokens, own), end = (length + pages::kTokens - 1) / pages::kTokens;
    const int all = end - first;
    int each = split_pages;
    if (each == 0) each = max(max((all + splits - 1) / splits, min((all + 15) / 16, 4)), 1);
    const int begin = first + split * each;
    return {begin, min(begin + each, end), (all + each - 1) / each};
}

// Puts the new tokens among 16 that are there but for them.
__device__ __forceinline__ void put_new(u32 place, u32 fresh, u32 fresh_scales, int start, int known, int length) {
    const int lane = threadIdx.x % 32;
    for (int token = max(known, start); token < min(length, start + tile::kTokens); ++token) {
        const int row = token - start, from = token - known;
        for (int piece = lane; piece < 2 * pages::kRowPieces; piece += 32) {
            const int half = piece / pages::kRowPieces, within = piece % pages::kRowPieces * 16;
            ptx::store_shared_four(
                place + half * tile::kHalfBytes + row * pages::kRowStride + within,
                ptx::load_shared_four(fresh + (2 * from + half) * pages::kRowStride + within));
        }
        if (pages::kE4m3 && lane < 2) {
            ptx::store_shared(
                place + 2 * tile::kHalfBytes + (lane * tile::kTokens + row) * 4,
                ptx::load_shared(fresh_scales + (2 * from + lane) * 4));
        }
    }
}

}  // namespace decode

extern "C" __global__ void __launch_bounds__(decode::kThreads, CTAS) TERSOR_ENTRY(
    const u16* __restrict__ qkv,          // [tokens, heads + 2 kv heads, HEAD_DIM]: queries, keys, values
    unsigned char* all,                   // pages
    float* scales,                        // [P, 2, kv heads, 64], of pages in e4m3
    const int* __restrict__ starts,       // [rows + 1]
    const int* __restrict__ lengths,      // [rows]
    const int* __restrict__ table,        // [rows, table_stride]
    const float* __restrict__ rotary,     // as in head::Form
    const u16* __restrict__ query_norm,   // [HEAD_DIM], or nothing
    const u16* __restrict__ key_norm,     // [HEAD_DIM]
    const void* __restrict__ sink_scores,  // as in sinks::Sinks
    u16* __restrict__ out,                // [tokens, heads, HEAD_DIM]
    float* partial,                       // [rows, gridDim.y, slots, part_queries * (HEAD_DIM + 2)]
    u32* arrived,                         // [rows, gridDim.y], zero: splits that have come
    const int* __restrict__ shared_plan,  // as in plan.cuh, where there is one
    long long stride,                     // elements from one token of qkv to the next
    int table_stride,
    int tokens,
    int heads,
    int kv_heads,
    int rotary_dim,
    int window,
    int wide_sinks,
    int settled,
    int part_queries,                     // queries of a split in `partial`: an even number, as many as there may be
    int split_pages,                      // pages of a split in any batch, or 0: as many as make gridDim.x splits
    int slots,                            // parts of a row: gridDim.x, and as many as may be read with others
    float scale,                          // of products, as pages::score takes it
    float soft,
    float eps,
    float offset) {
    using namespace decode;
    extern __shared__ __align__(16) unsigned char attention_memory[];
    launch::start_next();
    if (!settled) launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = blockIdx.z, kv_head = blockIdx.y % kv_heads, item = blockIdx.y / kv_heads;
    const int first = __ldcg(starts + row), fresh = __ldcg(starts + row + 1) - first, length = __ldcg(lengths + row);
    const int known = length - fresh, group = heads / kv_heads, base = item * kQueries;
    const bool padding = length == 0;
    plan::Own own = {};
    if constexpr (kShares) own = plan::own(shared_plan, gridDim.z, row);
    int first_pages[2] = {};  // a lane has every 32nd of the row's first 64
    if constexpr (kEarly) {
        const int* row_table = table + static_cast<long long>(row) * table_stride;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (lane + 32 * i < table_stride) first_pages[i] = __ldcg(row_table + lane + 32 * i);
        }
    }
    const Split split = split_of(length, known, window, own.begin, gridDim.x, blockIdx.x, split_pages);
    const int queries = min(fresh * group - base, kQueries);
    const bool works = !padding && fresh <= pages::kMostFew && queries > 0 && split.first < split.end;
    const u32 memory = ptx::shared_address(attention_memory);
    const u32 ring = memory + warp * STAGES * tile::kBytes;

    // The warp's tokens of page i of the split; a lane has the number of every 32nd page, counted from the split's first or,
    // where rows share pages, from the row's.
    const int slot = warp * tile::kTokens;
    int pages_left = 0, page_of_lane = 0;
    if (works) {
        pages_left = split.end - split.first;
        if ((split.end - 1) * pages::kTokens + slot >= length) --pages_left;
    }
    const int* split_table = table + static_cast<long long>(row) * table_stride + split.first;
    const auto page_of = [&](int i) {
        if constexpr (kEarly) {
            const int at = split.first + i;
            if (at < 64) return __shfl_sync(~0u, at < 32 ? first_pages[0] : first_pages[1], at % 32);
            if (at % 32 == 0 || i == 0) {
                const int mine = i - at % 32 + lane;
                page_of_lane = mine < pages_left ? __ldcg(split_table + mine) : 0;
            }
            return __shfl_sync(~0u, page_of_lane, at % 32);
        }
        if (i % 32 == 0) page_of_lane = i + lane < pages_left ? __ldcg(split_table + i + lane) : 0;
        return __shfl_sync(~0u, page_of_lane, i % 32);
    };
    const auto fetch = [&](int i) {
        if (i >= pages_left) {
            ptx::copy_async_commit();
            ptx::copy_async_commit();
            return;
        }
        const int there = known - (split.first + i) * pages::kTokens - slot;
        tile::fetch(ring + i % STAGES * tile::kBytes, all, scales, page_of(i), kv_heads, kv_head, slot, there);
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) fetch(i);
    int new_pages[2] = {};  // the last but one page and the last: at most 8 new tokens are in no other
    if (works) {
        new_pages[0] = __ldcg(split_table + max(split.end - split.first - 2, 0));
        new_pages[1] = __ldcg(split_table + split.end - split.first - 1);
    }
    if (settled) launch::wait_for_earlier();

    if (blockIdx.x == 0 && item == 0) {  // padding becomes zeros
        const auto clear = [&](int from, int to) {
            for (int token = from; token < to; ++token) {
                u32* place = reinterpret_cast<u32*>(out + (static_cast<long long>(token) * heads + kv_head * group) * kDim);
                for (int i = threadIdx.x; i < group * kDim / 2; i += kThreads) place[i] = 0;
            }
        };
        if (padding) clear(first, first + fresh);
        if (row + 1 == gridDim.z) clear(first + fresh, tokens);
    }
    if (!works) return;

    // Queries and new tokens come ready into shared memory, a head at a time by a warp, two of them under way.
    const bool owns = split.end * pages::kTokens > known;
    const int jobs = queries + (owns ? 2 * fresh : 0);
    const auto source_of = [&](int job) {
        const int made = job - queries;
        const int token = made < 0 ? (base + job) / group : made / 2;
        const int head = made < 0 ? kv_head * group + (base + job) % group : heads + made % 2 * kv_heads + kv_head;
        return qkv + (first + token) * stride + head * kDim;
    };
    const auto form_of = [&](int job) {
        const int made = job - queries;
        const bool turns = made < 0 || made % 2 == 0;
        const u16* norm = !turns ? nullptr : made < 0 ? query_norm : key_norm;
        return head::Form{turns ? rotary : nullptr, norm, rotary_dim, eps, offset};
    };
    const auto position_of = [&](int job) {
        return known + (job < queries ? (base + job) / group : (job - queries) / 2);
    };
    const auto give = [&](int job, const head::Raw& raw) {
        const head::Ready ready = head::finish(raw, form_of(job));
        if (job < queries) {
            const u32 to = memory + kQueriesAt + job * pages::kQueryStride;
            head::give_query(ready, [&](int place, u32 pair) { ptx::store_shared(to + place * 2, pair); });
            return;
        }
        const int made = job - queries, position = known + made / 2, page = position / pages::kTokens;
        const bool writes = item == 0 && page >= split.first && page < split.end;
        const int number = page == split.end - 1 ? new_pages[1] : new_pages[0];
        const long long at = pages::row_of(number, made % 2, kv_heads, kv_head, position % pages::kTokens);
        const u32 to = memory + kNewAt + made * pages::kRowStride;
        const float of_token = head::give_page(ready, [&](int channel, u32 pair) {
            if constexpr (pages::kE4m3) {
                ptx::store_shared_16(to + channel, static_cast<u16>(pair));
            } else {
                ptx::store_shared(to + channel * 2, pair);
            }
            if (writes) head::write_pair(all, at, channel, pair);
        });
        if (pages::kE4m3 && lane == 0) {
            ptx::store_shared(memory + kNewScalesAt + made * 4, __float_as_uint(of_token));
            if (writes) scales[at] = of_token;
        }
    };
    Sums sums = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) sums.largest[t][i] = pages::lowest();
    }
    const bool takes_parts = kShares && blockIdx.x == 0;
    const auto take_parts = [&] {
        const long long ticket = static_cast<long long>(row) * gridDim.y + blockIdx.y;
        const long long part = part_queries * (kDim + 2);
        const float* parts = partial + ticket * slots * part;
#pragma unroll 1
        for (int i = warp; i < own.parts; i += kWarps) add_part(sums, parts + i * part, part_queries, queries);
    };
    if (kEarly && takes_parts && warp >= jobs) take_parts();
    for (int job = warp; job < jobs; job += 2 * kWarps) {
        const bool two = job + kWarps < jobs;
        const head::Raw one = head::load(source_of(job), form_of(job), position_of(job));
        head::Raw other = {};
        if (two) other = head::load(source_of(job + kWarps), form_of(job + kWarps), position_of(job + kWarps));
        if (kEarly && takes_parts && job == warp) take_parts();
        give(job, one);
        if (two) give(job + kWarps, other);
    }
    if (!kEarly && takes_parts) take_parts();
    for (int i = threadIdx.x; i < (kQueries - queries) * pages::kQueryStride / 4; i += kThreads) {
        ptx::store_shared(memory + kQueriesAt + queries * pages::kQueryStride + i * 4, 0);
    }
    __syncthreads();

    const u32 placed = memory + kQueriesAt;
    u32 kept[kQueriesStay ? kTiles : 1][kSteps][2];
    if constexpr (kQueriesStay) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const u32 from = placed + (8 * t + lane / 4) * pages::kQueryStride + step * 32 + lane % 4 * 4;
                kept[t][step][0] = ptx::load_shared(from);
                kept[t][step][1] = ptx::load_shared(from + 16);
            }
        }
    }
    int last[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) last[t][i] = known + min((base + 8 * t + 2 * (lane % 4) + i) / group, fresh - 1);
    }
#pragma unroll 1
    for (int i = 0; i < pages_left; ++i) {
        const u32 place = ring + i % STAGES * tile::kBytes;
        const int start = (split.first + i) * pages::kTokens + slot;
        ptx::copy_async_wait<2 * STAGES - 1>();
        __syncwarp();
        if (start + tile::kTokens > known) {
            ptx::copy_async_wait<2 * STAGES - 2>();
            __syncwarp();
            put_new(place, memory + kNewAt, memory + kNewScalesAt, start, known, length);
            __syncwarp();
        }
        add_tile(sums, place, placed, kept, queries, start, last, window, scale, soft);
        __syncwarp();
        fetch(i + STAGES);
    }

    // The four warps' sums meet in shared memory.
    ptx::copy_async_wait<0>();
    __syncthreads();
    float* meeting = reinterpret_cast<float*>(attention_memory);
    float* meeting_scores = meeting + kWarps * kQueries * kSumStride;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float weights = sums.weights[t][i];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) weights += __shfl_xor_sync(~0u, weights, lanes);
            const int query = 8 * t + 2 * (lane % 4) + i;
            if (lane < 4) {
                meeting_scores[(warp * kQueries + query) * 2] = sums.largest[t][i];
                meeting_scores[(warp * kQueries + query) * 2 + 1] = weights;
            }
            float* to = meeting + (warp * kQueries + query) * kSumStride;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                to[16 * step + tile::channel_of(0)] = sums.outputs[step][t][i];
                to[16 * step + tile::channel_of(1)] = sums.outputs[step][t][i + 2];
            }
        }
    }
    __syncthreads();
    const bool alone = split.count == 1;
    const sinks::Sinks of_heads = {sink_scores, wide_sinks};
    const long long ticket = static_cast<long long>(row) * gridDim.y + blockIdx.y;
    const long long part = part_queries * (kDim + 2);
    float* parts = partial + ticket * slots * part;
    float* mine = parts + (own.parts + blockIdx.x) * part;
    const auto result_of = [&](int query) {
        const int token = (base + query) / group, head = kv_head * group + (base + query) % group;
        return out + (static_cast<long long>(first + token) * heads + head) * kDim;
    };
    for (int i = threadIdx.x; i < queries * (kDim / 4); i += kThreads) {
        const int query = i / (kDim / 4), channel = i % (kDim / 4) * 4;
        float largest = pages::lowest(), weights = 0.0f;
        float4 total = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            largest = fmaxf(largest, meeting_scores[(w * kQueries + query) * 2]);
        }
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float* scores = meeting_scores + (w * kQueries + query) * 2;
            const float factor = ptx::power_of_two(scores[0] - finite(largest));
            const float* from = meeting + (w * kQueries + query) * kSumStride + channel;
            const float4 four = *reinterpret_cast<const float4*>(from);
            weights += scores[1] * factor;
            total.x += four.x * factor;
            total.y += four.y * factor;
            total.z += four.z * factor;
            total.w += four.w * factor;
        }
        if (alone) {
            const float sink = of_heads.of(kv_head * group + (base + query) % group);
            write(result_of(query) + channel, total, sinks::last_factor(largest, weights, sink));
        } else {
            *reinterpret_cast<float4*>(mine + query * kDim + channel) = total;
            if (channel == 0) {
                mine[part_queries * kDim + query] = largest;
                mine[part_queries * (kDim + 1) + query] = weights;
            }
        }
    }
    if (alone) return;
    __syncthreads();
    const bool comes_last = threadIdx.x == 0 && ptx::arrive(arrived + ticket) == split.count - 1;
    if (!__syncthreads_or(comes_last)) return;
    if (comes_last) arrived[ticket] = 0;
    for (int query = warp; query < queries; query += kWarps) {
        const float sink = of_heads.of(kv_head * group + (base + query) % group);
        merge(parts + own.parts * part, part_queries, query, split.count, sink, result_of(query));
    }
}
