/* How merge_tokens.cu and merge_energy.cu are launched, as token_merge.py has it: parameters, memory, clusters. Nothing
   here asks for a runtime or a driver. */
#ifndef PLANISH_LAUNCH_MERGE_H
#define PLANISH_LAUNCH_MERGE_H

#include <stdint.h>

enum { MERGE_THREADS = 512, MERGE_MOST_TOKENS = 2720, MERGE_MOST_BY_ENERGY = 1744 };

/* As in merge.cuh. */
typedef struct {
  const void *x, *keys;
  const float *sizes;
  void *y;
  float *merged, *logs;
  int64_t *index;
  void *scratch;
  long long x_batch, x_row, keys_batch, keys_row, keys_head, scratch_batch;
  int tokens, width, heads, size, count, protect, max_norm, wide;
  float margin, alpha;
  const void *added, *gain, *shift;
  void *normed;
  float epsilon;
  const void *added_shift;
  const float *key_shift;
} merge_parameters;

/* Blocks that work on an image: one for each multiprocessor, as far as batch and clusters go. */
static inline unsigned merge_cluster(int arch, int processors, int64_t batch) {
  if (arch != 90) return 1;
  int64_t wanted = processors / (batch > 1 ? batch : 1);
  return wanted >= 8 ? 8 : wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
}

/* Dynamic shared memory: directions, keys or ranks, numbers of tokens, sizes. `count`: tokens that go. */
static inline int64_t merge_shared(int64_t tokens, int64_t protect, int64_t count, int energy) {
  int64_t left = tokens - count, half = (tokens + 1) / 2, free = tokens > protect ? tokens - protect : 0;
  int64_t lists = energy ? 8 * free + 4 * (2 * left + 4 * count + tokens) : 8 * half + 4 * (left + half + 3 * count);
  return lists + 4 * tokens;
}

/* Bytes of scratch for an image, a multiple of 16; `size`: of a head of the keys. */
static inline int64_t merge_scratch(int64_t tokens, int64_t protect, int64_t size, int64_t count, int energy) {
  if (!count) return 0;
  int64_t half = (tokens + 1) / 2, free = tokens > protect ? tokens - protect : 0;
  int64_t bytes = tokens * ((size + 31) / 32 * 32) * 4 + 8 * (energy ? free + count : half);
  return (bytes + 15) / 16 * 16;
}

#endif
