/* Attention of one token a row over a cache in main memory, for caches that stay on the host.
 *
 * Each row of keys and values is read once from memory, by tasks of some hundred tokens of one head of keys; what tasks
 * find is combined by their largest scores and sums (flash decoding). Rows lie as (batch, kv heads, capacity, size). */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* tokens whose scores are kept at once */
#define LARGEST 256 /* head size */

typedef struct {
  const void *q, *k, *v; /* (batch, heads or kv heads, size): queries, the new keys and values */
  void *keys, *values, *out;
  const int32_t *last; /* (batch) position of the new token */
  int64_t batch, heads, kv_heads, size, capacity, window, task;
  float scale, softcap;
  float *scratch; /* (batch, heads, tasks, size + 2) */
} planish_job;

typedef void (*part_of)(const planish_job *, const float *, const void *, const void *, int64_t, float *);

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)

#define LANES 16
#define VECTOR __m512
#define ZERO _mm512_setzero_ps
#define ALL _mm512_set1_ps
#define FLOATS _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#define TIMES _mm512_mul_ps
#define SUM _mm512_reduce_add_ps
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx2")))
#define ELEMENT uint16_t
#define LOAD(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define NAME half_512
#include "host_attention_part.h"
#undef ELEMENT
#undef LOAD
#undef NAME
#define ELEMENT float
#define LOAD(p) _mm512_loadu_ps(p)
#define NAME float_512
#include "host_attention_part.h"
#undef ELEMENT
#undef LOAD
#undef NAME
#undef LANES
#undef VECTOR
#undef ZERO
#undef ALL
#undef FLOATS
#undef STORE
#undef MULTIPLY_ADD
#undef TIMES
#undef SUM
#undef TARGET

#define LANES 8
#define VECTOR __m256
#define ZERO _mm256_setzero_ps
#define ALL _mm256_set1_ps
#define FLOATS _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#define TIMES _mm256_mul_ps
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define SUM sum_256
TARGET static inline float sum_256(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
#define ELEMENT uint16_t
#define LOAD(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define NAME half_256
#include "host_attention_part.h"
#undef ELEMENT
#undef LOAD
#undef NAME
#define ELEMENT float
#define LOAD(p) _mm256_loadu_ps(p)
#define NAME float_256
#include "host_attention_part.h"

__attribute__((target("f16c,avx"))) static float from_half(uint16_t x) { return _cvtsh_ss(x); }
__attribute__((target("f16c,avx"))) static uint16_t to_half(float x) { return _cvtss_sh(x, 0); }

/* 2: AVX-512, 1: AVX2, 0: none that this is written for. */
int planish_host_level(void) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
             ? 2
             : 1;
}

static int64_t first_of(const planish_job *job, int64_t row) {
  int64_t begin = job->last[row] + 1 - job->window;
  return begin > 0 ? begin : 0;
}

/* Numbers of scratch: float32. */
int64_t planish_host_scratch(const planish_job *job) {
  int64_t tasks = (job->capacity + job->task - 1) / job->task;
  return job->batch * job->heads * (tasks * (job->size + 2) + job->size);
}

/* Writes the new keys and values, then attends; `level` of the processor, at most. Returns 0, or what it can not. */
int planish_host_attention(const planish_job *job, int half, int level, int threads) {
  const int64_t size = job->size, group = job->heads / job->kv_heads, width = half ? 2 : 4;
  if (size > LARGEST || size % (level == 2 ? 16 : 8) || level < 1) return 1;
  const int64_t tasks = (job->capacity + job->task - 1) / job->task, stride = size + 2;
  const part_of part = level == 2 ? (half ? part_half_512 : part_float_512) : (half ? part_half_256 : part_float_256);
  float *queries = job->scratch + job->batch * job->heads * tasks * stride;
  for (int64_t i = 0; i < job->batch * job->heads * size; ++i)
    queries[i] = (half ? from_half(((const uint16_t *)job->q)[i]) : ((const float *)job->q)[i]) * job->scale;
  for (int64_t i = 0; i < job->batch * job->kv_heads; ++i) {
    const int64_t at = (i * job->capacity + job->last[i / job->kv_heads]) * size * width;
    memcpy((char *)job->keys + at, (const char *)job->k + i * size * width, size * width);
    memcpy((char *)job->values + at, (const char *)job->v + i * size * width, size * width);
  }
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < job->batch * job->kv_heads; ++i)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = i / job->kv_heads, end = job->last[row] + 1;
      int64_t from = task * job->task, to = from + job->task;
      if (from < first_of(job, row)) from = first_of(job, row);
      if (to > end) to = end;
      float *found = job->scratch + (i * tasks + task) * group * stride;
      if (from >= to) {
        for (int64_t h = 0; h < group; ++h) found[h * stride] = -INFINITY;
        continue;
      }
      const int64_t at = (i * job->capacity + from) * size * width;
      part(job, queries + i * group * size, (const char *)job->keys + at, (const char *)job->values + at, to - from,
           found);
    }
  for (int64_t i = 0; i < job->batch * job->kv_heads; ++i)
    for (int64_t h = 0; h < group; ++h) {
      float largest = -INFINITY, sum = 0, mixed[LARGEST] = {0};
      const float *found = job->scratch + i * tasks * group * stride + h * stride;
      for (int64_t task = 0; task < tasks; ++task) largest = fmaxf(largest, found[task * group * stride]);
      for (int64_t task = 0; task < tasks; ++task) {
        const float *one = found + task * group * stride;
        if (one[0] == -INFINITY) continue;
        const float weight = expf(one[0] - largest);
        sum += weight * one[1];
        for (int64_t d = 0; d < size; ++d) mixed[d] += weight * one[2 + d];
      }
      const int64_t to = (i * group + h) * size;
      for (int64_t d = 0; d < size; ++d) {
        const float y = mixed[d] / sum;
        if (half)
          ((uint16_t *)job->out)[to + d] = to_half(y);
        else
          ((float *)job->out)[to + d] = y;
      }
    }
  return 0;
}
