// Adds up x of all ranks in one step: in float32, in the order of ranks, rounded once, so that all get the same bits.
//
// Every rank has a buffer that its peers read and write: flags, then two slots of x. A rank copies its x to a slot, sets
// a flag at every peer, waits for theirs, and adds what it reads from all. A CTA does so for a share of x, and has its
// own flags, which count calls: they are never cleared. Slots are taken in turn. A rank writes one again only after the
// call between, whose flags peers set after they had read the slot before: so nobody waits at the end.
//
// Who waits in vain is told so in the host's memory, which takes no call of CUDA: one that is under way while a kernel waits
// may itself wait, for room in a stream's queue or for code that is still to be loaded. It is looked at now and then, for it
// lies behind the bus; whoever sees it says so to all kernels to come.
// Parameters: BF16 (1: bf16, 0: fp16), RANKS (how many), CTAS (flags of a rank), SLOT_BYTES (of x at most).
#pragma once

#include "common/launch.cuh"
#include "small/flags.cuh"
#include "small/pieces.cuh"

namespace all_reduce {

constexpr int kThreads = 512;
constexpr int kFlagBytes = 4096;  // of a buffer, before its slots
constexpr u32 kLooks = 4096;      // at a flag, for one at the host's memory: some milliseconds
static_assert(RANKS <= kThreads && RANKS * CTAS * sizeof(u32) <= kFlagBytes);

}  // namespace all_reduce

extern "C" __global__ void __launch_bounds__(all_reduce::kThreads) TERSOR_ENTRY(
    u16* x,              // [pieces * 8], becomes the sum
    const u64* buffers,  // [RANKS]: addresses, those of peers in the address space of this GPU
    u32* calls,          // [CTAS]: of every CTA so far; then one number that ends all waiting when it is not 0
    const u32* ended,    // the same, where the host writes it
    int rank,
    int pieces) {  // of 16 bytes, at least 1 and at most SLOT_BYTES / 16
    using namespace all_reduce;
    launch::start_next();
    launch::wait_for_earlier();
    const u32 call = calls[blockIdx.x] + 1;
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    const long long slot = kFlagBytes + static_cast<long long>(call & 1) * SLOT_BYTES;
    const auto slot_of = [&](int peer) { return reinterpret_cast<u16*>(buffers[peer] + slot); };
    // A CTA without a share counts the call and tells nobody; the first one always has a share.
    if (static_cast<int>(blockIdx.x * blockDim.x) < pieces) {
        for (int piece = first; piece < pieces; piece += step) {
            pieces::store(slot_of(rank), piece, pieces::load(x, piece));
        }
        __syncthreads();
        if (threadIdx.x < RANKS) {
            const int peer = threadIdx.x;
            flags::set(reinterpret_cast<u32*>(buffers[peer]) + rank * CTAS + blockIdx.x, call);
            const u32* flag = reinterpret_cast<const u32*>(buffers[rank]) + peer * CTAS + blockIdx.x;
            volatile u32* over = calls + CTAS;
            for (u32 look = 1; static_cast<int>(flags::read(flag) - call) < 0 && *over == 0; ++look) {
                if (look % kLooks == 0 && *static_cast<const volatile u32*>(ended) != 0) *over = 1;
            }
        }
        __syncthreads();
        for (int piece = first; piece < pieces; piece += step) {
            float sums[pieces::kChannels] = {};
#pragma unroll
            for (int peer = 0; peer < RANKS; ++peer) {
                const pieces::Piece given = pieces::load(slot_of(peer), piece);
#pragma unroll
                for (int k = 0; k < pieces::kChannels; ++k) sums[k] += ptx::widen<BF16>(given.values[k]);
            }
            pieces::Piece rounded;
#pragma unroll
            for (int k = 0; k < pieces::kChannels; ++k) rounded.values[k] = ptx::narrow<BF16>(sums[k]);
            pieces::store(x, piece, rounded);
        }
    }
    __syncthreads();  // all threads have read the count
    if (threadIdx.x == 0) calls[blockIdx.x] = call;
}
