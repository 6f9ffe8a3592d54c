// One head of one token, by a warp: its channels are read, normed, rotated, and rounded to what a page or a product takes.
// A lane has pairs of channels: lane + 32 i, as long as there are such.
#pragma once

#include "attention/pages.cuh"

namespace head {

constexpr int kPairs = pages::kDim / 2;
constexpr int kOfLane = (kPairs + 31) / 32;

// What all heads of a kind have in common.
struct Form {
    const float* rotary;  // [positions, rotary_dim]: cosines, then sines; or nothing
    const u16* norm;      // [HEAD_DIM] weights of the RMS norm, or nothing
    int rotary_dim;       // a multiple of 4
    float eps;
    float offset;  // is added to the weights
};

// A head as it came.
struct Own {
    u32 pairs[kOfLane], others[kOfLane];  // others: what they turn with, where no lane has it (kWithin)
};

// Cosines and sines of the pairs that a lane has, of one position.
struct Turns {
    float2 cosine[kOfLane], sine[kOfLane];
};

// Weights of the RMS norm, of the pairs that a lane has.
struct Weights {
    u32 pairs[kOfLane], others[kOfLane];
};

// Number by number, since a choice of places would have both in memory.
__device__ __forceinline__ Weights one_of(bool first, const Weights& one, const Weights& other) {
    Weights chosen;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        chosen.pairs[i] = first ? one.pairs[i] : other.pairs[i];
        chosen.others[i] = first ? one.others[i] : other.others[i];
    }
    return chosen;
}

// A head with what it is multiplied by.
struct Raw {
    Own own;
    Turns turns;
    Weights weights;
};

// Where all channels of such a head are rotated, what a pair turns with is in the same lane or 16 lanes further.
constexpr bool kSameLane = pages::kDim % 128 == 0;
constexpr bool kWithin = kSameLane || pages::kDim == 64;

__device__ __forceinline__ bool within(int rotary_dim) { return kWithin && rotary_dim == pages::kDim; }

// Of what a lane has of all channels, what its pairs turn with.
__device__ __forceinline__ u32 turned_with(const u32 (&own)[kOfLane], int i) {
    if constexpr (kSameLane) {
        return own[(i + kOfLane / 2) % kOfLane];
    } else {
        return __shfl_xor_sync(~0u, own[i], 16);
    }
}

__device__ __forceinline__ int partner(int channel, int rotary_dim) {
    const int half = rotary_dim / 2;
    return channel < half ? channel + half : channel - half;
}

__device__ __forceinline__ float2 widen(u32 pair) {
    return make_float2(
        ptx::widen<BF16>(static_cast<u16>(pair & 0xffff)), ptx::widen<BF16>(static_cast<u16>(pair >> 16)));
}

__device__ __forceinline__ u32 load_pair(const u16* row, int channel) {
    return __ldcg(reinterpret_cast<const u32*>(row + channel));
}

__device__ __forceinline__ Turns load_turns(const float* rotary, int rotary_dim, int position) {
    Turns turns = {};
    if (rotary == nullptr) return turns;
    const float* of_position = rotary + static_cast<long long>(position) * rotary_dim;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        if (channel >= rotary_dim) continue;
        const float* place = of_position + min(channel, partner(channel, rotary_dim));
        turns.cosine[i] = __ldcg(reinterpret_cast<const float2*>(place));
        turns.sine[i] = __ldcg(reinterpret_cast<const float2*>(place + rotary_dim / 2));
    }
    return turns;
}

// What `from` has where a lane has pairs, and where what they turn with is.
__device__ __forceinline__ void load_pairs(
    u32 (&pairs)[kOfLane], u32 (&others)[kOfLane], const u16* from, const Form& form) {
    const bool apart = form.rotary != nullptr && !within(form.rotary_dim);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        pairs[i] = others[i] = 0;
        if (channel >= pages::kDim) continue;
        pairs[i] = load_pair(from, channel);
        if (apart && channel < form.rotary_dim) others[i] = load_pair(from, partner(channel, form.rotary_dim));
    }
}

__device__ __forceinline__ Own load_own(const u16* row, const Form& form) {
    Own own;
    load_pairs(own.pairs, own.others, row, form);
    return own;
}

__device__ __forceinline__ Weights load_weights(const Form& form) {
    Weights weights = {};
    if (form.norm != nullptr) load_pairs(weights.pairs, weights.others, form.norm, form);
    return weights;
}

__device__ __forceinline__ Raw load(const u16* row, const Form& form, int position) {
    return {load_own(row, form), load_turns(form.rotary, form.rotary_dim, position), load_weights(form)};
}

// What a head is after norm and rotation.
struct Ready {
    float2 values[kOfLane];
};

