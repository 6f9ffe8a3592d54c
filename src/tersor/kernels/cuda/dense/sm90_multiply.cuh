// The multiplying warps of sm90_linear.cuh with 16-bit activations: weights from the ring are decoded to registers and meet
// the activations of the other ring in the tensor cores.
#ifndef TERSOR_DENSE_SM90_MULTIPLY  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_MULTIPLY

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "common/wgmma.cuh"
#include "dense/sm90_outliers.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

using Multiply = wgmma::Multiply<kBf16 ? wgmma::kBfloat16 : wgmma::kFloat16>;

// sums += scale * factor * part for one scale group of the block.
__device__ __forceinline__ void add_scaled(
    float (&sums)[kSums], const float (&part)[kSums], const char* block_scales, int group, int row, float factor) {
    const float low = scales::in_block(block_scales, group, row) * factor;
    const float high = scales::in_block(block_scales, group, row + 8) * factor;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? low : high) * part[i];
}

// A warpgroup with few tokens: all rows of every kTurns-th block, 16 of each row group a warp, so that a fragment of
// activations that was read once meets the weights of all row groups. `sums` are of a row group each. wgmma takes as
// long for 8 tokens as for 16, so mma.sync feeds the tensor cores faster here, and with 32 tokens still as fast as weights
// come to a small matrix; its fragments and sums are those of wgmma for each warp's 16 rows.
template <typename Work>
__device__ __forceinline__ void multiply_few(
    float (&sums)[kRowGroups][kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const float* row_scales, int first_row, int oc, const Beside<Work>& beside) {
    // Whether a fragment of activations meets all row groups before the next; scales in many groups leave no registers.
    constexpr bool kShares = kGroups < 2;
    const auto kept = [](u32 value) { return kShares ? ptx::kept(value) : value; };
    const int lane = kept(threadIdx.x % 32), warp = threadIdx.x / 32 % 4;
    const int turn = __shfl_sync(~0u, threadIdx.x / 128, 0);
    constexpr int kPairs = decode::kRegisters;
    constexpr int kSets = 4 * tile::kSteps / kPairs;
    constexpr int kSetSteps = kPairs / 4;
    constexpr int kChains = kRowGroups * kTokens == 8 ? 2 : 1;  // sums that take turns, so that none waits for itself
    static_assert(!kFew || kSetSteps % 2 == 0, "two steps share a load");
    static_assert(!kFew || kWeightSlots == kXSlots, "one place tells of both rings");
    // Whether scales are read with the words: read last, they delay the slot's release. With more tokens that is slower.
    constexpr bool kScalesAhead = kGroups == 1 && kTokens == 8;
    // The same of the first rounds of outliers; 128 rows and 16 tokens leave no registers for them.
    constexpr bool kRoundsAhead = kRowGroups * kTokens < 32;
    float parts[kRowGroups][kChains][kTokens / 8][4] = {};
    scales::RowOffsets offsets[kRowGroups];
#pragma unroll
    for (int rows = 0; rows < kRowGroups; ++rows) {
        const int row = first_row + rows * tile::kUnitRows + warp * tile::kRows + threadIdx.x % 32 / 4;
        offsets[rows] = scales::row_offsets(row_scales, row, oc);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[rows][i] = 0.0f;
    }
    WeightRing::Place at(use + turn);
    const u32 mask = decode::kept_mask(count);
    const u32 own = kept(warp * tile::kBytes + lane * 16);
    const u32 own_scales = kept(kRowGroups * tile::kUnitBytes + warp * scales::kBlockBytes);
    const int row = kept(lane / 4);
    // Where this lane finds row (token) lane % 8 of the 16-byte column lane / 8, under the swizzle; column 4 + lane / 8 is
    // 64 bytes before or after.
    const u32 chunk = kept(lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16);
    const u32 own_kept = kRowGroups * (tile::kUnitBytes + kScaleBytes) + warp * OUTLIERS * rounds::kBytes;
    const auto flush = [&](int rows, float low, float high) {
        if constexpr (kOutliers) {
            const int own = first_row + rows * tile::kUnitRows + warp * tile::kRows + row;
            low *= beside.scale(own);
            high *= beside.scale(own + 8);
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            float part = parts[rows][0][i / 4][i % 4];
            if constexpr (kChains == 2) part += parts[rows][1][i / 4][i % 4];
            sums[rows][i] += (i % 4 < 2 ? low : high) * part;
#pragma unroll
            for (int chain = 0; chain < kChains; ++chain) parts[rows][chain][i / 4][i % 4] = 0.0f;
        }
    };
    for (int block = turn; block < count; block += kTurns) {
        weights.wait_filled(at);
        const char* stage = slots + (weights.address(at) - xs.base);
        u32 words[kRowGroups][tile::kLaneWords], fragments[(kSetSteps + 1) / 2][kTokens / 8][4];
        const XRing::Place x_at(at.slot, at.parity);
        const u32 x = xs.address(x_at) + chunk;
        float ahead[kRowGroups][2];
        uint4 rounds[kRowGroups];
        const auto load_rounds = [&] {
#pragma unroll
            for (int rows = 0; rows < kRowGroups; ++rows) {
                rounds[rows] = beside.first(stage + own_kept + rows * kKeptBytes);
            }
        };
        if constexpr (kOutliers && kRoundsAhead) load_rounds();
        if constexpr (kScalesAhead) {
#pragma unroll
            for (int rows = 0; rows < kRowGroups; ++rows) {
                const char* block_scales = stage + own_scales + rows * kScaleBytes;
                ahead[rows][0] = scales::in_block(block_scales, 0, row);
                ahead[rows][1] = scales::in_block(block_scales, 0, row + 8);
            }
        }
#pragma unroll
        for (int index = 0; index < kSets * kRowGroups; ++index) {
            const int set = kShares ? index / kRowGroups : index % kSets;
            const int rows = kShares ? index % kRowGroups : index / kSets;
            const char* block_scales = stage + own_scales + rows * kScaleBytes;
            if (set == 0) tile::load_lane(words[rows], stage + own + rows * tile::kUnitBytes, lane);
            if constexpr (kGroups >= 2) __syncwarp();  // else ptxas fetches a block's scales at once, and spills
            u32 a[kPairs];
            decode::extract(a, words[rows] + set * decode::kWords, mask);
            scales::finish<kBf16>(a, set * kSetSteps, block_scales, row, offsets[rows]);
            if (index == 0) xs.wait_filled(x_at);
#pragma unroll
            for (int i = 0; i < kSetSteps; ++i) {
                const int step = set * kSetSteps + i;
#pragma unroll
                for (int tokens = 0; tokens < kTokens / 8; ++tokens) {
                    u32(&b)[4] = fragments[i / 2][tokens];
                    if (i % 2 == 0 && (rows == 0 || !kShares)) {
                        ptx::load_matrices(
                            b, (step / 2 % 2 == 0 ? x : x ^ 64) + step / 4 * kXPiece + tokens * 1024);
                    }
                    ptx::multiply_add<kBf16>(
                        parts[rows][step % kChains][tokens], a + 4 * i, b[i % 2 * 2], b[i % 2 * 2 + 1]);
                }
                if constexpr (kGroups > 0) {
                    if (step % scales::kSteps == scales::kSteps - 1) {
                        const int group = step / scales::kSteps;
                        flush(
                            rows, kScalesAhead ? ahead[rows][0] : scales::in_block(block_scales, group, row),
                            kScalesAhead ? ahead[rows][1] : scales::in_block(block_scales, group, row + 8));
                    }
                }
            }
        }
        if constexpr (kOutliers) {
            const u32 slot = xs.address(x_at) - xs.base;
            bool others = false;
            if constexpr (!kRoundsAhead) load_rounds();
#pragma unroll
            for (int rows = 0; rows < kRowGroups; ++rows) {
                beside.add(sums[rows], rounds[rows], slot);
                others |= rounds::follows(rounds[rows]);
            }
            if (others) {
#pragma unroll
                for (int rows = 0; rows < kRowGroups; ++rows) {
                    beside.add_others(sums[rows], rounds[rows], stage + own_kept + rows * kKeptBytes, slot);
                }
            }
        }
        weights.release(at);  // and with it this thread's loads of activations have ended, too
        release_x(xs, x_at);
        at.advance(kTurns);
    }
    if constexpr (kGroups == 0) {
#pragma unroll
        for (int rows = 0; rows < kRowGroups; ++rows) flush(rows, 1.0f, 1.0f);
    }
}

// A multiplying warp: decodes its 16 rows of its blocks and multiplies them with the tokens in the slots. `use` counts
// the blocks that this CTA had before the item.
template <typename Work>
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets, int own_row, const Beside<Work>& beside) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    constexpr int kPairs = decode::kRegisters;
    constexpr int kSets = 4 * tile::kSteps / kPairs;  // decode groups of a block
    constexpr int kSetSteps = kPairs / 4;             // k16 steps of a decode group
    constexpr int kSlotSets = kSets / kSlotsOfBlock;  // decode groups that a slot of activations serves
    static_assert(kSlotSets > 0, "a decode group reads one slot of activations");
    // Decode groups whose products are under way or being prepared: four where registers are plenty, one where each
    // ends a scale group and is waited for anyway.
    constexpr bool kPlenty = kGroups == 0 && kSets >= 4 && kComputeRegisters - kSums * (kOutliers ? 2 : 1) >= 192;
    constexpr int kAhead = kPlenty ? 4 : kGroups > 0 && kSetSteps % scales::kSteps == 0 ? 1 : 2;
    const u32 mask = decode::kept_mask(count);
    // Whether all products of a block are waited for at its end; beside the last ones its outliers are added.
    constexpr bool kBlockwise = kGroups > 0 || kOutliers;
    float part[kSums];  // of one scale group or, without, of outliers
    u32 pairs[kAhead][kPairs];
    if constexpr (kGroups > 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    } else if constexpr (kOutliers) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) part[i] = 0.0f;
    }
    const u32 own_kept =
        kRowGroups * (tile::kUnitBytes + kScaleBytes) + row_group * kKeptBytes + warp * OUTLIERS * rounds::kBytes;
    WeightRing::Place weights_at(use);
    XRing::Place x_at(use * kSlotsOfBlock), x_before = x_at;
    for (int block = 0; block < count; ++block) {
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        const char* block_scales =
            stage + kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
        u32 words[tile::kLaneWords];
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes + lane * 16, lane);
        XRing::Place at = x_at;
        uint4 round;
        if constexpr (kOutliers) round = beside.first(stage + own_kept);
        const auto add_outliers = [&](float (&to)[kSums]) {
            const u32 slot = xs.address(x_at) - xs.base;
            beside.add(to, round, slot);
            if (rounds::follows(round)) beside.add_others(to, round, stage + own_kept, slot);
        };
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            u32* a = pairs[set % kAhead];
            if (set > 0 && set % kSlotSets == 0) at.advance();
            if (set % kSlotSets == 0) xs.wait_filled(at);
            wgmma::wait<kAhead - 1>();  // the products that read these `pairs` have ended
            if constexpr (!kBlockwise) {
                // And with them the slot that their group was the last to read is free.
                const int done = (set + kSets - kAhead) % kSets;
                if (done % kSlotSets == kSlotSets - 1 && (set >= kAhead || block > 0)) {
                    XRing::Place free = set >= kAhead ? x_at : x_before;
                    free.advance(done / kSlotSets);
                    release_x(xs, free);
                }
            }
            decode::extract(a, words + set * decode::kWords, mask);
            scales::finish<kBf16>(a, set * kSetSteps, block_scales, lane / 4, offsets);
            const u64 x = wgmma::describe(xs.address(at));
            wgmma::fence();
