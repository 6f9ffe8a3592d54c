// A ring of slots in shared memory between threads that fill it and threads that read it, for any kernel of sm_90.
//
//     use       0    1    2    3    4    5  ...     numbered by those who fill and by those who read, each for itself
//     slot      0    1    2    0    1    2  ...     with three slots
//     parity    0    0    0    1    1    1  ...     of the slot's barriers, turns over with every round
//
// A slot has two mbarriers of 8 bytes: "filled", which the copies' bytes complete, and "emptied", at which its readers
// arrive. Who fills waits for emptied, announces bytes and copies; who reads waits for filled, loads and releases.
#pragma once

#include "common/ptx.cuh"

namespace ring {

constexpr int kBarrierBytes = 16;  // of a slot

template <int kSlots>
struct Ring {
    u32 base;      // shared address of the first slot
    u32 bytes;     // of a slot
    u32 barriers;  // shared address of kSlots times kBarrierBytes, aligned to 8 bytes

    // Where a use stands.
    struct Place {
        u32 slot, parity;

        __device__ __forceinline__ explicit Place(u32 use) : slot(use % kSlots), parity(use / kSlots % 2) {}
        __device__ __forceinline__ Place(u32 slot, u32 parity) : slot(slot), parity(parity) {}
        __device__ __forceinline__ void advance(u32 by = 1) {
            slot += by;
            if (slot >= kSlots) {
                slot -= kSlots;
                parity ^= 1;
            }
        }
    };

    // One thread initialises the barriers. `readers` threads tell when they have read a slot: every lane for itself,
    // which takes no longer than one for its warp, and is an order that racecheck understands.
    __device__ __forceinline__ void start(int readers) const {
        for (int slot = 0; slot < kSlots; ++slot) {
            ptx::barrier_init(barriers + slot * kBarrierBytes, 1);
            ptx::barrier_init(barriers + slot * kBarrierBytes + 8, readers);
        }
    }
    __device__ __forceinline__ u32 address(const Place& at) const { return base + at.slot * bytes; }
    __device__ __forceinline__ u32 filled(const Place& at) const { return barriers + at.slot * kBarrierBytes; }
    __device__ __forceinline__ u32 emptied(const Place& at) const { return filled(at) + 8; }
    __device__ __forceinline__ void wait_filled(const Place& at) const { ptx::barrier_wait(filled(at), at.parity); }
    // A barrier that has not turned over yet counts as one that ended the phase of parity 1.
    __device__ __forceinline__ void wait_emptied(const Place& at) const {
        ptx::barrier_wait(emptied(at), at.parity ^ 1);
    }
    // This thread has read a slot by loads; they must have ended, or they meet what the slot is filled with next.
    __device__ __forceinline__ void release(const Place& at) const {
        ptx::end_reads();
        ptx::barrier_arrive(emptied(at));
    }
};

}  // namespace ring
