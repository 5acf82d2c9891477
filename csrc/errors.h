// Error texts for the caller: what was wrong, what was got, what was wanted.
#pragma once

#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

namespace medley {

inline int refuse(char* error, int64_t bytes, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, bytes, format, arguments);
  va_end(arguments);
  return -1;
}

inline int report(cudaError_t code, const char* what, char* error, int64_t bytes) {
  if (code != cudaSuccess) snprintf(error, bytes, "%s: %s", what, cudaGetErrorString(code));
  return static_cast<int>(code);
}

}  // namespace medley
