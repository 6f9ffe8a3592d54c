// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias on sm_90a, for any number of tokens: weights are decoded in registers and
// feed wgmma as its A operand; sums are float32; scales are applied to the sums.
//
// A CTA takes items in turn: a tile of ROW_GROUPS x 64 rows and N_TILE tokens over all blocks of 128 channels or, for the
// last tiles, one of `splits` ranges of blocks. Its warpgroups:
//
//     ROW_GROUPS x K_GROUPS that multiply: row group r has 64 rows, channel group k every K_GROUPS-th block of the item
//     1 that copies: a warp keeps a ring of packed weights full, another one of activations
//
// Weights come by contiguous bulk copies, activations through a tensor map with a 128-byte swizzle; in a cluster the
// CTAs of neighbouring row tiles fetch their share of the activations for all. With programmatic dependent launch the weight
// ring fills before the kernels ahead have ended, so the one just ahead must not be what wrote the weights. Splits add
// up in a float32 workspace: the CTA that arrives last adds the parts in their order, so the result does not depend on
// who that was.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16 (1: bf16 activations, 0: fp16), N_TILE (8 to 256), ROW_GROUPS,
// K_GROUPS, CLUSTER (1, 2 or 4), RESIDENT (CTAs that fit on a multiprocessor), WEIGHT_SLOTS, X_SLOTS, SCALE_GROUPS,
// SCALE_TYPE and ZERO_POINTS (scales.cuh; one scale a row is applied at the end).
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
constexpr int kRowGroups = ROW_GROUPS;
constexpr int kChannelGroups = K_GROUPS;
constexpr int kCluster = CLUSTER;
constexpr int kWeightSlots = WEIGHT_SLOTS;
constexpr int kXSlots = X_SLOTS;
constexpr int kGroups = scales::kGroups;
constexpr bool kFew = kTokens <= FEW_TOKENS;
constexpr int kBand = 1024 / kTokens;   // token tiles whose activations are in use at a time
constexpr int kFinishers = 128 * kRowGroups;  // threads of channel group 0, which write the result
constexpr int kConsumers = kFinishers * kChannelGroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kRows = tile::kUnitRows * kRowGroups;
constexpr int kSums = kTokens / 2;  // float32 sums of a thread

constexpr int kScaleBytes = tile::kUnitBlocks * scales::kBlockBytes;  // of one unit: 64 rows of one block
constexpr int kWeightSlotBytes = kRowGroups * (tile::kUnitBytes + kScaleBytes);
constexpr int kXHalf = kTokens * 128;                // 64 channels, the width of a swizzled row
constexpr int kSlotHalves = kTokens < 128 ? 2 : 1;   // a slot has a whole block while that is small
constexpr int kSlotsOfBlock = 2 / kSlotHalves;
constexpr int kSlotBoxes = kCluster > kSlotHalves ? kCluster / kSlotHalves : 1;  // of each half
constexpr int kXSlotBytes = kSlotHalves * kXHalf;
constexpr int kExchangeBytes = kFinishers * (kChannelGroups - 1) * kSums * 4;  // between channel groups

constexpr bool kMany = kTokens >= 128;               // results are turned in shared memory
constexpr int kStoreTokens = 64;                     // as many at a time
constexpr int kStoreBytes = kStoreTokens * 128;      // of one warpgroup

// Shared memory: activations, which need 1024 bytes alignment, weights, then sums of channel groups or results.
constexpr int kWeightsAt = kXSlots * kXSlotBytes;
constexpr int kExchangeAt = kWeightsAt + kWeightSlots * kWeightSlotBytes;

// The register file is dealt out evenly at the start; the copying warpgroup then gives most of its share away.
constexpr int kCopyRegisters = 40;
constexpr int kEvenRegisters = 65536 / (RESIDENT * kThreads) / 8 * 8;
constexpr int kSpareRegisters = (kEvenRegisters * kThreads - 128 * kCopyRegisters) / kConsumers / 8 * 8;
constexpr int kComputeRegisters = kSpareRegisters > 240 ? 240 : kSpareRegisters;

