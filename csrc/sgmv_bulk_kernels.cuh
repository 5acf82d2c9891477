// The kernels of sgmv_bulk.cuh: shrink and expand, which meet in a workspace.
#pragma once

#include "sgmv_bulk.cuh"

namespace medley::bulk {

// Rings are as small as keeps a multiprocessor's memory busy: what four thread blocks leave of shared memory and registers
// holds blocks of the next kernel, whose weights arrive meanwhile. Rings of 40 KB took up to 15 % longer.
constexpr int kShrinkRing = 24 << 10, kExpandRing = 16 << 10;

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
  Ring ring(shared, kShrinkRing, p.header[2], at.warp);
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int num_units = p.header[0] * kSlices;
  Shrink<T, HALVES> shrink{p, at, ring, reinterpret_cast<float4*>(shared + kShrinkRing + Ring::kBarrierBytes),
                           p.header[2]};
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
  Ring ring(shared, kExpandRing, p.header[3], at.warp);
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int parts = p.header[1], num_units = p.header[0] * parts;
  Expand<T, HALVES> expand{p, at, ring, reinterpret_cast<uint2*>(shared + kExpandRing + Ring::kBarrierBytes), p.header[3],
                           parts};
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
