// SwiGLU, one pass each way.
// Called through ctypes by cpu.py; the contract is contract.py's. Elements are fp32 or bf16,
// arithmetic is fp32, and no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

template <typename T>
void swiglu_forward(const T* gate, const T* up, T* out, int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) {
    const float g = wide(gate[i]);
    out[i] = narrow<T>(g * sigmoid(g) * wide(up[i]));
  }
}

template <typename T>
void swiglu_backward(const T* gate, const T* up, const T* grad, T* of_gate, T* of_up,
                     int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) {
    const float g = wide(gate[i]), u = wide(up[i]), d = wide(grad[i]);
    const float s = sigmoid(g);
    of_up[i] = narrow<T>(d * g * s);
    of_gate[i] = narrow<T>(d * u * s * (1.0f + g * (1.0f - s)));
  }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_swiglu_forward_##SUFFIX(const T* a, const T* b, T* c, int64_t d) {       \
    swiglu_forward(a, b, c, d);                                                                    \
  }                                                                                                \
  extern "C" void megagpt_swiglu_backward_##SUFFIX(const T* a, const T* b, const T* c, T* d, T* e, \
                                                   int64_t f) {                                    \
    swiglu_backward(a, b, c, d, e, f);                                                             \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