enum Barrier { kAllBarrier, kPartsReady, kPartsRead, kFinishersBarrier, kGroupBarriers };  // the last: one a row group

static_assert(kTokens % 8 == 0 && kTokens <= 256, "N_TILE is a width that wgmma has");
static_assert(kWeightSlots % kChannelGroups == 0 && kXSlots % (kChannelGroups * kSlotsOfBlock) == 0,
              "a slot always serves the same channel group: one that is ahead must not take an old round for its own");
static_assert(!kMany || kChannelGroups == 1, "results and sums of channel groups share no room");

// A ring of slots with two mbarriers each. Uses of its slots are numbered; a place is where a use stands, and the parity
// of a slot's barriers turns over with every round.
template <int kSlots>
struct Ring {
    u32 base, bytes, barriers;

    struct Place {
        u32 slot, parity;

        __device__ __forceinline__ explicit Place(u32 use) : slot(use % kSlots), parity(use / kSlots % 2) {}
        __device__ __forceinline__ void advance(u32 by = 1) {
            slot += by;
            if (slot >= kSlots) {
                slot -= kSlots;
                parity ^= 1;
            }
        }
    };

    // `readers` warps tell when they have read a slot.
    __device__ __forceinline__ void start(int readers) const {
        for (int slot = 0; slot < kSlots; ++slot) {
            ptx::barrier_init(barriers + slot * 16, 1);
            ptx::barrier_init(barriers + slot * 16 + 8, readers);
        }
    }
    __device__ __forceinline__ u32 address(const Place& at) const { return base + at.slot * bytes; }
    __device__ __forceinline__ u32 filled(const Place& at) const { return barriers + at.slot * 16; }
    __device__ __forceinline__ u32 emptied(const Place& at) const { return filled(at) + 8; }
    __device__ __forceinline__ void wait_filled(const Place& at) const { ptx::barrier_wait(filled(at), at.parity); }
    // A barrier that has not turned over yet counts as one that ended the phase of parity 1.
    __device__ __forceinline__ void wait_emptied(const Place& at) const {
        ptx::barrier_wait(emptied(at), at.parity ^ 1);
    }
};

// What the launch asks for, and which part of it an item is.
struct Work {
    int oc, ic, n;
    int whole_tiles, splits;  // tiles before `whole_tiles` are one item each, the others `splits`

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }
    __device__ __forceinline__ int token_tiles() const { return (n + kTokens - 1) / kTokens; }
    __device__ __forceinline__ int row_tiles() const { return (oc + kCluster * kRows - 1) / (kCluster * kRows); }
    __device__ __forceinline__ int tiles() const { return token_tiles() * row_tiles(); }  // of a cluster
    __device__ __forceinline__ int items() const { return whole_tiles + (tiles() - whole_tiles) * splits; }
};

struct Item {
    int tile, part, parts;          // of the cluster
    int first_row, first_token;
    int first_block, last_block;

    __device__ __forceinline__ Item(const Work& work, int index, int rank) {
        tile = index, part = 0, parts = 1;
        if (index >= work.whole_tiles) {
            parts = work.splits;
            tile = work.whole_tiles + (index - work.whole_tiles) / parts;
            part = (index - work.whole_tiles) % parts;
        }
        // Token tiles by bands: what runs at a time shares activations as well as weights.
        const int band = tile / (kBand * work.row_tiles()), in_band = tile % (kBand * work.row_tiles());
        const int width = min(kBand, work.token_tiles() - band * kBand);
        first_token = (band * kBand + in_band % width) * kTokens;
        first_row = (in_band / width * kCluster + rank) * kRows;
        first_block = work.blocks() * part / parts;
        last_block = work.blocks() * (part + 1) / parts;
    }
};

