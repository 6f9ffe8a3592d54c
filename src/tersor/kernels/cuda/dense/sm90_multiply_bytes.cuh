// The multiplying warps of sm90_linear.cuh with 8-bit activations: weights from the ring are decoded to registers of four
// and meet the activations of the other ring in the tensor cores.
//
// Those add products of 8-bit floats with about 14 bits, so sums of a few blocks, or of a scale group, go to float32 sums
// of their own (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Tiles of more than 128 tokens have registers for one set of
// sums only: with one scale a row all blocks of an item meet in the tensor cores, which is what others call fast
// accumulation; else those of pieces of the tokens do (sm90_multiply_pieces.cuh). Products of int8
// add up exactly, and of a whole row with one scale they stay whole until the end. So they do where codes in groups become
// int8 by ratios. Those of wider codes in a scale group become float32 to be scaled (MixLLM, arXiv 2412.14590, section 3.3),
// and so do those of a block where each has its own scale of a token.
#ifndef TERSOR_DENSE_SM90_MULTIPLY_BYTES  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_MULTIPLY_BYTES

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "common/wgmma.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

static_assert(BYTE_WEIGHT == 4 || BYTE_WEIGHT == 5 || kWhole, "8-bit weights are e4m3 or e5m2, by their exponents, or int8");
constexpr wgmma::Kind kOperand = kWhole ? wgmma::kInt8 : BYTE_WEIGHT == 5 ? wgmma::kE5m2 : wgmma::kE4m3;
using Multiply = wgmma::Multiply<kOperand>;

constexpr int kByteSteps = 4;                        // of 32 channels in a block
constexpr int kByteRegisters = 4 * kByteSteps;       // that a lane's weights of a block take
constexpr int kScales = kGroups > 0 ? kGroups : 1;   // of a row in a block
constexpr int kGroupSteps = kByteSteps / kScales;    // a scale covers whole steps
constexpr int kSettled = 4;                          // blocks whose products meet in the tensor cores' sums
constexpr bool kSettles = !kWhole && kTokens <= 128;
constexpr int kBuffers = kTokens <= 128 ? 2 : 1;     // blocks of decoded weights that products are under way with

static_assert(kGroups <= kByteSteps, "a scale covers 32 channels at the least");

template <int kValue>
struct Number {
    static constexpr int value = kValue;
};

// What makes numbers of the codes of a lane's two rows, of each scale: zero points as decode::finish takes them, or ratios.
struct Terms {
    u32 zeros[2 * kScales];
    u32 ratios[scales::kRatios ? 2 * kScales : 1];

    __device__ __forceinline__ explicit Terms(const scales::RowOffsets& offsets) : zeros{offsets.pairs[0], offsets.pairs[1]} {}

    // Those of a block whose scales are at `block`; `row`: the lane's first of the 16.
    __device__ __forceinline__ void read(const char* block, int row, const scales::RowOffsets& offsets) {
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
            if constexpr (scales::kRatios) {
                const auto found = scales::Ratio::of(block, i / 2, row + i % 2 * 8, offsets.pairs[i % 2]);
                ratios[i] = found.ratio;
                zeros[i] = found.offset;
            } else if constexpr (scales::kZeroPoints) {
                zeros[i] = scales::zero_bytes(block, i / 2, row + i % 2 * 8);
            }
        }
    }
};

// Registers that products under way read are free for a compiler, unless instructions behind the wait for those products
// write them. So where codes are numbers as they stand, they are combined with `nothing`, a 0 of which no compiler knows:
// without that ptxas loads them right into those registers, before the wait.
__device__ __forceinline__ void decode_bytes(
    u32 (&a)[kByteRegisters], const u32 (&words)[tile::kLaneWords], const Terms& terms, u32 nothing) {
#pragma unroll
    for (int set = 0; set < kByteRegisters / decode::kRegisters; ++set) {
        decode::extract(a + set * decode::kRegisters, words + set * decode::kWords);
    }
    if constexpr (scales::kRatios) {
#pragma unroll
        for (int i = 0; i < kByteRegisters; ++i) {
            const int of = 2 * (i / 4 / kGroupSteps) + i % 2;
            a[i] = decode::apply_ratio<tile::kBits, !scales::kZeroPoints>(a[i], terms.ratios[of], terms.zeros[of]);
        }
    } else if constexpr (scales::kZeroPoints || DECODE_FINISH == decode::kSubtractToE4m3) {
#pragma unroll
        for (int i = 0; i < kByteRegisters; ++i) {
            const u32 zero = scales::kZeroPoints ? terms.zeros[2 * (i / 4 / kGroupSteps) + i % 2] : DECODE_CONSTANT;
            a[i] = decode::finish<kBf16>(a[i], zero, false);
        }
    } else if constexpr (decode::kPlain) {
#pragma unroll
        for (int i = 0; i < kByteRegisters; ++i) a[i] ^= nothing;
    }
}

