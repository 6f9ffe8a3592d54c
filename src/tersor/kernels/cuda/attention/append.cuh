// Ahead of prefill.cuh: keys and values of the new tokens of rows with many come to their pages, and queries, normed and
// rotated, to where their results will be. A CTA has a few tokens in turn, the heads of one under way while those of the
// one ahead are worked on, those of the first before it is known whose it is.
// Parameters: those of pages.cuh.
#pragma once

#include "attention/head.cuh"
#include "attention/pages.cuh"
#include "attention/rows.cuh"
#include "common/launch.cuh"

namespace append {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = head::kOfLane > 2 ? 2 : 6;  // heads that a warp has under way

}  // namespace append

extern "C" __global__ void __launch_bounds__(append::kThreads) TERSOR_ENTRY(
    const u16* __restrict__ qkv,         // as in decode.cuh, like all that has its name
    unsigned char* all,
    float* scales,
    const int* __restrict__ starts,
    const int* __restrict__ lengths,
    const int* __restrict__ table,
    const float* __restrict__ rotary,
    const u16* __restrict__ query_norm,
    const u16* __restrict__ key_norm,
    u16* __restrict__ queries,           // [tokens, heads, HEAD_DIM], rounded as products take them
    long long stride,
    int rows,
    int each,                            // tokens of a CTA
    int table_stride,
    int heads,
    int kv_heads,
    int rotary_dim,
    float eps,
    float offset) {
    using namespace append;
    launch::start_next();
    launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, all_heads = heads + 2 * kv_heads;
    const auto form_of = [&](int head) {
        const bool turned = head < heads + kv_heads;
        const u16* norm = head < heads ? query_norm : turned ? key_norm : nullptr;
        return head::Form{turned ? rotary : nullptr, norm, rotary_dim, eps, offset};
    };
    const auto load = [&](head::Own (&own)[kAtOnce], int token, int first_head) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int head = first_head + i * kWarps;
            if (head < all_heads) own[i] = head::load_own(qkv + token * stride + head * pages::kDim, form_of(head));
        }
    };
    int token = blockIdx.x * each;
    head::Own own[kAtOnce];
    load(own, token, warp);
    int row = rows::row_of(starts, rows, token), first = __ldcg(starts + row), end = __ldcg(starts + row + 1);
    int length = __ldcg(lengths + row);
    const int last = min(token + each, __ldcg(starts + rows));  // padding is not brought anywhere
    const head::Weights of_queries = head::load_weights(form_of(0)), of_keys = head::load_weights(form_of(heads));
#pragma unroll 1
    for (; token < last; ++token) {
        head::Own next[kAtOnce];
        if (token + 1 < last) load(next, token + 1, warp);
        while (token >= end) {
            first = end;
            end = __ldcg(starts + ++row + 1);
            length = __ldcg(lengths + row);
        }
        const int fresh = end - first, position = length - fresh + token - first;
        if (length != 0 && fresh > pages::kMostFew) {
            const int page = __ldcg(table + static_cast<long long>(row) * table_stride + position / pages::kTokens);
            const head::Turns turns = head::load_turns(rotary, rotary_dim, position);
            const auto give = [&](int head, const head::Own& one) {
                const int half = head >= heads + kv_heads, kv_head = head - heads - half * kv_heads;
                const auto ready = [&] {
                    const head::Weights weights = head::one_of(head < heads, of_queries, of_keys);
                    return head::finish(one, turns, weights, form_of(head));
                };
                if (head < heads) {
                    u16* to = queries + (static_cast<long long>(token) * heads + head) * pages::kDim;
                    head::give_query(ready(), [&](int place, u32 pair) { *reinterpret_cast<u32*>(to + place) = pair; });
                    return;
                }
                const long long at = pages::row_of(page, half, kv_heads, kv_head, position % pages::kTokens);
                const auto store = [&](int channel, u32 pair) { head::write_pair(all, at, channel, pair); };
                if (!pages::kE4m3 && half == 1) {  // values are written as they came
                    head::give_pairs(one, store);
                    return;
                }
                const float scale = head::give_page(ready(), store);
                if (pages::kE4m3 && lane == 0) scales[at] = scale;
            };
#pragma unroll 1
            for (int first_head = warp; first_head < all_heads; first_head += kAtOnce * kWarps) {
                if (first_head != warp) load(own, token, first_head);
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    if (first_head + i * kWarps < all_heads) give(first_head + i * kWarps, own[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) own[i] = next[i];
    }
}
