// Passes over rows of logits, and the sum of gradients.
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
void row_statistics(const T* logits, const int64_t* index, int64_t rows, int64_t columns,
                    int64_t num_real, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = logits + i * columns;
    float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < num_real; ++j) largest = std::max(largest, wide(row[j]));
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < num_real; ++j) total += exp_of(wide(row[j]) - largest);
    out[i] = largest;
    out[rows + i] = total;
    out[2 * rows + i] = index[i] < 0 ? 0.0f : wide(row[index[i]]);
  }
}

template <typename T>
void row_gradients(T* logits, const int64_t* index, const float* log_sum_exp, const float* scale,
                   const float* target_scale, int64_t rows, int64_t columns, int64_t num_real) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    T* row = logits + i * columns;
    const float shift = log_sum_exp[i], factor = scale[i];
    const float target = index[i] < 0 ? 0.0f : wide(row[index[i]]);
#pragma omp simd
    for (int64_t j = 0; j < num_real; ++j)
      row[j] = narrow<T>(exp_of(wide(row[j]) - shift) * factor);
    if (index[i] >= 0)
      row[index[i]] = narrow<T>(exp_of(target - shift) * factor - target_scale[i]);
    std::memset(static_cast<void*>(row + num_real), 0, (columns - num_real) * sizeof(T));
  }
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_row_statistics_##SUFFIX(const T* a, const int64_t* b, int64_t c,         \
                                                  int64_t d, int64_t e, float* f) {                \
    row_statistics(a, b, c, d, e, f);                                                              \
  }                                                                                                \
  extern "C" void megagpt_row_gradients_##SUFFIX(T* a, const int64_t* b, const float* c,           \
                                                 const float* d, const float* e, int64_t f,        \
                                                 int64_t g, int64_t h) {                           \
    row_gradients(a, b, c, d, e, f, g, h);                                                         \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