// A whole number of at most 22 bits as float32: behind 1.5 * 2^23 it stands in the lowest bits of the mantissa, so that
// full-rate additions do it.
__device__ __forceinline__ float to_float(int sum) { return __int_as_float(sum + 0x4B400000) - 12582912.0f; }
__device__ __forceinline__ float to_float(float sum) { return sum; }

static_assert(tile::kColumns / kScales * 128 * 128 <= 1 << 22, "sums of a scale group have at most 22 bits");

#if (SCALE_GROUPS == 0 || RATIOS) && !X_GROUPS

// A multiplying warp: decodes its 16 rows of its blocks and multiplies them with the tokens in the slots. `use` counts
// the blocks that this CTA had before the item. Sums have one scale a row. A block is decoded while the products of the block
// before are under way or, with one buffer, those of the other warpgroup.
__device__ __forceinline__ void multiply_blocks(
    Sum (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets) {
    Terms terms(offsets);
    const u32 nothing = count >> 31;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    const int own_scales = kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
    u32 a[2][kByteRegisters];
    WeightRing::Place weights_at(use);
    XRing::Place x_at(use), x_read = x_at;
    const auto release = [&] {
        release_x(xs, x_read);
        x_read.advance();
    };
    // Starts the products of the next block; `waits`: when those that read `from` have ended; `releases`: and with them
    // a slot has been read.
    const auto multiply = [&](Sum (&to)[kSums], u32 (&from)[kByteRegisters], bool adds, bool waits, bool releases) {
        u32 words[tile::kLaneWords];
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes + lane * 16, lane);
        if constexpr (scales::kRatios) terms.read(stage + own_scales, lane / 4, offsets);
        xs.wait_filled(x_at);
        if (waits) wgmma::wait<kBuffers - 1>();
        if (releases) release();
        decode_bytes(from, words, terms, nothing);
        const u64 x = wgmma::describe(xs.address(x_at));
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < kByteSteps; ++step) {
            Multiply::run(to, from + 4 * step, x + wgmma::offset(step * 32), adds || step > 0);
        }
        wgmma::commit();
        weights.release(weights_at);
        weights_at.advance();
        x_at.advance();
    };
    if constexpr (kSettles) {
        Sum part[kSums];
        const auto settle = [&] {
            wgmma::wait<0>();
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] += part[i];
        };
        int block = 0;
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0;
        for (; block + kSettled <= count; block += kSettled) {
#pragma unroll
            for (int turn = 0; turn < kSettled; ++turn) multiply(part, a[turn % 2], turn > 0, turn > 1, turn > 1);
            settle();
            release();
            release();
        }
        for (; block < count; ++block) {
            multiply(part, a[0], false, false, false);
            settle();
            release();
        }
    } else if constexpr (kBuffers == 2) {
        int block = 0;
        for (; block + 2 <= count; block += 2) {
            multiply(sums, a[0], block > 0, true, block > 0);
            multiply(sums, a[1], true, true, block > 0);
        }
        if (block < count) multiply(sums, a[0], block > 0, true, block > 0);
        wgmma::wait<0>();
        if (count > 1) release();
        release();
    } else {
        for (int block = 0; block < count; ++block) multiply(sums, a[0], block > 0, true, block > 0);
        wgmma::wait<0>();
        release();
    }
}

#elif !PIECES

