// SGMV for Hopper: two launches, weights by bulk copies, sums over K through a workspace.
//
// Each warp keeps stages of weights in flight to shared memory of its own, so that no warp waits for another and the
// rest is little more than the tensor cores' instructions. Weights do not depend on the kernel before, so their copies
// start while that still runs (programmatic dependent launch): the expand's arrive while the shrink adds up.
//
// How a row's sums are ordered depends on K alone: 8 slices take a range of K each, the 4 warps of a slice take its
// blocks of 32 two by two in turn, a warp adds its own in order, then the warps of a slice are added in order, then the
// slices. So a row's bits are the same in any batch and any block. There is no atomic and nothing to clear.
#pragma once

#include "sgmv_bulk_loads.cuh"

namespace medley::bulk {

inline __device__ int slice_blocks(const Params& p) { return (p.k_blocks + kSlices - 1) / kSlices; }

// Lane i: where pair `first` + i of the item begins in A.
inline __device__ const char* pair_of_lane(const Params& p, const Work& work, int first, int lane) {
  const int mine = min(first + lane, work.num_pairs - 1), tile = mine / work.num_active;
  return from_lane(work.tile, tile) +
         static_cast<long long>(work.site(mine - tile * work.num_active)) * p.k_blocks * kBlockBytes;
}

// Shared memory: the ring, its barriers, then float4s: partial sums of the warps (shrink), low-rank rows (expand).
constexpr int kShrinkRing = 40 << 10;
constexpr int kResidentBytes = 220 << 10;  // of a multiprocessor, for all of its thread blocks
template <int HALVES>
constexpr int shrink_bytes() {
  constexpr int MT = kPairsOfHalves<HALVES>;
  return kShrinkRing + Ring::kBarrierBytes + kWarps * kGroup * MT * kLanes * 16;
}
template <int HALVES>
__host__ __device__ constexpr int low_bytes(int max_pairs) {
  return max_pairs * kPairsOfHalves<HALVES> * kLanes * 16;
}
// What the low-rank rows leave to the ring, in whole stages of two tiles.
template <int HALVES>
__host__ __device__ constexpr int expand_ring(int max_pairs) {
  constexpr int kUnit = kWarps * 2 * kCopyBytes;
  const int left = kResidentBytes / kResident<HALVES> - Ring::kBarrierBytes - low_bytes<HALVES>(max_pairs);
  return (left < kMaxStages * kUnit ? left / kUnit : kMaxStages) * kUnit;
}
template <int HALVES>
constexpr int expand_bytes(int max_pairs) {
  return expand_ring<HALVES>(max_pairs) + Ring::kBarrierBytes + low_bytes<HALVES>(max_pairs);
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) shrink_kernel(const __grid_constant__ Params p) {
  constexpr int MT = kPairsOfHalves<HALVES>;
  extern __shared__ __align__(128) char shared[];
  const int size = p.header[2];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
  Ring ring(shared, kShrinkRing, size, warp);
  float4* part = reinterpret_cast<float4*>(shared + kShrinkRing + Ring::kBarrierBytes);  // [warps][kGroup][MT][lanes]
  if (lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int num_units = p.header[0] * kSlices, per_slice = slice_blocks(p);
  bool is_first = true;

  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    Work work;
    work.load(p, unit, kSlices, lane);
    const int begin = work.part * per_slice, end = min(begin + per_slice, p.k_blocks);
    // Where the next copies are, ahead of where the sums are.
    int next_first = 0, next_k = begin;
    const char* from = pair_of_lane(p, work, 0, lane);
    auto fill = [&] {
      const int blocks = min(kDepth, end - next_k - warp * kDepth);
      if (next_first < work.num_pairs && blocks > 0)
        ring.fill(from + (next_k + warp * kDepth) * kBlockBytes, min(size, work.num_pairs - next_first),
                  blocks * kBlockBytes, lane);
      next_k += kStep;
      if (next_k < end) return;
      next_k = begin;
      next_first += size;
      if (next_first < work.num_pairs) from = pair_of_lane(p, work, next_first, lane);
    };
    for (int i = 0; i < ring.num_stages; ++i) fill();
    if (is_first) wait_for_previous_kernel();
    is_first = false;
    float4* plane = p.planes + static_cast<long long>(unit) * p.max_pairs * MT * kLanes;
    const bool has_row = group < work.num_rows;
    const Lanes<HALVES> start(p.x, p.x_stride, work, begin * kBlock, min(p.in_features, end * kBlock), warp, group, quad);
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
        const int blocks = end - k - warp * kDepth;
        if (blocks <= 0) return fill();
        const unsigned here = ring.wait(lane);
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
              part[((warp * kGroup + i) * MT + m) * kLanes + lane] =
                  make_float4(acc[i][m][0], acc[i][m][1], acc[i][m][2], acc[i][m][3]);
      __syncthreads();
      for (int e = warp; e < count * MT; e += kWarps)
        if (has_row) {
          float4 sum = part[e * kLanes + lane];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) sum = sum + part[(w * kGroup * MT + e) * kLanes + lane];
          __stcg(plane + (first * MT + e) * kLanes + lane, sum);
        }
      __syncthreads();
    }
  }
  // Who comes next counts on this kernel to have waited, also where there was nothing to do.
  if (is_first) wait_for_previous_kernel();
}

