// GELU in the tanh form, one pass each way.
// Called through ctypes by cpu.py; the contract is contract.py's. Elements are fp32 or bf16,
// arithmetic is fp32, and no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

// tanh-GELU is x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kTwiceRoot = 1.59576912f;  // 2 sqrt(2/pi)
constexpr float kCubic = 0.044715f;

template <typename T>
void gelu_forward(const T* x, T* out, int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) {
    const float v = wide(x[i]);
    out[i] = narrow<T>(v * sigmoid(kTwiceRoot * v * (1.0f + kCubic * v * v)));
  }
}

template <typename T>
void gelu_backward(const T* x, const T* grad, T* out, int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) {
    const float v = wide(x[i]), square = v * v;
    const float s = sigmoid(kTwiceRoot * v * (1.0f + kCubic * square));
    const float slope = kTwiceRoot * v * (1.0f + 3.0f * kCubic * square);
    out[i] = narrow<T>(wide(grad[i]) * s * (1.0f + slope * (1.0f - s)));
  }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_gelu_forward_##SUFFIX(const T* a, T* b, int64_t c) {                     \
    gelu_forward(a, b, c);                                                                         \
  }                                                                                                \
  extern "C" void megagpt_gelu_backward_##SUFFIX(const T* a, const T* b, T* c, int64_t d) {        \
    gelu_backward(a, b, c, d);                                                                     \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
