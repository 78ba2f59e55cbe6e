// Rotary positions, one pass each way.
// Called through ctypes by cpu.py; the contract is contract.py's. Elements are fp32 or bf16,
// arithmetic is fp32, and no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

// Heads [tokens, heads, 2 half] turned by cos and sin [table_tokens, half], the tables repeating;
// sign -1 turns back.
template <typename T>
void rotary_turn(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads,
                 int64_t half, int64_t table_tokens, float sign) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < tokens; ++i) {
    const T* c = cos + i % table_tokens * half;
    const T* s = sin + i % table_tokens * half;
    for (int64_t head = 0; head < heads; ++head) {
      const T* from = x + (i * heads + head) * 2 * half;
      T* to = out + (i * heads + head) * 2 * half;
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float a = wide(from[j]), b = wide(from[half + j]);
        const float cosine = wide(c[j]), sine = sign * wide(s[j]);
        to[j] = narrow<T>(a * cosine - b * sine);
        to[half + j] = narrow<T>(b * cosine + a * sine);
      }
    }
  }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_rotary_turn_##SUFFIX(const T* a, const T* b, const T* c, T* d,           \
                                               int64_t e, int64_t f, int64_t g, int64_t h,         \
                                               float i) {                                          \
    rotary_turn(a, b, c, d, e, f, g, h, i);                                                        \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
