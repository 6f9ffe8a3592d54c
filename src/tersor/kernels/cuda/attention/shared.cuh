// Ahead of decode.cuh: pages that several rows of one new token begin with are read once for all of them (Hydragen, arXiv
// 2402.05099; ChunkAttention, arXiv 2402.15220). A CTA takes pairs of an item (plan.cuh) and a head of keys in turn; the
// queries of the item's rows that share the head are up to 64 (wide.cuh). What it finds for a row is a part in `partial`,
// beside those of the row's own text, and decode.cuh adds all of them up.
//
// Pages are full, and no kernel of the step writes them: the first are fetched while the kernel ahead still runs, where
// `settled` says that it does not write tables either.
// Parameters: those of wide.cuh (ROW_TILES 1), SHARED_BYTES.
#pragma once

#include "attention/head.cuh"
#include "attention/pages.cuh"
#include "attention/plan.cuh"
#include "attention/wide.cuh"
#include "common/launch.cuh"

namespace shared {

using namespace wide;

static_assert(kTiles == 1);
constexpr int kRowAt = 2 * kDim;  // behind a query, of row i of an item behind query i: its number, its token, its position
constexpr int kAtOnce = kDim > 128 ? 1 : kDim > 64 ? 4 : 8;  // queries that a warp has under way
static_assert(kRowAt + 16 == pages::kQueryStride && kWideBytes == SHARED_BYTES);

}  // namespace shared

