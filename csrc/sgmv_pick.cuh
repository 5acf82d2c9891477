// The kernels of one dtype, each dtype in a translation unit of its own, so that they build side by side.
#pragma once

#include "sgmv_bulk.cuh"
#include "sgmv_ring.cuh"

namespace medley {

template <typename T, int MT>
Kernel pick_step(Step step) {
  switch (step) {
    case Step::kFused: return ring::sgmv_kernel<T, MT, ring::kFused>;
    case Step::kRingShrink: return ring::sgmv_kernel<T, MT, ring::kShrink>;
    case Step::kRingExpand: return ring::sgmv_kernel<T, MT, ring::kExpand>;
    case Step::kBulkShrink: return bulk::shrink_kernel<T, MT>;
    case Step::kBulkExpand: return bulk::expand_kernel<T, MT>;
  }
  return nullptr;
}

template <typename T>
Kernel pick(int block_rows, Step step) {
  return block_rows == 16 ? pick_step<T, 1>(step) : pick_step<T, 2>(step);
}

}  // namespace medley
