// SGMV, segmented gather matrix-vector multiplication: y[s] += scale * (x[s] @ A) @ B for segments s of rows that
// share an adapter. A plain C ABI: device pointers, sizes, a stream; no torch.
//
// Weights lie in tiles of 8 ranks of one projection group (sites that share an input: q, k, v) over all layers:
//   tile = [layers][ A: sites x ceil(in / 32) blocks | B: ceil(out / 32) blocks, site after site ]
// A block is 512 bytes in the order in which the lanes of a warp want them, so that a warp reads it with one
// 16-byte load a lane:
//   A block k of a site: [8 ranks][32 of K];  B block n: [8][4][4][2], see `sgmv_layout.py`, which writes them.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MEDLEY_MAX_SITES = 3, MEDLEY_MAX_TILES = 16, MEDLEY_HEADER = 8, MEDLEY_ABI = 4 };
enum { MEDLEY_BF16 = 0, MEDLEY_FP16 = 1 };
// How weights arrive. Shrink and expand are two launches, whose sums over K meet in a workspace.
enum {
  MEDLEY_RING = 0,  // by copies of 16 bytes a lane (sm_80)
  MEDLEY_BULK = 1,  // by bulk copies (sm_90)
};

// A block of rows: up to `block_rows` that share an adapter.
typedef struct {
  int32_t row_start, num_rows;
  int32_t num_tiles;  // 1 to 16
  int32_t site_mask;  // bit s: site s of the group is adapted; at least one is
  const float* scales;      // [layers][sites of the model]
  const void* tiles[MEDLEY_MAX_TILES];
} MedleyItem;

typedef struct {
  int32_t in_features, num_sites, out_features[MEDLEY_MAX_SITES];
  int32_t first_site;   // of the group, among the model's sites (a row of `scales`)
  int32_t model_sites;  // numbers in a row of `scales`
  int32_t num_layers;
} MedleyGroup;

typedef struct {
  void* y;
  const void* x;
  int64_t y_stride, x_stride;  // elements from row to row
  const MedleyItem* items;     // device
  const int32_t* header;       // device, MEDLEY_HEADER numbers, the first 4 used: items; parts into which the columns of each
                               // are divided; how many pairs (1 to 4) and tiles (1 or 2) a stage of MEDLEY_BULK keeps
  int32_t max_items;           // capacity of `items`
  int32_t layer;
  int32_t dtype;
  int32_t block_rows;  // 8 or 32: the rows that an item may hold
  int32_t mode;
  int32_t pdl;  // 1: programmatic dependent launch
  void* workspace;
  int64_t workspace_bytes;
} MedleyCall;

// All return 0, or a CUDA error code, or -1 for an argument; `error` (NUL-terminated) then says what was wrong.
int medley_abi(void);
int medley_sgmv(const MedleyGroup* group, const MedleyCall* call, void* stream, char* error, int64_t error_bytes);
// Bytes of workspace that a mode wants for so many items.
int64_t medley_sgmv_workspace(const MedleyGroup* group, int32_t max_items, int32_t block_rows, int32_t mode);
// How many parts of items the current device works on at once, and how many column blocks each should hold at least.
int medley_sgmv_room(const MedleyGroup* group, int32_t block_rows, int32_t mode, int32_t* parts, int32_t* column_blocks,
                     char* error, int64_t error_bytes);
// Greedy draw. logits: [rows, vocab] float32, row after row. For each row: the lowest index of the largest logit,
// its log-softmax, and whether the row's log-sum-exp is no finite number. `row_map` (may be null): where the token
// is also written, last_token[row_map[row]].
int medley_greedy(const float* logits, int64_t rows, int64_t vocab, int64_t* tokens, float* logprobs, uint8_t* is_bad,
                  const int64_t* row_map, int64_t* last_token, void* stream, char* error, int64_t error_bytes);

// Virtual memory. Addresses and sizes are multiples of the granularity; the device's context is current. Nothing that
// runs may use what is unmapped: the caller waits for it before.
// The granularity of a device's memory in bytes; 0 where the device or its driver has no virtual memory.
int medley_memory_granularity(int32_t device, int64_t* granularity, char* error, int64_t error_bytes);
// Addresses without memory, and their end, once nothing is mapped there.
int medley_memory_reserve(int64_t size, uint64_t* address, char* error, int64_t error_bytes);
int medley_memory_release(uint64_t address, int64_t size, char* error, int64_t error_bytes);
// Memory with anything in it at reserved addresses, as a whole, and its end. All or nothing; `handle` knows the memory.
int medley_memory_map(int32_t device, uint64_t address, int64_t size, uint64_t* handle, char* error,
                      int64_t error_bytes);
int medley_memory_unmap(uint64_t address, int64_t size, uint64_t handle, char* error, int64_t error_bytes);

#ifdef __cplusplus
}
#endif
