// A row of logits as all kernels of sampling see it: logits where no token is listed or forbidden, and a list of tokens
// with logits of their own, for which the row itself holds minus infinity. Parameters: INPUT (0: fp16, 1: bf16, 2: float32).
#pragma once

#include "common/ptx.cuh"
#include "sampling/numbers.cuh"

namespace row {

constexpr int kChunk = 8;  // logits that a thread has at a time

template <int kInput>
struct Element {
    using Type = u16;
};
template <>
struct Element<2> {
    using Type = float;
};
using Given = Element<INPUT>::Type;

// Bits of a key that are the same for all logits of one sign.
constexpr int kConstantBits = INPUT == 0 ? 13 : INPUT == 1 ? 16 : 0;

__device__ __forceinline__ float widen(Given given) {
    if constexpr (INPUT == 2) {
        return given;
    } else {
        return ptx::widen<INPUT == 1>(given);
    }
}

__device__ __forceinline__ Given narrow(float value) {
    if constexpr (INPUT == 2) {
        return value;
    } else {
        return ptx::narrow<INPUT == 1>(value);
    }
}

struct Row {
    const Given* logits;
    const int* allowed;   // a bit a token, or nothing
    const int* tokens;    // those listed; -1 is none
    const float* values;  // their logits
    int listed;
    int vocabulary;
    bool aligned;         // chunks start on 16 bytes, and none is cut short
};

// Where a row's options are: in its own place, or in that of its slot.
__device__ __forceinline__ int slot_of(const int* slots, int row) { return slots == nullptr ? row : __ldcg(slots + row); }

__device__ __forceinline__ Row row_of(
    int row, int slot, const void* logits, long long stride, int vocabulary, int aligned, const int* starts,
    const int* ends, const int* tokens, const float* values, const int* allowed, const int* allowed_rows, int words) {
    Row found = {static_cast<const Given*>(logits) + row * stride, nullptr, nullptr, nullptr, 0, vocabulary, aligned != 0};
    if (starts != nullptr) {
        const int first = __ldcg(starts + slot);
        found.tokens = tokens + first;
        found.values = values + first;
        found.listed = __ldcg(ends + slot) - first;
    }
    if (allowed != nullptr) {
        const int of = __ldcg(allowed_rows + slot);
        if (of >= 0) found.allowed = allowed + static_cast<long long>(of) * words;
    }
    return found;
}

// Logits first .. first + 7 as they stand in memory, and the bits that allow them; minus infinity beyond the row.
struct Chunk {
    Given given[kChunk];
    u32 bits;
};

// Only loads: what is under way is waited for in values_of.
__device__ __forceinline__ Chunk fetch(const Row& row, int first) {
    Chunk chunk;
    chunk.bits = ~0u;
    if (row.aligned && first < row.vocabulary) {
        constexpr int kVectors = sizeof(chunk.given) / 16;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            reinterpret_cast<uint4*>(chunk.given)[i] = __ldcg(reinterpret_cast<const uint4*>(row.logits + first) + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            chunk.given[i] = first + i < row.vocabulary ? __ldcg(row.logits + first + i) : narrow(numbers::lowest());
        }
    }
    if (row.allowed != nullptr && first < row.vocabulary) {
        chunk.bits = static_cast<u32>(__ldcg(row.allowed + first / 32)) >> first % 32;
    }
    return chunk;
}

// Logits, minus infinity where a bit forbids the token, and whether one of them is NaN or infinity.
__device__ __forceinline__ bool values_of(const Chunk& chunk, float (&values)[kChunk]) {
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
        values[i] = widen(chunk.given[i]);
        wrong |= !(values[i] < numbers::infinity());
        if (!(chunk.bits >> i & 1)) values[i] = numbers::lowest();
    }
    return wrong;
}

// Calls f(values, first) with the logits of tokens first, first + 1 ..., minus infinity where none is or may be drawn:
// of the chunks worker, worker + workers ... of the row, and one by one of its list. Returns whether one of them is NaN
// or infinity. A chunk is fetched while the one before is looked at.
template <class F>
__device__ __forceinline__ bool each_chunk(const Row& row, int worker, int workers, const F& f) {
    bool wrong = false;
    Chunk chunk = fetch(row, worker * kChunk);
    for (int first = worker * kChunk; first < row.vocabulary; first += workers * kChunk) {
        const Chunk next = fetch(row, first + workers * kChunk);
        float values[kChunk];
        wrong |= values_of(chunk, values);
        f(values, first);
        chunk = next;
    }
    for (int i = worker; i < row.listed; i += workers) {
        const int token = __ldcg(row.tokens + i);
        if (token < 0) continue;
        const float one[1] = {__ldcg(row.values + i)};
        wrong |= !(one[0] < numbers::infinity());
        f(one, token);
    }
    return wrong;
}

// The same with f(value, token) for every logit that is not minus infinity.
template <class F>
__device__ __forceinline__ bool each(const Row& row, int worker, int workers, const F& f) {
    return each_chunk(row, worker, workers, [&](const auto& values, int first) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(float)); ++i) {
            if (values[i] != numbers::lowest()) f(values[i], first + i);
        }
    });
}

// Calls f(value, i) for those values whose bit is set: few, so the code of f is there but once.
template <int kCount, class F>
__device__ __forceinline__ void each_set(u32 bits, const float (&values)[kCount], const F& f) {
    while (bits != 0) {
        const int i = 31 - __clz(static_cast<int>(bits));
        float value = values[0];
#pragma unroll
        for (int other = 1; other < kCount; ++other) value = i == other ? values[other] : value;
        f(value, i);
        bits ^= 1u << i;
    }
}

// Whether some tokens may not be drawn: not of the most probable token alone, nor of all.
__device__ __forceinline__ bool filtered(float temperature, int top_k, float top_p, float min_p, int vocabulary) {
    return temperature >= numbers::kLeastTemperature && ((top_k > 0 && top_k < vocabulary) || top_p < 1.0f || min_p > 0.0f);
}

// How a row is filtered: not at all, or its token is drawn already; by top-k, with or without others; by top-p without
// top-k; by min-p alone.
enum Kind : u32 { kDrawn, kByCount, kBySum, kByWeight };

__device__ __forceinline__ u32 kind_of(int top_k, float top_p, int vocabulary) {
    return top_k > 0 && top_k < vocabulary ? kByCount : top_p < 1.0f ? kBySum : kByWeight;
}

// What a part of the weights is in whole units: 1 at least.
__device__ __forceinline__ u64 share(float part, u64 total) {
    return max(__double2ull_ru(__dmul_rn(static_cast<double>(part), __ull2double_rn(total))), static_cast<u64>(1));
}

// What passes over a row leave for later ones.
struct State {
    u64 need;      // what the greatest tokens of `bin` must weigh together
    u64 best;      // score and token (numbers::pair_of) of what is kept in any case
    u64 of_bin;    // the same of the tokens of `bin`
    u32 count;     // of candidates
    u32 arrived;
    u32 peak;      // key of the greatest logit
    u32 cut;       // at least top-k tokens have this key at least
    u32 filtered;  // Kind
    u32 bin;       // where the least logit lies that top-p keeps
    u32 greatest;  // key of the tokens of `bin`
    u32 inverse;   // and of the least ~key
    float a_unit;  // bins of 2^-x a unit of x
    u32 unused;
};

}  // namespace row
