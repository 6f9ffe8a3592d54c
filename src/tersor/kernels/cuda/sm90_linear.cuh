// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias on sm_90a, for any number of tokens: weights are decoded in registers and
// feed wgmma as its A operand; sums are float32; scales are applied to the sums.
//
//                 input channels, in blocks of 128 ->                 grid: (token tiles, row tiles, splits)
//     64 rows     warpgroup 0   [block][block]...  | [block]...
//     64 rows     warpgroup 1   [block][block]...  | [block]...       one CTA = WARPGROUPS x 64 rows, one split,
//     ..                             split 0       |  split 1                   N_TILE tokens
//
// A copying warp keeps a ring of STAGES slots full: packed weights by contiguous bulk copies, activations through a
// tensor map with a 128-byte swizzle. With programmatic dependent launch the ring is filled before this kernel waits for
// those ahead of it, so the one just ahead must not be what wrote the weights. Splits add up in a float32 workspace: the
// CTA that arrives last adds the parts in their order, so the result does not depend on who that was.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16 (1: bf16 activations, 0: fp16), N_TILE (8 to 256), WARPGROUPS,
// RESIDENT (CTAs on a multiprocessor), STAGES, SCALE_GROUPS, SCALE_TYPE and ZERO_POINTS (scales.cuh; one scale a row is
// applied at the end).
#pragma once

#include "ptx.cuh"
#include "decode.cuh"
#include "tile.cuh"
#include "scales.cuh"
#include "wgmma.cuh"

namespace linear {

// 128 opaque bytes that the driver encodes (CUtensorMap).
struct alignas(64) TensorMap {
    char opaque[128];
};

constexpr bool kBf16 = BF16;
constexpr int kTokens = N_TILE;
constexpr int kWarpgroups = WARPGROUPS;
constexpr int kStages = STAGES;
constexpr int kGroups = scales::kGroups;
constexpr int kConsumers = 128 * kWarpgroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kRows = tile::kUnitRows * kWarpgroups;

constexpr int kScaleBytes = tile::kUnitBlocks * scales::kBlockBytes;  // of one unit: 64 rows of one block
constexpr int kWeightBytes = kWarpgroups * tile::kUnitBytes;
constexpr int kXHalf = kTokens * 128;  // 64 channels, the width of a swizzled row
constexpr int kXBytes = 2 * kXHalf;
constexpr int kStageBytes = (kXBytes + kWeightBytes + kWarpgroups * kScaleBytes + 1023) / 1024 * 1024;
constexpr int kSums = kTokens / 2;  // float32 sums of a thread

// The register file is dealt out evenly at the start; the copying warpgroup then gives most of its share away.
constexpr int kCopyRegisters = 24;
constexpr int kEvenRegisters = 65536 / (RESIDENT * kThreads) / 8 * 8;
constexpr int kSpareRegisters = (kEvenRegisters * kThreads - 128 * kCopyRegisters) / kConsumers / 8 * 8;
constexpr int kComputeRegisters = kSpareRegisters > 240 ? 240 : kSpareRegisters;

static_assert(kTokens % 8 == 0 && kTokens <= 256, "N_TILE is a width that wgmma has");

struct Ring {
    u32 base, full, empty;  // shared addresses: slots, and two mbarriers a slot

    __device__ __forceinline__ u32 slot(int index) const { return base + index * kStageBytes; }
    __device__ __forceinline__ u32 filled(int index) const { return full + 8 * index; }
    __device__ __forceinline__ u32 emptied(int index) const { return empty + 8 * index; }
};

// Walks around the ring; the parity of a slot's barrier turns over with every round.
struct Position {
    int index = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++index == kStages) {
            index = 0;
            parity ^= 1;
        }
    }
};