using WeightRing = Ring<kWeightSlots>;
using XRing = Ring<kXSlots>;

// Calls run(item) for every item of this CTA.
template <typename Run>
__device__ __forceinline__ void for_items(const Work& work, int rank, const Run& run) {
#pragma unroll 1
    for (int index = blockIdx.x / kCluster; index < work.items(); index += gridDim.x / kCluster) {
        run(Item(work, index, rank));
    }
}

// The thread that copies weights.
__device__ __forceinline__ void copy_weights(
    const WeightRing& ring, const Work& work, int rank, const char* weight, const char* scale) {
    const u64 policy = ptx::evict_first_policy();
    const int row_units = (work.oc + tile::kUnitRows - 1) / tile::kUnitRows;
    const long long blocks = work.blocks();
    WeightRing::Place at(0);
    for_items(work, rank, [&](const Item& item) {
        const int row_unit = item.first_row / tile::kUnitRows;
        const int units = max(0, min(kRowGroups, row_units - row_unit));
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block, at.advance()) {
            ring.wait_emptied(at);
            ptx::barrier_expect(ring.filled(at), units * (tile::kUnitBytes + kScaleBytes));
#pragma unroll 1
            for (int i = 0; i < units; ++i) {
                const long long unit = (row_unit + i) * blocks + block;
                ptx::bulk_copy_once(
                    ring.address(at) + i * tile::kUnitBytes, weight + unit * tile::kUnitBytes, tile::kUnitBytes,
                    ring.filled(at), policy);
                if constexpr (kGroups > 0) {
                    ptx::bulk_copy_once(
                        ring.address(at) + kRowGroups * tile::kUnitBytes + i * kScaleBytes, scale + unit * kScaleBytes,
                        kScaleBytes, ring.filled(at), policy);
                }
            }
        }
    });
}

// The thread that copies activations: `x_rows` rows in a box of the tensor map.
__device__ __forceinline__ void copy_activations(
    const XRing& ring, const Work& work, int rank, const TensorMap& x_map, int x_rows) {
    ptx::prefetch_map(&x_map);
    ptx::wait_for_earlier_kernels();
    XRing::Place at(0);
    for_items(work, rank, [&](const Item& item) {
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block) {
#pragma unroll
            for (int i = 0; i < kSlotsOfBlock; ++i, at.advance()) {
                ring.wait_emptied(at);
                ptx::barrier_expect(ring.filled(at), kSlotHalves * kSlotBoxes * x_rows * 128);
#pragma unroll
                for (int half = 0; half < kSlotHalves; ++half) {
                    const int channel = block * tile::kColumns + (i + half) * 64;
                    const u32 target = ring.address(at) + half * kXHalf;
                    if constexpr (kCluster == 1) {
                        ptx::tensor_copy(target, &x_map, channel, item.first_token, ring.filled(at));
                    } else if (kSlotHalves == 1 || half == rank % kSlotHalves) {
                        const int first = kSlotHalves * (rank / kSlotHalves) * (kTokens / kCluster);
                        ptx::tensor_copy_to_all<kCluster>(
                            target + first * 128, &x_map, channel, item.first_token + first, ring.filled(at));
                    }
                }
            }
        }
    });
}

// sums += scale * part for one scale group of the block.
__device__ __forceinline__ void add_scaled(
    float (&sums)[kSums], const float (&part)[kSums], const char* block_scales, int group, int row) {
    const float low = scales::in_block(block_scales, group, row), high = scales::in_block(block_scales, group, row + 8);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? low : high) * part[i];
}

// Tells all CTAs that share a slot of activations that this warp has read it.
__device__ __forceinline__ void release_x(const XRing& ring, const XRing::Place& at) {
    const int lane = threadIdx.x % 32;
    if constexpr (kCluster == 1) {
        if (lane == 0) ptx::barrier_arrive(ring.emptied(at));
    } else {
        if (lane < kCluster) ptx::barrier_arrive_at(ring.emptied(at), lane);
    }
}

