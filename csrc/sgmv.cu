// The host side of SGMV: checks every argument, picks the kernel and its grid, launches.
#include <cuda_runtime.h>
#include <limits.h>

#include "errors.h"
#include "sgmv_bulk_kernels.cuh"
#include "sgmv_ring.cuh"

using namespace medley;

namespace {

int num_blocks(int features) { return (features + kBlock - 1) / kBlock; }

bool is_bulk(Step step) { return step == Step::kBulkShrink || step == Step::kBulkExpand; }
// Thread blocks among which an item's K, or its columns, are divided: a grid holds them whole.
int blocks_of(Step step) { return is_bulk(step) ? 1 : ring::kSlices; }

template <int HALVES>
int smem_bytes(Step step, int max_pairs) {
  constexpr int MT = (HALVES + 1) / 2;
  switch (step) {
    case Step::kBulkShrink: return bulk::shrink_bytes<HALVES>();
    case Step::kBulkExpand: return bulk::expand_bytes<HALVES>(max_pairs);
    case Step::kRingShrink: return ring::Smem<MT, ring::kShrink>::bytes(max_pairs);
    case Step::kRingExpand: return ring::Smem<MT, ring::kExpand>::bytes(max_pairs);
  }
  return 0;
}

int smem_bytes(int block_rows, Step step, int max_pairs) {
  return block_rows == 8 ? smem_bytes<1>(step, max_pairs) : smem_bytes<4>(step, max_pairs);
}

Step shrink_of(int mode) { return mode == MEDLEY_RING ? Step::kRingShrink : Step::kBulkShrink; }
Step expand_of(int mode) { return mode == MEDLEY_RING ? Step::kRingExpand : Step::kBulkExpand; }

int check_group(const MedleyGroup* g, char* error, int64_t bytes) {
  if (g->num_sites < 1 || g->num_sites > MEDLEY_MAX_SITES)
    return refuse(error, bytes, "num_sites: got %d, wanted 1 to %d", g->num_sites, MEDLEY_MAX_SITES);
  if (g->in_features < 8 || g->in_features % 8)
    return refuse(error, bytes, "in_features: got %d, wanted a multiple of 8", g->in_features);
  for (int s = 0; s < g->num_sites; ++s)
    if (g->out_features[s] < 8 || g->out_features[s] % 8)
      return refuse(error, bytes, "out_features[%d]: got %d, wanted a multiple of 8", s, g->out_features[s]);
  return 0;
}

struct Launch {
  Kernel kernel;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attribute;
};

// Blocks that are resident on the device at once; asked once for each kernel and size, since the answer is slow.
int resident_blocks(Launch& launch, int most_smem, int* blocks, char* error, int64_t bytes) {
  struct Known {
    Kernel kernel;
    size_t smem;
    int device, blocks;
  };
  static thread_local Known known[64];
  static thread_local int num_known = 0;
  int device = 0;
  if (int code = report(cudaGetDevice(&device), "cudaGetDevice", error, bytes)) return code;
  for (int i = 0; i < num_known; ++i)
    if (known[i].kernel == launch.kernel && known[i].smem == launch.config.dynamicSmemBytes &&
        known[i].device == device) {
      *blocks = known[i].blocks;
      return 0;
    }
  const void* function = reinterpret_cast<const void*>(launch.kernel);
  // The most that any group asks of this kernel: a later call for a smaller group must not lower it.
  if (int code = report(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_smem),
                        "shared memory of the SGMV kernel", error, bytes))
    return code;
  int per_sm = 0, sms = 0;
  if (int code = report(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, function, launch.config.blockDim.x,
                                                                      launch.config.dynamicSmemBytes),
                        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", error, bytes))
    return code;
  if (int code = report(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute",
                        error, bytes))
    return code;
  *blocks = per_sm * sms;
  if (*blocks < 1) return refuse(error, bytes, "the SGMV kernel does not fit on this device");
  if (num_known < 64) known[num_known++] = {launch.kernel, launch.config.dynamicSmemBytes, device, *blocks};
  return 0;
}

int prepare(const MedleyGroup* g, int dtype, int block_rows, Step step, bool pdl, cudaStream_t stream, Launch& launch,
            char* error, int64_t bytes) {
  launch.kernel = (dtype == MEDLEY_BF16 ? pick_bf16 : pick_fp16)(block_rows, step);
  launch.config = {};
  launch.config.blockDim = dim3(is_bulk(step) ? bulk::kThreads : kThreads);
  launch.config.dynamicSmemBytes = smem_bytes(block_rows, step, g->num_sites * MEDLEY_MAX_TILES);
  launch.config.stream = stream;
  launch.config.attrs = &launch.attribute;
  const int most_smem = smem_bytes(block_rows, step, MEDLEY_MAX_SITES * MEDLEY_MAX_TILES);
  int blocks = 0;
  if (int code = resident_blocks(launch, most_smem, &blocks, error, bytes)) return code;
  launch.config.gridDim = dim3(blocks / blocks_of(step) * blocks_of(step));
  if (pdl) {
    launch.config.numAttrs = 1;
    launch.attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    launch.attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return 0;
}

}  // namespace

extern "C" {

int medley_abi(void) { return MEDLEY_ABI; }

int64_t medley_sgmv_workspace(const MedleyGroup* g, int32_t max_items, int32_t block_rows, int32_t mode) {
  const int64_t slices = mode == MEDLEY_RING ? ring::kSlices : bulk::kSlices;
  return max_items * slices * g->num_sites * MEDLEY_MAX_TILES * ((block_rows + 15) / 16) * kLanes * 16;
}

int medley_sgmv_room(const MedleyGroup* g, int32_t block_rows, int32_t mode, int32_t* parts, int32_t* column_blocks,
                     char* error, int64_t bytes) {
  if (int code = check_group(g, error, bytes)) return code;
  Launch launch = {};
  const Step step = expand_of(mode);
  if (int code = prepare(g, MEDLEY_BF16, block_rows, step, false, nullptr, launch, error, bytes)) return code;
  *parts = static_cast<int>(launch.config.gridDim.x) / blocks_of(step);
  *column_blocks = is_bulk(step) ? bulk::kWarps : ring::kSplit;
  return 0;
}

int medley_sgmv(const MedleyGroup* g, const MedleyCall* c, void* stream, char* error, int64_t bytes) {
  if (int code = check_group(g, error, bytes)) return code;
  if (c->dtype != MEDLEY_BF16 && c->dtype != MEDLEY_FP16)
    return refuse(error, bytes, "dtype: got %d, wanted 0 (bfloat16) or 1 (float16)", c->dtype);
  if (c->block_rows != 8 && c->block_rows != 32)
    return refuse(error, bytes, "block_rows: got %d, wanted 8 or 32", c->block_rows);
  if (c->mode != MEDLEY_RING && c->mode != MEDLEY_BULK)
    return refuse(error, bytes, "mode: got %d, wanted 0 (ring) or 1 (bulk)", c->mode);
  if (c->layer < 0 || c->layer >= g->num_layers)
    return refuse(error, bytes, "layer: got %d, wanted 0 to %d", c->layer, g->num_layers - 1);
  if (!c->y || reinterpret_cast<uintptr_t>(c->y) % 16 || c->y_stride % 8)
    return refuse(error, bytes, "y: got address %p and row stride %lld, wanted 16-byte aligned rows", c->y,
                  static_cast<long long>(c->y_stride));
  if (!c->x || reinterpret_cast<uintptr_t>(c->x) % 16 || c->x_stride % 8)
    return refuse(error, bytes, "x: got address %p and row stride %lld, wanted 16-byte aligned rows", c->x,
                  static_cast<long long>(c->x_stride));
  if (!c->items || !c->header) return refuse(error, bytes, "items: got a null pointer");
  const int64_t wanted = medley_sgmv_workspace(g, c->max_items, c->block_rows, c->mode);
  if (c->workspace_bytes < wanted || (wanted && !c->workspace))
    return refuse(error, bytes, "workspace: got %lld bytes, wanted %lld", static_cast<long long>(c->workspace_bytes),
                  static_cast<long long>(wanted));

  Params p = {};
  p.y = c->y;
  p.x = c->x;
  p.y_stride = c->y_stride;
  p.x_stride = c->x_stride;
  p.items = c->items;
  p.header = c->header;
  p.planes = static_cast<float4*>(c->workspace);
  p.in_features = g->in_features;
  p.k_blocks = num_blocks(g->in_features);
  p.max_pairs = g->num_sites * MEDLEY_MAX_TILES;
  int column = 0;
  for (int s = 0; s < MEDLEY_MAX_SITES; ++s) {
    p.n_begin[s] = s < g->num_sites ? p.num_column_blocks : INT_MAX;
    if (s >= g->num_sites) continue;
    p.out_features[s] = g->out_features[s];
    p.num_column_blocks += num_blocks(g->out_features[s]);
    p.y_begin[s] = column;
    column += g->out_features[s];
  }
  p.b_offset = g->num_sites * p.k_blocks * kBlockBytes;
  p.layer_offset = static_cast<long long>(c->layer) * (p.b_offset + p.num_column_blocks * kBlockBytes);
  p.scale_offset = c->layer * g->model_sites + g->first_site;

  for (const Step step : {shrink_of(c->mode), expand_of(c->mode)}) {
    Launch launch = {};
    const auto to = static_cast<cudaStream_t>(stream);
    if (int code = prepare(g, c->dtype, c->block_rows, step, c->pdl != 0, to, launch, error, bytes)) return code;
    void* arguments[] = {&p};
    const void* function = reinterpret_cast<const void*>(launch.kernel);
    if (int code = report(cudaLaunchKernelExC(&launch.config, function, arguments), "launch of SGMV", error, bytes))
      return code;
  }
  return 0;
}

}  // extern "C"
