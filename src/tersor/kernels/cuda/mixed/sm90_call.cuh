// What a launch with several row sets is given, beside sizes: those of a mixed weight (tersor/layouts/mixed.py) or of the
// experts of a layer (layouts/stacked_mixed.py), and which CTAs have which.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.cuh"

namespace mixed {

constexpr int kMostLevels = 8;  // as in tersor/formats/mix.py

// Where the row set of every level lies.
struct RowSets {
    struct {
        const char* weight;  // units of packed codes
        const char* scale;   // by rows or, in groups, by units (scales.cuh)
    } of[kMostLevels];
};

// The CTAs that have the row set of a level, in clusters, and how they have it (sm90_work.cuh).
struct Share {
    int rows;         // of the row set; 0 where the weight has none of the level
    int end;          // clusters of this level and of those before it
    int whole_tiles;  // of clusters: taken in turn, over all blocks; what is left is dealt out evenly; not of experts
    int output;       // tiles dealt out at the levels before; not of experts
};
struct Shares {
    Share of[kMostLevels];
};

static_assert(sizeof(RowSets) == 128 && sizeof(Shares) == 128, "tersor/kernels/mixed.py packs them otherwise");

// Shared memory for the Work of a level.
struct KeptWork {
    int numbers[16];
};

// The rest, in which levels do not differ.
struct Call {
    const TensorMap& x_map;
    const int* features;  // [channels] of every row, in the order of row sets, or null: rows stand in order
    const u16* bias;      // [OC] in order of features, or null
    const float* x_scale;
    const u16* residual;  // as y, added to it, or null
    u16* y;               // [N, outputs]
    float* partial;       // sums of split tiles
    u32* arrived;         // a counter for each, zero before and after
    int ic, n, outputs, x_rows;
    int most_parts;       // of a tile
    int cluster, splits;  // which cluster this CTA belongs to; CTAs of one that gathers, else 1
    char* slots;          // shared memory, as in sm90_cta.cuh
    u64* barriers;
    float* token_scales;
    KeptWork* kept;
};

}  // namespace mixed
