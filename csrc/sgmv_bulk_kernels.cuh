// The kernels of sgmv_bulk.cuh: shrink and expand as two launches, and both in one.
//
// In one launch ("joined") a thread block first does its units of shrink, then its units of expand. The 8 planes of an
// item come from other blocks; each is announced by a flag in device memory, which a unit of expand waits for. That ends
// because all blocks of the grid are resident at once and none waits before its shrinks are done. A flag holds the number
// of the launch (its epoch), so that nothing need be cleared; each block keeps the number in a word of its own and adds
// one as it ends. Flags and words belong to one group and size of items, and are zero before their first launch.
#pragma once

#include "sgmv_bulk.cuh"

namespace medley::bulk {

constexpr int kShrinkRing = 40 << 10;
constexpr int kResidentBytes = 220 << 10;  // of a multiprocessor, for all of its thread blocks
template <int HALVES>
constexpr int kBlockBytesShared = kResidentBytes / kResident<HALVES>;
constexpr int kMaxGrid = 4096;  // thread blocks that "joined" has words for

template <int HALVES>
constexpr int shrink_bytes() {
  return kShrinkRing + Ring::kBarrierBytes + Shrink<void, HALVES>::kPartBytes;
}
// What the low-rank rows leave to the ring, in whole stages of two tiles.
template <int HALVES>
__host__ __device__ constexpr int expand_ring(int max_pairs) {
  constexpr int kUnit = kWarps * 2 * kCopyBytes;
  const int left =
      kBlockBytesShared<HALVES> - Ring::kBarrierBytes - Expand<void, HALVES>::low_bytes(max_pairs);
  return (left < kMaxStages * kUnit ? left / kUnit : kMaxStages) * kUnit;
}
template <int HALVES>
constexpr int expand_bytes(int max_pairs) {
  return expand_ring<HALVES>(max_pairs) + Ring::kBarrierBytes + Expand<void, HALVES>::low_bytes(max_pairs);
}
// What the sums of the warps, and after them the low-rank rows, of items of so many pairs leave to the ring.
template <int HALVES>
__device__ int joined_ring(int most_pairs) {
  const int meeting = max(Shrink<void, HALVES>::kPartBytes, Expand<void, HALVES>::low_bytes(most_pairs));
  return (kBlockBytesShared<HALVES> - Ring::kBarrierBytes - meeting) / (kWarps * 128) * (kWarps * 128);
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
    shrink.run([] {});
  }
  // Who comes next counts on this kernel to have waited, also where there was nothing to do.
  if (is_first) wait_for_previous_kernel();
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) expand_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const Place at;
  const int ring_bytes = expand_ring<HALVES>(p.max_pairs);
  Ring ring(shared, ring_bytes, p.header[3], at.warp);
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int parts = p.header[1], num_units = p.header[0] * parts;
  Expand<T, HALVES> expand{p, at, ring, reinterpret_cast<uint4*>(shared + ring_bytes + Ring::kBarrierBytes),
                           p.header[3], parts};
  bool is_first = true;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    expand.open(unit);
    if (is_first) wait_for_previous_kernel();
    is_first = false;
    expand.run([] {});
  }
  if (is_first) wait_for_previous_kernel();
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) joined_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const Place at;
  const int parts = p.header[1], num_shrinks = p.header[0] * kSlices, num_expands = p.header[0] * parts;
  const int ring_bytes = joined_ring<HALVES>(p.header[4]), tiles = p.header[3];
  // Low-rank rows of large ranks leave little: two stages there must be.
  const int pairs = min(p.header[2], max(ring_bytes / kWarps / kCopyBytes / 2, tiles));
  Ring ring(shared, ring_bytes, max(pairs, tiles), at.warp);
  char* meeting = shared + ring_bytes + Ring::kBarrierBytes;
  if (at.lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();

  int epoch = 0;
  bool is_first = true;
  auto wait_once = [&] {
    if (!is_first) return;
    is_first = false;
    wait_for_previous_kernel();
    epoch = load_relaxed(p.epochs + blockIdx.x) + 1;
  };
  Expand<T, HALVES> expand{p, at, ring, reinterpret_cast<uint4*>(meeting), tiles, parts};
  bool is_open = false;
  {
    Shrink<T, HALVES> shrink{p, at, ring, reinterpret_cast<float4*>(meeting), pairs};
    for (int unit = blockIdx.x; unit < num_shrinks; unit += gridDim.x) {
      shrink.open(unit);
      wait_once();
      // B of the first expand arrives while the last shrink is added up and announced.
      const bool is_last = unit + gridDim.x >= num_shrinks && blockIdx.x < num_expands;
      shrink.run([&] {
        if (is_last) expand.open(blockIdx.x);
        is_open = is_last;
      });
      if (threadIdx.x == 0) store_release(p.flags + unit, epoch);
    }
  }
  for (int unit = blockIdx.x; unit < num_expands; unit += gridDim.x) {
    if (!is_open) expand.open(unit);
    is_open = false;
    wait_once();
    expand.run([&] {
      if (threadIdx.x < kSlices)
        while (load_acquire(p.flags + expand.work.block * kSlices + threadIdx.x) != epoch) {
        }
      __syncthreads();
    });
  }
  wait_once();
  if (threadIdx.x == 0) store_relaxed(p.epochs + blockIdx.x, epoch);
}

}  // namespace medley::bulk
