// Attention on a CPU with vectors of 512 bits, causal and within documents, forward and backward:
// blocks of keys that no query of a block sees are left out. Called through ctypes by cpu.py.
//
// All blocks stand with queries along the vector, so that softmax is one lane a query: scores^T
// [keys, queries] = K Q^T, out^T [d, queries] = V^T P^T, and so in backward. A product reads its left
// side row by row, one word of W elements for all lanes, and its right side packed by W rows: one
// element for fp32, two for bf16, which the processor multiplies and adds at once.
// Source of the method: Dao 2023, https://arxiv.org/abs/2307.08691.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace {

#include "../elements.inc"

constexpr int64_t kBlock = 64;  // queries, and keys, of a block
constexpr int64_t kLanes = 16;
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <typename T>
struct Words;  // how W elements are one word, and a product's step

template <>
struct Words<float> {
  static constexpr int64_t kWidth = 1;
  static __m512 spread(const float* a) { return _mm512_set1_ps(*a); }
  static __m512 load(const float* b) { return _mm512_loadu_ps(b); }
  static __m512 step(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Words<bf16> {
  static constexpr int64_t kWidth = 2;
  static __m512i spread(const bf16* a) {
    int32_t word;
    std::memcpy(&word, a, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static __m512i load(const bf16* b) { return _mm512_loadu_si512(b); }
  static __m512 step(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <typename T>
struct Buffer {
  explicit Buffer(int64_t size)
      : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))) {
    if (data == nullptr) std::abort();
    std::memset(static_cast<void*>(data.get()), 0, size * sizeof(T));
  }
  T* get() const { return data.get(); }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data;
};

// Four rows of C and kVectors vectors of its columns.
template <typename T, int kVectors>
void multiply_rows(const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
                   int64_t depth, bool adds) {
  constexpr int64_t kWidth = Words<T>::kWidth;
  __m512 sum[4][kVectors];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = adds ? _mm512_loadu_ps(c + i * ldc + j * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += kWidth) {
    const T* row = b + k * ldb;
    for (int i = 0; i < 4; ++i) {
      const auto word = Words<T>::spread(a + i * lda + k);
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = Words<T>::step(sum[i][j], word, Words<T>::load(row + j * kLanes * kWidth));
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + i * ldc + j * kLanes, sum[i][j]);
}

// C [rows, columns] = A [rows, depth] B, or C += A B; B is packed, [depth / W, columns, W]. Rows are
// a multiple of 4, columns of 16, depth of W.
template <typename T>
void multiply(const T* a, int64_t lda, const T* b, float* c, int64_t rows, int64_t columns,
              int64_t depth, bool adds) {
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < columns; j += 4 * kLanes) {
      const T *left = a + i * lda, *right = b + j * Words<T>::kWidth;
      float* out = c + i * columns + j;
      switch ((columns - j) / kLanes) {
        case 1: multiply_rows<T, 1>(left, lda, right, columns, out, columns, depth, adds); break;
        case 2: multiply_rows<T, 2>(left, lda, right, columns, out, columns, depth, adds); break;
        case 3: multiply_rows<T, 3>(left, lda, right, columns, out, columns, depth, adds); break;
        default: multiply_rows<T, 4>(left, lda, right, columns, out, columns, depth, adds);
      }
    }
  }
}

// A block's rows [count, d], `stride` apart, in three orders; rows up to kBlock are 0.
template <typename T>
void copy_rows(const T* from, int64_t stride, int64_t count, int64_t d, T* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * d, from + i * stride, d * sizeof(T));
  std::memset(static_cast<void*>(to + count * d), 0, (kBlock - count) * d * sizeof(T));
}

// -> [d / W, kBlock, W], the right side of a product over d.
template <typename T>
void pack_over_d(const T* rows, int64_t d, T* to) {
  constexpr int64_t kWidth = Words<T>::kWidth;
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t k = 0; k < d; k += kWidth)
      std::memcpy(to + k * kBlock + i * kWidth, rows + i * d + k, kWidth * sizeof(T));
}

// -> [kBlock / W, d, W], the right side of a product over the block's rows.
template <typename T>
void pack_over_rows(const T* rows, int64_t d, T* to) {
  constexpr int64_t kWidth = Words<T>::kWidth;
  for (int64_t i = 0; i < kBlock; i += kWidth)
    for (int64_t k = 0; k < d; ++k)
      for (int64_t w = 0; w < kWidth; ++w) to[(i * d) + k * kWidth + w] = rows[(i + w) * d + k];
}

