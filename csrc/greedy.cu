// Greedy draw of a step's rows: the largest logit, its log-softmax, and whether the row is sound, in one pass.
#include <math.h>

#include "errors.h"
#include "medley.h"

namespace {

constexpr int kThreads = 512;

// What is known of a part of a row: its largest logit, where it is, and sum(exp(logit - largest)).
struct Part {
  float best;
  int at;
  float mass;
};

// In a fixed order, so that a row's bits do not depend on its neighbours. NaN is kept in `mass`.
__device__ Part join(Part a, Part b) {
  const bool first = a.best > b.best || (a.best == b.best && a.at < b.at);
  const Part &high = first ? a : b, &low = first ? b : a;
  const float factor = low.best == high.best ? 1.f : expf(low.best - high.best);
  return {high.best, high.at, high.mass + low.mass * factor};
}

__global__ void __launch_bounds__(kThreads) greedy_kernel(const float* logits, int vocab, int64_t* tokens,
                                                          float* logprobs, uint8_t* is_bad, const int64_t* row_map,
                                                          int64_t* last_token) {
  const int64_t row = blockIdx.x;
  const float* from = logits + row * vocab;
  Part mine = {-INFINITY, vocab, 0.f};
  bool has_nan = false;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const float value = from[i];
    has_nan |= !(value < INFINITY);
    if (value > mine.best) {
      mine = {value, i, mine.mass * (mine.best == -INFINITY ? 0.f : expf(mine.best - value)) + 1.f};
    } else if (value > -INFINITY) {
      mine.mass += expf(value - mine.best);
    }
  }
  __shared__ Part parts[kThreads];
  parts[threadIdx.x] = mine;
  const bool any_nan = __syncthreads_or(has_nan);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] = join(parts[threadIdx.x], parts[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const Part all = parts[0];
    const bool bad = any_nan || all.at >= vocab;
    const int64_t token = bad ? 0 : all.at;
    tokens[row] = token;
    logprobs[row] = -logf(all.mass);
    is_bad[row] = bad;
    if (row_map) last_token[row_map[row]] = token;
  }
}

}  // namespace

extern "C" int medley_greedy(const float* logits, int64_t rows, int64_t vocab, int64_t* tokens, float* logprobs,
                             uint8_t* is_bad, const int64_t* row_map, int64_t* last_token, void* stream, char* error,
                             int64_t bytes) {
  if (!logits || !tokens || !logprobs || !is_bad)
    return medley::refuse(error, bytes, "logits, tokens, logprobs, is_bad: got a null pointer");
  if (row_map && !last_token) return medley::refuse(error, bytes, "last_token: got a null pointer beside a row_map");
  if (rows < 0 || vocab < 1 || vocab > INT32_MAX)
    return medley::refuse(error, bytes, "logits: got shape [%lld, %lld]", static_cast<long long>(rows),
                          static_cast<long long>(vocab));
  if (rows == 0) return 0;
  greedy_kernel<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logits, static_cast<int>(vocab), tokens, logprobs, is_bad, row_map, last_token);
  return medley::report(cudaGetLastError(), "launch of the greedy draw", error, bytes);
}
