// The end of an item of sm90_linear.cuh: sums of warpgroups and of splits are added, scaled, rounded and stored.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "dense/sm90_norm.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

using gate::kHalves;

// After blocks in turn: each warpgroup hands its sums of other row groups over and adds up those of its own, in the same
// order always. Returns true where there are some, in the first kRowGroups warpgroups.
__device__ __forceinline__ bool exchange_turns(
    float (&sums)[kSums], const float (&turns)[kRowGroups][kSums], float* exchange, bool is_first) {
    const int own = threadIdx.x / 128;
    const auto part = [&](int rows, int turn) {
        return exchange + (rows * (kTurns - 1) + turn) * kSums * 128 + threadIdx.x % 128;
    };
    if (!is_first) ptx::sync_threads<kPartsRead, kConsumers>();
#pragma unroll
    for (int rows = 0; rows < kRowGroups; ++rows) {
        if (rows == own) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] = turns[rows][i];
        } else {
            float* target = part(rows, own - (own > rows));
#pragma unroll
            for (int i = 0; i < kSums; ++i) target[i * 128] = turns[rows][i];
        }
    }
    ptx::sync_threads<kPartsReady, kConsumers>();
    if (own >= kRowGroups) return false;
#pragma unroll
    for (int turn = 0; turn < kTurns - 1; ++turn) {
        const float* source = part(own, turn);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += source[i * 128];
    }
    return true;
}

// Hands this CTA's sums to the first of its cluster; returns true there, where then the sum of all splits is. `arrived`
// is the barrier that counts the bytes of the parts. Where they have no room of their own they go to where the rings of
// that CTA were: `room` is the barrier at which its threads tell the others that they have read what was there.
__device__ __forceinline__ bool gather_splits(
    Sum (&sums)[kSums], const Item& item, u32 base, const char* slots, u32 room, u32 arrived) {
    static_assert((GATHERS - 1) * kPartBytes <= kExchangeAt, "as many parts as the rings have room for");
    constexpr int kFours = kSums / 4;
    const bool to_rings = item.parts - 1 > GATHER_ROOM;
    const int place = to_rings ? 0 : kExchangeAt + kExchangeBytes;
    if (item.part > 0) {
        const u32 first = base + place + (item.part - 1) * kPartBytes + threadIdx.x * 16;
        const u32 there = ptx::address_in(first, 0), barrier = ptx::address_in(arrived, 0);
        if (to_rings) ptx::barrier_wait(room, 0);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float four[] = {
                bytes_of(sums[4 * i]), bytes_of(sums[4 * i + 1]), bytes_of(sums[4 * i + 2]), bytes_of(sums[4 * i + 3])};
            ptx::store_in(there + i * kFinishers * 16, four, barrier);
        }
        return false;
    }
    if (to_rings) {
        ptx::end_reads();
        for (int part = 1; part < item.parts; ++part) ptx::barrier_arrive_at(room, part);
    }
    ptx::barrier_wait(arrived, 0);
    const char* parts = slots + place;
    for (int part = 1; part < item.parts; ++part, parts += kPartBytes) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float4 four = reinterpret_cast<const float4*>(parts)[i * kFinishers + threadIdx.x];
            add_bytes(sums[4 * i], four.x);
            add_bytes(sums[4 * i + 1], four.y);
            add_bytes(sums[4 * i + 2], four.z);
            add_bytes(sums[4 * i + 3], four.w);
        }
    }
    return true;
}

// Hands this CTA's sums over through memory; returns true in the one CTA that then holds the sum of all splits.
template <typename Work>
__device__ __forceinline__ bool add_splits(
    Sum (&sums)[kSums], const Work& work, const Item& item, int rank, float* partial, u32* arrived) {
    __shared__ bool is_last;
    const int splits = item.parts, output = (item.tile - work.whole_tiles) * kCluster + rank;
    float* parts = partial + static_cast<long long>(output) * splits * kSums * kFinishers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(parts + (item.part * kSums + i) * kFinishers, bytes_of(sums[i]));
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
        for (int i = 0; i < kChunk; ++i) sums[chunk + i] = 0;
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
                for (int i = 0; i < kChunk; ++i) add_bytes(sums[chunk + i], loaded[s][i]);
            }
        }
    }
    return true;
}

constexpr bool kTokenScales = kBytewise || kNormIn;

// The scales of a tile's tokens: of 8-bit activations, or what a norm divides by, which a warp that copies brings
// (`scale_tokens`). A CTA reads each once: they lie in a few sectors of one slice of L2, which all CTAs would queue for.
// They, like residuals, are read past L1, which may hold what lay there before the kernel ahead wrote them: an earlier
// kernel that still ran beside this one may have read it.
struct TileScales {
    float own = 0.0f;  // of token threadIdx.x of the tile
    float* shared;     // [kTokens], of all, once they are shared

