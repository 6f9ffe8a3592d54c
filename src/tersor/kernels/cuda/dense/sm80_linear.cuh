// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual for few tokens (N <= N_TILE): weights are decoded in registers
// and feed mma.sync directly; sums are float32; scales are applied to the sums. Runs on sm_80 and newer.
//
//               input channels, in blocks of 128 ->
//     16 rows   warp 0   [block][block]... | [block][block]...
//     16 rows   warp 1   [block][block]... | [block][block]...
//     ..                     split 0       |     split 1            one CTA = 8 warps = 128 rows of one split
//
// A CTA walks its split through a ring of STAGES shared-memory slots filled by cp.async; a slot holds one block for
// each warp and the activations of those 128 channels. Splits add up in a float32 workspace: the CTA that arrives
// last adds the parts in their order, so the result does not depend on who that was.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16 (1: bf16 activations, 0: fp16), N_TILE (8, 16, 32 or 64), STAGES,
// SHARED_BYTES (what the launch asks for), SCALE_GROUPS, SCALE_TYPE and ZERO_POINTS (scales.cuh; one scale a row is
// applied at the end), EPILOGUE (gate.cuh).
#pragma once

#include "common/decode.cuh"
#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"

namespace linear {

constexpr bool kBf16 = BF16;
constexpr int kTokens = N_TILE;
constexpr int kTokenTiles = kTokens / 8;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = STAGES;
constexpr int kGroups = scales::kGroups;
constexpr int kRows = tile::kRows * kWarps;

constexpr int kXStride = tile::kColumns + 8;  // elements; 16 bytes of padding keep ldmatrix free of bank conflicts
constexpr int kWarpBytes = tile::kBytes + scales::kBlockBytes;
constexpr int kStageBytes = kWarps * kWarpBytes + kTokens * kXStride * 2;
constexpr int kSumStride = kRows + 4;  // floats

static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32 || kTokens == 64, "N_TILE is 8, 16, 32 or 64");
static_assert(kStages >= 2, "a ring needs two slots");
static_assert(kStages * kStageBytes == SHARED_BYTES, "tersor/kernels/tune/sm80.py counts the bytes of a slot otherwise");
static_assert(kStages * kStageBytes >= kTokens * kSumStride * 4, "the sums are exchanged through the ring");

struct Problem {
    const char* weight;     // blocks of packed codes
    const char* scale;      // by rows or, in groups, by blocks (scales.cuh)
    const u16* x;
    long long x_stride;     // elements between rows of x
    int ic, n;
    bool x_aligned;         // rows of x start on 16 bytes
};

// Starts the copy of this warp's block (weights and scales) of one stage into its part of the slot.
__device__ __forceinline__ void copy_block(const Problem& p, char* slot, long long block, int lane, u64 policy) {
    tile::copy_lane(ptx::shared_address(slot), p.weight + block * tile::kBytes, lane, policy);
    if constexpr (kGroups > 0) {
        const char* source = p.scale + block * scales::kBlockBytes;
        for (int offset = lane * 16; offset < scales::kBlockBytes; offset += 32 * 16) {
            ptx::copy_async_16_once(ptx::shared_address(slot + tile::kBytes + offset), source + offset, policy);
        }
    }
}

// Starts the copy of the activations of one stage; what lies beyond N or IC becomes zero.
__device__ __forceinline__ void copy_activations(const Problem& p, u16* slot, int stage) {
    constexpr int kChunks = tile::kColumns / 8;
    for (int index = threadIdx.x; index < kTokens * kChunks; index += kThreads) {
        const int token = index / kChunks;
        const int column = index % kChunks * 8;
        const int channel = stage * tile::kColumns + column;
        const int valid = token < p.n ? max(0, min(8, p.ic - channel)) : 0;
        const u16* source = p.x + (valid > 0 ? token * p.x_stride + channel : 0);
        u16* target = slot + token * kXStride + column;
        if (p.x_aligned) {
            ptx::copy_async_16_zero_fill(ptx::shared_address(target), source, 2 * valid);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) target[i] = i < valid ? source[i] : u16(0);
        }
    }
}

// One block of 128 channels: decode, multiply, and (in groups) scale.
__device__ __forceinline__ void multiply_block(
    float (&sums)[kTokenTiles][4], const char* weights, const u16* x, int lane, const scales::RowOffsets& offsets) {
    u32 words[tile::kLaneWords];
    tile::load_lane(words, weights + lane * 16, lane);
    const char* block_scales = weights + tile::kBytes;
    const u32 x_lane = ptx::shared_address(x + lane % 8 * kXStride + lane / 8 * 8);
    float part[kTokenTiles][4];
    u32 pairs[decode::kRegisters];
    u32 b[kTokenTiles][4];
#pragma unroll
    for (int step = 0; step < tile::kSteps; ++step) {
        const int first_pair = step * 4 % decode::kRegisters;
        if (first_pair == 0) {
            decode::extract(pairs, words + step * 4 / decode::kRegisters * decode::kWords);
            scales::finish<kBf16>(pairs, step, block_scales, lane / 4, offsets);
        }
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
            // One ldmatrix.x4 serves the B fragments of two steps.
            if (step % 2 == 0) ptx::load_matrices(b[i], x_lane + (i * 8 * kXStride + step * 16) * 2);
            if constexpr (kGroups > 0) {
                if (step % scales::kSteps == 0) part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0.0f;
            }
            ptx::multiply_add<kBf16>(
                kGroups > 0 ? part[i] : sums[i], pairs + first_pair, b[i][step % 2 * 2], b[i][step % 2 * 2 + 1]);
        }
        if constexpr (kGroups > 0) {
            if (step % scales::kSteps == scales::kSteps - 1) {
                const float low = scales::in_block(block_scales, step / scales::kSteps, lane / 4);
                const float high = scales::in_block(block_scales, step / scales::kSteps, lane / 4 + 8);
#pragma unroll
                for (int i = 0; i < kTokenTiles; ++i) {
                    sums[i][0] += low * part[i][0];
                    sums[i][1] += low * part[i][1];
                    sums[i][2] += high * part[i][2];
                    sums[i][3] += high * part[i][3];
                }
                // With many tokens and scales, loads taken ahead of this point would not fit in registers.
                if constexpr (kGroups * kTokens >= 256) __syncwarp();
            }
        }
    }
}

}  // namespace linear

