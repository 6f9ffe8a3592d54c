// A tile of 128 rows by N_TILE tokens with mma.sync, for any kernel of the sm80 schedule: a ring of packed blocks and
// activations that cp.async fills, products, the exchange of sums, scales and the rounded result.
//
// A CTA has 8 warps of 16 rows. It walks through blocks of 128 input channels with STAGES slots in shared memory; a
// slot holds one block for each warp and the activations of those channels. Where the input channels of a tile are
// split, the parts add up in a float32 workspace: the CTA that arrives last adds them in their order, so the result does
// not depend on who that was.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16 (1: bf16 activations, 0: fp16), N_TILE (8, 16, 32 or 64), STAGES,
// SHARED_BYTES (what the launch asks for), SCALE_GROUPS, SCALE_TYPE, ZERO_POINTS and RATIOS (scales.cuh; one scale a row is
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
constexpr int kXChunks = tile::kColumns / 8;  // copies of 16 bytes for a token's channels of one stage
constexpr int kWarpBytes = tile::kBytes + scales::kBlockBytes;
constexpr int kStageBytes = kWarps * kWarpBytes + kTokens * kXStride * 2;
constexpr int kSumStride = kRows + 4;  // floats

static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32 || kTokens == 64, "N_TILE is 8, 16, 32 or 64");
static_assert(kStages >= 2, "a ring needs two slots");
static_assert(kStages * kStageBytes == SHARED_BYTES, "tersor/kernels/tune/sm80.py counts the bytes of a slot otherwise");
static_assert(kStages * kStageBytes >= kTokens * kSumStride * 4, "the sums are exchanged through the ring");

// A matrix [oc, ic] in kernel tiles, which may be one of several in the same memory.
struct Matrix {
    const char* weight;     // blocks of packed codes
    const char* scale;      // by rows or, in groups, by blocks (scales.cuh)
    int oc, ic;
    int first_row_block;    // of all in memory; a multiple of tile::kUnitBlocks

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }

    // Where there is one scale a row: those of this matrix.
    __device__ __forceinline__ const float* row_scales() const {
        const long long rows_before = static_cast<long long>(first_row_block) * tile::kRows;
        return reinterpret_cast<const float*>(scale) + rows_before * scales::kRowWords;
    }
};

// Which part of the input channels a CTA takes, in blocks.
struct Range {
    int first, last;

    __device__ __forceinline__ Range(int blocks, int split, int splits)
        : first(static_cast<int>(static_cast<long long>(blocks) * split / splits)),
          last(static_cast<int>(static_cast<long long>(blocks) * (split + 1) / splits)) {}
};

// Starts the copy of this warp's block (weights and scales) of one stage into its part of the slot.
__device__ __forceinline__ void copy_block(const Matrix& matrix, char* slot, long long block, int lane, u64 policy) {
    tile::copy_lane(ptx::shared_address(slot), matrix.weight + block * tile::kBytes, lane, policy);
    if constexpr (kGroups > 0) {
        const char* source = matrix.scale + block * scales::kBlockBytes;
        for (int offset = lane * 16; offset < scales::kBlockBytes; offset += 32 * 16) {
            ptx::copy_async_16_once(ptx::shared_address(slot + tile::kBytes + offset), source + offset, policy);
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

// Multiplies a range of blocks and leaves the sums as [token][row], kSumStride floats a token, where the ring was, so
// that stores run along the rows. `copy_activations(slot, stage)`, by all threads, starts the copy of kTokens rows of
// kXStride elements; what lies beyond the tokens or the channels becomes zero.
template <typename CopyActivations>
__device__ __forceinline__ float* multiply_range(
    char* ring, const Matrix& matrix, int row_tile, const Range& range, const CopyActivations& copy_activations) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks = matrix.blocks(), first = range.first, last = range.last;

    // Warps beyond the last row block read that block again; their rows are not stored.
    const int row_blocks = (matrix.oc + tile::kRows - 1) / tile::kRows;
    const int row_block = min(row_tile * kWarps + warp, row_blocks - 1);
    const u64 policy = ptx::evict_first_policy();
    const scales::RowOffsets offsets =
        scales::row_offsets(matrix.row_scales(), row_block * tile::kRows + lane / 4, matrix.oc);

    const auto issue = [&](int stage) {
        if (stage < last) {
            char* slot = ring + (stage - first) % kStages * kStageBytes;
            const long long block = tile::block_index(matrix.first_row_block + row_block, stage, blocks);
            copy_block(matrix, slot + warp * kWarpBytes, block, lane, policy);
            copy_activations(reinterpret_cast<u16*>(slot + kWarps * kWarpBytes), stage);
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
    return exchange;
}

// Adds the splits of a tile of n tokens; true in the CTA that arrived last, where the sums are then those of all.
// partial: for each tile that may be split [splits][stride][kRows], of which n tokens are used; arrived: a counter for
// each, zero before and after.
__device__ __forceinline__ bool add_splits(
    float* exchange, float* partial, u32* arrived, int tile, int n, int stride, int split, int splits) {
    const int values = n * kRows;
    float* parts = partial + static_cast<long long>(tile) * splits * (stride * kRows);
    for (int i = threadIdx.x; i < values; i += kThreads) {
        parts[split * values + i] = exchange[i / kRows * kSumStride + i % kRows];
    }
    __threadfence();
    __syncthreads();
    __shared__ bool is_last;
    if (threadIdx.x == 0) is_last = ptx::arrive(arrived + tile) == splits - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    if (threadIdx.x == 0) arrived[tile] = 0;
    for (int i = threadIdx.x; i < values; i += kThreads) {
        float sum = 0.0f;
        for (int part = 0; part < splits; ++part) sum += __ldcg(parts + part * values + i);
        exchange[i / kRows * kSumStride + i % kRows] = sum;
    }
    __syncthreads();
    return true;
}

// Scales, biases, gates and rounds the sums of n tokens. `factor` is the power of two that the decoded weights still
// lack; bias [oc] and residual, as y, may be null; y [n, gate::outputs(oc)] is contiguous.
__device__ __forceinline__ void store(
    const float* exchange, const Matrix& matrix, int row_tile, int n, float factor, const u16* __restrict__ bias,
    const u16* residual, u16* __restrict__ y) {
    const float* row_scales = matrix.row_scales();
    const auto value = [&](int token, int row_in_tile) {
        const int row = row_tile * kRows + row_in_tile;
        const float row_scale = kGroups == 0 ? scales::of_row(row_scales, row) * factor : factor;
        const float row_bias = bias != nullptr ? ptx::widen<kBf16>(bias[row]) : 0.0f;
        return __fmaf_rn(exchange[token * kSumStride + row_in_tile], row_scale, row_bias);
    };
    constexpr int kOutputs = kRows * gate::kHalves / 2;
    const int outputs = gate::outputs(matrix.oc);
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

}  // namespace linear
