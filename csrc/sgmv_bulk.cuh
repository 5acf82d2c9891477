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
template <int MT>
constexpr int kResident = MT == 1 ? 4 : 2;

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
  // Lane `lane`'s 16 bytes of block `block`.
  __device__ uint4 load(int block, int lane) const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(data + stage * stage_bytes + block * kBlockBytes + lane * 16));
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

// Shared memory: the ring, its barriers, then float4s: partial sums of the warps (shrink), low-rank rows (expand).
constexpr int kShrinkRing = 44 << 10, kExpandRing = 48 << 10;
template <int MT>
constexpr int shrink_bytes() {
  return kShrinkRing + Ring::kBarrierBytes + kWarps * kGroup * MT * kLanes * 16;
}
template <int MT>
constexpr int expand_bytes(int max_pairs) {
  return kExpandRing + Ring::kBarrierBytes + max_pairs * MT * kLanes * 16;
}

template <typename T, int MT>
__global__ void __launch_bounds__(kAllThreads, kResident<MT>) shrink_kernel(const __grid_constant__ Params p) {
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

  wait_for_previous_kernel();
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    work.load(p, unit, kSlices, lane);
    const int begin = work.part * per_slice, end = min(begin + per_slice, p.k_blocks);
    float4* plane = p.planes + static_cast<long long>(unit) * p.max_pairs * MT * kLanes;
    const bool has_row = group < work.num_rows;
    const int halves = work.halves();
    const T* rows = static_cast<const T*>(p.x) + (work.row_start + group) * p.x_stride + quad * 8;
    for (int first = 0; first < work.num_pairs; first += size) {
      const int count = min(size, work.num_pairs - first);
      float acc[kGroup][MT][4] = {};
      uint4 x[kDepth][2 * MT];
      auto load_x = [&](int from) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const int k = from + d * kWarps + warp;
#pragma unroll
          for (int h = 0; h < 2 * MT; ++h) {
            const bool is_valid = k < end && k * kBlock + quad * 8 < p.in_features &&
                                  h * 8 + group < work.num_rows && h < halves;
            x[d][h] = is_valid ? __ldcg(reinterpret_cast<const uint4*>(rows + h * 8 * p.x_stride + k * kBlock))
                               : make_uint4(0, 0, 0, 0);
          }
        }
      };
      load_x(begin);
      for (int k = begin; k < end; k += kStep, ring.advance()) {
        uint4 now[kDepth][2 * MT];
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
#pragma unroll
          for (int h = 0; h < 2 * MT; ++h) now[d][h] = x[d][h];
        if (k + kStep < end) load_x(k + kStep);
        ring.wait_full();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          if (k + d * kWarps + warp >= end) break;
#pragma unroll
          for (int i = 0; i < kGroup; ++i)
            if (i < count) {
              const uint4 w = ring.load(i * kStep + d * kWarps + warp, lane);
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                const uint4 &top = now[d][2 * m], &bottom = now[d][2 * m + 1];
                Number<T>::mma(acc[i][m], top.x, bottom.x, top.y, bottom.y, w.x, w.y);
                Number<T>::mma(acc[i][m], top.z, bottom.z, top.w, bottom.w, w.z, w.w);
              }
            }
        }
        __syncwarp();
        if (lane == 0) ring.release();
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

