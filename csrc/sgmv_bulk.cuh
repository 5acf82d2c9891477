// SGMV for Hopper: weights by bulk copies, sums over K through a workspace, in two launches.
//
// Each warp keeps stages of weights in flight to shared memory of its own, so that no warp waits for another and the
// rest is little more than the tensor cores' instructions. Weights do not depend on the kernel before, so their copies
// start while that still runs (programmatic dependent launch).
//
// How a row's sums are ordered depends on K alone: 8 slices take a range of K each, 4 strands of a slice take its blocks of
// 32 two by two in turn, and each strand is cut into an early and a late half. A half is added in order; then early and
// late, then strands 0 and 1, 2 and 3, then these two, then the slices. A block takes a slice, a strand a warp, or two
// strands of it, half a strand a warp, so that few items fill the device too: a row's bits are the same either way, and in
// any batch. There is no atomic and nothing to clear.
#pragma once

#include "sgmv_bulk_loads.cuh"

namespace medley::bulk {

// Where a thread stands in its block.
struct Place {
  // Through a shuffle, so that the compiler knows it to be the same in all lanes: 7 % less time at one adapter.
  int warp = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0);
  int lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
};

// How a step's work is divided among blocks, and into stages: header[1] on (medley.h). None of it changes bits.
struct Shares {
  int column_parts, pairs, tiles, is_halved, pair_parts, part_pairs, has_deep_rings;

  __device__ explicit Shares(const int* header)
      : column_parts(header[1]), pairs(header[2]), tiles(header[3]), is_halved(header[4]), pair_parts(header[5]),
        part_pairs(header[6]), has_deep_rings(header[7]) {}
  __device__ int k_units() const { return kSlices << is_halved; }  // of an item
};

// An item's rows, 8 to a half; shrink gives two halves to the tensor cores at once.
template <int HALVES>
constexpr int kPairsOfHalves = (HALVES + 1) / 2;
// A lane's low-rank sums: two ranks of its row, and with more than 8 rows also of its row 8 further on.
template <int HALVES>
struct Sums {
  using Type = float4;
};
template <>
struct Sums<1> {
  using Type = float2;
};

// The planes: what units of shrink leave to expand, [items][units of K][pairs][MT][lanes].
template <int HALVES>
struct Planes {
  using Type = typename Sums<HALVES>::Type;
  // Of one unit, in numbers.
  static __device__ long long size(const Params& p) {
    return static_cast<long long>(p.max_pairs) * kPairsOfHalves<HALVES> * kLanes;
  }
  static __device__ Type* of(const Params& p, int item, int units, int unit) {
    return static_cast<Type*>(p.planes) + (static_cast<long long>(item) * units + unit) * size(p);
  }
};

}  // namespace medley::bulk
