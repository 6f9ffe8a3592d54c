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
// rows read pages together (SHARES), shared.cuh has left parts of them in `partial`, ahead of those of the splits.
//
// What a CTA works on is an item (items.cuh). Where there are more items than CTAs that fit the GPU (TURNS), each takes
// them in turn, the shortest of them more: the ring never runs dry, since pages of the next item, whose numbers have been
// looked up in time, follow those of the item, while its sums meet beside the ring, and its result is written.
// Parameters: those of pages.cuh, QUERY_TILES (1, 2 or 4), CTAS of a multiprocessor, STAGES of a ring, TURNS and SHARES
// (0 or 1), SHARED_BYTES.
#pragma once

#include "attention/head.cuh"
#include "attention/items.cuh"
#include "attention/pages.cuh"
#include "attention/plan.cuh"
#include "attention/sinks.cuh"
#include "attention/sums.cuh"
#include "attention/tile.cuh"
#include "common/launch.cuh"

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
    float* partial,                       // [rows, row_items, slots, part_queries * (HEAD_DIM + 2)]
    u32* arrived,                         // [rows, row_items], zero: splits that have come; then, in turns, items and CTAs
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
    int split_pages,                      // pages of a split in any batch, or 0: as many as make `splits`
    int slots,                            // parts of a row: `splits`, and as many as may be read with others
    int splits,
    int row_items,                        // kv heads, times parts of the queries that share one
    int rows,
    int in_turns,                         // whether CTAs take items in turn; otherwise each has that of its place in the grid
    float scale,                          // of products, as pages::score takes it
    float soft,
    float eps,
    float offset) {
    using namespace decode;
    extern __shared__ __align__(16) unsigned char attention_memory[];
    launch::start_next();
    if (!settled) launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = heads / kv_heads, slot = warp * tile::kTokens;
    const u32 memory = ptx::shared_address(attention_memory), ring = memory + warp * STAGES * tile::kBytes;
    const bool turns = kTurns && in_turns;
    const int total = turns ? splits * row_items * rows : 0, ctas = gridDim.x;

    const auto look_up = [&](int split, int of_row, int row) {
        Item item = {row, of_row % kv_heads, of_row / kv_heads, split};
        const int* own_table = table + static_cast<long long>(row) * table_stride;
        item.first = __ldcg(starts + row);
        item.fresh = __ldcg(starts + row + 1);
        item.length = __ldcg(lengths + row);
        if constexpr (kShares) item.own = plan::own(shared_plan, rows, row);
#pragma unroll
        for (int i = 0; i < 2; ++i) item.pages[i] = lane + 32 * i < table_stride ? __ldcg(own_table + lane + 32 * i) : 0;
        return item;
    };
    const auto look_up_at = [&](int work) {
        const int of_split = work / splits;
        return look_up(work % splits, of_split % row_items, of_split / row_items);
    };
    const auto text_of = [&](const Item& item) {
        Text text;
        const int fresh = item.fresh - item.first;
        text.known = item.length - fresh;
        text.queries = min(fresh * group - item.queries * kQueries, kQueries);
        text.split = split_of(item.length, text.known, window, item.own.begin, splits, item.split, split_pages);
        text.works = item.length > 0 && fresh <= pages::kMostFew && text.queries > 0 && text.split.first < text.split.end;
        return text;
    };
    const auto source_of = [&](const Item& item) {
        const Text text = text_of(item);
        Source source = {};
        source.table = table + static_cast<long long>(item.row) * table_stride;
        source.kv_head = item.kv_head;
        source.known = text.known;
        source.first = text.split.first;
        source.pages[0] = item.pages[0];
        source.pages[1] = item.pages[1];
        if (text.works) {
            source.left = text.split.end - text.split.first;
            if ((text.split.end - 1) * pages::kTokens + slot >= item.length) --source.left;
        }
        return source;
    };

    int next = ctas + blockIdx.x;  // what comes behind the item: the second is as given, too, those after it as they come
    Item item = turns ? look_up_at(blockIdx.x) : look_up(blockIdx.x, blockIdx.y, blockIdx.z), later = {};
    Source source = source_of(item);
    int fetched = 0, put = 0, taken = 0, held = 0;  // pages of the source; where in the ring the next goes, and is; there
    int next_place = 0;
    bool ahead = false, more = false;               // whether the source is of the next item; whether there is one
    const auto fetch = [&] {
        if (kTurns && more && !ahead && fetched == source.left) {
            source = source_of(later);
            fetched = 0;
            ahead = true;
        }
        if (fetched == source.left) {
            ptx::copy_async_commit();
            ptx::copy_async_commit();
            return;
        }
        const int there = source.known - (source.first + fetched) * pages::kTokens - slot;
        const int page = source.page(fetched, table_stride);
        tile::fetch(ring + put * tile::kBytes, all, scales, page, kv_heads, source.kv_head, slot, there);
        put = put + 1 == STAGES ? 0 : put + 1;
        ++fetched;
        ++held;
    };

#pragma unroll 1
    for (bool begins = true;; begins = false) {
        const int row = item.row, kv_head = item.kv_head, first = item.first, fresh = item.fresh - first;
        const int length = item.length, base = item.queries * kQueries;
        const Text text = text_of(item);
        const Split split = text.split;
        const int known = text.known, queries = text.queries;
        if (!begins && !ahead) {
            source = source_of(item);
            fetched = 0;
        }
        more = ahead = false;
#pragma unroll 1
        for (int i = held; i < STAGES; ++i) fetch();
        int pages_left = 0;
        int new_pages[2] = {};  // the last but one page and the last: at most 8 new tokens are in no other
        if (text.works) {
            const int* row_table = table + static_cast<long long>(row) * table_stride;
            new_pages[0] = __ldcg(row_table + max(split.end - 2, split.first));
            new_pages[1] = __ldcg(row_table + split.end - 1);
            pages_left = split.end - split.first - ((split.end - 1) * pages::kTokens + slot >= length);
        }
        if (begins && settled) launch::wait_for_earlier();
        int after = total;  // the item behind the next
        if constexpr (kTurns) {
            more = next < total;
            if (more) later = look_up_at(next);
            if (more && total > 2 * ctas && threadIdx.x == 0) after = 2 * ctas + ptx::arrive(arrived + row_items * rows);
        }

        // What is behind the next item goes from the thread that asked to all, by a barrier in between; places alternate.
        const auto tell_next = [&] {
            if (kTurns && more && threadIdx.x == 0) ptx::store_shared(memory + kNextAt + next_place * 4, after);
        };
        const auto go_on = [&] {
            item = later;
            next = total > 2 * ctas ? static_cast<int>(ptx::load_shared(memory + kNextAt + next_place * 4)) : total;
            next_place ^= 1;
        };
        if (item.split == 0 && item.queries == 0) {  // padding becomes zeros
            const auto clear = [&](int from, int to) {
                for (int token = from; token < to; ++token) {
                    u32* place = reinterpret_cast<u32*>(out + (static_cast<long long>(token) * heads + kv_head * group) * kDim);
                    for (int i = threadIdx.x; i < group * kDim / 2; i += kThreads) place[i] = 0;
                }
            };
            if (length == 0) clear(first, first + fresh);
            if (row + 1 == rows) clear(first + fresh, tokens);
        }
        if (!text.works) {
            if (!more) break;
            tell_next();
            __syncthreads();
            go_on();
            continue;
        }

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
            const bool writes = item.queries == 0 && page >= split.first && page < split.end;
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
        const long long ticket = static_cast<long long>(row) * row_items + item.queries * kv_heads + kv_head;
        const long long part = part_queries * (kDim + 2);
        float* parts = partial + ticket * slots * part;
        const bool takes_parts = kShares && item.split == 0;
        const auto take_parts = [&] {
#pragma unroll 1
            for (int i = warp; i < item.own.parts; i += kWarps) add_part(sums, parts + i * part, part_queries, queries);
        };
        if (takes_parts && warp >= jobs) take_parts();
        for (int job = warp; job < jobs; job += 2 * kWarps) {
            const bool two = job + kWarps < jobs;
            const head::Raw one = head::load(source_of(job), form_of(job), position_of(job));
            head::Raw other = {};
            if (two) other = head::load(source_of(job + kWarps), form_of(job + kWarps), position_of(job + kWarps));
            if (takes_parts && job == warp) take_parts();
            give(job, one);
            if (two) give(job + kWarps, other);
        }
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
            const u32 place = ring + taken * tile::kBytes;
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
            taken = taken + 1 == STAGES ? 0 : taken + 1;
            --held;
            fetch();
        }

        // The four warps' sums meet in shared memory.
        if constexpr (!kTurns) {  // where rings were
            ptx::copy_async_wait<0>();
            __syncthreads();
        }
        float* meeting = reinterpret_cast<float*>(attention_memory + kMeetingAt);
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
        tell_next();
        __syncthreads();
        const bool alone = split.count == 1;
        const sinks::Sinks of_heads = {sink_scores, wide_sinks};
        float* mine = parts + (item.own.parts + item.split) * part;
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
        if (!alone) {
            __syncthreads();
            const bool comes_last = threadIdx.x == 0 && ptx::arrive(arrived + ticket) == split.count - 1;
            if (__syncthreads_or(comes_last)) {
                if (comes_last) arrived[ticket] = 0;
                for (int query = warp; query < queries; query += kWarps) {
                    const float sink = of_heads.of(kv_head * group + (base + query) % group);
                    merge(parts + item.own.parts * part, part_queries, query, split.count, sink, result_of(query));
                }
            }
        }
        if (!more) break;
        go_on();
    }
    if (total > 2 * ctas && threadIdx.x == 0) {  // the last CTA leaves counters as they were
        u32* counters = arrived + row_items * rows;
        if (ptx::arrive(counters + 1) == ctas - 1) counters[0] = counters[1] = 0;
    }
}
