#include "sgmv_pick.cuh"

namespace medley {

Kernel pick_fp16(int block_rows, Step step) { return pick<__half>(block_rows, step); }

}  // namespace medley
