// The passes over memory of the CPU back ends, in one thread team a call. Called through ctypes by
// native.py, which states the signatures; the contracts are those of the ops' folders.
// Elements are float or bf16 (the upper half of a float); arithmetic is float. A row's result does
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7FC0u)};
}

// exp with an error below 1.5 units in the last place, 0 below -87.3, infinite above 88.7.
// exp(x) = 2^n exp(r), |r| <= log(2)/2; the series to r^7 leaves 5e-9 of it.
inline float exp_of(float x) {
  const float clamped = std::min(std::max(x, -87.3f), 88.7f);
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = std::fma(n, -1.42860682e-6f, std::fma(n, -0.693145752f, clamped));
  float p = 1.9841270e-4f;
  p = std::fma(p, r, 1.3888889e-3f);
  p = std::fma(p, r, 8.3333333e-3f);
  p = std::fma(p, r, 4.1666667e-2f);
  p = std::fma(p, r, 1.6666667e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float value = p * scale;
  const float high = x > 88.7f ? std::numeric_limits<float>::infinity() : value;
  return x != x ? x : (x < -87.3f ? 0.0f : high);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

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

// into += part, and nothing of part is rounded.
template <typename T>
void accumulate(float* into, const T* part, int64_t size) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < size; ++i) into[i] += wide(part[i]);
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
  }                                                                                                \
  extern "C" void megagpt_swiglu_forward_##SUFFIX(const T* a, const T* b, T* c, int64_t d) {       \
    swiglu_forward(a, b, c, d);                                                                    \
  }                                                                                                \
  extern "C" void megagpt_swiglu_backward_##SUFFIX(const T* a, const T* b, const T* c, T* d, T* e, \
                                                   int64_t f) {                                    \
    swiglu_backward(a, b, c, d, e, f);                                                             \
  }                                                                                                \
  extern "C" void megagpt_gelu_forward_##SUFFIX(const T* a, T* b, int64_t c) {                     \
    gelu_forward(a, b, c);                                                                         \
  }                                                                                                \
  extern "C" void megagpt_gelu_backward_##SUFFIX(const T* a, const T* b, T* c, int64_t d) {        \
    gelu_backward(a, b, c, d);                                                                     \
  }                                                                                                \
  extern "C" void megagpt_rms_norm_forward_##SUFFIX(const T* a, const T* b, const T* c, T* d,      \
                                                    T* e, float* f, int64_t g, int64_t h,          \
                                                    float i) {                                     \
    rms_norm_forward(a, b, c, d, e, f, g, h, i);                                                   \
  }                                                                                                \
  extern "C" void megagpt_rms_norm_backward_##SUFFIX(const T* a, const T* b, const float* c,       \
                                                     const T* d, const T* e, T* f, float* g,       \
                                                     int64_t h, int64_t i, int64_t j) {            \
    rms_norm_backward(a, b, c, d, e, f, g, h, i, j);                                               \
  }                                                                                                \
  extern "C" void megagpt_rotary_turn_##SUFFIX(const T* a, const T* b, const T* c, T* d,           \
                                               int64_t e, int64_t f, int64_t g, int64_t h,         \
                                               float i) {                                          \
    rotary_turn(a, b, c, d, e, f, g, h, i);                                                        \
  }                                                                                                \
  extern "C" void megagpt_accumulate_##SUFFIX(float* a, const T* b, int64_t c) {                   \
    accumulate(a, b, c);                                                                           \
  }

EXPORT_FOR(float, fp32)
EXPORT_FOR(bf16, bf16)
