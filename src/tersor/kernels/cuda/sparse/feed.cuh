// The warp that keeps the masks and values of a sparse weight coming: sm90_sparse.cuh multiplies them.
//
// A block of 64 rows by 128 channels, a unit's, has a mask of 1024 bytes, and layers of values (expand.cuh). The queues of
// a unit are stored as whole layers, so many as the longest queue has words. A block's mark says how many layers its
// queues, and those of the blocks before it, reach into, and which layers none of them reads any more: all, where queues
// begin anew. So values need no slots: the warp copies layers until the ring of the unit is full of such as may
// still be read, and a block's copies, its mask's and its layers', complete one barrier. What a block's mark says of the
// ring is left beside its slot.
//
// Whoever expands a block reads some words behind a queue's last value, of which nothing is used. They are there like
// those in use, so that no copy is on its way to a word that is read: layers are copied that much further than a mark
// says, up to the end of an item, behind which as many places of the ring are left as they are.
#pragma once

#include "common/ptx.cuh"
#include "dense/sm90_pipeline.cuh"
#include "sparse/expand.cuh"
#include "sparse/work.cuh"

namespace sparse {

using linear::WeightRing;

// Lanes of a warp read each other's queues in turn, so that none is longer than others where rows or channels have more
// weights left: lane l reads queue (l + kStep b) % 32 in block b.
constexpr int kStep = 5;

constexpr int kMaskBytes = tile::kUnitBytes;  // of a unit's block
static_assert(kMaskBytes == 1024, "a bit a weight");
static_assert(linear::kWeightSlots <= 32, "a lane remembers one slot");

// What a copying warp and those that expand have of the register file: the former holds more than that of a dense weight.
constexpr int kFeedRegisters = RESIDENT == 1 ? 64 : linear::kCopyRegisters;
constexpr int kLeftRegisters =
    (linear::kEvenRegisters * linear::kThreads - 128 * kFeedRegisters) / linear::kConsumers / 8 * 8;
constexpr int kExpandRegisters = kLeftRegisters > 240 ? 240 : kLeftRegisters;

struct Stored {
    const char* mask;    // [units][blocks] of kMaskBytes
    const char* layers;  // of kLayerBytes
    const u32* starts;   // [units], the first layer of each
    const u32* marks;    // [units][blocks]: layers reached, and above them, 16 bits up, layers done with
};

// The unit of a row group of an item; behind the last one there is that one again, whose results nobody stores.
__device__ __forceinline__ int unit_of(const Item& item, int group, int oc) {
    return min(item.first_row / tile::kUnitRows + group, (oc + tile::kUnitRows - 1) / tile::kUnitRows - 1);
}

// The queue that a lane reads in a block.
__device__ __forceinline__ u32 queue_of(int block) { return (threadIdx.x + kStep * block) % 32; }

// Where a lane goes on in its queue when a block comes: `least` is what the copying warp left beside the block's slot, the
// place behind the layers done with. Places count up from the first item of a CTA to its last: 2^27 layers are 64 GB.
__device__ __forceinline__ void enter_block(u32 least, u32& place) { place = max(place, least); }

// The marks of 32 blocks, one a lane.
__device__ __forceinline__ u32 fetch_marks(const u32* marks, int left) {
    const int lane = threadIdx.x % 32;
    return lane < left ? marks[lane] : 0;
}

// Of `count` layers from layer `first` of a unit's ring on, how many stand behind its end once more.
__device__ __forceinline__ u32 mirrored(u32 first, u32 count) {
    const u32 at = first % expand::kRingLayers, end = at + count, most = expand::kMirrored;
    const u32 behind = end > expand::kRingLayers ? end - expand::kRingLayers : 0;
    return at < most ? min(count, most - at) : min(behind, most);
}

// Copies `count` layers to where layer `first` of a unit's ring stands, and those again that are mirrored behind its end.
__device__ __forceinline__ void copy_layers(
    u32 ring, u32 first, u32 count, const char* from, u32 barrier, u64 policy) {
    using namespace expand;
    const u32 at = first % kRingLayers, before = min(count, kRingLayers - at), again = mirrored(first, count);
    const auto copy = [&](u32 layer, u32 skipped, u32 layers) {
        if (layers == 0) return;
        ptx::bulk_copy_once(
            ring + layer * kLayerBytes, from + skipped * kLayerBytes, layers * kLayerBytes, barrier, policy);
    };
    copy(at, 0, before);
    copy(0, before, count - before);
    const bool from_start = at < kMirrored;
    copy(kRingLayers + (from_start ? at : 0), from_start ? 0 : before, again);
}

__device__ __forceinline__ void copy_weights(
    const WeightRing& ring, const Work& work, const Stored& stored, u32 values, u32* slot_marks) {
    using namespace expand;
    const int lane = threadIdx.x % 32, units = (work.oc + tile::kUnitRows - 1) / tile::kUnitRows;
    const u64 policy = ptx::evict_first_policy();
    WeightRing::Place at(0), oldest(linear::kWeightSlots);
    u32 under_way = 0;                 // blocks whose slots nobody has given back
    u32 next[kRowGroups] = {};         // the layer that is copied next, of all that this CTA has had
    u32 done[kRowGroups] = {};         // of the block in slot `lane`: layers that nobody reads any more
    for_items_of_warp(work, [&](const Item& item) {
        u32 ahead[kRowGroups], base[kRowGroups], first[kRowGroups], end[kRowGroups];
        const int unit = item.first_row / tile::kUnitRows, own_units = units - unit;
        const auto look_ahead = [&](int block) {
#pragma unroll
            for (int group = 0; group < kRowGroups; ++group) {
                const u32 own = min(unit + group, units - 1) * work.blocks() + block;
                ahead[group] = fetch_marks(stored.marks + own, item.last_block - block);
            }
        };
        look_ahead(item.first_block);
#pragma unroll
        for (int group = 0; group < kRowGroups; ++group) {
            const int own = min(unit + group, units - 1);
            base[group] = next[group] - (__shfl_sync(~0u, ahead[group], 0) >> 16);
            first[group] = stored.starts[own] - base[group];
            end[group] = base[group] + (stored.marks[own * work.blocks() + item.last_block - 1] & 0xFFFF);
        }
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block, at.advance()) {
            const int index = (block - item.first_block) % 32;
            u32 marks[kRowGroups], until[kRowGroups];
            if (index == 0 && block > item.first_block) look_ahead(block);
#pragma unroll
            for (int group = 0; group < kRowGroups; ++group) {
                marks[group] = __shfl_sync(~0u, ahead[group], index);
                until[group] = min(base[group] + (marks[group] & 0xFFFF) + kBeyond, end[group]);
            }
            for (;;) {
                bool full = under_way == linear::kWeightSlots;
#pragma unroll
                for (int group = 0; group < kRowGroups; ++group) {
                    const u32 free = __shfl_sync(~0u, done[group], oldest.slot) + kRingLayers;
                    full |= under_way > 0 && static_cast<int>(until[group] - free) > 0;
                }
                if (!full) break;
                ring.wait_emptied(oldest);
                oldest.advance();
                --under_way;
            }
            ++under_way;
#pragma unroll
            for (int group = 0; group < kRowGroups; ++group) {
                if (lane == static_cast<int>(at.slot)) done[group] = base[group] + (marks[group] >> 16);
            }
            if (ptx::elect()) {
                u32 bytes = 0;
#pragma unroll
                for (int group = 0; group < kRowGroups; ++group) {
                    slot_marks[at.slot * kRowGroups + group] = (base[group] + (marks[group] >> 16)) * 32;
                    const u32 count = until[group] - next[group];
                    const u32 layers = count + mirrored(next[group], count);
                    if (group < own_units) bytes += kMaskBytes + layers * kLayerBytes;
                }
                ptx::barrier_expect(ring.filled(at), bytes);
#pragma unroll
                for (int group = 0; group < kRowGroups; ++group) {
                    if (group >= own_units) continue;
                    const u32 mask = (unit + group) * work.blocks() + block;
                    ptx::bulk_copy_once(
                        ring.address(at) + group * kMaskBytes, stored.mask + static_cast<u64>(mask) * kMaskBytes,
                        kMaskBytes, ring.filled(at), policy);
                    copy_layers(
                        values + group * kRingBytes, next[group], until[group] - next[group],
                        stored.layers + static_cast<u64>(first[group] + next[group]) * kLayerBytes,
                        ring.filled(at), policy);
                }
            }
            __syncwarp();
#pragma unroll
            for (int group = 0; group < kRowGroups; ++group) next[group] = until[group];
        }
#pragma unroll
        for (int group = 0; group < kRowGroups; ++group) next[group] += kBeyond;
    });
}

}  // namespace sparse
