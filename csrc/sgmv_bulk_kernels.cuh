// The kernels of mode "bulk": shrink and expand, which meet in a workspace.
#pragma once

#include "sgmv_bulk_expand.cuh"
#include "sgmv_bulk_shrink.cuh"

namespace medley::bulk {

// Rings, of which steps of one rank use 16 KB: more bytes in flight take longer, up to 4 %. With mixed ranks a device waits
// for its few long units, which are up to 10 % faster with all of it.
constexpr int kShrinkRing = 32 << 10, kExpandRing = 24 << 10, kShallowRing = 16 << 10;

template <int HALVES>
constexpr int shrink_bytes() {
  return kShrinkRing + Ring::kBarrierBytes + Shrink<void, HALVES>::kPartBytes;
}
template <int HALVES>
constexpr int expand_bytes(int max_pairs) {
  return kExpandRing + Ring::kBarrierBytes + Expand<void, HALVES>::low_bytes(max_pairs);
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) shrink_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const Place at;
  const Shares shares(p.header);
  Ring ring(shared, kShrinkRing, shares.has_deep_rings ? kShrinkRing : kShallowRing, shares.pairs, at.warp);
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int num_units = p.header[0] * shares.k_units() * shares.pair_parts;
  using Sum = typename Sums<HALVES>::Type;
  Shrink<T, HALVES> shrink{p, at, ring, reinterpret_cast<Sum*>(shared + kShrinkRing + Ring::kBarrierBytes), shares};
  bool is_first = true;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    shrink.open(unit);
    if (is_first) wait_for_previous_kernel();
    is_first = false;
    shrink.run();
  }
  // Who comes next counts on this kernel to have waited, also where there was nothing to do.
  if (is_first) wait_for_previous_kernel();
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) expand_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const Place at;
  const Shares shares(p.header);
  Ring ring(shared, kExpandRing, shares.has_deep_rings ? kExpandRing : kShallowRing, shares.tiles, at.warp);
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int num_units = p.header[0] * shares.column_parts;
  Expand<T, HALVES> expand{p, at, ring, reinterpret_cast<uint2*>(shared + kExpandRing + Ring::kBarrierBytes), shares};
  bool is_first = true;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    expand.open(unit);
    if (is_first) wait_for_previous_kernel();
    is_first = false;
    expand.run();
  }
  if (is_first) wait_for_previous_kernel();
}

}  // namespace medley::bulk
