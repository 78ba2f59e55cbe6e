// RMSNorm; a row stays in the cache through all passes over it.
// Called through ctypes by cpu.py; the contract is contract.py's. Elements are fp32 or bf16,
// arithmetic is fp32, and no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#include "../elements.inc"

// z = x + residual where there is one; y = z * rstd * weight.
template <typename T>
void rms_norm_forward(const T* x, const T* residual, const T* weight, T* y, T* z, float* rstd,
                      int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * size;
    if (residual != nullptr) {
      const T* other = residual + i * size;
      T* sum = z + i * size;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) sum[j] = narrow<T>(wide(row[j]) + wide(other[j]));
      row = sum;
    }
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < size; ++j) squares += wide(row[j]) * wide(row[j]);
    const float r = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    rstd[i] = r;
    T* out = y + i * size;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) out[j] = narrow<T>(wide(row[j]) * r * wide(weight[j]));
  }
}

// Parts of the weight's gradient, [blocks, size], each the sum of an equal run of rows.
template <typename T>
void rms_norm_backward(const T* z, const T* weight, const float* rstd, const T* of_y,
                       const T* of_z, T* of_x, float* parts, int64_t rows, int64_t size,
                       int64_t blocks) {
  const int64_t run = (rows + blocks - 1) / blocks;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    float* part = parts + block * size;
    std::fill(part, part + size, 0.0f);
    const int64_t end = std::min(rows, (block + 1) * run);
    for (int64_t i = block * run; i < end; ++i) {
      const T *row = z + i * size, *dy = of_y + i * size;
      const float r = rstd[i];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < size; ++j) dot += wide(dy[j]) * wide(weight[j]) * wide(row[j]);
      const float mean = dot * r * r / static_cast<float>(size);
      T* out = of_x + i * size;
      const T* more = of_z == nullptr ? nullptr : of_z + i * size;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        const float value = wide(row[j]), d = wide(dy[j]);
        part[j] += d * value * r;
        const float g = r * (d * wide(weight[j]) - value * mean);
        out[j] = narrow<T>(more == nullptr ? g : g + wide(more[j]));
      }
    }
  }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_rms_norm_forward_##SUFFIX(const T* a, const T* b, const T* c, T* d,      \
                                                    T* e, float* f, int64_t g, int64_t h,          \
                                                    float i) {                                     \
    rms_norm_forward(a, b, c, d, e, f, g, h, i);                                                   \
  }                                                                                                \
  extern "C" void megagpt_rms_norm_backward_##SUFFIX(const T* a, const T* b, const float* c,       \
                                                     const T* d, const T* e, T* f, float* g,       \
                                                     int64_t h, int64_t i, int64_t j) {            \
    rms_norm_backward(a, b, c, d, e, f, g, h, i, j);                                               \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