extern "C" __global__ void __launch_bounds__(linear::kThreads, 1) TERSOR_ENTRY(
    const char* __restrict__ weight,
    const char* __restrict__ scale,
    const u16* __restrict__ x,
    const u16* __restrict__ bias,  // [OC] or null
    const u16* residual,           // as y, added to it, or null
    u16* __restrict__ y,           // [N, OC], or half as many channels where gated; contiguous
    float* partial,                // [row tiles][splits][N][128]; unused with one split
    u32* arrived,                  // [row tiles], zero before and after; unused with one split
    long long x_stride,
    int oc,
    int ic,
    int n,
    int x_aligned,                 // whether rows of x start on 16 bytes
    float factor) {                // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(128) char ring[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int blocks = (ic + tile::kColumns - 1) / tile::kColumns;
    const Problem problem{weight, scale, x, x_stride, ic, n, x_aligned != 0};
    const int first = static_cast<int>(static_cast<long long>(blocks) * split / splits);
    const int last = static_cast<int>(static_cast<long long>(blocks) * (split + 1) / splits);

    // Warps beyond the last row block read that block again; their rows are not stored.
    const int row_blocks = (oc + tile::kRows - 1) / tile::kRows;
    const int row_block = min(row_tile * kWarps + warp, row_blocks - 1);
    const u64 policy = ptx::evict_first_policy();
    const float* row_scales = reinterpret_cast<const float*>(scale);
    const scales::RowOffsets offsets = scales::row_offsets(row_scales, row_block * tile::kRows + lane / 4, oc);

    const auto issue = [&](int stage) {
        if (stage < last) {
            char* slot = ring + (stage - first) % kStages * kStageBytes;
            copy_block(problem, slot + warp * kWarpBytes, tile::block_index(row_block, stage, blocks), lane, policy);
            copy_activations(problem, reinterpret_cast<u16*>(slot + kWarps * kWarpBytes), stage);
        }
        ptx::copy_async_commit();
    };

    float sums[kTokenTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) issue(first + i);
    for (int stage = first; stage < last; ++stage) {
        ptx::copy_async_wait<kStages - 2>();
        __syncthreads();  // everybody's copies of this stage have arrived, everybody has left the slot refilled next
        issue(stage + kStages - 1);
        const char* slot = ring + (stage - first) % kStages * kStageBytes;
        multiply_block(
            sums, slot + warp * kWarpBytes, reinterpret_cast<const u16*>(slot + kWarps * kWarpBytes), lane, offsets);
    }

    // Fragments to [token][row] in shared memory, so that stores run along the rows.
    ptx::copy_async_wait<0>();
    __syncthreads();
    float* exchange = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = i * 8 + lane % 4 * 2 + j % 2;
            exchange[token * kSumStride + warp * tile::kRows + lane / 4 + j / 2 * 8] = sums[i][j];
        }
    }
    __syncthreads();

    const int values = n * kRows;
    if (splits > 1) {
        float* parts = partial + static_cast<long long>(row_tile) * splits * values;
        for (int i = threadIdx.x; i < values; i += kThreads) {
            parts[split * values + i] = exchange[i / kRows * kSumStride + i % kRows];
        }
        __threadfence();
        __syncthreads();
        __shared__ bool is_last;
        if (threadIdx.x == 0) is_last = ptx::arrive(arrived + row_tile) == splits - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[row_tile] = 0;
        for (int i = threadIdx.x; i < values; i += kThreads) {
            float sum = 0.0f;
            for (int part = 0; part < splits; ++part) sum += __ldcg(parts + part * values + i);
            exchange[i / kRows * kSumStride + i % kRows] = sum;
        }
        __syncthreads();
    }
    const auto value = [&](int token, int row_in_tile) {
        const int row = row_tile * kRows + row_in_tile;
        const float row_scale = kGroups == 0 ? scales::of_row(row_scales, row) * factor : factor;
        const float row_bias = bias != nullptr ? ptx::widen<kBf16>(bias[row]) : 0.0f;
        return __fmaf_rn(exchange[token * kSumStride + row_in_tile], row_scale, row_bias);
    };
    constexpr int kOutputs = kRows * gate::kHalves / 2;
    const int outputs = gate::outputs(oc);
    for (int i = threadIdx.x; i < n * kOutputs; i += kThreads) {
        const int token = i / kOutputs, output = row_tile * kOutputs + i % kOutputs, row = gate::row_of(i % kOutputs);
        if (output >= outputs) continue;
        const long long at = static_cast<long long>(token) * outputs + output;
        float result = value(token, row);
        if constexpr (gate::kGated) result = gate::combine(result, value(token, row + 8));
        if (residual != nullptr) result = __fadd_rn(result, ptx::widen<kBf16>(residual[at]));
        y[at] = ptx::narrow<kBf16>(result);
    }
}
