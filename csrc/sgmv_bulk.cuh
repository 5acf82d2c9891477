// SGMV for Hopper: weights by bulk copies, sums over K through a workspace, in two launches or in one.
//
// Each warp keeps stages of weights in flight to shared memory of its own, so that no warp waits for another and the
// rest is little more than the tensor cores' instructions. Weights do not depend on the kernel before, so their copies
// start while that still runs (programmatic dependent launch).
//
// How a row's sums are ordered depends on K alone: 8 slices take a range of K each, the 4 warps of a slice take its
// blocks of 32 two by two in turn, a warp adds its own in order, then the warps of a slice are added in order, then the
// slices. So a row's bits are the same in any batch, any block and either number of launches. There is no atomic and
// nothing to clear.
#pragma once

#include "sgmv_bulk_loads.cuh"

namespace medley::bulk {

inline __device__ int slice_blocks(const Params& p) { return (p.k_blocks + kSlices - 1) / kSlices; }

// Where a thread stands in its block.
struct Place {
  int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
};

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
    work.load(p, unit, kSlices, at.lane);
    begin = work.part * slice_blocks(p);
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

  // Add up, and write the unit's plane. `after_loads` is called when the last of its copies has been read.
  template <typename After>
  __device__ void run(After&& after_loads) {
    float4* plane = p.planes + static_cast<long long>(unit) * p.max_pairs * MT * kLanes;
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
      if (first + size >= work.num_pairs) after_loads();
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

// Add to rows of y that were loaded a step ago, and store them.
template <typename T, int HALVES>
__device__ void add_to(const Lanes<HALVES>& y, const Ahead<HALVES>& before,
                       const float (&acc)[kDepth][kPairsOfHalves<HALVES>][4][4]) {
#pragma unroll
  for (int d = 0; d < kDepth; ++d)
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      if (!y.has(d, h)) continue;
      const uint4& was = before.values[d][h];
      const unsigned words[4] = {was.x, was.y, was.z, was.w};
      unsigned after[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = Number<T>::unpack(words[j]);
        const float* sum = &acc[d][h / 2][j][h % 2 * 2];
        after[j] = Number<T>::pack(pair.x + sum[0], pair.y + sum[1]);
      }
      *reinterpret_cast<uint4*>(y.at(d, h)) = make_uint4(after[0], after[1], after[2], after[3]);
    }
}

// A unit of expand: an item and a part of its columns. `size`: tiles in a stage.
template <typename T, int HALVES>
struct Expand {
  static constexpr int MT = kPairsOfHalves<HALVES>;
  static constexpr __host__ __device__ int low_bytes(int pairs) { return pairs * MT * kLanes * 16; }

  const Params& p;
  const Place& at;
  Ring& ring;
  uint4* low;  // [pairs][MT][lanes]: low-rank rows
  int size, parts, begin, end, next_n, next_first;
  Work work;
  Span next;
  const char* from;

  // Read the unit and start its copies, which depend on no kernel.
  __device__ void open(int unit) {
    const int per_part = (p.num_column_blocks + parts - 1) / parts;
    work.load(p, unit, parts, at.lane);
    begin = work.part * per_part;
    end = min(begin + per_part, p.num_column_blocks);
    next = span_of(0);
    next_n = next.begin;
    next_first = 0;
    from = from_lane(work.tile, at.lane) + p.b_offset;
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
      ring.fill(from + (next_n + at.warp * kDepth) * kBlockBytes, min(size, work.num_tiles - next_first),
                blocks * kBlockBytes, at.lane);
    next_first += size;
    from = from_lane(work.tile, next_first + at.lane) + p.b_offset;
    if (next_first < work.num_tiles) return;
    next_first = 0;
    from = work.tile + p.b_offset;
    next_n += kStep;
  }

  __device__ Lanes<HALVES> rows_of(const Span& span) const {
    const int shift = p.y_begin[span.site] - p.n_begin[span.site] * kBlock;  // from the group's columns to y's
    return Lanes<HALVES>(p.y, p.y_stride, work, shift + span.begin * kBlock,
                         min(p.y_begin[span.site] + p.out_features[span.site], shift + span.end * kBlock), at.warp,
                         at.group, at.quad);
  }

