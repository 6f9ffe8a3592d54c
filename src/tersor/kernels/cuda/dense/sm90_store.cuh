// The end of an item of sm90_linear.cuh: results are stored.
#ifndef TERSOR_DENSE_SM90_STORE  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_STORE

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm90_finish.cuh"
#include "dense/sm90_norm.cuh"
#include "dense/sm90_pipeline.cuh"
#include "dense/sm90_places.cuh"

namespace linear {

// What few tokens' results meet in memory: residuals and, where a norm is behind, its weights.
struct Met {
    u32 added[kTokens / 8][kHalves] = {};
    float2 weights[kHalves] = {};

    __device__ __forceinline__ void load(
        const Item& item, const RowTerms& terms, const Places& of, const u16* residual, const Norms& norms) {
        const FewPlaces places(item, terms.first_row, terms.rows, of);
        if constexpr (kNormOut) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                if (places.channel(half) >= places.outputs) continue;
                weights[half] = *reinterpret_cast<const float2*>(norms.weight + places.channel(half));
            }
        }
        if (residual == nullptr) return;
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                if (!places.there(item, i, half)) continue;
                const u16* source = residual + places.at(i, half, 0);
                if (places.together(half)) {
                    added[i][half] = __ldcg(reinterpret_cast<const u32*>(source));
                } else {
                    added[i][half] = __ldcg(source);
                    if (places.channel(half) + 1 < places.outputs) {
                        added[i][half] |= static_cast<u32>(__ldcg(residual + places.at(i, half, 1))) << 16;
                    }
                }
            }
        }
    }
};

// Rounds and stores few tokens. Where a norm is behind, output channels are a multiple of 8.
__device__ __forceinline__ void store_few(
    const Sum (&sums)[kSums], const Item& item, const RowTerms& terms, const Places& of, const TileScales& of_tokens,
    Met& met, bool adds, u16* y, const Norms& norms) {
    static_assert(!kNormOut || !gate::kGated, "a norm follows what a residual is added to");
    const FewPlaces places(item, terms.first_row, terms.rows, of);
    Squares squares;
    if (adds) {
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) met.added[i][half] = ptx::transpose_8x8(met.added[i][half]);
        }
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
        const TokenScales token_scales(of_tokens, i);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const u32 turned = ptx::transpose_8x8(terms.round(sums, i, half, token_scales, met.added[i][half]));
            if (!places.there(item, i, half)) continue;
            const long long at = places.at(i, half, 0);
            u16* target = y + at;
            if constexpr (kNormOut) {
                const float low = ptx::widen<kBf16>(static_cast<u16>(turned)) * met.weights[half].x;
                const float high = ptx::widen<kBf16>(static_cast<u16>(turned >> 16)) * met.weights[half].y;
                const u32 scaled = ptx::narrow<kBf16>(low) | static_cast<u32>(ptx::narrow<kBf16>(high)) << 16;
                *reinterpret_cast<u32*>(norms.scaled + at) = scaled;
                squares.add(i, turned);
            }
            if (kNormOut || places.together(half)) {
                *reinterpret_cast<u32*>(target) = turned;
            } else {
                target[0] = static_cast<u16>(turned);
                if (places.channel(half) + 1 < places.outputs) {
                    y[places.at(i, half, 1)] = static_cast<u16>(turned >> 16);
                }
            }
        }
    }
    if constexpr (kNormOut) squares.store(item, terms.rows, norms);
}