// A multiplying warp with few tokens. wgmma takes as long for 8 tokens as for 64, so mma.sync feeds the tensor cores
// faster here; its fragments and sums are those of wgmma for each warp's 16 rows.
__device__ __forceinline__ void multiply_few(
    float (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    const int channel_group = kChannelGroups == 1 ? 0 : threadIdx.x / kFinishers;
    constexpr int kPairs = decode::kRegisters;
    constexpr int kSets = 4 * tile::kSteps / kPairs;
    constexpr int kSetSteps = kPairs / 4;
    constexpr int kChains = kTokens == 8 ? 2 : 1;  // sums that take turns, so that none waits for itself
    static_assert(!kFew || kSetSteps % 2 == 0, "two steps share a load");
    float parts[kChains][kTokens / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    WeightRing::Place weights_at(use + channel_group);
    XRing::Place x_at(use + channel_group);
    // Where this lane finds row (token) lane % 8 of the 16-byte columns lane / 8 and 4 + lane / 8, under the swizzle.
    const u32 chunks[2] = {
        static_cast<u32>(lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16),
        static_cast<u32>(lane % 8 * 128 + ((lane / 8 + 4) ^ lane % 8) * 16)};
    const auto flush = [&](float low, float high) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            float part = parts[0][i / 4][i % 4];
            if constexpr (kChains == 2) part += parts[1][i / 4][i % 4];
            sums[i] += (i % 4 < 2 ? low : high) * part;
#pragma unroll
            for (int chain = 0; chain < kChains; ++chain) parts[chain][i / 4][i % 4] = 0.0f;
        }
    };
    for (int block = channel_group; block < count; block += kChannelGroups) {
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        const char* block_scales =
            stage + kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
        u32 words[tile::kLaneWords], fragments[kTokens / 8][4];
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes, lane);
        const u32 x = xs.address(x_at);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            u32 a[kPairs];
            decode::extract(a, words + set * decode::kWords);
            scales::finish<kBf16>(a, set * kSetSteps, block_scales, lane / 4, offsets);
            if (set == 0) xs.wait_filled(x_at);
#pragma unroll
            for (int i = 0; i < kSetSteps; ++i) {
                const int step = set * kSetSteps + i;
#pragma unroll
                for (int tokens = 0; tokens < kTokens / 8; ++tokens) {
                    u32(&b)[4] = fragments[tokens];
                    if (i % 2 == 0) {
                        ptx::load_matrices(b, x + step / 4 * kXHalf + tokens * 1024 + chunks[step / 2 % 2]);
                    }
                    ptx::multiply_add<kBf16>(
                        parts[step % kChains][tokens], a + 4 * i, b[i % 2 * 2], b[i % 2 * 2 + 1]);
                }
                if constexpr (kGroups > 0) {
                    if (step % scales::kSteps == scales::kSteps - 1) {
                        const int group = step / scales::kSteps;
                        flush(
                            scales::in_block(block_scales, group, lane / 4),
                            scales::in_block(block_scales, group, lane / 4 + 8));
                    }
                }
            }
        }
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(weights.emptied(weights_at));
        release_x(xs, x_at);
        weights_at.advance(kChannelGroups);
        x_at.advance(kChannelGroups);
    }
    if constexpr (kGroups == 0) flush(1.0f, 1.0f);
}