// [kBlock, d] -> [d, kBlock].
template <typename T>
void transpose(const T* rows, int64_t d, T* to) {
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t k = 0; k < d; ++k) to[k * kBlock + i] = rows[i * d + k];
}

struct Shape {
  int64_t batch, length, heads, kv_heads, d;
  float scale;
  int64_t blocks() const { return (length + kBlock - 1) / kBlock; }
  int64_t count(int64_t block) const { return std::min(kBlock, length - block * kBlock); }
};

// The first key that each query of a block sees: its document's.
struct Starts {
  Starts(const int64_t* starts, const Shape& shape, int64_t sample, int64_t block) {
    const int64_t count = shape.count(block);
    for (int64_t i = 0; i < kBlock; ++i)
      first[i] = starts == nullptr || i >= count
                     ? 0
                     : static_cast<int32_t>(starts[sample * shape.length + block * kBlock + i]);
    least = *std::min_element(first, first + count);
    most = *std::max_element(first, first + count);
  }
  int32_t first[kBlock];
  int64_t least, most;
};

// Scores^T of a block of keys and one of queries, times scale; kNone where they do not see.
inline void mask_scores(float* scores, int64_t keys, int64_t queries, const Starts& starts,
                        float scale) {
  const int32_t key0 = static_cast<int32_t>(keys * kBlock);
  const int32_t query0 = static_cast<int32_t>(queries * kBlock);
  const bool is_whole = keys < queries && starts.most <= key0;
  for (int32_t i = 0; i < kBlock; ++i) {
    float* row = scores + i * kBlock;
    if (is_whole) {
#pragma omp simd
      for (int32_t j = 0; j < kBlock; ++j) row[j] *= scale;
    } else {
#pragma omp simd
      for (int32_t j = 0; j < kBlock; ++j)
        row[j] = (key0 + i <= query0 + j && key0 + i >= starts.first[j]) ? row[j] * scale : kNone;
    }
  }
}

// Rows [kBlock, kBlock] of floats -> packed by W rows.
template <typename T>
void pack_floats(const float* rows, T* to) {
  constexpr int64_t kWidth = Words<T>::kWidth;
  for (int64_t i = 0; i < kBlock; i += kWidth) {
    T* out = to + i * kBlock;
    const float *first = rows + i * kBlock, *second = first + (kWidth - 1) * kBlock;
    if constexpr (kWidth == 1) {
      std::memcpy(out, first, kBlock * sizeof(float));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) {
        const uint32_t word = narrow<bf16>(first[j]).bits |
                              static_cast<uint32_t>(narrow<bf16>(second[j]).bits) << 16;
        std::memcpy(out + 2 * j, &word, sizeof word);
      }
    }
  }
}

template <typename T>
void forward_block(const T* q, const T* k_rows, const T* v_columns, const int64_t* all_starts,
                   T* out, float* log_sum_exp, const Shape& shape, int64_t sample, int64_t head,
                   int64_t block) {
  const int64_t d = shape.d, stride = shape.heads * d, count = shape.count(block);
  const int64_t offset = ((sample * shape.length + block * kBlock) * shape.heads + head) * d;
  const Starts starts(all_starts, shape, sample, block);
  Buffer<T> rows(kBlock * d), packed(kBlock * d), weights(kBlock * kBlock);
  Buffer<float> scores(kBlock * kBlock), sums(d * kBlock);
  copy_rows(q + offset, stride, count, d, rows.get());
  pack_over_d(rows.get(), d, packed.get());
  alignas(64) float largest[kBlock], total[kBlock], shrink[kBlock], top[kBlock];
  std::fill(largest, largest + kBlock, kNone);
  std::fill(total, total + kBlock, 0.0f);
  for (int64_t keys = starts.least / kBlock; keys <= block; ++keys) {
    float* s = scores.get();
    multiply(k_rows + keys * kBlock * d, d, packed.get(), s, kBlock, kBlock, d, false);
    mask_scores(s, keys, block, starts, shape.scale);
    std::copy(largest, largest + kBlock, top);
    for (int64_t i = 0; i < kBlock; ++i)
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) top[j] = std::max(top[j], s[i * kBlock + j]);
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      const float shift = top[j] == kNone ? 0.0f : top[j];
      shrink[j] = exp_of(largest[j] - shift);
      largest[j] = top[j];
      top[j] = shift;
      total[j] *= shrink[j];
    }
    for (int64_t i = 0; i < kBlock; ++i)
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) {
        const float p = exp_of(s[i * kBlock + j] - top[j]);
        s[i * kBlock + j] = p;
        total[j] += p;
      }
    pack_floats(s, weights.get());
    for (int64_t i = 0; i < d; ++i)
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) sums.get()[i * kBlock + j] *= shrink[j];
    multiply(v_columns + keys * kBlock * d, kBlock, weights.get(), sums.get(), d, kBlock, kBlock,
             true);
  }
  for (int64_t j = 0; j < count; ++j) {
    T* to = out + offset + j * stride;
    const float share = 1.0f / total[j];
    for (int64_t i = 0; i < d; ++i) to[i] = narrow<T>(sums.get()[i * kBlock + j] * share);
    log_sum_exp[(sample * shape.heads + head) * shape.length + block * kBlock + j] =
        largest[j] + std::log(total[j]);
  }
}

