// Keyed dropout, one pass; backward is the same pass over the gradient.
// Called through ctypes by cpu.py; the contract is contract.py's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

template <typename T>
void dropout(const T* x, const int64_t* stream, T* out, int64_t samples, int64_t size,
             int64_t first, int64_t threshold, float kept) {
  constexpr int64_t kRun = 4096;
  const int64_t runs = (size + kRun - 1) / kRun;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t sample = 0; sample < samples; ++sample)
    for (int64_t run = 0; run < runs; ++run) {
      const uint64_t state = static_cast<uint64_t>(stream[sample]);
      const int64_t begin = run * kRun, end = std::min(size, begin + kRun);
      const T* from = x + sample * size;
      T* to = out + sample * size;
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t place = static_cast<uint64_t>(first + 1 + i);
        const int64_t number = static_cast<int64_t>(mix(state + place * kGolden) >> 40);
        to[i] = narrow<T>(number >= threshold ? wide(from[i]) / kept : 0.0f);
      }
    }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                    \
  extern "C" void megagpt_dropout_##SUFFIX(const T* a, const int64_t* b, T* c, int64_t d,        \
                                           int64_t e, int64_t f, int64_t g, float h) {           \
    dropout(a, b, c, d, e, f, g, h);                                                             \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
