// Attention of rows with many new tokens on sm_90a, where keys and values are in pages already (append.cuh): as prefill.cuh,
// with products of warpgroups that do not wait for each other (FlashAttention-3: Shah and others, arXiv 2407.08608).
//
// A CTA takes tiles of kQueries queries in turn (sm90_pipeline.cuh). Its warpgroups:
//
//     2 that multiply: each has half of the queries; while the weights of one block of tokens are worked out, the weights
//         of the block before meet its values. They take turns at the tensor cores, so that one multiplies while the other
//         works out weights
//     1 that copies: a warp that finds tiles and keeps a ring of keys and values full, through a tensor map with a 128-byte
//         swizzle, and three warps that copy queries (sm90_queries.cuh) and make fp16 numbers of pages in e4m3
//
// Parameters: those of pages.cuh, GROUPS that multiply (2), BLOCK_PAGES whose keys meet queries at a time (1 or 2), SLOTS of
// keys or values, QUERY_SLOTS, RAW_SLOTS of keys or values in e4m3, SHARED_BYTES.
#pragma once

#include "attention/sm90_pipeline.cuh"
#include "attention/sm90_products.cuh"
#include "attention/sm90_queries.cuh"
#include "common/launch.cuh"

namespace prefill {

constexpr int kCopyRegisters = 56;
constexpr int kComputeRegisters = 224;

// A multiplying warpgroup.
__device__ __forceinline__ void multiply(
    const PageRing& pages, const QueryRing& queries, const ItemRing& items, u32 last, const sinks::Sinks& of_heads,
    u16* out, float4* partial, u32* arrived, int heads, int group, int window, int splits, float scale, float soft) {
    const int own = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    const int own_query = threadIdx.x / 32 * 16 + lane / 4;
    const float factor = soft == 0.0f ? scale : 1.0f;
    PageRing::Place at(0);
    QueryRing::Place query_at(0);
    ItemRing::Place item_at(0);
    if (own == 1) ptx::arrive_one_of<kTurns, kConsumers>(0);
#pragma unroll 1
    while (true) {
        items.wait_filled(item_at);
        const Item item = Item::load(items.address(item_at));
        items.release(item_at);
        item_at.advance();
        if (item.row < 0) break;
        const Seen seen(item, group, window, splits);
        int numbers[2];
        Sight sight;
        Sums sums;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            numbers[half] = item.base + min(own_query + 8 * half, seen.queries - 1);
            sight.until[half] = item.length - item.fresh + numbers[half] / group;
            sight.after[half] = max(sight.until[half] - window, -1);
            sums.largest[half] = pages::lowest();
            sums.weights[half] = 0.0f;
        }
        float scores[kBlock / 2];
        u32 narrowed[kBlock / 4];
        const auto finish = [&](int block) {
            const int start = seen.first_page * pages::kTokens + block * kBlock;
            if (soft != 0.0f) cap(scores, scale, soft);
            if (start + kBlock - 1 > seen.first || start <= seen.last - window) hide(scores, start, sight);
            return weigh(sums, scores, factor);
        };

        queries.wait_filled(query_at);
        const u32 rows = queries.address(query_at) + own * 64 * 128;
        pages.wait_filled(at);
        wgmma::fence();
        multiply_keys(scores, rows, pages.address(at));
        wgmma::commit();
        wgmma::wait<0>();
        ptx::barrier_arrive(pages.emptied(at));
        at.advance();
        finish(0);
        narrow(narrowed, scores);
        pages.wait_filled(at);
#pragma unroll 1
        for (int block = 1; block < seen.blocks; ++block) {
            PageRing::Place values_at = at;
            values_at.advance();
            pages.wait_filled(values_at);
            ptx::sync_one_of<kTurns, kConsumers>(own);
            wgmma::fence();
            multiply_keys(scores, rows, pages.address(at));
            wgmma::commit();
            multiply_values(sums.outputs, narrowed, pages.address(values_at), block > 1);
            wgmma::commit();
            ptx::arrive_one_of<kTurns, kConsumers>(1 - own);
            wgmma::wait<1>();
            ptx::barrier_arrive(pages.emptied(at));
            const float2 of_old = finish(block);
            at = values_at;
            at.advance();
            pages.wait_filled(at);  // here, or ptxas waits for products ahead of `finish`
            wgmma::wait<0>();
            ptx::barrier_arrive(pages.emptied(values_at));
            rescale(sums.outputs, of_old);
            narrow(narrowed, scores);
        }
        ptx::barrier_arrive(queries.emptied(query_at));
        query_at.advance();
        const int there = item.length - seen.first_page * pages::kTokens - (seen.blocks - 1) * kBlock;
        if (!pages::kE4m3 && there < kBlock) clear_values(pages.address(at), there, own);
        wgmma::fence();
        multiply_values(sums.outputs, narrowed, pages.address(at), seen.blocks > 1);
        wgmma::commit();
        wgmma::wait<0>();
        ptx::barrier_arrive(pages.emptied(at));
        at.advance();
        const int tile = item.tile * kGroups + own;
        if (seen.parts > 1) {
            float4* parts = partial + static_cast<long long>(tile) * splits * kPartFours * 128;
            if (!join(sums, parts, item.part, seen.parts, arrived + tile, last + 4 * own, own, factor)) continue;
        }
        Target targets[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weights = sums.weights[half];
            weights += __shfl_xor_sync(~0u, weights, 1);
            weights += __shfl_xor_sync(~0u, weights, 2);
            const int head = item.kv_head * group + numbers[half] % group;
            const long long token = item.first + numbers[half] / group;
            u16* to = own_query + 8 * half < seen.queries ? out + (token * heads + head) * kDim : nullptr;
            targets[half] = {to, sinks::last_factor(sums.largest[half] * factor, weights, of_heads.of(head))};
        }
        store(sums.outputs, targets);
    }
    if (own == 0) ptx::sync_one_of<kTurns, kConsumers>(0);  // the turn that nobody took
}

}  // namespace prefill