template <typename T, int MT>
__global__ void __launch_bounds__(kAllThreads, kResident<MT>) expand_kernel(const __grid_constant__ Params p) {
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
      for (int n = begin; n < end; n += kStep) {
        const int bytes = min(kStep, end - n) * kBlockBytes;
        if (!work.has_any(p, n, min(n + kStep, end) - 1)) continue;
        for (int first = 0; first < work.num_tiles; first += size, ring.advance()) {
          const int count = min(size, work.num_tiles - first);
          const char* mine = from_lane(from, first + lane);
          ring.wait_empty();
          if (lane == 0) ring.expect(count * bytes);
          __syncwarp();
          if (lane < count) ring.copy(lane * kStep * kBlockBytes, mine + n * kBlockBytes, bytes);
        }
      }
    }
    return;
  }

  wait_for_previous_kernel();
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    work.load(p, unit, parts, lane);
    const int begin = work.part * per_part, end = min(begin + per_part, p.num_column_blocks);
    const bool has_row = group < work.num_rows;
    T* rows = static_cast<T*>(p.y) + (work.row_start + group) * p.y_stride + quad * 8;
    uint4 y[kDepth][2 * MT];
    // Column of this lane's 8 in y for column block n, -1: there are none to change.
    auto column_of = [&](int n) {
      if (n >= end) return -1;
      const int s = site_of_column_block(p, n), column = (n - p.n_begin[s]) * kBlock;
      return work.has(s) && column + quad * 8 < p.out_features[s] ? p.y_begin[s] + column : -1;
    };
    auto load_y = [&](int from) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int column = column_of(from + d * kWarps + warp);
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h)
          y[d][h] = column >= 0 && h * 8 + group < work.num_rows
                        ? __ldcg(reinterpret_cast<const uint4*>(rows + h * 8 * p.y_stride + column))
                        : make_uint4(0, 0, 0, 0);
      }
    };
    load_y(begin);
    const float4* plane = p.planes + static_cast<long long>(work.block) * kSlices * p.max_pairs * MT * kLanes;
    const int from_site = site_of_column_block(p, begin), to_site = site_of_column_block(p, end - 1);
    for (int e = warp; e < work.num_pairs * MT; e += kWarps) {
      const int s = work.site(e / MT % work.num_active);
      if (!has_row || begin >= end || s < from_site || s > to_site) continue;
      float4 sum = __ldcg(plane + e * kLanes + lane);
#pragma unroll
      for (int i = 1; i < kSlices; ++i) sum = sum + __ldcg(plane + (i * p.max_pairs * MT + e) * kLanes + lane);
      low[e * kLanes + lane] = Number<T>::encode(sum, __ldg(work.scales + s));
    }
    sync_computing();
    for (int n = begin; n < end; n += kStep) {
      uint4 before[kDepth][2 * MT];
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h) before[d][h] = y[d][h];
      if (n + kStep < end) load_y(n + kStep);
      if (!work.has_any(p, n, min(n + kStep, end) - 1)) continue;
      float acc[kDepth][MT][4][4] = {};
      for (int first = 0; first < work.num_tiles; first += size, ring.advance()) {
        const int count = min(size, work.num_tiles - first);
        ring.wait_full();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const int block = n + d * kWarps + warp;
          if (block >= end) break;
          const int s = site_of_column_block(p, block);
          if (!work.has(s)) continue;
          const uint4* mine = low + (first * work.num_active + work.active_of(s)) * MT * kLanes + lane;
          const int tile_step = work.num_active * MT * kLanes;
#pragma unroll
          for (int i = 0; i < kGroup; i += 2) {
            if (i >= count) break;
            const bool has_second = i + 1 < count;
            const uint4 w0 = ring.load(i * kStep + d * kWarps + warp, lane);
            const uint4 w1 = has_second ? ring.load((i + 1) * kStep + d * kWarps + warp, lane) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              const uint4 v0 = mine[i * tile_step + m * kLanes];
              const uint4 v1 = has_second ? mine[(i + 1) * tile_step + m * kLanes] : make_uint4(0, 0, 0, 0);
              Number<T>::expand(acc[d][m], v0, v1, w0, w1);
            }
          }
        }
        __syncwarp();
        if (lane == 0) ring.release();
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int column = column_of(n + d * kWarps + warp);
        if (column < 0) continue;
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h) {
          if (h * 8 + group >= work.num_rows) break;
          const unsigned words[4] = {before[d][h].x, before[d][h].y, before[d][h].z, before[d][h].w};
          unsigned after[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 was = Number<T>::unpack(words[j]);
            const float* add = &acc[d][h / 2][j][h % 2 * 2];
            after[j] = Number<T>::pack(was.x + add[0], was.y + add[1]);
          }
          *reinterpret_cast<uint4*>(rows + h * 8 * p.y_stride + column) =
              make_uint4(after[0], after[1], after[2], after[3]);
        }
      }
    }
    sync_computing();  // `low` is written again for the next unit
  }
}

}  // namespace medley::bulk