  // Add the planes, scale, multiply, add to y. `wait_for_planes` is called when the first rows of y are on their way.
  template <typename Wait>
  __device__ void run(Wait&& wait_for_planes) {
    const int from_site = site_of_column_block(p, min(begin, p.num_column_blocks - 1));
    const int to_site = site_of_column_block(p, max(end - 1, 0));
    Ahead<HALVES> even, odd;
    Lanes<HALVES> y = rows_of(span_of(from_site));
    y.load(even);
    wait_for_planes();
    const float4* plane = p.planes + static_cast<long long>(work.block) * kSlices * p.max_pairs * MT * kLanes;
    if (at.group < work.num_rows && begin < end) {
      for (int e = at.warp; e < work.num_pairs * MT; e += kWarps) {
        const int s = work.site(e / MT % work.num_active);
        if (s < from_site || s > to_site) continue;
        float4 sum = __ldcg(plane + e * kLanes + at.lane);
#pragma unroll
        for (int i = 1; i < kSlices; ++i) sum = sum + __ldcg(plane + (i * p.max_pairs * MT + e) * kLanes + at.lane);
        low[e * kLanes + at.lane] = Number<T>::encode(sum, __ldg(work.scales + s));
      }
    }
    __syncthreads();
    const int tile_step = work.num_active * MT * kLanes;
    for (int s = from_site; s <= to_site; ++s) {
      const Span span = span_of(s);
      if (span.begin >= span.end) continue;
      if (s != from_site) {
        y = rows_of(span);
        y.load(even);
      }
      const uint4* mine = low + work.active_of(s) * MT * kLanes + at.lane;
      auto over_columns = [&](auto&& multiply) {
        auto step = [&](int n, const Ahead<HALVES>& now, Ahead<HALVES>& after) {
          const Lanes<HALVES> here = y;
          y.advance();
          y.load(after);
          float acc[kDepth][MT][4][4] = {};
          multiply(acc, span.end - n - at.warp * kDepth);
          add_to<T, HALVES>(here, now, acc);
        };
        for (int n = span.begin; n < span.end; n += 2 * kStep) {
          step(n, even, odd);
          if (n + kStep < span.end) step(n + kStep, odd, even);
        }
      };
      // A block past the span is multiplied with whatever is there, and not stored.
      if (work.num_tiles <= 2) {  // up to rank 16: the low-rank rows stay in registers
        const bool has_second = work.num_tiles == 2;
        uint4 v0[MT], v1[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          v0[m] = mine[m * kLanes];
          v1[m] = has_second ? mine[tile_step + m * kLanes] : make_uint4(0, 0, 0, 0);
        }
        over_columns([&](float (&acc)[kDepth][MT][4][4], int blocks) {
          if (blocks <= 0) return fill();
          const unsigned here = ring.wait(at.lane);
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            const uint4 w0 = Ring::load(here + d * kBlockBytes);
            uint4 w1 = make_uint4(0, 0, 0, 0);
            if (has_second) w1 = Ring::load(here + kCopyBytes + d * kBlockBytes);
#pragma unroll
            for (int m = 0; m < MT; ++m) Number<T>::expand(acc[d][m], v0[m], v1[m], w0, w1);
          }
          ring.release();
          fill();
        });
      } else {
        over_columns([&](float (&acc)[kDepth][MT][4][4], int blocks) {
          for (int first = 0; first < work.num_tiles; first += size) {
            if (blocks <= 0) {
              fill();
              continue;
            }
            const unsigned start = ring.wait(at.lane);
            const bool has_second = first + 1 < work.num_tiles;
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
              const uint4 w0 = Ring::load(start + d * kBlockBytes);
              const uint4 w1 = has_second ? Ring::load(start + kCopyBytes + d * kBlockBytes) : make_uint4(0, 0, 0, 0);
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                const uint4* here = mine + first * tile_step + m * kLanes;
                const uint4 v1 = has_second ? here[tile_step] : make_uint4(0, 0, 0, 0);
                Number<T>::expand(acc[d][m], here[0], v1, w0, w1);
              }
            }
            ring.release();
            fill();
          }
        });
      }
    }
    __syncthreads();  // `low` is written again for the next unit
  }
};

}  // namespace medley::bulk
