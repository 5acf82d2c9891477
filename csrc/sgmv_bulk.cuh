// SGMV for Hopper: weights by bulk copies, sums over K through a workspace, in two launches.
//
// Each warp keeps stages of weights in flight to shared memory of its own, so that no warp waits for another and the
// rest is little more than the tensor cores' instructions. Weights do not depend on the kernel before, so their copies
// start while that still runs (programmatic dependent launch).
//
// How a row's sums are ordered depends on K alone: 8 slices take a range of K each, the 4 warps of a slice take its
// blocks of 32 two by two in turn, a warp adds its own in order, then the warps of a slice are added in order, then the
// slices. So a row's bits are the same in any batch and any block. There is no atomic and nothing to clear.
#pragma once

#include "sgmv_bulk_loads.cuh"

namespace medley::bulk {

inline __device__ int slice_blocks(const Params& p) { return (p.k_blocks + kSlices - 1) / kSlices; }

// Where a thread stands in its block.
struct Place {
  // Through a shuffle, so that the compiler knows it to be the same in all lanes: 7 % less time at one adapter.
  int warp = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0);
  int lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
};

// An item's rows, 8 to a half; shrink gives two halves to the tensor cores at once.
template <int HALVES>
constexpr int kPairsOfHalves = (HALVES + 1) / 2;
// Numbers in the plane of a unit of shrink: [pairs][MT][lanes], each two ranks of a lane's row, and of its row 8 further on.
template <int HALVES>
__device__ long long plane_size(const Params& p) {
  return static_cast<long long>(p.max_pairs) * kPairsOfHalves<HALVES> * kLanes;
}

// A unit of shrink: an item and a slice of K. `size`: pairs in a stage.
template <typename T, int HALVES>
struct Shrink {
  static constexpr int MT = kPairsOfHalves<HALVES>;
  static constexpr int kPartBytes = kWarps * kGroup * MT * kLanes * 16;

  const Params& p;
  const Place& at;
  Ring& ring;
  float4* part;  // [warps][kGroup][MT][lanes]: sums of the warps
  int size, unit, begin, end, next_first, next_k;
  Work work;
  const char* from;

  // Read the unit and start its copies, which depend on no kernel.
  __device__ void open(int wanted) {
    unit = wanted;
    work.load(p, unit / kSlices, at.lane);
    begin = unit % kSlices * slice_blocks(p);
    end = min(begin + slice_blocks(p), p.k_blocks);
    next_first = 0;
    next_k = begin;
    from = pair_of_lane(0);
    for (int i = 0; i < ring.num_stages; ++i) fill();
  }

  // Lane i: where pair `first` + i of the item begins in A.
  __device__ const char* pair_of_lane(int first) const {
    const int mine = min(first + at.lane, work.num_pairs - 1), tile = mine / work.num_active;
    return from_lane(work.tile, tile) +
           static_cast<long long>(work.site(mine - tile * work.num_active)) * p.k_blocks * kBlockBytes;
  }

  __device__ void fill() {
    const int blocks = min(kDepth, end - next_k - at.warp * kDepth);
    if (next_first < work.num_pairs && blocks > 0)
      ring.fill(from + (next_k + at.warp * kDepth) * kBlockBytes, min(size, work.num_pairs - next_first),
                blocks * kBlockBytes, at.lane);
    next_k += kStep;
    if (next_k < end) return;
    next_k = begin;
    next_first += size;
    if (next_first < work.num_pairs) from = pair_of_lane(next_first);
  }

  // Add up, and write the unit's plane.
  __device__ void run() {
    float4* plane = p.planes + unit * plane_size<HALVES>(p);
    const bool has_row = at.group < work.num_rows;
    const Lanes<HALVES> start(p.x, p.x_stride, work, begin * kBlock, min(p.in_features, end * kBlock), at.warp, at.group,
                              at.quad);
    Lanes<HALVES> x = start;
    Ahead<HALVES> even, odd;
    x.load(even);
    for (int first = 0; first < work.num_pairs; first += size) {
      const int count = min(size, work.num_pairs - first);
      float acc[kGroup][MT][4] = {};
      auto step = [&](int k, const Ahead<HALVES>& now, Ahead<HALVES>& next) {
        // After the last step of a pass comes the first of the next, over the same x.
        if (k + kStep < end)
          x.advance();
        else
          x = start;
        if (k + kStep < end || first + size < work.num_pairs) x.load(next);
        const int blocks = end - k - at.warp * kDepth;
        if (blocks <= 0) return fill();
        const unsigned here = ring.wait(at.lane);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (i >= count) break;
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            if (d >= blocks) break;
            const uint4 w = Ring::load(here + i * kCopyBytes + d * kBlockBytes);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              const uint4& top = now.values[d][2 * m];
              uint4 bottom = make_uint4(0, 0, 0, 0);
              if constexpr (HALVES > 1) bottom = now.values[d][2 * m + 1];
              Number<T>::mma(acc[i][m], top.x, bottom.x, top.y, bottom.y, w.x, w.y);
              Number<T>::mma(acc[i][m], top.z, bottom.z, top.w, bottom.w, w.z, w.w);
            }
          }
        }
        ring.release();
        fill();
      };
      for (int k = begin; k < end; k += 2 * kStep) {
        step(k, even, odd);
        if (k + kStep < end)
          step(k + kStep, odd, even);
        else
          even = odd;
      }
      if (has_row)
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (i < count)
#pragma unroll
            for (int m = 0; m < MT; ++m)
              part[((at.warp * kGroup + i) * MT + m) * kLanes + at.lane] =
                  make_float4(acc[i][m][0], acc[i][m][1], acc[i][m][2], acc[i][m][3]);
      __syncthreads();
      for (int e = at.warp; e < count * MT; e += kWarps)
        if (has_row) {
          float4 sum = part[e * kLanes + at.lane];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) sum = sum + part[(w * kGroup * MT + e) * kLanes + at.lane];
          __stcg(plane + (first * MT + e) * kLanes + at.lane, sum);
        }
      __syncthreads();
    }
  }
};