extern "C" __global__ void __launch_bounds__(prefill::kThreads, 1) TERSOR_ENTRY(
    const __grid_constant__ prefill::TensorMap map,  // all tokens of pages of 16 bits, boxes of a page x 128 bytes
    const unsigned char* codes,                      // all tokens of pages in e4m3
    const float* scales,                             // of theirs
    const int* __restrict__ starts,                  // as in decode.cuh, like all that has its name
    const int* __restrict__ lengths,
    const int* __restrict__ table,
    const void* __restrict__ sink_scores,
    u16* out,                                        // holds the queries, and gets the results
    float4* partial,                                 // [tiles, kGroups, splits, kPartFours, 128]
    u32* taken,                                      // counters, zero before and after: of items, [tiles, kGroups] of parts
    int rows,
    int table_stride,
    int heads,
    int kv_heads,
    int window,
    int wide_sinks,
    int splits,                                      // most parts of what a tile sees
    float scale,
    float soft) {
    using namespace prefill;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    const u32 memory = ptx::shared_address(attention_memory);
    const u32 barriers = memory + kBarriersAt;
    const PageRing pages{memory, kSlotBytes, barriers};
    const QueryRing queries{memory + kQueriesAt, kQuerySlotBytes, barriers + SLOTS * ring::kBarrierBytes};
    const ItemRing items{memory + kItemsAt, kItemBytes, barriers + (SLOTS + QUERY_SLOTS) * ring::kBarrierBytes};
    const RawRing raw{
        memory + kRawAt, kRawSlotBytes, barriers + (SLOTS + QUERY_SLOTS + kItemSlots) * ring::kBarrierBytes};
    const int group = heads / kv_heads;
    launch::start_next();
    if (threadIdx.x == kConsumers) {
        if constexpr (pages::kE4m3) {
            raw.start(kQueryCopiers);
        } else {
            ptx::prefetch_map(&map);
        }
        pages.start(kConsumers);
        queries.start(kConsumers);
        items.start(kConsumers + kQueryCopiers);
        ptx::barrier_init_fence();
    }
    __syncthreads();
    launch::wait_for_earlier();
    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kCopyRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0) {
            const Finder finder(starts, lengths, taken, rows, kv_heads, group, splits);
            const Source source{map, codes, scales};
            if constexpr (pages::kE4m3) {
                copy_pages(raw, items, finder, source, table, table_stride, kv_heads, group, window, splits);
            } else {
                copy_pages(pages, items, finder, source, table, table_stride, kv_heads, group, window, splits);
            }
        } else {
            copy_queries(queries, items, raw, pages, out, heads, kv_heads, group, window, splits);
        }
    } else {
        ptx::take_registers<kComputeRegisters>();
        multiply(
            pages, queries, items, memory + kLastAt, {sink_scores, wide_sinks}, out, partial, taken + 1, heads, group, window,
            splits, scale, soft);
    }
}
