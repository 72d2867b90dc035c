// Token merging by energy (PiToMe, arXiv:2405.16148) in one launch: planish::MergeTokensEnergy, and with `max_norm`
// MergeTokensEnergyMaxNorm. The energy of a token is the mean over all that are not protected of ELU(similarity - margin).
// Of the 2 count tokens of the highest energy those of even rank go, each to the most similar one of odd rank; what stays
// keeps its order. Steps as in merge_tokens.cu, with energies before the comparison.
#include "merge_rows.cuh"

// Energies, times the number of free tokens, of 16 of them; of equal rows of keys equal to the last bit.
__device__ void energies(const Parameters &p, const __half *units, int padded, int free, int row, Key *to) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto line = [&](int i) { return (p.protect + min(i, free - 1)) * (padded / 4); };
  const int left[2] = {line(row + g), line(row + g + 8)};
  float energy[2] = {};
#pragma unroll 1
  for (int column = 0; column < free; column += COLUMNS) {
    int right[COLUMNS / 8];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) right[n] = line(column + 8 * n + g);
    float sum[COLUMNS / 8][4];
    similarities(sum, units, padded, left, right);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float away = fmaf(sum[n][c], 1 / (SCALE * SCALE), -p.margin);
        if (column + 8 * n + 2 * t + c % 2 < free) energy[c / 2] += away > 0 ? away : p.alpha * expm1f(away);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    energy[i] += __shfl_xor_sync(ALL, energy[i], 1);
    energy[i] += __shfl_xor_sync(ALL, energy[i], 2);
    if (t == 0 && row + g + 8 * i < free) to[row + g + 8 * i] = key_of(energy[i], row + g + 8 * i);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_tokens(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char memory[];
  const Cluster cluster;
  const int batch = blockIdx.y, thread = threadIdx.x, front = min(p.protect, p.tokens), left = p.tokens - p.count;
  const int free = p.tokens - front, padded = (p.size + 31) / 32 * 32;
  const int warps = cluster.blocks * WARPS, first = thread / 32 * cluster.blocks + cluster.rank;
  char *scratch = p.scratch + batch * p.scratch_batch;
  __half *units = reinterpret_cast<__half *>(scratch);
  Key *energy = reinterpret_cast<Key *>(scratch + static_cast<long long>(p.tokens) * padded * 4), *best = energy + free;
  Key *order = reinterpret_cast<Key *>(memory);
  int *origin = reinterpret_cast<int *>(order + free), *next = origin + 2 * left, *goal = next + 3 * p.count;
  int *position = goal + p.count;
  float *weight = reinterpret_cast<float *>(position + p.tokens);
  const Plan plan = {origin, origin + left, next, next + p.count, next + 2 * p.count, 0, p.count, weight};
  weigh(p, weight, batch);
  long long *index = p.index && cluster.rank == 0 ? p.index + static_cast<long long>(batch) * p.tokens : nullptr;

  if (p.count > 0) {
    if (cluster.rank == 0)
      for (int i = thread; i < p.count; i += THREADS) best[i] = 0;
    directions_of(p, cluster, batch, units, padded);
    cluster.meet();
    for (int at = first; at * 16 < free; at += warps) energies(p, units, padded, free, at * 16, energy);
    cluster.meet();
    for (int i = thread; i < free; i += THREADS) order[i] = __ldcg(energy + i);
    __syncthreads();
    rank(order, free, 2 * p.count, [&](int rank, int i, Key) { (rank % 2 ? goal : plan.source)[rank / 2] = front + i; });
    __syncthreads();
    for (int k = thread; k < p.count; k += THREADS) order[plan.source[k] - front] = 0;
    const int down = (p.count + 15) / 16, across = (p.count + COLUMNS - 1) / COLUMNS;
    for (int at = first; at < down * across; at += warps)
      compare(
          units, padded, p.count, p.count, [&](int i) { return plan.source[i]; }, [&](int i) { return goal[i]; },
          at / across * 16, at % across * COLUMNS, best);
    cluster.meet();
  }
  for (int i = thread; i < left; i += THREADS) plan.first[i] = p.count;
  if (thread < 32)
    compact(
        p.tokens, 0, [&](int i) { return i < front || p.count == 0 || order[i - front] != 0; },
        [&](int at, int i) {
          plan.origin[at] = i, position[i] = at;
          if (index) index[i] = at;
        });
  __syncthreads();
  for (int k = thread; k < p.count; k += THREADS) {
    plan.target[k] = position[goal[ALL - static_cast<unsigned>(__ldcg(best + k))]];
    if (index) index[plan.source[k]] = plan.target[k];
  }
  __syncthreads();
  plan.link();
  rows(p, plan, cluster, batch, left);
}
