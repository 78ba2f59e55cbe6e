// The sum of gradients over micro-batches and chunks, one pass.
// Called through ctypes by cpu.py; the contract is contract.py's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

// into += part, and nothing of part is rounded.
template <typename T>
void accumulate(float* into, const T* part, int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) into[i] += wide(part[i]);
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_accumulate_##SUFFIX(float* a, const T* b, int64_t c) {                   \
    accumulate(a, b, c);                                                                           \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
