// Shrink of mode "bulk": x times A, an item and a part of K and of its pairs (tile, site) to a unit.
#pragma once

#include "sgmv_bulk.cuh"

namespace medley::bulk {

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

}  // namespace medley::bulk
