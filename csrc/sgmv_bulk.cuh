// SGMV for Hopper: two launches, weights by bulk copies, sums over K through a workspace.
//
// A warp of its own keeps stages of up to 16 KB in flight from weights to shared memory, so that the others issue little
// more than the tensor cores' instructions. Its copies do not depend on the kernel before, and start while that still
// runs (programmatic dependent launch): the expand's weights arrive while the shrink adds up.
//
// How a row's sums are ordered depends on K alone: 8 slices take a range of K each, the 4 warps of a slice take its
// blocks of 32 in turn, a warp adds its own in order, then the warps of a slice are added in order, then the slices.
// So a row's bits are the same in any batch and any block. There is no atomic and nothing to clear.
#pragma once

#include "sgmv_common.cuh"

namespace medley::bulk {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;  // that compute
constexpr int kAllThreads = kThreads + kLanes;         // and a warp that copies
constexpr int kSlices = 8;
constexpr int kGroup = 4;               // (tile, site) pairs, or tiles, in one stage at the most
constexpr int kDepth = 2;               // blocks of a stage that a warp works on: of K, or of columns
constexpr int kStep = kDepth * kWarps;  // blocks of K or of columns in one stage
constexpr int kCopyBytes = kStep * kBlockBytes;  // of one pair or tile in a stage
constexpr int kMaxStages = 12;
// Thread blocks on a multiprocessor. Four small ones hide each other's waits better than two large ones.
template <int HALVES>
constexpr int kResident = HALVES <= 2 ? 4 : 2;
// An item's rows, 8 to a half; the tensor cores take two halves at once.
template <int HALVES>
constexpr int kPairsOfHalves = (HALVES + 1) / 2;

inline __device__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// A ring of stages with a barrier for "full" and one for "empty" each. A stage holds `group` pairs or tiles, so that
// the whole of it is in flight whatever the ranks are; bytes: of the ring.
struct Ring {
  unsigned data, full, empty;  // shared addresses
  int stage_bytes, num_stages, stage = 0, phase = 0;

  __device__ Ring(void* memory, int bytes, int group)
      : data(address_of(memory)), full(data + bytes), empty(full + kMaxStages * 8), stage_bytes(group * kCopyBytes),
        num_stages(min(kMaxStages, bytes / stage_bytes)) {}
  static constexpr int kBarrierBytes = 2 * kMaxStages * 8;

  __device__ void init() {
#if __CUDA_ARCH__ >= 900
    for (int s = 0; s < num_stages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + s * 8), "r"(kWarps) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __device__ void advance() {
    if (++stage == num_stages) stage = 0, phase ^= 1;
  }
  static __device__ void wait(unsigned barrier, int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
#endif
  }
  __device__ void wait_full() const { wait(full + stage * 8, phase); }
  __device__ void wait_empty() const { wait(empty + stage * 8, phase ^ 1); }
  // One lane of each computing warp, when all of the warp have read the stage.
  __device__ void release() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(empty + stage * 8)
                 : "memory");
#endif
  }
  __device__ void expect(int bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                     full + stage * 8),
                 "r"(bytes)
                 : "memory");
#endif
  }
  __device__ void copy(int offset, const char* from, int bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            data + stage * stage_bytes + offset),
        "l"(from), "r"(bytes), "r"(full + stage * 8)
        : "memory");
#endif
  }
  // Where this lane's 16 bytes of the warp's first block lie; its next block is kWarps on, the next pair's kStep.
  __device__ unsigned mine(int warp, int lane) const {
    return data + stage * stage_bytes + warp * kBlockBytes + lane * 16;
  }
  static __device__ uint4 load(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
  }
};

inline __device__ void sync_computing() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

inline __device__ int slice_blocks(const Params& p) { return (p.k_blocks + kSlices - 1) / kSlices; }

// Lane i: where pair `first` + i of the item begins in A.
inline __device__ const char* pair_of_lane(const Params& p, const Work& work, int first, int lane) {
  const int mine = min(first + lane, work.num_pairs - 1), tile = mine / work.num_active;
  return from_lane(work.tile, tile) +
         static_cast<long long>(work.site(mine - tile * work.num_active)) * p.k_blocks * kBlockBytes;
}

// 8 numbers of x or y for each row of a lane and each of the warp's blocks in a step, loaded a step ahead.
template <int HALVES>
struct Ahead {
  uint4 values[kDepth][HALVES];
};