// A multiplying warp: decodes its 16 rows of its blocks and multiplies them with the tokens in the slots. `use` counts the
// blocks that this CTA had before the item.
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    const int channel_group = kChannelGroups == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / kFinishers, 0);
    constexpr int kPairs = decode::kRegisters;
    constexpr int kSets = 4 * tile::kSteps / kPairs;  // decode groups of a block
    constexpr int kSetSteps = kPairs / 4;             // k16 steps of a decode group
    constexpr int kSlotSets = kSets / kSlotsOfBlock;  // decode groups that a slot of activations serves
    static_assert(kSlotSets > 0, "a decode group reads one slot of activations");
    // Decode groups whose products are under way or being prepared: four where registers are plenty.
    constexpr int kAhead = kGroups == 0 && kSets >= 4 && kComputeRegisters - kSums >= 192 ? 4 : 2;
    float part[kSums];  // of one scale group
    u32 pairs[kAhead][kPairs];
    if constexpr (kGroups > 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }
    WeightRing::Place weights_at(use + channel_group);
    XRing::Place x_at((use + channel_group) * kSlotsOfBlock), x_before = x_at;
    int block = channel_group;
    for (; block < count; block += kChannelGroups) {
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        const char* block_scales =
            stage + kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
        u32 words[tile::kLaneWords];
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes, lane);
        if constexpr (kGroups == 0) {
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(weights.emptied(weights_at));
        }
        XRing::Place at = x_at;
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            u32* a = pairs[set % kAhead];
            if (set > 0 && set % kSlotSets == 0) at.advance();
            if (set % kSlotSets == 0) xs.wait_filled(at);
            wgmma::wait<kAhead - 1>();  // the products that read these `pairs` have ended
            if constexpr (kGroups == 0) {
                // And with them the slot that their group was the last to read is free.
                const int done = (set + kSets - kAhead) % kSets;
                if (done % kSlotSets == kSlotSets - 1 && (set >= kAhead || block > channel_group)) {
                    XRing::Place free = set >= kAhead ? x_at : x_before;
                    free.advance(done / kSlotSets);
                    release_x(xs, free);
                }
            }
            decode::extract(a, words + set * decode::kWords);
            scales::finish<kBf16>(a, set * kSetSteps, block_scales, lane / 4, offsets);
            const u64 x = wgmma::describe(xs.address(at));
            wgmma::fence();
#pragma unroll
            for (int i = 0; i < kSetSteps; ++i) {
                const int step = set * kSetSteps + i, half = step / 4 % kSlotHalves;
                const u64 b = x + wgmma::offset(half * kXHalf + step % 4 * 32);
                if constexpr (kGroups == 0) {
                    wgmma::Multiply<kBf16>::run(sums, a + 4 * i, b, step > 0 || block > channel_group);
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
        if constexpr (kGroups > 0) {
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(weights.emptied(weights_at));
            XRing::Place free = x_at;
#pragma unroll
            for (int i = 0; i < kSlotsOfBlock; ++i, free.advance()) release_x(xs, free);
        }
        weights_at.advance(kChannelGroups);
        x_before = x_at;
        x_at.advance(kChannelGroups * kSlotsOfBlock);
    }
    wgmma::wait<0>();
    if (kGroups == 0 && block > channel_group) {
#pragma unroll
        for (int i = 0; i < kSlotsOfBlock; ++i, x_before.advance()) {
            if ((i + 1) * kSlotSets > kSets - kAhead) release_x(xs, x_before);
        }
    }
}

// Adds the sums of the other channel groups to those of group 0; returns true in the threads of group 0.
__device__ __forceinline__ bool add_channel_groups(float (&sums)[kSums], float* exchange, int count, bool is_first) {
    if constexpr (kChannelGroups == 1) return true;
    const int group = threadIdx.x / kFinishers, thread = threadIdx.x % kFinishers;
    float* parts = exchange + thread;
    if (group > 0) {
        if (!is_first) ptx::sync_threads<kPartsRead, kConsumers>();
        if (group < count) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) parts[((group - 1) * kSums + i) * kFinishers] = sums[i];
        }
        ptx::arrive_threads<kPartsReady, kConsumers>();
        return false;
    }
    if (!is_first) ptx::arrive_threads<kPartsRead, kConsumers>();
    ptx::sync_threads<kPartsReady, kConsumers>();
    for (int other = 1; other < min(kChannelGroups, count); ++other) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += parts[((other - 1) * kSums + i) * kFinishers];
    }
    return true;
}

