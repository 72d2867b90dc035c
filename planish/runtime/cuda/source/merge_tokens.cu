// Token merging (ToMe, arXiv:2210.09461) in one launch: planish::MergeTokens, and with `max_norm` MergeTokensMaxNorm
// (ToFu, arXiv:2312.01026). For an image:
//   1. the mean of each token's keys over heads, of length 1;
//   2. for every other token (side A) the most similar one of those between (side B), on tensor cores;
//   3. the `count` tokens of A that are most similar go, each block finds out for itself which;
//   4. rows of the output: copies, or means by size of a token of B and of those that go into it.
// Between the steps things lie in `scratch`, a few hundred bytes a token, which stays in the L2 cache.
#include "merge_rows.cuh"

__device__ void choose(const Parameters &p, const Plan &plan, Key *order, const Key *best, int a, int b, int front,
                       int first_a, int first_b, long long *index) {
  const int thread = threadIdx.x;
  for (int i = thread; i < b; i += THREADS) {
    plan.first[i] = p.count;
    plan.origin[plan.from + i] = first_b + 2 * i;
    if (index) index[first_b + 2 * i] = plan.from + i;
  }
  for (int i = thread; i < front; i += THREADS) {
    plan.origin[i] = i;
    if (index) index[i] = i;
  }
  if (p.count > 0)
    for (int i = thread; i < a; i += THREADS) order[i] = __ldcg(best + i);
  __syncthreads();
  if (p.count > 0) {
    rank(order, a, p.count, [&](int rank, int i, Key key) {
      plan.source[rank] = first_a + 2 * i;
      plan.target[rank] = ALL - static_cast<unsigned>(key);
      if (index) index[first_a + 2 * i] = plan.from + plan.target[rank];
    });
    __syncthreads();
    for (int k = thread; k < p.count; k += THREADS) order[(plan.source[k] - first_a) / 2] = 0;  // of no similarity: it goes
    plan.link();
  }
  if (thread < 32)  // what stays of A moves up
    compact(
        a, front, [&](int i) { return p.count == 0 || order[i] != 0; },
        [&](int position, int i) {
          plan.origin[position] = first_a + 2 * i;
          if (index) index[first_a + 2 * i] = position;
        });
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_tokens(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char memory[];
  const int batch = blockIdx.y, odd = p.protect % 2, front = min(p.protect, p.tokens), left = p.tokens - p.count;
  const int first_a = p.protect + odd, first_b = p.protect + 1 - odd;
  const int a = p.tokens > first_a ? (p.tokens - first_a + 1) / 2 : 0;
  const int b = p.tokens > first_b ? (p.tokens - first_b + 1) / 2 : 0;
  const int padded = (p.size + 31) / 32 * 32;
  char *scratch = p.scratch + batch * p.scratch_batch;
  __half *units = reinterpret_cast<__half *>(scratch);
  Key *best = reinterpret_cast<Key *>(scratch + static_cast<long long>(p.tokens) * padded * 4);
  if (p.count > 0) {
    const Cluster cluster;
    if (cluster.rank == 0)
      for (int i = threadIdx.x; i < a; i += THREADS) best[i] = 0;
    directions_of(p, cluster, batch, units, padded);
    cluster.meet();
    const int down = (a + 15) / 16, across = (b + COLUMNS - 1) / COLUMNS;
    const int warps = cluster.blocks * WARPS, first = threadIdx.x / 32 * cluster.blocks + cluster.rank;
    for (int at = first; at < down * across; at += warps)
      compare(
          units, padded, a, b, [&](int i) { return first_a + 2 * i; }, [&](int i) { return first_b + 2 * i; },
          at / across * 16, at % across * COLUMNS, best);
    cluster.meet();
  }
  const Cluster cluster;
  Key *order = reinterpret_cast<Key *>(memory);
  int *origin = reinterpret_cast<int *>(order + a), *next = origin + left + b;
  float *weight = reinterpret_cast<float *>(next + 3 * p.count);
  const Plan plan = {origin, origin + left, next, next + p.count, next + 2 * p.count, front + a - p.count, p.count, weight};
  weigh(p, weight, batch);
  const bool writes = p.index && cluster.rank == 0;
  choose(p, plan, order, best, a, b, front, first_a, first_b,
         writes ? p.index + static_cast<long long>(batch) * p.tokens : nullptr);
  rows(p, plan, cluster, batch, left);
}