// The way of a lane through rows of x or y: its rows are `group` + 8 h of the item, its columns 8 of every block.
template <int HALVES>
struct Lanes {
  static constexpr int kAhead = kWarps * kBlock;  // columns from a block of the warp to its next
  char* base;
  unsigned offset, half;  // bytes: to this lane's row and columns, and to its row 8 further on
  int left[HALVES];       // columns from there on that this lane may touch; 0 or less for rows that are not there

  // columns: where the step begins, and where what may be touched ends.
  __device__ Lanes(const void* rows, long long stride, const Work& work, int begin, int end, int warp, int group, int quad)
      : base(static_cast<char*>(const_cast<void*>(rows))) {
    const int column = begin + warp * kBlock + quad * 8;
    offset = static_cast<unsigned>((work.row_start + group) * stride + column) * 2;
    half = static_cast<unsigned>(stride) * 16;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) left[h] = h * 8 + group < work.num_rows ? end - column : 0;
  }
  __device__ char* at(int d, int h) const { return base + (offset + h * half + d * kAhead * 2); }
  __device__ bool has(int d, int h) const { return d * kAhead < left[h]; }
  __device__ void load(Ahead<HALVES>& ahead) const {
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        ahead.values[d][h] = make_uint4(0, 0, 0, 0);
        if (has(d, h)) ahead.values[d][h] = __ldcg(reinterpret_cast<const uint4*>(at(d, h)));
      }
  }
  __device__ void advance() {
    offset += kStep * kBlock * 2;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) left[h] -= kStep * kBlock;
  }
};

// Shared memory: the ring, its barriers, then float4s: partial sums of the warps (shrink), low-rank rows (expand).
constexpr int kShrinkRing = 32 << 10, kExpandRing = 32 << 10;
template <int HALVES>
constexpr int shrink_bytes() {
  constexpr int MT = kPairsOfHalves<HALVES>;
  return kShrinkRing + Ring::kBarrierBytes + kWarps * kGroup * MT * kLanes * 16;
}
template <int HALVES>
constexpr int expand_bytes(int max_pairs) {
  constexpr int MT = kPairsOfHalves<HALVES>;
  return kExpandRing + Ring::kBarrierBytes + max_pairs * MT * kLanes * 16;
}

