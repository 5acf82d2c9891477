// How weights, x and y come to a warp of the bulk kernels: weights by bulk copies through a ring of stages, rows of x and
// y into registers ahead of their use.
#pragma once

#include "sgmv_common.cuh"

namespace medley::bulk {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
constexpr int kSlices = 8;
constexpr int kGroup = 4;               // (tile, site) pairs in one stage at the most
constexpr int kTiles = 2;               // tiles in one stage at the most
constexpr int kDepth = 2;               // neighbouring blocks, of K or of columns, that a warp works on in a step
constexpr int kStep = kDepth * kWarps;  // blocks in a step
constexpr int kCopyBytes = kDepth * kBlockBytes;  // of one pair or tile in a stage
constexpr int kMaxStages = 8;
// Thread blocks on a multiprocessor. Four small ones hide each other's waits better than two large ones.
template <int HALVES>
constexpr int kResident = HALVES == 1 ? 4 : 2;
// Steps by which loads of y run ahead of their use; of x it is one.
template <int HALVES>
constexpr int kAhead = HALVES == 1 ? 2 : 1;

inline __device__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// A warp's ring of stages, each with a barrier that its copies complete. A stage holds `group` pairs or tiles, so that
// as much as there is room for is in flight whatever the ranks are.
struct Ring {
  unsigned data, full;  // shared addresses, of this warp
  int stage_bytes, num_stages, head = 0, tail = 0, phase = 0;

  __device__ Ring(void* memory, int bytes, int group, int warp)
      : data(address_of(memory) + warp * (bytes / kWarps)),
        full(address_of(memory) + bytes + warp * kMaxStages * 8), stage_bytes(group * kCopyBytes),
        num_stages(min(kMaxStages, bytes / kWarps / stage_bytes)) {}
  static constexpr int kBarrierBytes = kWarps * kMaxStages * 8;

  // By one lane, before any other uses it.
  __device__ void init() {
#if __CUDA_ARCH__ >= 900
    for (int s = 0; s < num_stages; ++s)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // Fill the next stage: lanes below `count` bring `bytes` each. All lanes call it.
  __device__ void fill(const char* from, int count, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    const unsigned barrier = full + head * 8;
    if (lane == 0)
      asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier),
                   "r"(count * bytes)
                   : "memory");
    __syncwarp();
    if (lane < count)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              data + head * stage_bytes + lane * kCopyBytes),
          "l"(from), "r"(bytes), "r"(barrier)
          : "memory");
#endif
    if (++head == num_stages) head = 0;
  }
  // Wait for the oldest stage; where this lane's 16 bytes of its first block lie.
  __device__ unsigned wait(int lane) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            full + tail * 8),
        "r"(phase)
        : "memory");
#endif
    return data + tail * stage_bytes + lane * 16;
  }
  // All lanes have read the oldest stage.
  __device__ void release() {
    __syncwarp();
    if (++tail == num_stages) tail = 0, phase ^= 1;
  }
  static __device__ uint4 load(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
  }
};

// 8 numbers of x or y for each row of a lane and each of the warp's blocks in a step.
template <int HALVES>
struct Ahead {
  uint4 values[kDepth][HALVES];
};

// The way of a lane through rows of x or y: its rows are `group` + 8 h of the item, its columns 8 of every block.
template <int HALVES>
struct Lanes {
  char* base;
  unsigned offset, half;  // bytes: to this lane's row and columns, and to its row 8 further on
  int left[HALVES];       // columns from there on that this lane may touch; 0 or less for rows that are not there

  // columns: where the first step begins, and where what may be touched ends.
  __device__ Lanes(const void* rows, long long stride, const Work& work, int begin, int end, int warp, int group, int quad)
      : base(static_cast<char*>(const_cast<void*>(rows))) {
    const int column = begin + warp * kDepth * kBlock + quad * 8;
    offset = static_cast<unsigned>((work.row_start + group) * stride + column) * 2;
    half = static_cast<unsigned>(stride) * 16;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) left[h] = h * 8 + group < work.num_rows ? end - column : 0;
  }
  // `step`: counted from where this stands.
  __device__ char* at(int step, int d, int h) const {
    return base + (offset + h * half + (step * kStep + d) * kBlock * 2);
  }
  __device__ bool has(int step, int d, int h) const { return (step * kStep + d) * kBlock < left[h]; }
  __device__ void load(Ahead<HALVES>& ahead, int step = 0) const {
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        ahead.values[d][h] = make_uint4(0, 0, 0, 0);
        if (has(step, d, h)) ahead.values[d][h] = __ldcg(reinterpret_cast<const uint4*>(at(step, d, h)));
      }
  }
  __device__ void advance() {
    offset += kStep * kBlock * 2;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) left[h] -= kStep * kBlock;
  }
};

}  // namespace medley::bulk
