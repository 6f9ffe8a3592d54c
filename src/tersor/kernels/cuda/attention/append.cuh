// Ahead of prefill.cuh: keys and values of the new tokens of rows with many come to their pages, and queries, normed and
// rotated, to where their results will be. A CTA has a few tokens, a warp one head at a time.
// Parameters: those of pages.cuh.
#pragma once

#include "attention/head.cuh"
#include "attention/pages.cuh"
#include "common/launch.cuh"

namespace append {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // of a CTA

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
    int table_stride,
    int heads,
    int kv_heads,
    int rotary_dim,
    float eps,
    float offset) {
    using namespace append;
    launch::start_next();
    launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.y;
    const int first = __ldcg(starts + row), fresh = __ldcg(starts + row + 1) - first, length = __ldcg(lengths + row);
    const int base = blockIdx.x * kTokens, known = length - fresh;
    if (length == 0 || fresh <= pages::kMostFew || base >= fresh) return;
    const int of_token = heads + 2 * kv_heads, jobs = min(fresh - base, kTokens) * of_token;
    const int* row_table = table + static_cast<long long>(row) * table_stride;
    const auto load = [&](int job) {
        const int token = base + job / of_token, head = job % of_token;
        const u16* norm = head < heads ? query_norm : head < heads + kv_heads ? key_norm : nullptr;
        const float* turns = head < heads + kv_heads ? rotary : nullptr;
        const u16* from = qkv + (first + token) * stride + head * pages::kDim;
        return head::load(from, {turns, norm, rotary_dim, eps, offset}, known + token);
    };
    const auto give = [&](int job, const head::Raw& raw) {
        const int token = base + job / of_token, head = job % of_token, position = known + token;
        const u16* norm = head < heads ? query_norm : head < heads + kv_heads ? key_norm : nullptr;
        const float* turns = head < heads + kv_heads ? rotary : nullptr;
        const head::Ready ready = head::finish(raw, {turns, norm, rotary_dim, eps, offset});
        if (head < heads) {
            u16* to = queries + (static_cast<long long>(first + token) * heads + head) * pages::kDim;
            head::give_query(ready, [&](int place, u32 pair) { *reinterpret_cast<u32*>(to + place) = pair; });
            return;
        }
        const int half = (head - heads) / kv_heads, kv_head = (head - heads) % kv_heads;
        const int page = __ldcg(row_table + position / pages::kTokens);
        const long long at = pages::row_of(page, half, kv_heads, kv_head, position % pages::kTokens);
        const float scale =
            head::give_page(ready, [&](int channel, u32 pair) { head::write_pair(all, at, channel, pair); });
        if (pages::kE4m3 && lane == 0) scales[at] = scale;
    };
    constexpr int kWarps = kThreads / 32;
#pragma unroll 1
    for (int job = warp; job < jobs; job += kWarps) give(job, load(job));
}