#pragma unroll
            for (int i = 0; i < kSetSteps; ++i) {
                const int step = set * kSetSteps + i, half = step / 4 % kSlotPieces;
                const u64 b = x + wgmma::offset(half * kXPiece + step % 4 * 32);
                if constexpr (kGroups == 0) {
                    Multiply::run(sums, a + 4 * i, b, step > 0 || block > 0);
                } else {
                    Multiply::run(part, a + 4 * i, b, step % scales::kSteps != 0);
                    if (step % scales::kSteps == scales::kSteps - 1) {
                        wgmma::commit();
                        if constexpr (kOutliers) {
                            if (step == tile::kSteps - 1) add_outliers(sums);
                        }
                        wgmma::wait<0>();
                        const float factor = kOutliers ? beside.factor : 1.0f;
                        add_scaled(sums, part, block_scales, step / scales::kSteps, lane / 4, factor);
                        if (i + 1 < kSetSteps) wgmma::fence();
                    }
                }
            }
            wgmma::commit();
            if (!kBlockwise && set == 0) {
                weights.release(weights_at);
            }
        }
        if constexpr (kOutliers && kGroups == 0) {
            add_outliers(part);
            wgmma::wait<0>();
        }
        // With a wait for a slot before each decode group, ptxas else waits after every product (C7513).
        if constexpr (kSlotSets == 1) wgmma::wait<kAhead - 1>();
        if constexpr (kBlockwise) {
            weights.release(weights_at);
            XRing::Place free = x_at;
#pragma unroll
            for (int i = 0; i < kSlotsOfBlock; ++i, free.advance()) release_x(xs, free);
        }
        weights_at.advance();
        x_before = x_at;
        x_at.advance(kSlotsOfBlock);
    }
    wgmma::wait<0>();
    if constexpr (!kBlockwise) {
#pragma unroll
        for (int i = 0; i < kSlotsOfBlock; ++i, x_before.advance()) {
            if ((i + 1) * kSlotSets > kSets - kAhead) release_x(xs, x_before);
        }
    } else if constexpr (kGroups == 0) {
        const float low = beside.scale(own_row), high = beside.scale(own_row + 8);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = __fmaf_rn(sums[i], i % 4 < 2 ? low : high, part[i]);
    }
}

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_MULTIPLY
