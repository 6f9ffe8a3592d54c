// y[P, OC] = x @ W_e^T + bias_e on sm_90a for P pairs of a token and an expert e that it was routed to, sorted by expert:
// the product of all experts of a layer in one launch, of as many CTAs however the tokens are routed. An expert to which
// no token came is not read; the others are read once for every N_TILE tokens of theirs.
//
// Rings, products, sums and results are those of sm90_linear.cuh, and so are the parameters (CLUSTER and GATHERS are 1).
// Beside them: GATHERS_TOKENS (1: x holds tokens, and each pair's is fetched by itself; 0: x holds pairs, in their order,
// and behind the last one as many rows as a tile has tokens, which are not used), TABLES_READY (1: what routed the tokens
// had ended before the kernel ahead started, so weights are fetched while that one still runs).
#pragma once

#include "common/tensor_map.cuh"
#include "experts/fetch.cuh"
#include "experts/sm90_cta.cuh"
#include "experts/sm90_work.cuh"

extern "C" __global__ void __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,  // x [tokens or pairs, IC], boxes of x_rows x 128 bytes
    const char* __restrict__ weight,                  // units of packed codes, expert by expert
    const char* __restrict__ scale,                   // by rows or, in groups, by units (scales.cuh), likewise
    const u16* __restrict__ bias,                     // [E, OC] or null
    const float* __restrict__ x_scale,                // [P] for 8-bit activations, else null
    const int* __restrict__ order,                    // [P], the pair at each place: token * top_k + rank
    const int4* table,                                // of blocks of pairs (sm90_work.cuh)
    u16* __restrict__ y,                              // [P, OC], or half as many channels where gated; contiguous
    float* partial,                                   // sums of split items
    u32* arrived,                                     // a counter for each split tile, zero before and after
    const char* following,                            // packed codes of the product behind, to be fetched, or null
    long long following_bytes,                        // of one expert
    int oc,
    int ic,
    int top_k,
    int x_rows,                                       // rows of a box, at most as many as x has
    int most_blocks,                                  // that the table has room for
    int most_splits,
    float factor) {                                   // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[kExpertsBarriers];
    __shared__ __align__(8) float token_scales[kExpertsTokenScales];
    __shared__ int block_tokens[GATHERS_TOKENS ? kTokens : 1];
    const Routed of{x_map, order, top_k, x_rows, x_scale, bias, oc, y, partial, arrived, slots, barriers, token_scales,
                    block_tokens};
    Work work(oc, ic, table, most_blocks, blockIdx.x, gridDim.x, 0, most_splits);
    run_experts(work, of, weight, scale, factor, {}, [&] {
        if (following != nullptr) fetch_experts(work, following, following_bytes);
    });
}