extern "C" __global__ void __launch_bounds__(shared::kThreads, 2) TERSOR_ENTRY(
    const u16* __restrict__ qkv,         // as in decode.cuh, like all that has its name
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
    int item_queries,                    // queries of a row that a CTA of decode.cuh has,
    int row_items,                       // and in how many CTAs they are
    float scale,
    float soft,
    float eps,
    float offset) {
    using namespace shared;
    extern __shared__ __align__(16) unsigned char attention_memory[];
    launch::start_next();
    if (!settled) launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = heads / kv_heads;
    const u32 memory = ptx::shared_address(attention_memory), placed = memory + kQueriesAt;
    bool waits = settled;
    // How many items there are is read again at each, where it does not cost the pages that pass by a register.
#pragma unroll 1
    for (int work = blockIdx.x; work < __ldcg(shared_plan) * kv_heads; work += gridDim.x) {
        const plan::Item item = plan::item(shared_plan, rows, work / kv_heads);
        const int kv_head = work % kv_heads, queries = item.rows * group, pages_left = item.end - item.begin;
        const int* members = plan::order(shared_plan) + item.first;
        const int* row_table = table + static_cast<long long>(__ldcg(members)) * table_stride + item.begin;
        const auto place_of = [&](int i, int half) { return memory + (i % STAGES * 2 + half) * kSlotBytes; };
        const auto fetch_half = [&](int i, int half) {
            if (i < pages_left) {
                const int page = __ldcg(row_table + i);
                fetch(place_of(i, half), all, scales, page, half, kv_heads, kv_head, pages::kTokens);
            }
            ptx::copy_async_commit();
        };
#pragma unroll
        for (int i = 0; i < 2 * STAGES - 1; ++i) fetch_half(i / 2, i % 2);
        if (threadIdx.x < item.rows) {
            const int row = __ldcg(members + threadIdx.x);
            const u32 to = placed + threadIdx.x * pages::kQueryStride + kRowAt;
            ptx::store_shared(to, row);
            ptx::store_shared(to + 4, __ldcg(starts + row));
            ptx::store_shared(to + 8, __ldcg(lengths + row) - 1);
        }
        __syncthreads();
        if (waits) launch::wait_for_earlier();
        waits = false;

        // Queries come ready into shared memory, a head at a time by a warp; those that there are not are zeros.
        const head::Form form = {rotary, query_norm, rotary_dim, eps, offset};
#pragma unroll 1
        for (int first = warp; first < queries; first += kAtOnce * kWarps) {
            head::Raw raw[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int query = first + i * kWarps;
                if (query >= queries) continue;
                const u32 row = placed + query / group * pages::kQueryStride + kRowAt;
                const int token = ptx::load_shared(row + 4), position = ptx::load_shared(row + 8);
                raw[i] = head::load(qkv + token * stride + (kv_head * group + query % group) * kDim, form, position);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int query = first + i * kWarps;
                if (query >= queries) continue;
                const u32 to = placed + query * pages::kQueryStride;
                head::give_query(head::finish(raw[i], form), [&](int at, u32 pair) { ptx::store_shared(to + at * 2, pair); });
            }
        }
        for (int i = threadIdx.x; i < (kQueries - queries) * pages::kQueryStride / 4; i += kThreads) {
            ptx::store_shared(placed + queries * pages::kQueryStride + i * 4, 0);
        }

        Sums sums = {};
        sums.largest[0][0] = sums.largest[0][1] = pages::lowest();
        const float factor = soft == 0.0f ? scale : 1.0f;
        const bool works = 16 * warp < queries;
#pragma unroll 1
        for (int i = 0; i < pages_left; ++i) {
            ptx::copy_async_wait<2 * STAGES - 2>();
            __syncthreads();
            fetch_half(i + STAGES - 1, 1);
#pragma unroll 1
            for (int part = 0; part < kParts; ++part) {
                const int within = part * kPartTokens * kRowStride, scales_at = kHalfBytes + part * kPartTokens * 4;
                float scores[1][kKeyTiles][4] = {};
                if (works) {
                    multiply_keys(scores, place_of(i, 0) + within, placed + 16 * warp * pages::kQueryStride);
                    if constexpr (pages::kE4m3) scale_by_token(scores, place_of(i, 0) + scales_at);
                    if (soft != 0.0f) {
#pragma unroll
                        for (int j = 0; j < kKeyTiles * 4; ++j) {
                            scores[0][j / 4][j % 4] = pages::score(scores[0][j / 4][j % 4], scale, soft);
                        }
                    }
                    weigh(sums, scores, factor);
                }
                ptx::copy_async_wait<2 * STAGES - 2>();
                __syncthreads();  // values are there; keys have been read
                if (part == kParts - 1) fetch_half(i + STAGES, 0);
                if (works) {
                    if constexpr (pages::kE4m3) scale_by_token(scores, place_of(i, 1) + scales_at);
                    multiply_values(sums, scores, place_of(i, 1) + within);
                }
            }
        }

        const int of_item = plan::part(shared_plan, rows, work / kv_heads);  // read here, where registers are free again
        const long long part = part_queries * (kDim + 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weights = sums.weights[0][half];
            weights += __shfl_xor_sync(~0u, weights, 1);
            weights += __shfl_xor_sync(~0u, weights, 2);
            const int query = 16 * warp + 8 * half + lane / 4, of_row = query % group;
            if (query >= queries) continue;
            const int row = ptx::load_shared(placed + query / group * pages::kQueryStride + kRowAt);
            const int local = of_row % item_queries;
            const long long ticket = (static_cast<long long>(row) * row_items + of_row / item_queries) * kv_heads + kv_head;
            float* to = partial + (ticket * slots + of_item) * part;
            if (lane % 4 == 0) {
                to[part_queries * kDim + local] = sums.largest[0][half] * factor;
                to[part_queries * (kDim + 1) + local] = weights;
            }
            to += local * kDim;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const float* low = sums.outputs[0][2 * step] + 2 * half;
                const float* high = sums.outputs[0][2 * step + 1] + 2 * half;
                if constexpr (pages::kE4m3) {
                    float* four = to + 16 * step + 4 * (lane % 4);
                    *reinterpret_cast<float4*>(four) = make_float4(low[0], high[0], low[1], high[1]);
                } else {
                    float* two = to + 16 * step + 2 * (lane % 4);
                    *reinterpret_cast<float2*>(two) = make_float2(low[0], low[1]);
                    *reinterpret_cast<float2*>(two + 8) = make_float2(high[0], high[1]);
                }
            }
        }
        __syncthreads();  // the ring and the queries have been read
    }
    if (waits) launch::wait_for_earlier();
}
