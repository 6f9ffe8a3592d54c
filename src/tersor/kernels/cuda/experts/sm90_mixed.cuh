// y[P, OC] = x @ W_e^T + bias_e as in sm90_experts.cuh, where the rows of all experts have one mix: the row sets of all
// levels in one launch. Every CTA belongs to one row set, that of all experts, and does what a CTA of sm90_experts.cuh does,
// with the code of its level; how many a row set has goes by what its blocks cost (tersor/kernels/tune/experts.py). Results
// go to the columns of their features at once.
//
// Parameters: those of sm90_experts.cuh, of which some are named by level, as in mixed/sm90_mixed.cuh; PLACED is 1.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/tensor_map.cuh"
#include "mixed/sm90_call.cuh"
#include "mixed/sm90_levels.cuh"

static_assert(CLUSTER == 1 && GATHERS == 1, "clusters do not know which tiles there are");

extern "C" __global__ void __launch_bounds__(level_0::linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,  // this one to `x_rows`: as in sm90_experts.cuh, or mixed/sm90_mixed.cuh
    const __grid_constant__ mixed::RowSets sets,
    const __grid_constant__ mixed::Shares shares,
    const int* __restrict__ features,
    const u16* __restrict__ bias,             // [E, bias_rows] in the order of features, or null
    const float* __restrict__ x_scale,
    const int* __restrict__ order,
    const int4* table,
    u16* __restrict__ y,                      // [P, outputs]
    float* partial,
    u32* arrived,
    int ic,
    int outputs,                              // columns of y
    int bias_rows,                            // of one expert
    int top_k,
    int x_rows,
    int most_blocks,
    int most_splits) {
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[mixed::most_barriers()];
    __shared__ __align__(8) float token_scales[level_0::linear::kExpertsTokenScales];
    __shared__ int block_tokens[GATHERS_TOKENS ? level_0::linear::kTokens : 1];
    int first_cta = 0, first_channel = 0;
    const int cta = blockIdx.x;
#define TERSOR_EACH(NUMBER)                                                                                          \
    if (cta < shares.of[NUMBER].end) {                                                                               \
        const level_##NUMBER::linear::Routed of{x_map, order, top_k, x_rows, x_scale, bias, bias_rows, y, partial,   \
                                                arrived, slots, barriers, token_scales, block_tokens};               \
        level_##NUMBER::linear::run_set(                                                                             \
            of, features, outputs, ic, table, most_blocks, most_splits, sets.of[NUMBER].weight,                      \
            sets.of[NUMBER].scale, shares.of[NUMBER], first_cta, first_channel);                                     \
        return;                                                                                                      \
    }                                                                                                                \
    first_cta = shares.of[NUMBER].end;                                                                               \
    first_channel += gate::outputs(shares.of[NUMBER].rows);
    TERSOR_ALL(TERSOR_EACH)
#undef TERSOR_EACH
}