template <typename T>
void forward(const T* q, const T* k, const T* v, const int64_t* starts, T* out, float* log_sum_exp,
             Shape shape) {
  const int64_t d = shape.d, blocks = shape.blocks(), units = shape.batch * shape.kv_heads;
  const int64_t size = blocks * kBlock * d, stride = shape.kv_heads * d;
  Buffer<T> keys(units * size), values(units * size);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t sample = unit / shape.kv_heads, head = unit % shape.kv_heads;
      const int64_t from = ((sample * shape.length + block * kBlock) * shape.kv_heads + head) * d;
      const int64_t to = unit * size + block * kBlock * d;
      Buffer<T> rows(kBlock * d);
      copy_rows(k + from, stride, shape.count(block), d, keys.get() + to);
      copy_rows(v + from, stride, shape.count(block), d, rows.get());
      transpose(rows.get(), d, values.get() + to);
    }
  const int64_t group = shape.heads / shape.kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t unit = 0; unit < shape.batch * shape.heads; ++unit)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t sample = unit / shape.heads, head = unit % shape.heads;
      const int64_t at = (sample * shape.kv_heads + head / group) * size;
      forward_block(q, keys.get() + at, values.get() + at, starts, out, log_sum_exp, shape, sample,
                    head, block);
    }
}

// What backward needs of a block of queries, for all blocks of keys.
template <typename T>
struct Queries {
  explicit Queries(int64_t d)
      : rows(kBlock * d), over_d(kBlock * d), over_rows(kBlock * d), gradient_over_d(kBlock * d),
        gradient_over_rows(kBlock * d), sums(kBlock * d) {}
  Buffer<T> rows, over_d, over_rows, gradient_over_d, gradient_over_rows;
  Buffer<float> sums;  // of the gradient^T, [d, kBlock]
  alignas(64) float log_sum_exp[kBlock], delta[kBlock];
};

