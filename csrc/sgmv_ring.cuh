// SGMV for sm_80: loads of 16 bytes a lane, kept in flight in a ring of shared memory; sums over K through a workspace, in
// two launches.
//
// How a row's sums are ordered depends on K alone: 32 warps (4 slices, 8 warps each) take the blocks of 32 along K in
// turn, a warp adds its own in order, then the 8 warps of a slice are added in order, then the slices. So a row's bits
// are the same in any batch and any block. There is no atomic and nothing to clear.
#pragma once

#include "sgmv_common.cuh"

namespace medley::ring {

constexpr int kSlices = 4;
constexpr int kSplit = kSlices * kWarps;  // warps among which K, and the columns, of an item are divided
constexpr int kRing = 12;                 // loads that a thread has in flight, one of them being read
constexpr int kPassPairs = 8;             // (tile, site) pairs that a warp works on together

enum Mode { kShrink, kExpand };

// 16 bytes to this thread's own place in shared memory; past `is_valid` zeros are written and nothing is read.
inline __device__ void copy_async(uint4* to, const void* from, bool is_valid) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
inline __device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Walks the 16-byte loads of a warp in the order in which they are used, over all of its items, and issues them
// ahead of their use. A load goes to the lane's own place in the ring, so that no barrier is needed.
//
// The order of shrink: for each pass of up to kPassPairs (tile, site) pairs, for each of the warp's blocks of K: the pairs'
// weights, then x, 8 rows a load. Of expand: for each block of columns the tiles' weights, then y, 8 rows a load.
template <Mode M>
struct Loads {
  const Params& p;
  uint4* ring;  // [kRing] of this thread, kThreads apart
  int item, num_items, parts, stride, lane, warp;
  Work work;
  int part;  // of `item`
  bool is_done;
  int at, num_weights, end;    // place in the present block of K or of columns: weights, then x or y
  int block, pair;             // block of K or of columns; first pair of the pass
  const char* weights;         // lane u: where weight u of the present pass or tile begins
  int head, tail;              // ring places of the next load and of the next use

  __device__ Loads(const Params& p, uint4* ring, int first, int num_items, int parts, int stride, int slice)
      : p(p), ring(ring), item(first), num_items(num_items), parts(parts), stride(stride), lane(threadIdx.x % kLanes),
        warp(slice * kWarps + threadIdx.x / kLanes), is_done(false), head(0), tail(0) {
    open();
  }

  // Start on `item`, or on the next one that has anything for this warp.
  __device__ void open() {
    for (; item < num_items; item += stride) {
      work.load(p, item / parts, lane);
      part = item % parts;
      if (M == kExpand) {
        if (open_columns(part * kSplit + warp)) return;
      } else if (part == 0 && warp < p.k_blocks && work.num_pairs > 0) {
        open_pass(0);
        return;
      }
    }
    is_done = true;
  }

  __device__ void open_pass(int first) {
    pair = first;
    num_weights = min(kPassPairs, work.num_pairs - pair);
    end = num_weights + work.halves();
    block = warp;
    at = 0;
    const int mine = min(pair + lane, work.num_pairs - 1), tile = mine / work.num_active;
    weights = from_lane(work.tile, tile) +
              static_cast<long long>(work.site(mine - tile * work.num_active)) * p.k_blocks * kBlockBytes;
  }

  // Go to column block `from` or the next one that this item adapts; false: there is none.
  __device__ bool open_columns(int from) {
    weights = work.tile + p.b_offset;
    num_weights = work.num_tiles;
    end = num_weights + work.halves();
    at = 0;
    for (block = from; block < p.num_column_blocks; block += parts * kSplit)
      if (work.has(site_of_column_block(p, block))) return true;
    return false;
  }

