// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual on sm_90a, for any number of tokens: weights are decoded in
// registers and feed wgmma as its A operand; sums are float32; scales are applied to the sums.
//
// A CTA takes items in turn: a tile of ROW_GROUPS x 64 rows and N_TILE tokens over all blocks of 128 channels or, for
// the last tiles, one of `splits` ranges of blocks. Its warpgroups:
//
//     ROW_GROUPS x K_GROUPS that multiply: with few tokens each takes all rows of every so many-th block of the item,
//         with more it has a row group, 64 rows, of every block (and K_GROUPS is 1)
//     1 that copies: warps that keep a ring of packed weights and their scales full, and another one of activations
//
// Weights come by contiguous bulk copies, activations through a tensor map with a 128-byte swizzle; in a cluster the
// CTAs of neighbouring row tiles fetch their share of the activations for all. With programmatic dependent launch the
// weight ring fills before the kernels ahead have ended, so the one just ahead must not be what wrote the weights.
// Where the launch makes a tile's splits a cluster, its first CTA gathers the parts in shared memory; otherwise splits
// add up in a float32 workspace, and the CTA that arrives last adds. Both add the parts in their order: the result does
// not depend on who was first.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16 (1: bf16 results and 16-bit activations, 0: fp16), BYTES (1: 8-bit
// activations with a scale a token), X_GROUPS (1: each of its blocks of 128 channels has one), BYTE_WEIGHT (beside e4m3
// activations weights decode to e4m3, 4, or e5m2, 5; 8: both are int8), PIECES (1: sums of a block are scaled while others
// of it are multiplied, sm90_multiply_pieces.cuh), N_TILE (wgmma.cuh), ROW_GROUPS, K_GROUPS, CLUSTER (1, 2 or 4), GATHERS
// (the most splits that may be a cluster), GATHER_ROOM (parts of theirs that have shared memory of their own), RESIDENT
// (CTAs that fit on a multiprocessor), WEIGHT_SLOTS, X_SLOTS, SHARED_BYTES (what the launch asks for), FEW_TOKENS (up to
// which mma.sync multiplies), SCALE_GROUPS, SCALE_TYPE, ZERO_POINTS and RATIOS
// (scales.cuh; one scale a row is applied at the end), EPILOGUE (gate.cuh), NORM (sm90_norm.cuh: 1 where x still lacks
// the division of a norm, 2 where a norm of y follows; all tokens are in one tile then), OUTLIERS (sm90_outliers.cuh),
// PLACED (sm90_finish.cuh: 1 where results stand among those of other row sets).
#pragma once

#include "dense/sm90_cta.cuh"
#include "dense/sm90_work.cuh"

#if CLUSTER > 1
#define TERSOR_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TERSOR_CLUSTER
#endif

extern "C" __global__ void TERSOR_CLUSTER __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,  // x [N, IC], boxes of x_rows x 128 bytes
    const char* __restrict__ weight,                  // units of packed codes
    const char* __restrict__ scale,                   // by rows or, in groups, by units (scales.cuh)
    const u16* __restrict__ bias,                     // [OC] or null
    const float* __restrict__ x_scale,                // for 8-bit activations [N] or, in groups, as copy_activations says
    const u16* residual,                              // as y, added to it, or null
    u16* __restrict__ y,                              // [N, OC], or half as many channels where gated; contiguous
    float* partial,                                   // sums of split items
    u32* arrived,                                     // a counter for each split tile, zero before and after
    int oc,
    int ic,
    int n,
    int whole_tiles,                                  // of clusters, before those that are split
    int splits,
    int x_rows,                                       // rows of a box: a CTA's share of a tile's tokens
    float factor,                                     // the power of two that the decoded weights still lack
    const float* norm_weight,                         // this one to norm_eps: Norms in sm90_norm.cuh
    u16* __restrict__ scaled,
    float* squares,
    float norm_scale,
    float norm_eps,
    const char* __restrict__ kept) {                  // of a weight that has outliers (sm90_outliers.cuh), else null
    using namespace linear;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[kBarriers];
    __shared__ __align__(8) float token_scales[kScaledTokens];
    const auto make = [&] { return Work{oc, ic, n, whole_tiles, splits, kSlotBoxes * x_rows}; };
    const Norms norms{norm_weight, scaled, squares, norm_scale, norm_eps};
    const float* row_scales = reinterpret_cast<const float*>(scale);
    const Operands of{row_scales, bias, x_scale, residual, y, partial, arrived, factor, norms, {}, kept};
    run_cta<Work>(make, nullptr, x_map, weight, scale, of, x_rows, splits, slots, barriers, token_scales);
}