// Rounds and stores many tokens: a warpgroup turns kStoreTokens of them at a time in shared memory, so that every store
// writes 16 bytes and a warp's fill whole lines. A token's channels are pieces of 16 bytes, swizzled by the token.
// Residuals come the same way, and each warp then puts its results where its residuals were. `kApart`: channels of a row
// set that do not stand side by side, or start between pieces of 16 bytes; a warp stores 32 of one token at a time, which
// lie as close as their levels are common.
template <bool kApart>
__device__ __forceinline__ void store_many(
    const Sum (&sums)[kSums], const Item& item, const RowTerms& terms, const Places& of, const TileScales& of_tokens,
    const u16* residual, u16* y, char* turned) {
    constexpr int kPieces = 4 * kHalves;           // of a token
    constexpr int kPassTokens = 128 / kPieces;     // that a warpgroup copies at a time
    constexpr int kTurnTokens = 32 / kHalves;      // that a warp turns at a time: four 8x8 matrices
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    char* tokens = turned + group * kStoreBytes;
    const u32 shared = ptx::shared_address(tokens);
    const int outputs = gate::outputs(terms.rows), stride = kPlaced ? of.outputs : outputs;
    const int group_channel = gate::outputs(item.first_row + group * tile::kUnitRows);
    // Of the matrices, first by tokens and then by channels, this lane addresses row lane % 8 of matrix lane / 8.
    const int own_token = lane / 8 / kHalves * 8 + lane % 8, own_piece = kHalves * warp + lane / 8 % kHalves;
    // What this lane copies between shared memory and matrices [N, outputs].
    const int piece = lane % kPieces, pass_token = threadIdx.x % 128 / kPieces;
    const int channel = group_channel + piece * 8, column = kPlaced ? of.first + channel : channel;
    const int channels = min(8, outputs - channel);
    const bool whole = kPlaced ? channels == 8 : outputs % 8 == 0;
    const auto place = [&](int token, int at_piece) { return token * 128 + (at_piece ^ token % 8) * 16; };
    int columns[kHalves];  // kApart: of channels lane and lane + 32, or -1
    if constexpr (kApart) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int own = group_channel + half * 32 + lane;
            columns[half] = own < outputs ? of.column(own) : -1;
        }
    }
    // Calls copy(shared element, index in a matrix) for what this lane copies of `count` tokens from `first` on.
    const auto copies = [&](int first, int count, const auto& copy) {
#pragma unroll 4
        for (int token = warp; token < count; token += 4) {
            const int y_token = item.first_token + first + token;
            if (y_token >= item.end_token) break;
            const long long at = static_cast<long long>(y_token) * stride;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                if (columns[half] < 0) continue;
                char* own = tokens + place(token, half * 4 + lane / 8) + lane % 8 * 2;
                copy(*reinterpret_cast<u16*>(own), at + columns[half]);
            }
        }
    };
#pragma unroll
    for (int first = 0; first < kTokens; first += kStoreTokens) {
        const int count = min(kStoreTokens, kTokens - first);
        ptx::sync_one_of<kGroupBarriers, 128>(group);  // the pieces before have been read
        if (residual != nullptr) {
            if constexpr (kApart) {
                copies(first, count, [&](u16& element, long long at) { element = __ldcg(residual + at); });
            } else {
#pragma unroll
                for (int i = 0; i < count; i += kPassTokens) {
                    const int token = i + pass_token, y_token = item.first_token + first + token;
                    if (token >= count || y_token >= item.end_token || channels <= 0) continue;
                    const u16* source = residual + static_cast<long long>(y_token) * stride + column;
                    char* target = tokens + place(token, piece);
                    if (whole) {
                        *reinterpret_cast<uint4*>(target) = __ldcg(reinterpret_cast<const uint4*>(source));
                    } else {
                        for (int j = 0; j < channels; ++j) reinterpret_cast<u16*>(target)[j] = __ldcg(source + j);
                    }
                }
            }
            ptx::sync_one_of<kGroupBarriers, 128>(group);
        }
#pragma unroll
        for (int i = 0; i < count; i += kTurnTokens) {
            const u32 own = shared + place(i + own_token, own_piece);
            u32 parts[4] = {};
            if (residual != nullptr) ptx::load_matrices_turned(parts, own);
#pragma unroll
            for (int eight = 0; eight < kTurnTokens / 8; ++eight) {
                if (i + 8 * eight >= count) continue;
                const int at = (first + i) / 8 + eight;
                const TokenScales token_scales(of_tokens, at);
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    u32& part = parts[eight * kHalves + half];
                    part = terms.round(sums, at, half, token_scales, part);
                }
            }
            __syncwarp();
            ptx::store_matrices_turned(own, parts);
        }
        ptx::sync_one_of<kGroupBarriers, 128>(group);
        if constexpr (kApart) {
            copies(first, count, [&](u16& element, long long at) { y[at] = element; });
        } else {
#pragma unroll
            for (int i = 0; i < count; i += kPassTokens) {
                const int token = i + pass_token, y_token = item.first_token + first + token;
                if (token >= count || y_token >= item.end_token || channels <= 0) continue;
                const char* source = tokens + place(token, piece);
                u16* target = y + static_cast<long long>(y_token) * stride + column;
                if (whole) {
                    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
                } else {
                    for (int j = 0; j < channels; ++j) target[j] = reinterpret_cast<const u16*>(source)[j];
                }
            }
        }
    }
}

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_STORE