// The same of scales in groups, of weights or activations or both. A block is decoded while products of the block before are
// under way, but where scales of many tokens leave no registers for that. Sums of whole numbers take three instructions
// each to be scaled: of those the tokens of a large tile are halves that take turns, and products of one are under way
// while sums of the other are scaled. ptxas follows products that are under way along a run of blocks, not around a loop:
// behind a run there are none.
__device__ __forceinline__ void multiply_blocks(
    Sum (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets) {
    constexpr int kHalves = kWhole && !kXGroups && kTokens >= 128 && kTokens % 32 == 0 ? 2 : 1;
    constexpr int kHalfSums = kSums / kHalves;
    constexpr bool kAhead = !kXGroups || kTokens < 128;
    constexpr int kRun = kScales > 1 || !kAhead ? 2 : 4, kDecoded = kAhead ? 2 : 1;
    static_assert(kRun % 2 == 0, "a run begins with the first buffer");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    const u32 nothing = count >> 31;
    u32 a[kDecoded][kByteRegisters];
    float scale[kDecoded][2 * kScales];
    SumOf<kWhole>::Type part[kHalves][kHalfSums];  // of the group under way
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    WeightRing::Place weights_at(use);
    XRing::Place x_at(use), x_before = x_at;
    // Decodes the next block of weights.
    const auto decode = [&](int buffer) {
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        const char* block_scales =
            stage + kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
        u32 words[tile::kLaneWords];
        Terms terms(offsets);
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes + lane * 16, lane);
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
            scale[buffer][i] = scales::in_block(block_scales, i / 2, lane / 4 + i % 2 * 8);
        }
        terms.read(block_scales, lane / 4, offsets);
        weights.release(weights_at);
        weights_at.advance();
        decode_bytes(a[buffer], words, terms, nothing);
    };
    // Adds up a half; `at`: where the activations of its products were; `low`, `high`: scales of its rows.
    const auto settle = [&](int half, const XRing::Place& at, float low, float high) {
        float* to = sums + half * kHalfSums;
        if constexpr (kXGroups) {
            const float2* of_tokens =
                reinterpret_cast<const float2*>(slots + x_scales_at(at)) + lane % 4 + half * kHalfSums;
#pragma unroll
            for (int i = 0; i < kHalfSums; i += 4) {
                const float2 pair = of_tokens[i];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float of_token = k % 2 == 0 ? pair.x : pair.y;
                    to[i + k] +=
                        (kGroups == 0 ? of_token : (k < 2 ? low : high) * of_token) * to_float(part[half][i + k]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kHalfSums; ++i) to[i] += (i % 4 < 2 ? low : high) * to_float(part[half][i]);
        }
    };
    const auto release = [&] {
        if constexpr (kXGroups) ptx::end_reads();
        release_x(xs, x_before);
    };
    // Multiplies so many blocks. Decoded ahead, the first one is, and so will be the one behind them where there is `more`.
    const auto run = [&](auto length, bool more) {
#pragma unroll
        for (int turn = 0; turn < length.value; ++turn) {
            const int buffer = turn % kDecoded;
            if constexpr (!kAhead) {
                if (turn > 0) {
                    wgmma::wait<0>();
                    settle(0, x_before, scale[0][2 * kScales - 2], scale[0][2 * kScales - 1]);
                    release();
                }
                decode(0);
            }
            xs.wait_filled(x_at);
            const u64 x = wgmma::describe(xs.address(x_at));
#pragma unroll
            for (int group = 0; group < kScales; ++group) {
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    if ((kAhead && turn > 0) || group > 0) {
                        const float* const of =
                            group > 0 ? scale[buffer] + 2 * (group - 1) : scale[kDecoded - 1 - buffer] + 2 * (kScales - 1);
                        wgmma::wait<kHalves - 1>();
                        settle(half, group > 0 ? x_at : x_before, of[0], of[1]);
                        if (group == 0 && half == kHalves - 1) release();
                    }
                    wgmma::fence();
#pragma unroll
                    for (int step = group * kGroupSteps; step < (group + 1) * kGroupSteps; ++step) {
                        const u64 tokens = x + wgmma::offset(step * 32 + half * (kTokens / kHalves) * 128);
                        Multiply::run(part[half], a[buffer] + 4 * step, tokens, step % kGroupSteps > 0);
                    }
                    wgmma::commit();
                }
            }
            x_before = x_at;
            x_at.advance();
            if (kAhead && (turn + 1 < length.value || more)) decode(1 - buffer);
        }
        const float* const of = scale[(length.value - 1) % kDecoded] + 2 * (kScales - 1);
        if constexpr (kHalves == 2) {
            wgmma::wait<1>();
            settle(0, x_before, of[0], of[1]);
        }
        wgmma::wait<0>();
        settle(kHalves - 1, x_before, of[0], of[1]);
        release();
    };
    if constexpr (kAhead) decode(0);
    int block = kRun;
    for (; block <= count; block += kRun) run(Number<kRun>{}, block < count);
    for (block -= kRun; block < count; ++block) {
        run(Number<1>{}, false);
        if (kAhead && block + 1 < count) decode(0);
    }
}

#endif

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_MULTIPLY_BYTES
