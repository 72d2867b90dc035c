/* One task: `tokens` rows of one head of keys, for all queries that read it. Included once for each type and width.
 * found: for each query the largest score, the sum of exponentials, and the values weighted by them. */
TARGET static void PASTE(part, NAME)(const planish_job *job, const float *q, const void *keys, const void *values,
                                     int64_t tokens, float *found) {
  const int64_t size = job->size, group = job->heads / job->kv_heads, vectors = size / LANES, stride = size + 2;
  for (int64_t h = 0; h < group; ++h) {
    found[h * stride] = -INFINITY;
    memset(found + h * stride + 1, 0, (size + 1) * sizeof(float));
  }
  for (int64_t start = 0; start < tokens; start += BLOCK) {
    const int64_t count = tokens - start < BLOCK ? tokens - start : BLOCK;
    const ELEMENT *k = (const ELEMENT *)keys + start * size, *v = (const ELEMENT *)values + start * size;
    for (int64_t t = 0; t < count; ++t) /* values come from memory while keys are computed with */
      for (int64_t d = 0; d < size; d += 64 / sizeof(ELEMENT)) __builtin_prefetch(v + t * size + d);
    for (int64_t h = 0; h < group; ++h) {
      float scores[BLOCK], *one = found + h * stride, largest = one[0];
      const float *query = q + h * size;
      for (int64_t t = 0; t < count; ++t) {
        VECTOR a = ZERO(), b = ZERO();
        int64_t i = 0;
        for (; i + 1 < vectors; i += 2) {
          a = MULTIPLY_ADD(FLOATS(query + i * LANES), LOAD(k + t * size + i * LANES), a);
          b = MULTIPLY_ADD(FLOATS(query + (i + 1) * LANES), LOAD(k + t * size + (i + 1) * LANES), b);
        }
        if (i < vectors) a = MULTIPLY_ADD(FLOATS(query + i * LANES), LOAD(k + t * size + i * LANES), a);
        float score = SUM(a) + SUM(b);
        if (job->softcap > 0) score = job->softcap * tanhf(score / job->softcap);
        scores[t] = score;
        largest = score > largest ? score : largest;
      }
      const float before = one[0] == -INFINITY ? 0 : expf(one[0] - largest);
      float sum = one[1] * before;
      for (int64_t t = 0; t < count; ++t) sum += scores[t] = expf(scores[t] - largest);
      one[0] = largest;
      one[1] = sum;
      for (int64_t i = 0; i < vectors; i += 4) { /* four sums at a time stay in registers */
        const int64_t n = vectors - i < 4 ? vectors - i : 4;
        VECTOR sums[4];
        for (int64_t j = 0; j < n; ++j) sums[j] = TIMES(FLOATS(one + 2 + (i + j) * LANES), ALL(before));
        if (n == 4)
          for (int64_t t = 0; t < count; ++t) {
            const VECTOR weight = ALL(scores[t]);
            const ELEMENT *from = v + t * size + i * LANES;
            sums[0] = MULTIPLY_ADD(weight, LOAD(from), sums[0]);
            sums[1] = MULTIPLY_ADD(weight, LOAD(from + LANES), sums[1]);
            sums[2] = MULTIPLY_ADD(weight, LOAD(from + 2 * LANES), sums[2]);
            sums[3] = MULTIPLY_ADD(weight, LOAD(from + 3 * LANES), sums[3]);
          }
        else
          for (int64_t t = 0; t < count; ++t)
            for (int64_t j = 0; j < n; ++j)
              sums[j] = MULTIPLY_ADD(ALL(scores[t]), LOAD(v + t * size + (i + j) * LANES), sums[j]);
        for (int64_t j = 0; j < n; ++j) STORE(one + 2 + (i + j) * LANES, sums[j]);
      }
    }
  }
}
