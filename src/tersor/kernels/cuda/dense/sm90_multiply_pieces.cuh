// The multiplying warps of sm90_linear.cuh with 8-bit activations where sums of a block are scaled as a whole: a row has
// one scale there, or a token, or both.
//
// Scaling takes about as long as products, so the tokens of a block are pieces: while products of some are under way the
// sums of the one ahead of them are scaled. Registers hold all sums but only `kParts` pieces of products, which lets tiles
// have 256 tokens, and so decode a weight and read it from shared memory half as often.
//
//     products    0  1  2 | 3     4     5     6     7 |               | 0  1  2 |
//     scaled              0     1     2     3     4      5     6    7
//     weights                                              read         decoded
//
// Nothing is under way from one block to the next. ptxas would make products wait for each other around a loop that was
// written otherwise, and where it sees a run of blocks it moves the scaling in between the products of one piece, so that
// these wait for it. The tensor cores have the other warpgroup's products meanwhile: it begins with a block when this one is
// halfway through its own, and the other way round.
#ifndef TERSOR_DENSE_SM90_MULTIPLY_PIECES  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_MULTIPLY_PIECES

#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "common/wgmma.cuh"
#include "dense/sm90_multiply_bytes.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

#if PIECES

__device__ __forceinline__ void multiply_blocks(
    Sum (&sums)[kSums], const WeightRing& weights, const XRing& xs, const char* slots, u32 use, int count,
    const scales::RowOffsets& offsets) {
    constexpr int kPieceTokens = 32, kPieces = kTokens / kPieceTokens, kPieceSums = kPieceTokens / 2;
    constexpr int kParts = 3;
    static_assert(kGroups <= 1 && kGroups + kXGroups > 0, "sums of a block are scaled as a whole");
    static_assert(kTokens % kPieceTokens == 0 && kPieces > kParts, "pieces have as many tokens each, a width of wgmma.cuh");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128 % kRowGroups;
    const u32 nothing = count >> 31;
    u32 a[kByteRegisters], words[tile::kLaneWords];
    float scale[2], next_scale[2];
    Terms terms(offsets);
    SumOf<kWhole>::Type part[kParts][kPieceSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    WeightRing::Place weights_at(use);
    XRing::Place x_at(use);
    // Reads the next block of weights.
    const auto read = [&] {
        weights.wait_filled(weights_at);
        const char* stage = slots + (weights.address(weights_at) - xs.base);
        tile::load_lane(words, stage + row_group * tile::kUnitBytes + warp * tile::kBytes + lane * 16, lane);
        const char* block_scales =
            stage + kRowGroups * tile::kUnitBytes + row_group * kScaleBytes + warp * scales::kBlockBytes;
#pragma unroll
        for (int half = 0; half < 2 * kGroups; ++half) {
            next_scale[half] = scales::in_block(block_scales, 0, lane / 4 + 8 * half);
        }
        terms.read(block_scales, lane / 4, offsets);
    };
    // Starts the products of a piece with the block whose activations are described by `x`.
    const auto multiply = [&](int piece, u64 x) {
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < kByteSteps; ++step) {
            const u64 tokens = x + wgmma::offset(step * 32 + piece * kPieceTokens * 128);
            Multiply::run(part[piece % kParts], a + 4 * step, tokens, step > 0);
        }
        wgmma::commit();
    };
    // Adds up a piece.
    const auto settle = [&](int piece) {
        const auto& from = part[piece % kParts];
        float* to = sums + piece * kPieceSums;
        if constexpr (kXGroups) {
            const float2* of_tokens =
                reinterpret_cast<const float2*>(slots + x_scales_at(x_at)) + lane % 4 + piece * kPieceSums;
#pragma unroll
            for (int i = 0; i < kPieceSums; i += 4) {
                const float2 pair = of_tokens[i];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float of_token = k % 2 == 0 ? pair.x : pair.y;
                    to[i + k] += (kGroups == 0 ? of_token : scale[k / 2] * of_token) * static_cast<float>(from[i + k]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPieceSums; ++i) to[i] += scale[i % 4 / 2] * static_cast<float>(from[i]);
        }
    };
    read();
#pragma unroll 1
    for (int block = 0; block < count; ++block) {
        decode_bytes(a, words, terms, nothing);
#pragma unroll
        for (int half = 0; half < 2 * kGroups; ++half) scale[half] = next_scale[half];
        xs.wait_filled(x_at);
        const u64 x = wgmma::describe(xs.address(x_at));
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            if (piece >= kParts) {
                wgmma::wait<kParts - 1>();
                settle(piece - kParts);
            }
            multiply(piece, x);
            if (piece == kParts - 1) {
                weights.release(weights_at);
                weights_at.advance();
            }
        }
        static_assert(kParts == 3, "as many waits");
        wgmma::wait<2>();
        settle(kPieces - 3);
        if (block + 1 < count) read();
        wgmma::wait<1>();
        settle(kPieces - 2);
        wgmma::wait<0>();
        settle(kPieces - 1);
        if constexpr (kXGroups) ptx::end_reads();
        release_x(xs, x_at);
        x_at.advance();
    }
}

#endif

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_MULTIPLY_PIECES