// A part of an item's columns within one adapted site: column blocks `begin` to `end` of the group.
struct Span {
  int begin, end, site;
};

// Sums of a lane over one of its blocks of columns: of its row in each half, the leading and the remaining part of the
// low-rank row apart (Number::expand).
template <int HALVES>
using Columns = float[HALVES][4][4];

// Add to rows of y that were loaded some steps ago, and store them.
template <typename T, int HALVES>
__device__ void add_to(const Lanes<HALVES>& y, int step, int d, const Ahead<HALVES>& before, const Columns<HALVES>& acc) {
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    if (!y.has(step, d, h)) continue;
    const uint4& was = before.values[d][h];
    const unsigned words[4] = {was.x, was.y, was.z, was.w};
    unsigned after[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = Number<T>::unpack(words[j]);
      const float* sum = acc[h][j];
      after[j] = Number<T>::pack(pair.x + (sum[0] + sum[2]), pair.y + (sum[1] + sum[3]));
    }
    *reinterpret_cast<uint4*>(y.at(step, d, h)) = make_uint4(after[0], after[1], after[2], after[3]);
  }
}

// A unit of expand: an item and a part of its columns. `size`: tiles in a stage.
template <typename T, int HALVES>
struct Expand {
  static constexpr int MT = kPairsOfHalves<HALVES>;
  static constexpr __host__ __device__ int low_bytes(int pairs) { return pairs * HALVES * kLanes * sizeof(uint2); }

  const Params& p;
  const Place& at;
  Ring& ring;
  uint2* low;  // [pairs][HALVES][lanes]: low-rank rows
  int size, parts, item, begin, end, next_n, next_first;
  Work work;
  Span next;
  const char* from;

  // Read the unit and start its copies, which depend on no kernel.
  __device__ void open(int unit) {
    const int per_part = (p.num_column_blocks + parts - 1) / parts;
    item = unit / parts;
    work.load(p, item, at.lane);
    begin = (unit - item * parts) * per_part;
    end = min(begin + per_part, p.num_column_blocks);
    next = span_of(0);
    next_n = next.begin;
    next_first = 0;
    from = from_lane(work.tile, at.lane);
    for (int i = 0; i < ring.num_stages; ++i) fill();
  }

  // The span of site `s`; empty where the site is not adapted.
  __device__ Span span_of(int s) const {
    const int site_end = s + 1 < MEDLEY_MAX_SITES ? min(p.n_begin[s + 1], p.num_column_blocks) : p.num_column_blocks;
    if (!work.has(s)) return {0, 0, s};
    return {max(begin, p.n_begin[s]), min(end, site_end), s};
  }

  __device__ void fill() {
    while (next_n >= next.end) {
      if (next.site + 1 >= MEDLEY_MAX_SITES) return;
      next = span_of(next.site + 1);
      next_n = next.begin;
    }
    const int blocks = min(kDepth, next.end - next_n - at.warp * kDepth);
    if (blocks > 0)
      ring.fill(from + p.b_offset + (next_n + at.warp * kDepth) * kBlockBytes, min(size, work.num_tiles - next_first),
                blocks * kBlockBytes, at.lane);
    next_first += size;
    if (next_first >= work.num_tiles) {
      next_first = 0;
      next_n += kStep;
    }
    from = from_lane(work.tile, next_first + at.lane);
  }

  __device__ Lanes<HALVES> rows_of(const Span& span) const {
    const int shift = p.y_begin[span.site] - p.n_begin[span.site] * kBlock;  // from the group's columns to y's
    return Lanes<HALVES>(p.y, p.y_stride, work, shift + span.begin * kBlock,
                         min(p.y_begin[span.site] + p.out_features[span.site], shift + span.end * kBlock), at.warp,
                         at.group, at.quad);
  }

