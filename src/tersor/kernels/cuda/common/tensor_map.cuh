// A matrix as the copy engine sees it.
#pragma once

// 128 opaque bytes that the driver encodes (CUtensorMap).
struct alignas(64) TensorMap {
    char opaque[128];
};
