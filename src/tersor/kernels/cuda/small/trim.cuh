// Copies the first channels of every head: a thread has eight of them.
#pragma once

#include "common/launch.cuh"
#include "small/pieces.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const u16* __restrict__ x,  // [heads of all tokens, width]
    u16* out,                   // [heads of all tokens, kept]
    int count,                  // pieces of the result
    int width,                  // in pieces
    int kept) {                 // in pieces
    launch::start_next();
    launch::wait_for_earlier();
    const int piece = blockIdx.x * blockDim.x + threadIdx.x;
    if (piece >= count) return;
    const long long head = piece / kept;
    pieces::store(out, piece, pieces::load(x + head * width * pieces::kChannels, piece % kept));
}