  // Issue the next load. `with_activations`: those of x and y may be issued. False: nothing was.
  __device__ bool issue(bool with_activations) {
    if (is_done || (!with_activations && at >= num_weights)) return false;
    const char* from;
    bool is_valid = true;
    if (at < num_weights) {
      from = from_lane(weights, at) + block * kBlockBytes + lane * 16;
    } else {
      const int row = (at - num_weights) * 8 + lane / 4;
      int column = block * kBlock + lane % 4 * 8;
      long long offset;
      if (M == kShrink) {
        is_valid = column < p.in_features;
        from = static_cast<const char*>(p.x);
        offset = (work.row_start + row) * p.x_stride + column;
      } else {
        const int s = site_of_column_block(p, block);
        column -= p.n_begin[s] * kBlock;
        is_valid = column < p.out_features[s];
        from = static_cast<const char*>(p.y);
        offset = (work.row_start + row) * p.y_stride + p.y_begin[s] + column;
      }
      is_valid = is_valid && row < work.num_rows;
      if (is_valid) from += offset * 2;
    }
    copy_async(ring + head * kThreads, from, is_valid);
    head = head + 1 == kRing ? 0 : head + 1;
    if (++at == end) advance();
    return true;
  }

  __device__ void advance() {
    if (M == kShrink) {
      at = 0;
      block += kSplit;
      if (block < p.k_blocks) return;
      if (pair + kPassPairs < work.num_pairs) return open_pass(pair + kPassPairs);
    } else if (open_columns(block + parts * kSplit)) {
      return;
    }
    item += stride;
    open();
  }

