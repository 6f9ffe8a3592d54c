// shared.cuh by products of warpgroups, on sm_90a: pages that several rows of one new token begin with are read once for
// all of them, whose queries, up to 64, fill a product. A CTA takes pairs of an item (plan.cuh) and a head of keys in turn,
// with the ring and the products of sm90_prefill.cuh. Its warpgroups:
//
//     1 that makes queries ready and multiplies: while the weights of one page are worked out, those of the page before
//         meet its values
//     1 that copies: a warp keeps the ring full, from the pages of one item on to those of the next, through a tensor map;
//         three warps make fp16 numbers of pages in e4m3
//
// What an item finds for a row is a part in `partial`, beside those of the row's own text, and decode.cuh adds all of them
// up. Pages are full, and no kernel of the step writes them: they are fetched while the kernel ahead still runs, where
// `settled` says that it does not write tables either.
// Parameters: those of sm90_prefill.cuh (GROUPS, BLOCK_PAGES and QUERY_SLOTS 1), RESIDENT CTAs of a multiprocessor (1 or 2).
#pragma once

#include "attention/head.cuh"
#include "attention/plan.cuh"
#include "attention/sm90_pipeline.cuh"
#include "attention/sm90_products.cuh"
#include "attention/sm90_queries.cuh"
#include "common/launch.cuh"

namespace shared {

using namespace prefill;

static_assert(kGroups == 1 && kBlockPages == 1 && QUERY_SLOTS == 1);
constexpr int kCopyRegisters = 56;
constexpr int kComputeRegisters = 200;
constexpr int kAtOnce = kDim > 192 ? 1 : kDim > 128 ? 2 : kDim > 64 ? 4 : 8;  // queries that a warp has under way
constexpr int kAhead = SLOTS / 2;            // pages of an item ahead of the search for the next

// What there is to do, the same in all CTAs: items, each with every head of keys.
struct Works {
    const int* plan;
    int rows, kv_heads;

    __device__ __forceinline__ int count() const { return __ldcg(plan) * kv_heads; }
    __device__ __forceinline__ plan::Item item(int work) const { return plan::item(plan, rows, work / kv_heads); }
    __device__ __forceinline__ int kv_head(int work) const { return work % kv_heads; }
};

// What the copying warp knows of an item; a lane has the number of every 32nd page.
struct Found {
    const int* table;
    int kv_head, pages, numbers;
};

// The warp that copies: of page after page the keys, each ahead of the values of the page before.
template <class Ring>
__device__ __forceinline__ void copy_items(
    const Ring& ring, const Works& works, const Source& source, const int* table, int table_stride) {
    const int lane = threadIdx.x % 32, count = works.count();
    typename Ring::Place at(0);
    const auto numbers_from = [&](const Found& found, int page) {
        return page + lane < found.pages ? __ldcg(found.table + page + lane) : 0;
    };
    const auto find = [&](int work) {
        Found found = {};
        if (work >= count) return found;
        const plan::Item item = works.item(work);
        const int row = __ldcg(plan::order(works.plan) + item.first);
        found.table = table + static_cast<long long>(row) * table_stride + item.begin;
        found.kv_head = works.kv_head(work);
        found.pages = item.end - item.begin;
        found.numbers = numbers_from(found, 0);
        return found;
    };
    const auto fill = [&](int page, int half, int kv_head) {
        ring.wait_emptied(at);
        if (ptx::elect()) {
            const u32 filled = ring.filled(at), to = ring.address(at);
            const long long row = pages::row_of(page, half, works.kv_heads, kv_head, 0);
            if constexpr (pages::kE4m3) {
                ptx::barrier_expect(filled, kRawCodes + kRawScales);
                ptx::bulk_copy(to, source.codes + row * kDim, kRawCodes, filled);
                ptx::bulk_copy(to + kRawCodes, source.scales + row, kRawScales, filled);
            } else {
                ptx::barrier_expect(filled, kPieces * kPageBytes);
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    ptx::tensor_copy(to + piece * kPieceBytes, &source.map, piece * 64, static_cast<int>(row), filled);
                }
            }
        }
        __syncwarp();
        at.advance();
    };
    Found now = find(blockIdx.x);
#pragma unroll 1
    for (int work = blockIdx.x; work < count; work += gridDim.x) {
        Found next = {};
        int page = 0, before = 0, later = 0;
#pragma unroll 1
        for (int i = 0; i <= now.pages; ++i) {
            if (i < now.pages) {
                if (i % 32 == 16) later = numbers_from(now, i + 16);
                if (i % 32 == 0 && i > 0) now.numbers = later;
                before = page;
                page = __shfl_sync(~0u, now.numbers, i % 32);
                fill(page, 0, now.kv_head);
            } else {
                before = page;
            }
            if (i > 0) fill(before, 1, now.kv_head);
            if (i == min(kAhead, now.pages)) next = find(work + gridDim.x);
        }
        now = next;
    }
}