template <typename T, int HALVES>
__global__ void __launch_bounds__(kAllThreads, kResident<HALVES>) shrink_kernel(const __grid_constant__ Params p) {
  constexpr int MT = kPairsOfHalves<HALVES>;
  extern __shared__ __align__(128) char shared[];
  const int size = p.header[2];
  Ring ring(shared, kShrinkRing, size);
  float4* part = reinterpret_cast<float4*>(shared + kShrinkRing + Ring::kBarrierBytes);  // [warps][kGroup][MT][lanes]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  let_next_kernel_start();
  const int num_units = p.header[0] * kSlices, per_slice = slice_blocks(p);
  Work work;

  if (warp == kWarps) {
    for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
      work.load(p, unit, kSlices, lane);
      const int begin = work.part * per_slice, end = min(begin + per_slice, p.k_blocks);
      for (int first = 0; first < work.num_pairs; first += size) {
        const int count = min(size, work.num_pairs - first);
        const char* from = pair_of_lane(p, work, first, lane);
        for (int k = begin; k < end; k += kStep, ring.advance()) {
          const int bytes = min(kStep, end - k) * kBlockBytes;
          ring.wait_empty();
          if (lane == 0) ring.expect(count * bytes);
          __syncwarp();
          if (lane < count) ring.copy(lane * kStep * kBlockBytes, from + k * kBlockBytes, bytes);
        }
      }
    }
    return;
  }

  if (blockIdx.x < num_units) work.load(p, blockIdx.x, kSlices, lane);
  wait_for_previous_kernel();
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    if (unit != blockIdx.x) work.load(p, unit, kSlices, lane);
    const int begin = work.part * per_slice, end = min(begin + per_slice, p.k_blocks);
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
        ring.wait_full();
        const unsigned from = ring.mine(warp, lane);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (i >= count) break;
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            if (k + d * kWarps + warp >= end) break;
            const uint4 w = Ring::load(from + i * kCopyBytes + d * kWarps * kBlockBytes);
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
        __syncwarp();
        if (lane == 0) ring.release();
        ring.advance();
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
      sync_computing();
      for (int e = warp; e < count * MT; e += kWarps)
        if (has_row) {
          float4 sum = part[e * kLanes + lane];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) sum = sum + part[(w * kGroup * MT + e) * kLanes + lane];
          __stcg(plane + (first * MT + e) * kLanes + lane, sum);
        }
      sync_computing();
    }
  }
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
__global__ void __launch_bounds__(kAllThreads, kResident<HALVES>) expand_kernel(const __grid_constant__ Params p) {
  constexpr int MT = kPairsOfHalves<HALVES>;
  extern __shared__ __align__(128) char shared[];
  const int size = p.header[3];
  Ring ring(shared, kExpandRing, size);
  uint4* low = reinterpret_cast<uint4*>(shared + kExpandRing + Ring::kBarrierBytes);  // [pairs][MT][lanes]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  let_next_kernel_start();
  const int parts = p.header[1], num_units = p.header[0] * parts;
  const int per_part = (p.num_column_blocks + parts - 1) / parts;
  Work work;

  if (warp == kWarps) {
    for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
      work.load(p, unit, parts, lane);
      const int begin = work.part * per_part, end = min(begin + per_part, p.num_column_blocks);
      const char* from = work.tile + p.b_offset;
      for (int s = 0; s < MEDLEY_MAX_SITES; ++s) {
        const Span span = span_of(p, work, s, begin, end);
        for (int n = span.begin; n < span.end; n += kStep) {
          const int bytes = min(kStep, span.end - n) * kBlockBytes;
          for (int first = 0; first < work.num_tiles; first += size, ring.advance()) {
            const int count = min(size, work.num_tiles - first);
            const char* mine = from_lane(from, first + lane);
            ring.wait_empty();
            if (lane == 0) ring.expect(count * bytes);
            __syncwarp();
            if (lane < count) ring.copy(lane * kCopyBytes, mine + n * kBlockBytes, bytes);
          }
        }
      }
    }
    return;
  }

  if (blockIdx.x < num_units) work.load(p, blockIdx.x, parts, lane);
  wait_for_previous_kernel();
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    if (unit != blockIdx.x) work.load(p, unit, parts, lane);
    const int begin = work.part * per_part, end = min(begin + per_part, p.num_column_blocks);
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
    sync_computing();
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
        auto step = [&](const Ahead<HALVES>& now, Ahead<HALVES>& next) {
          const Lanes<HALVES> here = y;
          y.advance();
          y.load(next);
          float acc[kDepth][MT][4][4] = {};
          multiply(acc);
          add_to<T, HALVES>(here, now, acc);
        };
        for (int n = span.begin; n < span.end; n += 2 * kStep) {
          step(even, odd);
          if (n + kStep < span.end) step(odd, even);
        }
      };
      // Blocks past the span are multiplied too, and not stored.
      if (work.num_tiles <= 2) {  // up to rank 16: the low-rank rows stay in registers
        const bool has_second = work.num_tiles == 2;
        uint4 v0[MT], v1[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          v0[m] = mine[m * kLanes];
          v1[m] = has_second ? mine[tile_step + m * kLanes] : make_uint4(0, 0, 0, 0);
        }
        run([&](float (&acc)[kDepth][MT][4][4]) {
          ring.wait_full();
          const unsigned from = ring.mine(warp, lane);
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            const uint4 w0 = Ring::load(from + d * kWarps * kBlockBytes);
            uint4 w1 = make_uint4(0, 0, 0, 0);
            if (has_second) w1 = Ring::load(from + kCopyBytes + d * kWarps * kBlockBytes);
#pragma unroll
            for (int m = 0; m < MT; ++m) Number<T>::expand(acc[d][m], v0[m], v1[m], w0, w1);
          }
          __syncwarp();
          if (lane == 0) ring.release();
          ring.advance();
        });
      } else {
        run([&](float (&acc)[kDepth][MT][4][4]) {
          for (int first = 0; first < work.num_tiles; first += size, ring.advance()) {
            const int count = min(size, work.num_tiles - first);
            ring.wait_full();
            const unsigned from = ring.mine(warp, lane);
#pragma unroll
            for (int i = 0; i < kGroup; i += 2) {
              if (i >= count) break;
              const bool has_second = i + 1 < count;
#pragma unroll
              for (int d = 0; d < kDepth; ++d) {
                const unsigned block = from + i * kCopyBytes + d * kWarps * kBlockBytes;
                const uint4 w0 = Ring::load(block);
                const uint4 w1 = has_second ? Ring::load(block + kCopyBytes) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                  const uint4* here = mine + (first + i) * tile_step + m * kLanes;
                  const uint4 v1 = has_second ? here[tile_step] : make_uint4(0, 0, 0, 0);
                  Number<T>::expand(acc[d][m], here[0], v1, w0, w1);
                }
              }
            }
            __syncwarp();
            if (lane == 0) ring.release();
          }
        });
      }
    }
    sync_computing();  // `low` is written again for the next unit
  }
}

}  // namespace medley::bulk