// A part of an item's columns within one adapted site: column blocks `begin` to `end` of the group.
struct Span {
  int begin, end, site;
};

// The span of site `s` in column blocks first .. last of an item; empty where the site is not adapted.
inline __device__ Span span_of(const Params& p, const Work& work, int s, int first, int last) {
  const int site_end = s + 1 < MEDLEY_MAX_SITES ? min(p.n_begin[s + 1], p.num_column_blocks) : p.num_column_blocks;
  if (!work.has(s)) return {0, 0, s};
  return {max(first, p.n_begin[s]), min(last, site_end), s};
}

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

template <typename T, int HALVES>
__global__ void __launch_bounds__(kThreads, kResident<HALVES>) expand_kernel(const __grid_constant__ Params p) {
  constexpr int MT = kPairsOfHalves<HALVES>;
  extern __shared__ __align__(128) char shared[];
  const int size = p.header[3];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
  const int ring_bytes = expand_ring<HALVES>(p.max_pairs);
  Ring ring(shared, ring_bytes, size, warp);
  uint4* low = reinterpret_cast<uint4*>(shared + ring_bytes + Ring::kBarrierBytes);  // [pairs][MT][lanes]
  if (lane == 0) ring.init();
  __syncwarp();
  let_next_kernel_start();
  const int parts = p.header[1], num_units = p.header[0] * parts;
  const int per_part = (p.num_column_blocks + parts - 1) / parts;
  bool is_first = true;

  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    Work work;
    work.load(p, unit, parts, lane);
    const int begin = work.part * per_part, end = min(begin + per_part, p.num_column_blocks);
    // Where the next copies are, ahead of where the products are.
    Span next = span_of(p, work, 0, begin, end);
    int next_n = next.begin, next_first = 0;
    const char* from = from_lane(work.tile, lane) + p.b_offset;
    auto fill = [&] {
      while (next_n >= next.end) {
        if (next.site + 1 >= MEDLEY_MAX_SITES) return;
        next = span_of(p, work, next.site + 1, begin, end);
        next_n = next.begin;
      }
      const int blocks = min(kDepth, next.end - next_n - warp * kDepth);
      if (blocks > 0)
        ring.fill(from + (next_n + warp * kDepth) * kBlockBytes, min(size, work.num_tiles - next_first),
                  blocks * kBlockBytes, lane);
      next_first += size;
      from = from_lane(work.tile, next_first + lane) + p.b_offset;
      if (next_first < work.num_tiles) return;
      next_first = 0;
      from = work.tile + p.b_offset;
      next_n += kStep;
    };
    for (int i = 0; i < ring.num_stages; ++i) fill();
    if (is_first) wait_for_previous_kernel();
    is_first = false;
    const float4* plane = p.planes + static_cast<long long>(work.block) * kSlices * p.max_pairs * MT * kLanes;
    const int from_site = site_of_column_block(p, min(begin, p.num_column_blocks - 1));
    const int to_site = site_of_column_block(p, max(end - 1, 0));
    auto rows_of = [&](const Span& span) {
      const int shift = p.y_begin[span.site] - p.n_begin[span.site] * kBlock;  // from the group's columns to y's
      return Lanes<HALVES>(p.y, p.y_stride, work, shift + span.begin * kBlock,
                       min(p.y_begin[span.site] + p.out_features[span.site], shift + span.end * kBlock), warp, group,
                       quad);
    };
    // The first rows of y are on their way while the low-rank rows are added up.
    Ahead<HALVES> even, odd;
    Lanes<HALVES> y = rows_of(span_of(p, work, from_site, begin, end));
    y.load(even);
    if (group < work.num_rows && begin < end) {
      for (int e = warp; e < work.num_pairs * MT; e += kWarps) {
        const int s = work.site(e / MT % work.num_active);
        if (s < from_site || s > to_site) continue;
        float4 sum = __ldcg(plane + e * kLanes + lane);
#pragma unroll
        for (int i = 1; i < kSlices; ++i) sum = sum + __ldcg(plane + (i * p.max_pairs * MT + e) * kLanes + lane);
        low[e * kLanes + lane] = Number<T>::encode(sum, __ldg(work.scales + s));
      }
    }
    __syncthreads();
    const int tile_step = work.num_active * MT * kLanes;
    for (int s = from_site; s <= to_site; ++s) {
      const Span span = span_of(p, work, s, begin, end);
      if (span.begin >= span.end) continue;
      if (s != from_site) {
        y = rows_of(span);
        y.load(even);
      }
      const uint4* mine = low + work.active_of(s) * MT * kLanes + lane;
      auto run = [&](auto&& multiply) {
        auto step = [&](int n, const Ahead<HALVES>& now, Ahead<HALVES>& after) {
          const Lanes<HALVES> here = y;
          y.advance();
          y.load(after);
          float acc[kDepth][MT][4][4] = {};
          multiply(acc, span.end - n - warp * kDepth);
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
        run([&](float (&acc)[kDepth][MT][4][4], int blocks) {
          if (blocks <= 0) return fill();
          const unsigned here = ring.wait(lane);
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
        run([&](float (&acc)[kDepth][MT][4][4], int blocks) {
          for (int first = 0; first < work.num_tiles; first += size) {
            if (blocks <= 0) {
              fill();
              continue;
            }
            const unsigned start = ring.wait(lane);
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
  if (is_first) wait_for_previous_kernel();
}

}  // namespace medley::bulk