// Three warps that make fp16 numbers of pages in e4m3, in the order of `copy_items`.
__device__ __forceinline__ void widen_items(const RawRing& raw, const PageRing& wide, const Works& works) {
    RawRing::Place raw_at(0);
    PageRing::Place wide_at(0);
    const int count = works.count();
#pragma unroll 1
    for (int work = blockIdx.x; work < count; work += gridDim.x) {
        const plan::Item item = works.item(work);
        const Item pages = {0, 0, 0, 0, 1, (item.end - item.begin) * pages::kTokens, 0, 0};
        widen_item(raw, wide, raw_at, wide_at, pages, Seen(pages, 1, pages.length, 1));
    }
}

// Queries of an item and a head of keys come ready into swizzled rows, a head at a time by a warp; those that there are not
// are zeros. A lane has members `lane` and `lane + 32` of the item.
struct Members {
    int row[2], token[2], position[2];

    __device__ __forceinline__ Members(
        const int* order, const int* starts, const int* lengths, const plan::Item& item) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int member = threadIdx.x % 32 + 32 * i;
            row[i] = token[i] = position[i] = 0;
            if (member >= item.rows) continue;
            row[i] = __ldcg(order + item.first + member);
            token[i] = __ldcg(starts + row[i]);
            position[i] = __ldcg(lengths + row[i]) - 1;
        }
    }
    __device__ __forceinline__ static int of(const int (&numbers)[2], int member) {
        const int low = __shfl_sync(~0u, numbers[0], member % 32), high = __shfl_sync(~0u, numbers[1], member % 32);
        return member < 32 ? low : high;
    }
};

__device__ __forceinline__ void make_queries(
    u32 placed, const u16* qkv, long long stride, const head::Form& form, const Members& members, int kv_head, int group,
    int queries) {
    const int warp = threadIdx.x / 32;
    const head::Weights weights = head::load_weights(form);
#pragma unroll 1
    for (int first = warp; first < queries; first += 4 * kAtOnce) {
        head::Own own[kAtOnce];
        head::Turns turns[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int query = first + 4 * i;
            if (query >= queries) continue;
            const int member = query / group;
            const long long token = Members::of(members.token, member);
            const u16* from = qkv + token * stride + (kv_head * group + query - member * group) * kDim;
            own[i] = head::load_own(from, form);
            turns[i] = head::load_turns(form.rotary, form.rotary_dim, Members::of(members.position, member));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int query = first + 4 * i;
            if (query >= queries) continue;
            const u32 row = placed + query * 128;
            head::give_query(head::finish(own[i], turns[i], weights, form), [&](int at, u32 pair) {
                const u32 piece = row + at / 64 * kQueryPieceBytes;
                ptx::store_shared(piece + (at % 64 / 8 ^ query % 8) * 16 + at % 8 * 2, pair);
            });
        }
    }
    for (int i = threadIdx.x; i < (kQueries - queries) * kPieces * 8; i += kConsumers) {
        const int row = queries + i / 8 % (kQueries - queries), piece = i / 8 / (kQueries - queries);
        ptx::store_shared_four(placed + piece * kQueryPieceBytes + row * 128 + i % 8 * 16, make_uint4(0, 0, 0, 0));
    }
    ptx::end_reads();  // and writes, which the tensor cores are to see
    ptx::sync_threads<kGroupBarriers, kConsumers>();
}

// All pages of an item meet its queries.
__device__ __forceinline__ void multiply(
    Sums& sums, const PageRing& pages, PageRing::Place& at, u32 queries, int count, float scale, float soft) {
    const float factor = soft == 0.0f ? scale : 1.0f;
    float scores[kBlock / 2];
    u32 narrowed[kBlock / 4];
    const auto finish = [&] {
        if (soft != 0.0f) cap(scores, scale, soft);
        return weigh(sums, scores, factor);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sums.largest[half] = pages::lowest();
        sums.weights[half] = 0.0f;
    }
    pages.wait_filled(at);
    wgmma::fence();
    multiply_keys(scores, queries, pages.address(at));
    wgmma::commit();
    wgmma::wait<0>();
    ptx::barrier_arrive(pages.emptied(at));
    at.advance();
    finish();
    narrow(narrowed, scores);
    pages.wait_filled(at);
#pragma unroll 1
    for (int page = 1; page < count; ++page) {
        PageRing::Place values_at = at;
        values_at.advance();
        pages.wait_filled(values_at);
        wgmma::fence();
        multiply_keys(scores, queries, pages.address(at));
        wgmma::commit();
        multiply_values(sums.outputs, narrowed, pages.address(values_at), page > 1);
        wgmma::commit();
        wgmma::wait<1>();
        ptx::barrier_arrive(pages.emptied(at));
        const float2 of_old = finish();
        at = values_at;
        at.advance();
        pages.wait_filled(at);  // here, or ptxas waits for products ahead of `finish`
        wgmma::wait<0>();
        ptx::barrier_arrive(pages.emptied(values_at));
        rescale(sums.outputs, of_old);
        narrow(narrowed, scores);
    }
    wgmma::fence();
    multiply_values(sums.outputs, narrowed, pages.address(at), count > 1);
    wgmma::commit();
    wgmma::wait<0>();
    ptx::barrier_arrive(pages.emptied(at));
    at.advance();
}

}  // namespace shared