    __device__ __forceinline__ TileScales(float* shared, const float* x_scale, const Item& item) : shared(shared) {
        static_assert(!kBytewise || kTokens <= kFinishers, "a thread has one token");
        const int token = item.first_token + threadIdx.x;
        if (kBytewise && threadIdx.x < kTokens && token < item.end_token) own = __ldcg(x_scale + token);
    }
    // `brought`: the barrier at which that warp tells.
    __device__ __forceinline__ void share(u32 brought) const {
        if constexpr (kNormIn) ptx::barrier_wait(brought, 0);  // for the first item, and so for all
        if constexpr (kBytewise) {
            ptx::sync_threads<kFinishersBarrier, kFinishers>();  // those of the item before have been read
            if (threadIdx.x < kTokens) shared[threadIdx.x] = own;
            ptx::sync_threads<kFinishersBarrier, kFinishers>();
        }
    }
};

// The scales of the two tokens that a lane has of the `tokens`-th group of eight.
struct TokenScales {
    float of[2] = {};

    __device__ __forceinline__ TokenScales(const TileScales& all, int tokens) {
        if constexpr (kTokenScales) {
            const float2 pair = *reinterpret_cast<const float2*>(all.shared + tokens * 8 + threadIdx.x % 4 * 2);
            of[0] = pair.x;
            of[1] = pair.y;
        }
    }
};

// The scales and biases of this lane's two rows of a tile, of those of one matrix.
struct RowTerms {
    float scale[2], bias[2];
    int first_row, rows;

    __device__ __forceinline__ RowTerms(int rows, const Item& item, const float* scales, float factor)
        : first_row(item.first_row + threadIdx.x % kFinishers / 32 * tile::kRows), rows(rows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            scale[half] = kGroups > 0 ? factor : (row < rows ? scales::of_row(scales, row) * factor : 0.0f);
        }
    }
    __device__ __forceinline__ void add_bias(const u16* biases) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            bias[half] = biases != nullptr && row < rows ? ptx::widen<kBf16>(biases[row]) : 0.0f;
        }
    }
    // Of this lane's row `half`, token 2 (lane % 4) + `odd` of the `tokens`-th group of eight.
    __device__ __forceinline__ float value(
        const Sum (&sums)[kSums], int tokens, int half, int odd, const TokenScales& token_scales) const {
        const float sum = static_cast<float>(sums[4 * tokens + 2 * half + odd]);
        return __fmaf_rn(kTokenScales ? sum * token_scales.of[odd] : sum, scale[half], bias[half]);
    }
    // The same of an output channel: of a gated linear's there is one, of two rows.
    __device__ __forceinline__ float output(
        const Sum (&sums)[kSums], int tokens, int half, int odd, const TokenScales& token_scales) const {
        const float only = value(sums, tokens, half, odd, token_scales);
        if constexpr (gate::kGated) return gate::combine(only, value(sums, tokens, 1, odd, token_scales));
        return only;
    }
    // Both tokens, with a pair of residuals added.
    __device__ __forceinline__ u32 round(
        const Sum (&sums)[kSums], int tokens, int half, const TokenScales& token_scales, u32 added) const {
        const float low = ptx::widen<kBf16>(static_cast<u16>(added));
        const float high = ptx::widen<kBf16>(static_cast<u16>(added >> 16));
        const u32 even = ptx::narrow<kBf16>(__fadd_rn(output(sums, tokens, half, 0, token_scales), low));
        const u32 odd = ptx::narrow<kBf16>(__fadd_rn(output(sums, tokens, half, 1, token_scales), high));
        return even | odd << 16;
    }
};

// Where a lane stores few tokens: fragments are turned so that stores run along the rows.
struct FewPlaces {
    int outputs, first_channel, first_token;
    long long first;

    // Channels 2 (lane % 4) and the next, token lane / 4 of the first group of eight.
    __device__ __forceinline__ FewPlaces(const Item& item, const RowTerms& terms)
        : outputs(gate::outputs(terms.rows)),
          first_channel(gate::outputs(terms.first_row) + threadIdx.x % 4 * 2),
          first_token(item.first_token + threadIdx.x % 32 / 4),
          first(static_cast<long long>(first_token) * outputs + first_channel) {}
    __device__ __forceinline__ int channel(int half) const { return first_channel + 8 * half; }
    __device__ __forceinline__ bool there(const Item& item, int tokens, int half) const {
        return first_token + tokens * 8 < item.end_token && channel(half) < outputs;
    }
    __device__ __forceinline__ long long at(int tokens, int half) const {
        return first + static_cast<long long>(tokens) * 8 * outputs + 8 * half;
    }
};

// What few tokens' results meet in memory: residuals and, where a norm is behind, its weights.
struct Met {
    u32 added[kTokens / 8][kHalves] = {};
    float2 weights[kHalves] = {};

