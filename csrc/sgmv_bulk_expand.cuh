// Expand of mode "bulk": the planes' sums times B, added to y, an item and a part of its columns to a unit.
#pragma once

#include "sgmv_bulk.cuh"

namespace medley::bulk {

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

// A unit of expand: an item and a part of its columns.
template <typename T, int HALVES>
struct Expand {
  static constexpr int MT = kPairsOfHalves<HALVES>;
  using Sum = typename Sums<HALVES>::Type;
  static constexpr __host__ __device__ int low_bytes(int pairs) { return pairs * HALVES * kLanes * sizeof(uint2); }

  const Params& p;
  const Place& at;
  Ring& ring;
  uint2* low;  // [pairs][HALVES][lanes]: low-rank rows
  const Shares& shares;
  int item, begin, end, next_n, next_first;
  Work work;
  Span next;
  const char* from;

  // Read the unit and start its copies, which depend on no kernel.
  __device__ void open(int unit) {
    const int per_part = (p.num_column_blocks + shares.column_parts - 1) / shares.column_parts;
    item = unit / shares.column_parts;
    work.load(p, item, at.lane);
    begin = (unit - item * shares.column_parts) * per_part;
    end = min(begin + per_part, p.num_column_blocks);
    next = span_of(0);
    next_n = next.begin;
    next_first = 0;
    from = from_lane(work.tile, at.lane);
#pragma unroll 1
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
      ring.fill(from + p.b_offset + (next_n + at.warp * kDepth) * kBlockBytes, min(shares.tiles, work.num_tiles - next_first),
                blocks * kBlockBytes, at.lane);
    next_first += shares.tiles;
    if (next_first >= work.num_tiles) {
      next_first = 0;
      next_n += kStep;
    }
    from = from_lane(work.tile, next_first + at.lane);
  }

  __device__ Lanes<HALVES> rows_of(const Span& span) const {
    const int shift = p.y_begin[span.site] - p.n_begin[span.site] * kBlock;  // from the group's columns to y's
    return Lanes<HALVES>(p.y, p.y_stride, work, shift + span.begin * kBlock,
                         min(p.y_begin[span.site] + p.out_features[span.site], shift + span.end * kBlock), at.warp * kDepth,
                         at.group, at.quad);
  }

  // The low-rank rows of the sites that this part has columns of.
  __device__ void add_planes(int from_site, int to_site) {
    if (at.group >= work.num_rows || begin >= end) return;
    const Sum* plane = Planes<HALVES>::of(p, item, shares.k_units(), 0) + at.lane;
    const long long size = Planes<HALVES>::size(p);
    for (int e = at.warp; e < work.num_pairs * MT; e += kWarps) {
      const int s = work.site(e / MT % work.num_active);
      if (s < from_site || s > to_site) continue;
      const Sum* from_units = plane + e * kLanes;
      const Sum sum = shares.is_halved ? units_sum<true>(from_units, size) : units_sum<false>(from_units, size);
      const float scale = __ldg(work.scales + s);
      uint2* to = low + e * (HALVES / MT) * kLanes + at.lane;
      to[0] = Number<T>::encode(make_float2(sum.x, sum.y), scale);
      if constexpr (HALVES > 1) to[kLanes] = Number<T>::encode(make_float2(sum.z, sum.w), scale);
    }
  }
  template <bool IS_HALVED>
  static __device__ Sum units_sum(const Sum* from_units, long long size) {
    auto slice = [&](int i) {
      if (!IS_HALVED) return __ldcg(from_units + i * size);
      return __ldcg(from_units + 2 * i * size) + __ldcg(from_units + (2 * i + 1) * size);
    };
    Sum sum = slice(0);
#pragma unroll
    for (int i = 1; i < kSlices; ++i) sum = sum + slice(i);
    return sum;
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
        Columns<HALVES> acc[kDepth] = {};
        if (span.end - span.begin - step * kStep - at.warp * kDepth > 0) {
          const unsigned here = ring.wait(at.lane);
          // A block past the span is multiplied with whatever is there, and not stored.
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            Number<T>::expand(acc[d][0], v0, Ring::load(here + d * kBlockBytes));
            if (has_second) Number<T>::expand(acc[d][0], v1, Ring::load(here + kCopyBytes + d * kBlockBytes));
          }
          ring.release();
        }
        fill();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) add_to<T, HALVES>(y, step, d, before, acc[d]);
      });
      return;
    }
    walk(y, ahead, steps, [&](int step, const Ahead<HALVES>& before) {
      const bool has_blocks = span.end - span.begin - step * kStep - at.warp * kDepth > 0;
      Columns<HALVES> acc[kDepth] = {};
      for (int first = 0; first < work.num_tiles; first += shares.tiles) {
        if (has_blocks) {
          const unsigned here = ring.wait(at.lane);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            if (i >= shares.tiles || first + i >= work.num_tiles) break;
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
              const uint4 w = Ring::load(here + i * kCopyBytes + d * kBlockBytes);
#pragma unroll
              for (int h = 0; h < HALVES; ++h)
                Number<T>::expand(acc[d][h], mine[(first + i) * tile_step + h * kLanes], w);
            }
          }
          ring.release();
        }
        fill();
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) add_to<T, HALVES>(y, step, d, before, acc[d]);
    });
  }
};

}  // namespace medley::bulk