template <typename T>
void backward_unit(const T* q, const T* k, const T* v, const T* out, const T* of_out,
                   const float* log_sum_exp, const int64_t* all_starts, T* of_q, T* of_k, T* of_v,
                   const Shape& shape, int64_t sample, int64_t kv_head) {
  const int64_t d = shape.d, blocks = shape.blocks(), group = shape.heads / shape.kv_heads;
  const int64_t stride = shape.heads * d, kv_stride = shape.kv_heads * d;
  const int64_t size = kBlock * d, whole = blocks * size;
  Buffer<T> k_rows(whole), k_columns(whole), v_rows(whole);
  Buffer<float> k_sums(whole), v_sums(whole);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = ((sample * shape.length + block * kBlock) * shape.kv_heads + kv_head) * d;
    copy_rows(k + from, kv_stride, shape.count(block), d, k_rows.get() + block * size);
    copy_rows(v + from, kv_stride, shape.count(block), d, v_rows.get() + block * size);
    transpose(k_rows.get() + block * size, d, k_columns.get() + block * size);
  }
  Buffer<float> scores(kBlock * kBlock), slopes(kBlock * kBlock);
  Buffer<T> left(kBlock * kBlock), packed(kBlock * kBlock);
  Queries<T> queries(d);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t count = shape.count(block);
      const int64_t at = ((sample * shape.length + block * kBlock) * shape.heads + head) * d;
      const Starts starts(all_starts, shape, sample, block);
      copy_rows(q + at, stride, count, d, queries.rows.get());
      pack_over_d(queries.rows.get(), d, queries.over_d.get());
      pack_over_rows(queries.rows.get(), d, queries.over_rows.get());
      copy_rows(of_out + at, stride, count, d, queries.rows.get());
      pack_over_d(queries.rows.get(), d, queries.gradient_over_d.get());
      pack_over_rows(queries.rows.get(), d, queries.gradient_over_rows.get());
      std::fill(queries.sums.get(), queries.sums.get() + size, 0.0f);
      for (int64_t j = 0; j < kBlock; ++j) {
        // Lanes behind the sequence's end: exp(.. - inf) is 0.
        queries.log_sum_exp[j] = -kNone;
        queries.delta[j] = 0.0f;
        if (j >= count) continue;
        queries.log_sum_exp[j] =
            log_sum_exp[(sample * shape.heads + head) * shape.length + block * kBlock + j];
        float dot = 0.0f;
        for (int64_t i = 0; i < d; ++i)
          dot += wide(out[at + j * stride + i]) * wide(of_out[at + j * stride + i]);
        queries.delta[j] = dot;
      }
      for (int64_t keys = starts.least / kBlock; keys <= block; ++keys) {
        float *p = scores.get(), *slope = slopes.get();
        multiply(k_rows.get() + keys * size, d, queries.over_d.get(), p, kBlock, kBlock, d, false);
        mask_scores(p, keys, block, starts, shape.scale);
        multiply(v_rows.get() + keys * size, d, queries.gradient_over_d.get(), slope, kBlock,
                 kBlock, d, false);
        for (int64_t i = 0; i < kBlock; ++i)
#pragma omp simd
          for (int64_t j = 0; j < kBlock; ++j) {
            const float weight = exp_of(p[i * kBlock + j] - queries.log_sum_exp[j]);
            left.get()[i * kBlock + j] = narrow<T>(weight);
            slope[i * kBlock + j] = weight * (slope[i * kBlock + j] - queries.delta[j]) * shape.scale;
          }
        multiply(left.get(), kBlock, queries.gradient_over_rows.get(), v_sums.get() + keys * size,
                 kBlock, d, kBlock, true);
#pragma omp simd
        for (int64_t i = 0; i < kBlock * kBlock; ++i) left.get()[i] = narrow<T>(slope[i]);
        multiply(left.get(), kBlock, queries.over_rows.get(), k_sums.get() + keys * size, kBlock, d,
                 kBlock, true);
        pack_floats(slope, packed.get());
        multiply(k_columns.get() + keys * size, kBlock, packed.get(), queries.sums.get(), d, kBlock,
                 kBlock, true);
      }
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < d; ++i)
          of_q[at + j * stride + i] = narrow<T>(queries.sums.get()[i * kBlock + j]);
    }
  for (int64_t i = 0; i < shape.length; ++i) {
    const int64_t to = ((sample * shape.length + i) * shape.kv_heads + kv_head) * d;
    for (int64_t j = 0; j < d; ++j) {
      of_k[to + j] = narrow<T>(k_sums.get()[i * d + j]);
      of_v[to + j] = narrow<T>(v_sums.get()[i * d + j]);
    }
  }
}

template <typename T>
void backward(const T* q, const T* k, const T* v, const T* out, const T* of_out,
              const float* log_sum_exp, const int64_t* starts, T* of_q, T* of_k, T* of_v,
              Shape shape) {
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t sample = 0; sample < shape.batch; ++sample)
    for (int64_t head = 0; head < shape.kv_heads; ++head)
      backward_unit(q, k, v, out, of_out, log_sum_exp, starts, of_q, of_k, of_v, shape, sample,
                    head);
}

}  // namespace

#define EXPORT_FOR(T, SUFFIX)                                                                      \
  extern "C" void megagpt_attention_forward_##SUFFIX(                                              \
      const T* q, const T* k, const T* v, const int64_t* starts, T* out, float* log_sum_exp,       \
      int64_t b, int64_t s, int64_t n, int64_t kv, int64_t d, float scale) {                       \
    forward(q, k, v, starts, out, log_sum_exp, Shape{b, s, n, kv, d, scale});                      \
  }                                                                                                \
  extern "C" void megagpt_attention_backward_##SUFFIX(                                             \
      const T* q, const T* k, const T* v, const T* out, const T* of_out, const float* log_sum_exp, \
      const int64_t* starts, T* of_q, T* of_k, T* of_v, int64_t b, int64_t s, int64_t n,           \
      int64_t kv, int64_t d, float scale) {                                                        \
    backward(q, k, v, out, of_out, log_sum_exp, starts, of_q, of_k, of_v,                          \
             Shape{b, s, n, kv, d, scale});                                                        \
  }

EXPORT_FOR(float, fp32)
#ifdef __AVX512BF16__
EXPORT_FOR(bf16, bf16)
#endif
#endif
