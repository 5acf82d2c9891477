// What the SGMV kernels share: numbers, the tensor cores' instructions, and a work item as a warp sees it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "medley.h"

namespace medley {

constexpr int kWarps = 8, kLanes = 32, kThreads = kWarps * kLanes;  // that compute
constexpr int kBlock = 32;        // elements of K, or columns of the output, in one block of weights
constexpr int kBlockBytes = 512;  // 8 ranks of it

struct Params {
  void* y;
  const void* x;
  long long y_stride, x_stride;
  const MedleyItem* items;
  const int* header;  // medley.h
  float4* planes;          // the workspace
  long long layer_offset;  // bytes from a tile's start to this layer
  int in_features, k_blocks, max_pairs, num_column_blocks;
  int out_features[MEDLEY_MAX_SITES];
  int n_begin[MEDLEY_MAX_SITES];  // first column block of a site; past the last site, beyond all
  int y_begin[MEDLEY_MAX_SITES];      // first column of a site in y
  int b_offset;                       // bytes from the layer's start to its B
  int scale_offset;                   // of this layer and group in an adapter's scales
};

// Float32 operands are cut to tf32's 10 bits by the unit: the caller splits what needs more.
inline __device__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

template <typename T>
struct Number;

template <>
struct Number<__nv_bfloat16> {
  static __device__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                             unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ float2 unpack(unsigned w) {
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
  }
  static __device__ unsigned pack(float lo, float hi) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<unsigned*>(&pair);
  }
  // Two low-rank values, scaled, as two operands: as bfloat16, and what that leaves, 16 bits of mantissa in all.
  static __device__ uint2 encode(float2 v, float scale) {
    // Rounded here: fused into the subtraction below it would depend on how a kernel was compiled.
    v = make_float2(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
    const unsigned head = pack(v.x, v.y);
    const float2 kept = unpack(head);
    return make_uint2(head, pack(v.x - kept.x, v.y - kept.y));
  }
  // A tile, 8 ranks, of 32 columns. v: `encode`d; w: its block of B. The unit takes 16 rows: 8 rows' heads, and below
  // them what these left. acc[j]: two columns of the heads' sum, then of the rests'.
  static __device__ void expand(float (&acc)[4][4], uint2 v, uint4 w) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float(&c)[4] = acc[j];
      asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(v.x), "r"(v.y), "r"(words[j]));
    }
  }
};

template <>
struct Number<__half> {
  static __device__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                             unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ float2 unpack(unsigned w) { return __half22float2(*reinterpret_cast<__half2*>(&w)); }
  static __device__ unsigned pack(float lo, float hi) {
    __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<unsigned*>(&pair);
  }
  // Half's range is too small for sums over K, so low-rank values stay float32 here.
  static __device__ uint2 encode(float2 v, float scale) {
    return make_uint2(__float_as_uint(v.x * scale), __float_as_uint(v.y * scale));
  }
  // As tf32: the first 11 bits, and below them what these leave.
  static __device__ void expand(float (&acc)[4][4], uint2 v, uint4 w) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
    const float x = __uint_as_float(v.x & 0xffffe000u), y = __uint_as_float(v.y & 0xffffe000u);
    const float operand[4] = {x, __uint_as_float(v.x) - x, y, __uint_as_float(v.y) - y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 b = unpack(words[j]);
      mma_tf32(acc[j], operand, b.x, b.y);
    }
  }
};

inline __device__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
inline __device__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline __device__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// One item as a warp sees it: every lane holds the fields, lane t the pointer to tile t.
struct Work {
  int row_start, num_rows, num_tiles, site_mask, num_active, num_pairs;
  const float* scales;
  const char* tile;

  __device__ void load(const Params& p, int item, int lane) {
    const MedleyItem* from = p.items + item;
    row_start = from->row_start;
    num_rows = from->num_rows;
    num_tiles = from->num_tiles;
    site_mask = from->site_mask;
    scales = from->scales + p.scale_offset;
    tile = static_cast<const char*>(from->tiles[lane % MEDLEY_MAX_TILES]) + p.layer_offset;
    num_active = __popc(site_mask);
    num_pairs = num_tiles * num_active;
  }
  // The site of the `active`-th adapted one.
  __device__ int site(int active) const {
    int s = __ffs(site_mask) - 1;
    for (int a = 0; a < active; ++a) s = __ffs(site_mask & ~((2 << s) - 1)) - 1;
    return s;
  }
  __device__ bool has(int s) const { return site_mask >> s & 1; }
  // Where site s, which is adapted, stands among the adapted ones.
  __device__ int active_of(int s) const { return __popc(site_mask & ((1 << s) - 1)); }
  // Groups of 8 rows.
  __device__ int halves() const { return (num_rows + 7) / 8; }
};

inline __device__ int site_of_column_block(const Params& p, int n) { return (n >= p.n_begin[1]) + (n >= p.n_begin[2]); }

inline __device__ const char* from_lane(const char* value, int lane) {
  const unsigned long long bits = reinterpret_cast<unsigned long long>(value);
  return reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, bits, lane));
}

using Kernel = void (*)(const Params);

// What a mode launches, for items of `block_rows` rows.
enum class Step { kRingShrink, kRingExpand, kBulkShrink, kBulkExpand };
Kernel pick_bf16(int block_rows, Step step);
Kernel pick_fp16(int block_rows, Step step);

}  // namespace medley
