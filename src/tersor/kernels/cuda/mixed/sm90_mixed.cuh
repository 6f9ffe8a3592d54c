// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual on sm_90a, where the rows of W have different schemes: the row sets
// of all levels in one launch. Every CTA belongs to one row set and does what a CTA of sm90_linear.cuh does, with the code
// of its level; how many a row set has goes by what its blocks cost (tersor/kernels/tune/mixed.py), and each has an even
// share of them. Results go to the columns of their features at once.
//
// Parameters: those of sm90_linear.cuh. LEVELS says how many levels there are, and what differs between them is named by
// level: BITS_0 and BITS_1, DECODE_*, BYTE_WEIGHT, PIECES, SCALE_GROUPS, SCALE_TYPE, ZERO_POINTS, RATIOS, WEIGHT_SLOTS,
// X_SLOTS, SHARED_BYTES (of a CTA of the level; the launch asks for the most of them), FACTOR (the power of two that
// decoded weights still lack). NORM is 0, PLACED 1.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/tensor_map.cuh"
#include "mixed/sm90_call.cuh"
#include "mixed/sm90_levels.cuh"


#if CLUSTER > 1
#define TERSOR_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TERSOR_CLUSTER
#endif

extern "C" __global__ void TERSOR_CLUSTER __launch_bounds__(level_0::linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,  // x [N, IC], boxes of x_rows x 128 bytes
    const __grid_constant__ mixed::RowSets sets,
    const __grid_constant__ mixed::Shares shares,
    const int* __restrict__ features,         // this one to `arrived`, and `most_parts`: Call in sm90_call.cuh
    const u16* __restrict__ bias,
    const float* __restrict__ x_scale,        // as in sm90_linear.cuh
    const u16* residual,
    u16* __restrict__ y,
    float* partial,
    u32* arrived,
    int ic,
    int n,
    int outputs,                              // columns of y
    int x_rows,                               // rows of a box: a CTA's share of a tile's tokens
    int most_parts,
    int splits) {                             // CTAs of a cluster that gathers, else 1
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[mixed::most_barriers()];
    __shared__ __align__(8) float token_scales[level_0::linear::kScaledTokens];
    __shared__ mixed::KeptWork kept;
    const mixed::Call call{x_map, features, bias, x_scale, residual, y, partial, arrived, ic, n, outputs, x_rows,
                           most_parts, static_cast<int>(blockIdx.x / (CLUSTER * splits)), splits, slots, barriers,
                           token_scales, &kept};
    int first_cta = 0, first_channel = 0;
#define TERSOR_EACH(NUMBER)                                                                                         \
    if (call.cluster < shares.of[NUMBER].end) {                                                                          \
        level_##NUMBER::linear::run_set(                                                                            \
            call, sets.of[NUMBER].weight, sets.of[NUMBER].scale, shares.of[NUMBER], first_cta, first_channel);      \
        return;                                                                                                     \
    }                                                                                                               \
    first_cta = shares.of[NUMBER].end;                                                                              \
    first_channel += gate::outputs(shares.of[NUMBER].rows);
    TERSOR_ALL(TERSOR_EACH)
#undef TERSOR_EACH
}