  // The low-rank rows of the sites that this part has columns of.
  __device__ void add_planes(int from_site, int to_site) {
    if (at.group >= work.num_rows || begin >= end) return;
    const float4* plane = p.planes + item * kSlices * plane_size<HALVES>(p);
    for (int e = at.warp; e < work.num_pairs * MT; e += kWarps) {
      const int s = work.site(e / MT % work.num_active);
      if (s < from_site || s > to_site) continue;
      float4 sum = __ldcg(plane + e * kLanes + at.lane);
#pragma unroll
      for (int i = 1; i < kSlices; ++i) sum = sum + __ldcg(plane + i * plane_size<HALVES>(p) + e * kLanes + at.lane);
      const float scale = __ldg(work.scales + s);
      uint2* to = low + e * (HALVES / MT) * kLanes + at.lane;
      to[0] = Number<T>::encode(make_float2(sum.x, sum.y), scale);
      if constexpr (HALVES > 1) to[kLanes] = Number<T>::encode(make_float2(sum.z, sum.w), scale);
    }
  }

  // Add the planes, scale, multiply, add to y.
  __device__ void run() {
    const int from_site = site_of_column_block(p, min(begin, p.num_column_blocks - 1));
    const int to_site = site_of_column_block(p, max(end - 1, 0));
    Ahead<HALVES> ahead[kAhead<HALVES> + 1];
    Lanes<HALVES> y = rows_of(span_of(from_site));
    load_first(y, ahead);
    add_planes(from_site, to_site);
    __syncthreads();
    for (int s = from_site; s <= to_site; ++s) {
      const Span span = span_of(s);
      if (span.begin >= span.end) continue;
      if (s != from_site) {
        y = rows_of(span);
        load_first(y, ahead);
      }
      multiply(span, y, ahead, low + work.active_of(s) * HALVES * kLanes + at.lane);
    }
    __syncthreads();  // `low` is written again for the next unit
  }

  __device__ void load_first(const Lanes<HALVES>& y, Ahead<HALVES> (&ahead)[kAhead<HALVES> + 1]) const {
#pragma unroll
    for (int j = 0; j < kAhead<HALVES>; ++j) y.load(ahead[j], j);
  }

  // Calls each(step, what was loaded for it) for each step of a site. The first kAhead are loaded already.
  template <typename Each>
  __device__ void walk(const Lanes<HALVES>& y, Ahead<HALVES> (&ahead)[kAhead<HALVES> + 1], int steps, Each&& each) const {
    for (int first = 0; first < steps; first += kAhead<HALVES> + 1)
#pragma unroll
      for (int j = 0; j <= kAhead<HALVES>; ++j) {
        const int step = first + j;
        if (step >= steps) break;
        y.load(ahead[(j + kAhead<HALVES>) % (kAhead<HALVES> + 1)], step + kAhead<HALVES>);
        each(step, ahead[j]);
      }
  }

  // One site. `mine`: this lane's low-rank rows of the site's first tile.
  __device__ void multiply(const Span& span, const Lanes<HALVES>& y, Ahead<HALVES> (&ahead)[kAhead<HALVES> + 1],
                           const uint2* mine) {
    const int steps = (span.end - span.begin + kStep - 1) / kStep;
    const int tile_step = work.num_active * HALVES * kLanes;
    if (HALVES == 1 && work.num_tiles <= kTiles) {  // up to rank 16: the low-rank row stays in registers
      const bool has_second = work.num_tiles > 1;
      const uint2 v0 = mine[0], v1 = has_second ? mine[tile_step] : make_uint2(0, 0);
      walk(y, ahead, steps, [&](int step, const Ahead<HALVES>& before) {
        if (span.end - span.begin - step * kStep - at.warp * kDepth <= 0) return fill();
        const unsigned here = ring.wait(at.lane);
        Columns<HALVES> acc[kDepth] = {};
        // A block past the span is multiplied with whatever is there, and not stored.
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          Number<T>::expand(acc[d][0], v0, Ring::load(here + d * kBlockBytes));
          if (has_second) Number<T>::expand(acc[d][0], v1, Ring::load(here + kCopyBytes + d * kBlockBytes));
        }
        ring.release();
        fill();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) add_to<T, HALVES>(y, step, d, before, acc[d]);
      });
      return;
    }
    walk(y, ahead, steps, [&](int step, const Ahead<HALVES>& before) {
      const bool has_blocks = span.end - span.begin - step * kStep - at.warp * kDepth > 0;
      Columns<HALVES> acc[kDepth] = {};
      for (int first = 0; first < work.num_tiles; first += size) {
        if (!has_blocks) {
          fill();
          continue;
        }
        const unsigned here = ring.wait(at.lane);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i >= size || first + i >= work.num_tiles) break;
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            const uint4 w = Ring::load(here + i * kCopyBytes + d * kBlockBytes);
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
              Number<T>::expand(acc[d][h], mine[(first + i) * tile_step + h * kLanes], w);
          }
        }
        ring.release();
        fill();
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) add_to<T, HALVES>(y, step, d, before, acc[d]);
    });
  }
};

}  // namespace medley::bulk