// The copying thread: fills slots with the blocks first .. last - 1 of this CTA's rows and tokens.
__device__ __forceinline__ void copy_blocks(
    const Ring& ring, const TensorMap& x_map, const char* weight, const char* scale, int row_unit, int row_units,
    int first_token, int blocks, int first, int last) {
    const u64 policy = ptx::evict_first_policy();
    const int units = min(kWarpgroups, row_units - row_unit);
    const u32 bytes = kXBytes + units * (tile::kUnitBytes + kScaleBytes);
    const long long first_unit = static_cast<long long>(row_unit) * blocks + first;
    const char* weights = weight + first_unit * tile::kUnitBytes;
    const char* scales = scale + first_unit * kScaleBytes;
    const auto copy_weights = [&](int slot) {
        const u32 target = ring.slot(slot) + kXBytes;
        ptx::barrier_expect(ring.filled(slot), bytes);
#pragma unroll
        for (int i = 0; i < kWarpgroups; ++i) {
            if (i >= units) break;
            const long long unit = static_cast<long long>(i) * blocks;
            ptx::bulk_copy_once(
                target + i * tile::kUnitBytes, weights + unit * tile::kUnitBytes, tile::kUnitBytes, ring.filled(slot),
                policy);
            if constexpr (kGroups > 0) {
                ptx::bulk_copy_once(
                    target + kWeightBytes + i * kScaleBytes, scales + unit * kScaleBytes, kScaleBytes,
                    ring.filled(slot), policy);
            }
        }
        weights += tile::kUnitBytes;
        scales += kScaleBytes;
    };
    const auto copy_activations = [&](int slot, int block) {
        const int channel = block * tile::kColumns;
        ptx::tensor_copy(ring.slot(slot), &x_map, channel, first_token, ring.filled(slot));
        ptx::tensor_copy(ring.slot(slot) + kXHalf, &x_map, channel + 64, first_token, ring.filled(slot));
    };
    const int ahead = min(kStages, last - first);
    for (int i = 0; i < ahead; ++i) copy_weights(i);
    ptx::wait_for_earlier_kernels();
    for (int i = 0; i < ahead; ++i) copy_activations(i, first + i);
    Position at;
    for (int block = first + ahead; block < last; ++block, at.advance()) {
        ptx::barrier_wait(ring.emptied(at.index), at.parity);
        copy_weights(at.index);
        copy_activations(at.index, block);
    }
}

// sums += scale * part for one scale group of the block.
__device__ __forceinline__ void add_scaled(
    float (&sums)[kSums], const float (&part)[kSums], const char* block_scales, int group, int row) {
    const float low = scales::in_block(block_scales, group, row), high = scales::in_block(block_scales, group, row + 8);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? low : high) * part[i];
}

// A computing warp: decodes its 16 rows of every block and multiplies them with the tokens in the slot.
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[kSums], const Ring& ring, const char* slots, int first, int last, const scales::RowOffsets& offsets) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
    constexpr int kPairs = decode::kRegisters;
    constexpr int kSets = 4 * tile::kSteps / kPairs;        // decode groups of a block
    constexpr int kSetSteps = kPairs / 4;                   // k16 steps of a decode group
    float part[kSums];  // of one scale group
    u32 pairs[2][kPairs];
    if constexpr (kGroups > 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }
    Position at;
    int previous = 0;
    for (int block = first; block < last; ++block) {
        ptx::barrier_wait(ring.filled(at.index), at.parity);
        const char* stage = slots + at.index * kStageBytes;
        const u32 x = ring.slot(at.index);
        const char* unit = stage + kXBytes + group * tile::kUnitBytes;
        const char* block_scales =
            stage + kXBytes + kWeightBytes + group * kScaleBytes + warp * scales::kBlockBytes;
        u32 words[tile::kLaneWords];
        tile::load_lane(words, unit + warp * tile::kBytes, lane);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            u32* a = pairs[set % 2];
            wgmma::wait<1>();  // the products that read this half of `pairs` have ended
            if (kGroups == 0 && set == 1 && block > first && lane == 0) ptx::barrier_arrive(ring.emptied(previous));
            decode::extract(a, words + set * decode::kWords);
            scales::finish<kBf16>(a, set * kSetSteps, block_scales, lane / 4, offsets);
            wgmma::fence();
#pragma unroll
            for (int i = 0; i < kSetSteps; ++i) {
                const int step = set * kSetSteps + i;
                const u64 b = wgmma::describe(x + step / 4 * kXHalf + step % 4 * 32);
                if constexpr (kGroups == 0) {
                    wgmma::Multiply<kBf16>::run(sums, a + 4 * i, b, step > 0 || block > first);
                } else {
                    wgmma::Multiply<kBf16>::run(part, a + 4 * i, b, step % scales::kSteps != 0);
                    if (step % scales::kSteps == scales::kSteps - 1) {
                        wgmma::commit();
                        wgmma::wait<0>();
                        add_scaled(sums, part, block_scales, step / scales::kSteps, lane / 4);
                        if (i + 1 < kSetSteps) wgmma::fence();
                    }
                }
            }
            wgmma::commit();
        }
        if (kGroups > 0 && lane == 0) ptx::barrier_arrive(ring.emptied(at.index));
        previous = at.index;
        at.advance();
    }
    wgmma::wait<0>();
}

