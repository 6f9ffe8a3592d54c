// Which pages rows read together, int32 numbers side by side: how many items there are; rows by what they share [rows]; of
// every row how many pages its own part of the text leaves out and in how many parts others read them [rows, 2]; items
// [.., 5]. An item is a few rows, which stand side by side in that order, and pages that all of them begin with.
// `ops.Rows.shared` says more.
#pragma once

namespace plan {

constexpr int kItemNumbers = 5;

struct Item {
    int first, rows;  // in the order of rows
    int begin, end;   // pages
};

struct Own {
    int begin;  // the first page of a row that nobody reads for it
    int parts;  // that are read for it
};

__device__ __forceinline__ const int* order(const int* plan) { return plan + 1; }

__device__ __forceinline__ Own own(const int* plan, int rows, int row) {
    const int* numbers = plan + 1 + rows + 2 * row;
    return {__ldcg(numbers), __ldcg(numbers + 1)};
}

__device__ __forceinline__ Item item(const int* plan, int rows, int i) {
    const int* numbers = plan + 1 + 3 * rows + kItemNumbers * i;
    return {__ldcg(numbers), __ldcg(numbers + 1), __ldcg(numbers + 2), __ldcg(numbers + 3)};
}

// Which part of its rows an item is, the first is 0.
__device__ __forceinline__ int part(const int* plan, int rows, int i) {
    return __ldcg(plan + 1 + 3 * rows + kItemNumbers * i + 4);
}

}  // namespace plan