    __device__ __forceinline__ void load(
        const Item& item, const RowTerms& terms, const u16* residual, const Norms& norms) {
        const FewPlaces places(item, terms);
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
                const u16* source = residual + places.at(i, half);
                if (places.outputs % 2 == 0) {
                    added[i][half] = __ldcg(reinterpret_cast<const u32*>(source));
                } else {
                    added[i][half] = __ldcg(source);
                    if (places.channel(half) + 1 < places.outputs) {
                        added[i][half] |= static_cast<u32>(__ldcg(source + 1)) << 16;
                    }
                }
            }
        }
    }
};

// Rounds and stores few tokens. Where a norm is behind, output channels are a multiple of 8.
__device__ __forceinline__ void store_few(
    const Sum (&sums)[kSums], const Item& item, const RowTerms& terms, const TileScales& of_tokens, Met& met,
    bool adds, u16* y, const Norms& norms) {
    static_assert(!kNormOut || !gate::kGated, "a norm follows what a residual is added to");
    const FewPlaces places(item, terms);
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
            const long long at = places.at(i, half);
            u16* target = y + at;
            if constexpr (kNormOut) {
                const float low = ptx::widen<kBf16>(static_cast<u16>(turned)) * met.weights[half].x;
                const float high = ptx::widen<kBf16>(static_cast<u16>(turned >> 16)) * met.weights[half].y;
                const u32 scaled = ptx::narrow<kBf16>(low) | static_cast<u32>(ptx::narrow<kBf16>(high)) << 16;
                *reinterpret_cast<u32*>(norms.scaled + at) = scaled;
                squares.add(i, turned);
            }
            if (kNormOut || places.outputs % 2 == 0) {
                *reinterpret_cast<u32*>(target) = turned;
            } else {
                target[0] = static_cast<u16>(turned);
                if (places.channel(half) + 1 < places.outputs) target[1] = static_cast<u16>(turned >> 16);
            }
        }
    }
    if constexpr (kNormOut) squares.store(item, terms.rows, norms);
}

// Rounds and stores many tokens: a warpgroup turns kStoreTokens of them at a time in shared memory, so that every store
// writes 16 bytes and a warp's fill whole lines. A token's channels are pieces of 16 bytes, swizzled by the token.
// Residuals come the same way, and each warp then puts its results where its residuals were.
__device__ __forceinline__ void store_many(
    const Sum (&sums)[kSums], const Item& item, const RowTerms& terms, const TileScales& of_tokens,
    const u16* residual, u16* y, char* turned) {
    constexpr int kPieces = 4 * kHalves;           // of a token
    constexpr int kPassTokens = 128 / kPieces;     // that a warpgroup copies at a time
    constexpr int kTurnTokens = 32 / kHalves;      // that a warp turns at a time: four 8x8 matrices
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    char* tokens = turned + group * kStoreBytes;
    const u32 shared = ptx::shared_address(tokens);
    const int outputs = gate::outputs(terms.rows);
    // Of the matrices, first by tokens and then by channels, this lane addresses row lane % 8 of matrix lane / 8.
    const int own_token = lane / 8 / kHalves * 8 + lane % 8, own_piece = kHalves * warp + lane / 8 % kHalves;
    // What this lane copies between shared memory and matrices [N, outputs].
    const int piece = lane % kPieces, pass_token = threadIdx.x % 128 / kPieces;
    const int channel = gate::outputs(item.first_row + group * tile::kUnitRows) + piece * 8;
    const int channels = min(8, outputs - channel);
    const auto place = [&](int token, int at_piece) { return token * 128 + (at_piece ^ token % 8) * 16; };
#pragma unroll
    for (int first = 0; first < kTokens; first += kStoreTokens) {
        const int count = min(kStoreTokens, kTokens - first);
        ptx::sync_one_of<kGroupBarriers, 128>(group);  // the pieces before have been read
        if (residual != nullptr) {
#pragma unroll
            for (int i = 0; i < count; i += kPassTokens) {
                const int token = i + pass_token, y_token = item.first_token + first + token;
                if (token >= count || y_token >= item.end_token || channels <= 0) continue;
                const u16* source = residual + static_cast<long long>(y_token) * outputs + channel;
                char* target = tokens + place(token, piece);
                if (outputs % 8 == 0) {
                    *reinterpret_cast<uint4*>(target) = __ldcg(reinterpret_cast<const uint4*>(source));
                } else {
                    for (int j = 0; j < channels; ++j) reinterpret_cast<u16*>(target)[j] = __ldcg(source + j);
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
#pragma unroll
        for (int i = 0; i < count; i += kPassTokens) {
            const int token = i + pass_token, y_token = item.first_token + first + token;
            if (token >= count || y_token >= item.end_token || channels <= 0) continue;
            const char* source = tokens + place(token, piece);
            u16* target = y + static_cast<long long>(y_token) * outputs + channel;
            if (outputs % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
            } else {
                for (int j = 0; j < channels; ++j) target[j] = reinterpret_cast<const u16*>(source)[j];
            }
        }
    }
}

}  // namespace linear