__device__ __forceinline__ Ready finish(const Own& own, const Turns& turns, const Weights& weights, const Form& form) {
    if constexpr (kSameLane) {
        if (form.rotary != nullptr && form.norm == nullptr && within(form.rotary_dim)) {  // what most models have
            constexpr int kHalf = kOfLane / 2;
            Ready turned;
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const float2 low = widen(own.pairs[i]), high = widen(own.pairs[i + kHalf]);
                const float2 cosine = turns.cosine[i], sine = turns.sine[i];
                turned.values[i] = make_float2(low.x * cosine.x - high.x * sine.x, low.y * cosine.y - high.y * sine.y);
                turned.values[i + kHalf] =
                    make_float2(high.x * cosine.x + low.x * sine.x, high.y * cosine.y + low.y * sine.y);
            }
            return turned;
        }
    }
    float factor = 1.0f;
    if (form.norm != nullptr) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            const float2 pair = widen(own.pairs[i]);
            squares += pair.x * pair.x + pair.y * pair.y;
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
        factor = rsqrtf(squares / pages::kDim + form.eps);
    }
    Ready ready;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        const bool near = within(form.rotary_dim);
        float2 pair = widen(own.pairs[i]), other = widen(near ? turned_with(own.pairs, i) : own.others[i]);
        if (form.norm != nullptr) {
            const u32 of_other = near ? turned_with(weights.pairs, i) : weights.others[i];
            const float2 weight = widen(weights.pairs[i]), other_weight = widen(of_other);
            pair.x *= factor * (weight.x + form.offset);
            pair.y *= factor * (weight.y + form.offset);
            other.x *= factor * (other_weight.x + form.offset);
            other.y *= factor * (other_weight.y + form.offset);
        }
        if (form.rotary != nullptr && channel < form.rotary_dim) {
            const float sign = channel < form.rotary_dim / 2 ? -1.0f : 1.0f;
            pair.x = pair.x * turns.cosine[i].x + sign * other.x * turns.sine[i].x;
            pair.y = pair.y * turns.cosine[i].y + sign * other.y * turns.sine[i].y;
        }
        ready.values[i] = pair;
    }
    return ready;
}

__device__ __forceinline__ Ready finish(const Raw& raw, const Form& form) {
    return finish(raw.own, raw.turns, raw.weights, form);
}

// NaN stays NaN.
__device__ __forceinline__ float within_fp16(float value) {
    return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
}

// Hands a query's pairs, rounded for products, to `store(place, pair)`.
template <class Store>
__device__ __forceinline__ void give_query(const Ready& ready, const Store& store) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        if (channel >= pages::kDim) continue;
        float2 values = ready.values[i];
        if constexpr (pages::kBf16 && !pages::kBf16Products) {  // bf16 numbers that fp16 has not
            values.x = within_fp16(values.x);
            values.y = within_fp16(values.y);
        }
        store(pages::place_of(channel), ptx::narrow_pair<pages::kBf16Products>(values.x, values.y));
    }
}

// Hands pairs as they came to `store(channel, pair)`.
template <class Store>
__device__ __forceinline__ void give_pairs(const Own& own, const Store& store) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        if (channel < pages::kDim) store(channel, own.pairs[i]);
    }
}

// Hands a key's or a value's pairs, as pages hold them, to `store(channel, pair)`, and returns the token's scale.
template <class Store>
__device__ __forceinline__ float give_page(const Ready& ready, const Store& store) {
    float scale = 1.0f;
    if constexpr (pages::kE4m3) {
        float most = 0.0f;
        bool wrong = false;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            const float2 values = ready.values[i];
            most = fmaxf(most, fmaxf(fabsf(values.x), fabsf(values.y)));
            wrong |= values.x != values.x || values.y != values.y;
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
        scale = fmaxf(most / 448.0f, 5.9604644775390625e-8f);
        if (__any_sync(~0u, wrong)) scale = __uint_as_float(0x7fffffffu);
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int channel = 2 * (threadIdx.x % 32 + 32 * i);
        if (channel >= pages::kDim) continue;
        const float2 values = ready.values[i];
        if constexpr (pages::kE4m3) {
            store(channel, pages::to_e4m3_pair(values.x / scale, values.y / scale));
        } else {
            store(channel, ptx::narrow_pair<BF16>(values.x, values.y));
        }
    }
    return scale;
}

// The same into a page: `token` is its row of `pages`.
__device__ __forceinline__ void write_pair(unsigned char* all, long long token, int channel, u32 pair) {
    unsigned char* place = all + token * pages::kRowBytes + channel * pages::kElementBytes;
    if constexpr (pages::kE4m3) {
        *reinterpret_cast<u16*>(place) = static_cast<u16>(pair);
    } else {
        *reinterpret_cast<u32*>(place) = pair;
    }
}

}  // namespace head