// Hands this CTA's sums over; returns true in the one CTA that then holds the sum of all splits.
__device__ __forceinline__ bool add_splits(
    float (&sums)[kSums], const Work& work, const Item& item, int rank, float* partial, u32* arrived) {
    __shared__ bool is_last;
    const int splits = item.parts, output = (item.tile - work.whole_tiles) * kCluster + rank;
    float* parts = partial + static_cast<long long>(output) * splits * kSums * kFinishers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(parts + (item.part * kSums + i) * kFinishers, sums[i]);
    __threadfence();
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
    if (threadIdx.x == 0) {
        is_last = ptx::arrive(arrived + output) == splits - 1;
        if (is_last) arrived[output] = 0;
    }
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
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
                        split + s < splits ? __ldcg(parts + ((split + s) * kSums + chunk + i) * kFinishers) : 0.0f;
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

// The scales and biases of this lane's two rows of a tile.
struct RowTerms {
    float scale[2], bias[2];
    int first_row;

    __device__ __forceinline__ RowTerms(const Work& work, const Item& item, const float* scales, float factor)
        : first_row(item.first_row + threadIdx.x % kFinishers / 32 * tile::kRows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            scale[half] = kGroups > 0 ? factor : (row < work.oc ? scales::of_row(scales, row) * factor : 0.0f);
        }
    }
    __device__ __forceinline__ void add_bias(const Work& work, const u16* biases) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            bias[half] = biases != nullptr && row < work.oc ? ptx::widen<kBf16>(biases[row]) : 0.0f;
        }
    }
    // Tokens 2 (lane % 4) and the next of the `tokens`-th group of eight.
    __device__ __forceinline__ u32 round(const float (&sums)[kSums], int tokens, int half) const {
        const float* pair = sums + 4 * tokens + 2 * half;
        const u32 even = ptx::narrow<kBf16>(pair[0] * scale[half] + bias[half]);
        const u32 odd = ptx::narrow<kBf16>(pair[1] * scale[half] + bias[half]);
        return even | odd << 16;
    }
};

