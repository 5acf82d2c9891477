#include "sgmv_pick.cuh"

namespace medley {

Kernel pick_bf16(int block_rows, Step step) { return pick<__nv_bfloat16>(block_rows, step); }

}  // namespace medley
