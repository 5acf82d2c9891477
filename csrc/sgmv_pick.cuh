// The kernels of one dtype, each dtype in a translation unit of its own, so that they build side by side.
#pragma once

#include "sgmv_bulk_kernels.cuh"
#include "sgmv_ring.cuh"

namespace medley {

template <typename T, int HALVES>
Kernel pick_step(Step step) {
  constexpr int MT = (HALVES + 1) / 2;
  switch (step) {
    case Step::kRingShrink: return ring::sgmv_kernel<T, MT, ring::kShrink>;
    case Step::kRingExpand: return ring::sgmv_kernel<T, MT, ring::kExpand>;
    case Step::kBulkShrink: return bulk::shrink_kernel<T, HALVES>;
    case Step::kBulkExpand: return bulk::expand_kernel<T, HALVES>;
  }
  return nullptr;
}

template <typename T>
Kernel pick(int block_rows, Step step) {
  return block_rows == 8 ? pick_step<T, 1>(step) : pick_step<T, 4>(step);
}

}  // namespace medley