  // The next load in order, and one more sent after it.
  __device__ uint4 take() {
    wait_copies<kRing - 2>();
    const uint4 value = ring[tail * kThreads];
    tail = tail + 1 == kRing ? 0 : tail + 1;
    issue(true);
    commit_copies();
    return value;
  }
};

// 16-byte units: of the ring, and behind it of the warps' partial sums (shrink) or the low-rank rows (expand).
template <int MT, Mode M>
struct Smem {
  static constexpr int kRingSize = kRing * kThreads, kPairSize = MT * kLanes, kPart = kWarps * kPassPairs * kPairSize;
  static int bytes(int max_pairs) { return (kRingSize + (M == kShrink ? kPart : max_pairs * kPairSize)) * 16; }
};

template <typename T, int MT, Mode M>
__global__ void __launch_bounds__(kThreads, MT == 1 ? 2 : 1) sgmv_kernel(const __grid_constant__ Params p) {
  extern __shared__ uint4 smem[];
  using S = Smem<MT, M>;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
  const int slice = blockIdx.x % kSlices, cluster = blockIdx.x / kSlices, num_clusters = gridDim.x / kSlices;
  const int warp_of_item = slice * kWarps + warp;

  const int parts = p.header[1], num_items = p.header[0] * parts;
  Loads<M> loads(p, smem + threadIdx.x, cluster, num_items, parts, num_clusters, slice);
  // Weights and the work list do not depend on the kernel before: fetch them while it still runs.
  int issued = 0;
  for (; issued < kRing - 1; ++issued) {
    if (!loads.issue(false)) break;
    commit_copies();
  }
  wait_for_previous_kernel();
  for (; issued < kRing - 1; ++issued) {
    loads.issue(true);
    commit_copies();
  }

  Work work;
  for (int item = cluster; item < num_items; item += num_clusters) {
    const int block = item / parts, part_of_item = item % parts;
    if (M == kShrink && part_of_item != 0) continue;
    work.load(p, block, lane);
    // [slices][pairs][MT][lanes] of this block
    float4* plane = p.planes + static_cast<long long>(block) * kSlices * p.max_pairs * S::kPairSize;
    // Of a tile of 16 rows lane l holds rows l / 4 and l / 4 + 8: with few rows, few lanes have anything to add.
    const bool has_row = group < work.num_rows;
    const int halves = work.halves();

    if constexpr (M == kShrink) {
      float4* part = reinterpret_cast<float4*>(smem + S::kRingSize);  // [warps][pass pairs][MT][lanes]
      for (int first = 0; first < work.num_pairs; first += kPassPairs) {
        const int count = min(kPassPairs, work.num_pairs - first);
        float acc[kPassPairs][MT][4] = {};
        for (int k = warp_of_item; k < p.k_blocks; k += kSplit) {
          uint4 w[kPassPairs];
#pragma unroll
          for (int i = 0; i < kPassPairs; ++i)
            if (i < count) w[i] = loads.take();
          uint4 x[2 * MT];
#pragma unroll
          for (int h = 0; h < 2 * MT; ++h) x[h] = h < halves ? loads.take() : make_uint4(0, 0, 0, 0);
#pragma unroll
          for (int i = 0; i < kPassPairs; ++i)
            if (i < count)
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                const uint4 &top = x[2 * m], &bottom = x[2 * m + 1];
                Number<T>::mma(acc[i][m], top.x, bottom.x, top.y, bottom.y, w[i].x, w[i].y);
                Number<T>::mma(acc[i][m], top.z, bottom.z, top.w, bottom.w, w[i].z, w[i].w);
              }
        }
#pragma unroll
        for (int i = 0; i < kPassPairs; ++i)
          if (i < count && has_row)
#pragma unroll
            for (int m = 0; m < MT; ++m)
              part[((warp * kPassPairs + i) * MT + m) * kLanes + lane] =
                  make_float4(acc[i][m][0], acc[i][m][1], acc[i][m][2], acc[i][m][3]);
        __syncthreads();
        for (int e = warp; e < count * MT; e += kWarps)
          if (has_row) {
            float4 sum = part[e * kLanes + lane];
#pragma unroll
            for (int w = 1; w < kWarps; ++w) sum = sum + part[(w * kPassPairs * MT + e) * kLanes + lane];
            plane[slice * p.max_pairs * S::kPairSize + (first * MT + e) * kLanes + lane] = sum;
          }
        __syncthreads();
      }
    } else {
      uint2* low = reinterpret_cast<uint2*>(smem + S::kRingSize);  // [pairs][2 MT][lanes], of all slices, scaled
      for (int e = warp; e < work.num_pairs * MT; e += kWarps)
        if (has_row) {
          float4 sum = __ldcg(plane + e * kLanes + lane);
#pragma unroll
          for (int s = 1; s < kSlices; ++s) sum = sum + __ldcg(plane + (s * p.max_pairs * MT + e) * kLanes + lane);
          const float scale = __ldg(work.scales + work.site(e / MT % work.num_active));
          low[2 * e * kLanes + lane] = Number<T>::encode(make_float2(sum.x, sum.y), scale);
          low[(2 * e + 1) * kLanes + lane] = Number<T>::encode(make_float2(sum.z, sum.w), scale);
        }
      __syncthreads();
      if (item + num_clusters >= num_items) let_next_kernel_start();

      for (int n = part_of_item * kSplit + warp_of_item; n < p.num_column_blocks; n += parts * kSplit) {
        const int s = site_of_column_block(p, n);
        if (!work.has(s)) continue;
        const uint2* mine = low + work.active_of(s) * 2 * MT * kLanes + lane;
        const int tile_step = work.num_active * 2 * MT * kLanes;
        float acc[2 * MT][4][4] = {};
        for (int t = 0; t < work.num_tiles; ++t) {
          const uint4 w = loads.take();
#pragma unroll
          for (int h = 0; h < 2 * MT; ++h) Number<T>::expand(acc[h], mine[t * tile_step + h * kLanes], w);
        }
        const int column = (n - p.n_begin[s]) * kBlock + quad * 8;
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h) {
          if (h >= halves) break;
          const uint4 before = loads.take();
          const int row = h * 8 + group;
          if (row < work.num_rows && column < p.out_features[s]) {
            const unsigned words[4] = {before.x, before.y, before.z, before.w};
            unsigned after[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float2 y = Number<T>::unpack(words[j]);
              const float* sum = acc[h][j];
              after[j] = Number<T>::pack(y.x + (sum[0] + sum[2]), y.y + (sum[1] + sum[3]));
            }
            T* to = static_cast<T*>(p.y) + (work.row_start + row) * p.y_stride + p.y_begin[s] + column;
            *reinterpret_cast<uint4*>(to) = make_uint4(after[0], after[1], after[2], after[3]);
          }
        }
      }
      __syncthreads();  // `low` is written again for the next item
    }
  }
}

}  // namespace medley::ring