// Rounds and stores few tokens: fragments are turned so that stores run along the rows.
__device__ __forceinline__ void store_few(
    const float (&sums)[kSums], const Work& work, const Item& item, const RowTerms& terms, u16* y) {
    const int lane = threadIdx.x % 32, oc = work.oc;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // rows 2 (lane % 4) and the next, token lane / 4
            const u32 turned = ptx::transpose_8x8(terms.round(sums, i, half));
            const int token = item.first_token + i * 8 + lane / 4;
            const int row = terms.first_row + 8 * half + lane % 4 * 2;
            if (token >= work.n || row >= oc) continue;
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

// Rounds and stores many tokens: a warpgroup turns kStoreTokens of them at a time in shared memory, so that every store
// writes 16 bytes and a warp's fill whole lines. A token's 64 rows are 8 pieces of 16 bytes, swizzled by the token.
__device__ __forceinline__ void store_many(
    const float (&sums)[kSums], const Work& work, const Item& item, const RowTerms& terms, u16* y, char* turned) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    char* tokens = turned + group * kStoreBytes;
    const u32 shared = ptx::shared_address(tokens);
    const int group_row = item.first_row + group * tile::kUnitRows;
    // Of the four 8x8 matrices of 16 tokens and 16 rows, this lane addresses row lane % 8 of matrix lane / 8.
    const int own_token = lane / 16 * 8 + lane % 8, own_piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int first = 0; first < kTokens; first += kStoreTokens) {
        ptx::sync_one_of<kGroupBarriers, 128>(group);  // the pieces before have been read
#pragma unroll
        for (int i = 0; i < kStoreTokens; i += 16) {
            const int at = first / 8 + i / 8;
            const u32 parts[4] = {
                terms.round(sums, at, 0), terms.round(sums, at, 1), terms.round(sums, at + 1, 0),
                terms.round(sums, at + 1, 1)};
            const int token = i + own_token;
            ptx::store_matrices_turned(shared + token * 128 + (own_piece ^ token % 8) * 16, parts);
        }
        ptx::sync_one_of<kGroupBarriers, 128>(group);
#pragma unroll
        for (int i = 0; i < kStoreTokens; i += 16) {
            const int token = i + threadIdx.x % 128 / 8, piece = lane % 8;
            const int row = group_row + piece * 8, y_token = item.first_token + first + token;
            if (y_token >= work.n || row >= work.oc) continue;
            const char* source = tokens + token * 128 + (piece ^ token % 8) * 16;
            u16* target = y + static_cast<long long>(y_token) * work.oc + row;
            if (work.oc % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
            } else {
                for (int j = 0; j < min(8, work.oc - row); ++j) target[j] = reinterpret_cast<const u16*>(source)[j];
            }
        }
    }
}

}  // namespace linear

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ linear::TensorMap x_map,  // x [N, IC], boxes of x_rows x 64
    const char* __restrict__ weight,                  // units of packed codes
    const char* __restrict__ scale,                   // by rows or, in groups, by units (scales.cuh)
    const u16* __restrict__ bias,                     // [OC] or null
    u16* __restrict__ y,                              // [N, OC], contiguous
    float* partial,                                   // sums of split items
    u32* arrived,                                     // a counter for each split tile, zero before and after
    int oc,
    int ic,
    int n,
    int whole_tiles,                                  // of clusters, before those that are split
    int splits,
    int x_rows,                                       // rows that a box has: N_TILE / CLUSTER, or n where that is less
    float factor) {                                   // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[2 * (kXSlots + kWeightSlots)];
    const Work work{oc, ic, n, whole_tiles, splits};
    const int rank = kCluster > 1 ? blockIdx.x % kCluster : 0;
    const u32 base = ptx::shared_address(slots), first_barrier = ptx::shared_address(barriers);
    const XRing xs{base, kXSlotBytes, first_barrier};
    const WeightRing weights{base + kWeightsAt, kWeightSlotBytes, first_barrier + 16 * kXSlots};

    if (threadIdx.x == 0) {
        xs.start(kFinishers / 32 * kCluster);
        weights.start(kFinishers / 32);
        ptx::barrier_init_fence();
    }
    ptx::sync_cluster<kCluster>();
    ptx::launch_dependents();

    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kCopyRegisters>();
        if (threadIdx.x == kConsumers) copy_weights(weights, work, rank, weight, scale);
        if (threadIdx.x == kConsumers + 32) copy_activations(xs, work, rank, x_map, x_rows);
    } else {
        ptx::take_registers<kComputeRegisters>();
        u32 use = 0;
        for_items(work, rank, [&](const Item& item) {
            float sums[kSums];
            const int count = item.last_block - item.first_block;
            const float* row_scales = reinterpret_cast<const float*>(scale);
            RowTerms terms(work, item, row_scales, factor);
            const int row = terms.first_row + threadIdx.x % 32 / 4;
            const scales::RowOffsets offsets = scales::row_offsets(row_scales, row, oc);
            if constexpr (kFew) {
                multiply_few(sums, weights, xs, slots, use, count, offsets);
            } else {
                multiply_blocks(sums, weights, xs, slots, use, count, offsets);
            }
            float* exchange = reinterpret_cast<float*>(slots + kExchangeAt);
            if (add_channel_groups(sums, exchange, count, use == 0) &&
                (item.parts == 1 || add_splits(sums, work, item, rank, partial, arrived))) {
                terms.add_bias(work, bias);
                if constexpr (kMany) {
                    store_many(sums, work, item, terms, y, slots + kExchangeAt);
                } else {
                    store_few(sums, work, item, terms, y);
                }
            }
            use += count;
        });
    }
    if constexpr (kCluster > 1) ptx::sync_cluster<kCluster>();  // no CTA ends while another may write to it
}