// Hands this CTA's sums over; returns true in the one CTA that then holds the sum of all splits.
__device__ __forceinline__ bool add_splits(float (&sums)[kSums], float* partial, u32* arrived) {
    __shared__ bool is_last;
    const int splits = gridDim.z, output = blockIdx.y * gridDim.x + blockIdx.x;
    float* parts = partial + static_cast<long long>(output) * splits * kSums * kConsumers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(parts + (blockIdx.z * kSums + i) * kConsumers, sums[i]);
    __threadfence();
    ptx::sync_first<kConsumers>();
    if (threadIdx.x == 0) {
        is_last = ptx::arrive(arrived + output) == splits - 1;
        if (is_last) arrived[output] = 0;
    }
    ptx::sync_first<kConsumers>();
    if (!is_last) return false;
    __threadfence();
    // A load from L2 takes about a microsecond: as many as registers hold are under way at a time.
    constexpr int kChunk = kSums < 64 ? kSums : 64;
    constexpr int kTogether = kChunk < 16 ? 16 / kChunk : 1;
#pragma unroll
    for (int chunk = 0; chunk < kSums; chunk += kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sums[chunk + i] = 0.0f;
        for (int split = 0; split < splits; split += kTogether) {
            float loaded[kTogether][kChunk];
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) {
                    loaded[s][i] =
                        split + s < splits ? __ldcg(parts + ((split + s) * kSums + chunk + i) * kConsumers) : 0.0f;
                }
            }
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) sums[chunk + i] += loaded[s][i];
            }
        }
    }
    return true;
}

// Scales, adds the bias, rounds and stores: fragments are turned so that stores run along the rows.
__device__ __forceinline__ void store(
    const float (&sums)[kSums], const float* scale, const u16* bias, u16* y, int first_token, int oc, int n,
    float factor) {
    const int lane = threadIdx.x % 32;
    const int first_row = blockIdx.y * kRows + threadIdx.x / 32 * tile::kRows;
    float factors[2], biases[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        factors[half] = kGroups > 0 ? factor : (row < oc ? scales::of_row(scale, row) * factor : 0.0f);
        biases[half] = bias != nullptr && row < oc ? ptx::widen<kBf16>(bias[row]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 even = ptx::narrow<kBf16>(sums[4 * i + 2 * half] * factors[half] + biases[half]);
            const u32 odd = ptx::narrow<kBf16>(sums[4 * i + 2 * half + 1] * factors[half] + biases[half]);
            const u32 turned = ptx::transpose_8x8(even | odd << 16);  // rows 2 (lane % 4) and the next, token lane / 4
            const int token = first_token + i * 8 + lane / 4;
            const int row = first_row + 8 * half + lane % 4 * 2;
            if (token >= n || row >= oc) continue;
            u16* target = y + static_cast<long long>(token) * oc + row;
            if (oc % 2 == 0) {
                *reinterpret_cast<u32*>(target) = turned;
            } else {
                target[0] = static_cast<u16>(turned);
                if (row + 1 < oc) target[1] = static_cast<u16>(turned >> 16);
            }
        }
    }
}

}  // namespace linear

extern "C" __global__ void __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ linear::TensorMap x_map,  // x [N, IC], boxes of N_TILE x 64
    const char* __restrict__ weight,                  // units of packed codes
    const char* __restrict__ scale,                   // by rows or, in groups, by units (scales.cuh)
    const u16* __restrict__ bias,                     // [OC] or null
    u16* __restrict__ y,                              // [N, OC], contiguous
    float* partial,                                   // sums of every CTA; unused with one split
    u32* arrived,                                     // a counter for each row and token tile, zero before and after
    int oc,
    int ic,
    int n,
    float factor) {                                   // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[2 * kStages];
    const int blocks = (ic + tile::kColumns - 1) / tile::kColumns;
    const int first = static_cast<int>(static_cast<long long>(blocks) * blockIdx.z / gridDim.z);
    const int last = static_cast<int>(static_cast<long long>(blocks) * (blockIdx.z + 1) / gridDim.z);
    const int first_token = blockIdx.x * kTokens;
    const u32 full = ptx::shared_address(barriers);
    const Ring ring{ptx::shared_address(slots), full, full + 8 * kStages};

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::barrier_init(ring.filled(i), 1);
            ptx::barrier_init(ring.emptied(i), kConsumers / 32);
        }
        ptx::barrier_init_fence();
    }
    __syncthreads();
    ptx::launch_dependents();

    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kCopyRegisters>();
        if (threadIdx.x == kConsumers) {
            const int row_units = (oc + tile::kUnitRows - 1) / tile::kUnitRows;
            copy_blocks(
                ring, x_map, weight, scale, blockIdx.y * kWarpgroups, row_units, first_token, blocks, first, last);
        }
    } else {
        ptx::take_registers<kComputeRegisters>();
        const float* row_scales = reinterpret_cast<const float*>(scale);
        const int row = blockIdx.y * kRows + threadIdx.x / 32 * tile::kRows + threadIdx.x % 32 / 4;
        float sums[kSums];
        multiply_blocks(sums, ring, slots, first, last, scales::row_offsets(row_scales, row, oc));
        if (gridDim.z > 1 && !add_splits(sums, partial, arrived)) return;
        store(sums, row_scales, bias, y, first_token, oc, n, factor);
    }
}