extern "C" __global__ void __launch_bounds__(shared::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ prefill::TensorMap map,  // as in sm90_prefill.cuh
    const u16* __restrict__ qkv,                     // as in shared.cuh, like all that has its name
    const unsigned char* all,
    const float* scales,
    const int* __restrict__ starts,
    const int* __restrict__ lengths,
    const int* __restrict__ table,
    const float* __restrict__ rotary,
    const u16* __restrict__ query_norm,
    float* partial,
    const int* __restrict__ shared_plan,
    long long stride,
    int table_stride,
    int rows,
    int heads,
    int kv_heads,
    int rotary_dim,
    int settled,
    int slots,
    int part_queries,
    int item_queries,
    int row_items,
    float scale,
    float soft,
    float eps,
    float offset) {
    using namespace shared;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    const u32 memory = ptx::shared_address(attention_memory), barriers = memory + kBarriersAt;
    const PageRing pages{memory, kSlotBytes, barriers};
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
        ptx::barrier_init_fence();
    }
    __syncthreads();
    if (!settled) launch::wait_for_earlier();
    const Works works{shared_plan, rows, kv_heads};
    if (threadIdx.x >= kConsumers) {
        if constexpr (RESIDENT == 2) ptx::give_registers<kCopyRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0) {
            const Source source{map, all, scales};
            if constexpr (pages::kE4m3) {
                copy_items(raw, works, source, table, table_stride);
            } else {
                copy_items(pages, works, source, table, table_stride);
            }
        } else if constexpr (pages::kE4m3) {
            widen_items(raw, pages, works);
        }
        return;
    }
    if constexpr (RESIDENT == 2) ptx::take_registers<kComputeRegisters>();
    const int lane = threadIdx.x % 32, count = works.count();
    const u32 placed = memory + kQueriesAt;
    const head::Form form = {rotary, query_norm, rotary_dim, eps, offset};
    PageRing::Place at(0);
    bool waits = settled;
#pragma unroll 1
    for (int work = blockIdx.x; work < count; work += gridDim.x) {
        const plan::Item item = works.item(work);
        const int kv_head = works.kv_head(work), queries = item.rows * group;
        const Members members(plan::order(shared_plan), starts, lengths, item);
        const int of_item = plan::part(shared_plan, rows, work / kv_heads);
        if (waits) launch::wait_for_earlier();
        waits = false;
        ptx::sync_threads<kGroupBarriers, kConsumers>();  // the queries of the item before have been read
        make_queries(placed, qkv, stride, form, members, kv_head, group, queries);
        int own[2], own_rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            own[half] = threadIdx.x / 32 * 16 + 8 * half + lane / 4;
            own_rows[half] = Members::of(members.row, min(own[half] / group, 63));
        }
        Sums sums;
        multiply(sums, pages, at, placed, item.end - item.begin, scale, soft);
        const float factor = soft == 0.0f ? scale : 1.0f;
        const long long part = part_queries * (kDim + 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weights = sums.weights[half];
            weights += __shfl_xor_sync(~0u, weights, 1);
            weights += __shfl_xor_sync(~0u, weights, 2);
            if (own[half] >= queries) continue;
            const int of_row = own[half] % group, local = of_row % item_queries;
            const long long ticket = (static_cast<long long>(own_rows[half]) * row_items + of_row / item_queries) * kv_heads;
            float* to = partial + ((ticket + kv_head) * slots + of_item) * part;
            if (lane % 4 == 0) {
                to[part_queries * kDim + local] = sums.largest[half] * factor;
                to[part_queries * (kDim + 1) + local] = weights;
            }
            to += local * kDim + 2 * (lane % 4);
#pragma unroll
            for (int tile = 0; tile < kDim / 8; ++tile) {
                const float* two = sums.outputs + 4 * tile + 2 * half;
                *reinterpret_cast<float2*>(to + 8 * tile) = make_float2(two[0], two[1]);
            }
        }
    }
    if (waits) launch::wait_for_earlier();
}
