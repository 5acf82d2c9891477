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

// Calls each(pair, block, its weights) for what a stage at `here` holds.
template <typename Each>
__device__ void each_block(unsigned here, int count, int blocks, Each&& each) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= count) break;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d >= blocks) break;
      each(i, d, Ring::load(here + i * kCopyBytes + d * kBlockBytes));
    }
  }
}

// c += x * w over 32 of K. top, bottom: 8 rows each.
template <typename T>
__device__ void multiply(float (&c)[4], const uint4& top, const uint4& bottom, const uint4& w) {
  Number<T>::mma(c, top.x, bottom.x, top.y, bottom.y, w.x, w.y);
  Number<T>::mma(c, top.z, bottom.z, top.w, bottom.w, w.z, w.w);
}

// What a warp adds up of the pairs (tile, site) of a stage, the halves of its strand apart.
template <typename T, int HALVES>
struct Strand {
  float early[kGroup][kPairsOfHalves<HALVES>][4] = {}, late[kGroup][kPairsOfHalves<HALVES>][4] = {};

  // Of the stage at `here`, which holds `count` pairs and `blocks` blocks of each.
  __device__ void add(const Ahead<HALVES>& x, bool is_late, unsigned here, int count, int blocks) {
    if (is_late)
      add(late, x, here, count, blocks);
    else
      add(early, x, here, count, blocks);
  }
  __device__ float4 sum(int i, int m) const {
    const float(&a)[4] = early[i][m];
    const float(&b)[4] = late[i][m];
    return make_float4(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]);
  }

 private:
  static __device__ void add(float (&half)[kGroup][kPairsOfHalves<HALVES>][4], const Ahead<HALVES>& x, unsigned here,
                             int count, int blocks) {
    each_block(here, count, blocks, [&](int i, int d, const uint4& w) {
#pragma unroll
      for (int m = 0; m < kPairsOfHalves<HALVES>; ++m)
        multiply<T>(half[i][m], x.values[d][2 * m], x.values[d][2 * m + 1], w);
    });
  }
};
// 8 rows fill half of what the unit takes, which has room for 16: the late half of the strand is added up in the other.
template <typename T>
struct Strand<T, 1> {
  float both[kGroup][4] = {};

  __device__ void add(const Ahead<1>& x, bool is_late, unsigned here, int count, int blocks) {
    uint4 early[kDepth], late[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const uint4 none = make_uint4(0, 0, 0, 0);
      early[d] = is_late ? none : x.values[d][0];
      late[d] = is_late ? x.values[d][0] : none;
    }
    each_block(here, count, blocks, [&](int i, int d, const uint4& w) { multiply<T>(both[i], early[d], late[d], w); });
  }
  __device__ float2 sum(int i, int) const { return make_float2(both[i][0] + both[i][2], both[i][1] + both[i][3]); }
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

// A unit of shrink: an item, a slice of K or two strands of one, and some of the item's pairs (tile, site).
template <typename T, int HALVES>
struct Shrink {
  static constexpr int MT = kPairsOfHalves<HALVES>;
  using Sum = typename Sums<HALVES>::Type;
  static constexpr int kPartBytes = kWarps * kGroup * MT * kLanes * sizeof(Sum);

  const Params& p;
  const Place& at;
  Ring& ring;
  Sum* part;  // [warps][kGroup][MT][lanes]: sums of the warps
  const Shares& shares;
  int strand, begin, middle, end;  // of this warp: its first block in each step; blocks of K; where the late half begins
  int pair_begin, pair_end, next_first, next_k;
  int next_tile, next_active;  // of the pair that this lane brings of the stages from next_first on
  Sum* plane;
  Work work;
  const char* from;  // where that pair's A begins

  // Read the unit and start its copies, which depend on no kernel.
  __device__ void open(int unit) {
    const int rest = unit / shares.pair_parts, k_unit = rest & (shares.k_units() - 1), item = rest / shares.k_units();
    work.load(p, item, at.lane);
    plane = Planes<HALVES>::of(p, item, shares.k_units(), k_unit);
    take_strand(k_unit);
    pair_begin = (unit - rest * shares.pair_parts) * shares.part_pairs;
    pair_end = min(pair_begin + shares.part_pairs, work.num_pairs);
    next_first = pair_begin;
    next_k = begin;
    next_tile = (pair_begin + at.lane) / work.num_active;
    next_active = pair_begin + at.lane - next_tile * work.num_active;
    from = next_pair();
#pragma unroll 1
    for (int i = 0; i < ring.num_stages; ++i) fill();
  }

  __device__ void take_strand(int k_unit) {
    const int blocks = (p.k_blocks + kSlices - 1) / kSlices, early_steps = ((blocks + kStep - 1) / kStep + 1) / 2;
    begin = (k_unit >> shares.is_halved) * blocks;
    end = min(begin + blocks, p.k_blocks);
    middle = begin + early_steps * kStep;
    strand = at.warp * kDepth;
    if (!shares.is_halved) return;
    strand = ((k_unit & 1) * 2 + at.warp / 2) * kDepth;
    if (at.warp % 2)
      begin = middle;
    else
      end = min(end, middle);
  }

  // Of lanes that bring one.
  __device__ const char* next_pair() const {
    return from_lane(work.tile, next_tile) + work.site(next_active) * p.k_blocks * kBlockBytes;
  }

  __device__ void fill() {
    const int blocks = min(kDepth, end - next_k - strand);
    if (next_first < pair_end && blocks > 0)
      ring.fill(from + (next_k + strand) * kBlockBytes, min(shares.pairs, pair_end - next_first), blocks * kBlockBytes,
                at.lane);
    next_k += kStep;
    if (next_k < end) return;
    next_k = begin;
    next_first += shares.pairs;
    for (next_active += shares.pairs; next_active >= work.num_active; next_active -= work.num_active) ++next_tile;
    from = next_pair();
  }

  // Add up, and write the unit's plane.
  __device__ void run() {
    const bool has_row = at.group < work.num_rows;
    const Lanes<HALVES> start(p.x, p.x_stride, work, begin * kBlock, min(p.in_features, end * kBlock), strand, at.group,
                              at.quad);
    Lanes<HALVES> x = start;
    Ahead<HALVES> even, odd;
    x.load(even);
    for (int first = pair_begin; first < pair_end; first += shares.pairs) {
      const int count = min(shares.pairs, pair_end - first);
      Strand<T, HALVES> sums;
      auto step = [&](int k, const Ahead<HALVES>& now, Ahead<HALVES>& next) {
        // After the last step of a pass comes the first of the next, over the same x.
        if (k + kStep < end)
          x.advance();
        else
          x = start;
        if (k + kStep < end || first + shares.pairs < pair_end) x.load(next);
        const int blocks = end - k - strand;
        if (blocks > 0) {
          const unsigned here = ring.wait(at.lane);
          sums.add(now, k >= middle, here, count, blocks);
          ring.release();
        }
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
            for (int m = 0; m < MT; ++m) part[((at.warp * kGroup + i) * MT + m) * kLanes + at.lane] = sums.sum(i, m);
      __syncthreads();
      for (int e = at.warp; e < count * MT; e += kWarps)
        if (has_row) {
          auto of_warp = [&](int w) { return part[(w * kGroup * MT + e) * kLanes + at.lane]; };
          __stcg(plane + (first * MT + e) * kLanes + at.lane, (of_warp(0) + of_warp(1)) + (of_warp(2) + of_warp(3)));
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
