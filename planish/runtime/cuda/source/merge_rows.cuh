// Rows of what token merging gives: copies, means by size, and with FUSED their layer norm; a warp for each.
#pragma once
#include "merge.cuh"

// Pieces of a row, up to PIECES for each lane; all reads come before what is done with them.
template <int N> struct Pieces {
  Some<N> at[PIECES];

  __device__ __forceinline__ void load(const Value *row, int first, int pieces) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      if (first + 32 * i < pieces) at[i] = *reinterpret_cast<const Some<N> *>(row + (first + 32 * i) * N);
  }
  __device__ __forceinline__ void store(Value *row, int first, int pieces) const {
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      if (first + 32 * i < pieces) *reinterpret_cast<Some<N> *>(row + (first + 32 * i) * N) = at[i];
  }
  __device__ __forceinline__ void add_to(float (&sum)[PIECES][N], float part) const {
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
#pragma unroll
      for (int c = 0; c < N; ++c) sum[i][c] = fmaf(static_cast<float>(at[i].at[c]), part, sum[i][c]);
  }
  __device__ __forceinline__ float squares(int first, int pieces) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      if (first + 32 * i < pieces)
#pragma unroll
        for (int c = 0; c < N; ++c) total = fmaf(static_cast<float>(at[i].at[c]), static_cast<float>(at[i].at[c]), total);
    return total;
  }
};

// What a merged token is scaled by, to the norm of its longest member; `length` of a row of x and `mean` of some pieces.
template <class Length, class Mean> __device__ float lengthened(const Plan &plan, int token, int first, Length length, Mean mean) {
  float longest = length(token);
#pragma unroll 1
  for (int k = first; k < plan.count; k = plan.next[k]) longest = fmaxf(longest, length(plan.source[k]));
  return sqrtf(longest) / fmaxf(sqrtf(mean()), TINY);
}

// One row of y by a warp.
template <int N>
__device__ void row_of(const Parameters &p, const Plan &plan, const Value *x, int row, Value *y, float *merged, float *logs) {
  const int lane = threadIdx.x % 32, pieces = p.width / N, token = plan.origin[row];
  const int first = row < plan.from ? p.count : plan.first[row - plan.from];
  const Value *own = x + token * p.x_row;
  float total = plan.weight[token];
  Pieces<N> some;
  if (first == p.count) {
#pragma unroll 1
    for (int piece = lane; piece < pieces; piece += 32 * PIECES) {
      some.load(own, piece, pieces);
      some.store(y, piece, pieces);
    }
  } else {
    const float weight = total;
#pragma unroll 1
    for (int k = first; k < p.count; k = plan.next[k]) total += plan.weight[plan.source[k]];
    float sum[PIECES][N];
    auto average = [&](int piece) {
      some.load(own, piece, pieces);
#pragma unroll
      for (int i = 0; i < PIECES; ++i)
#pragma unroll
        for (int c = 0; c < N; ++c) sum[i][c] = 0;
      some.add_to(sum, weight / total);
#pragma unroll 1
      for (int k = first; k < p.count; k = plan.next[k]) {
        int source = plan.source[k];
        some.load(x + source * p.x_row, piece, pieces);
        some.add_to(sum, plan.weight[source] / total);
      }
    };
    float factor = 1;
    if (p.max_norm) {
      auto length = [&](int token) {
        float squares = 0;
#pragma unroll 1
        for (int piece = lane; piece < pieces; piece += 32 * PIECES) {
          some.load(x + token * p.x_row, piece, pieces);
          squares += some.squares(piece, pieces);
        }
        return sum_of_warp(squares);
      };
      factor = lengthened(plan, token, first, length, [&] {
        float squares = 0;
#pragma unroll 1
        for (int piece = lane; piece < pieces; piece += 32 * PIECES) {
          average(piece);
#pragma unroll
          for (int i = 0; i < PIECES; ++i)
#pragma unroll
            for (int c = 0; c < N; ++c)
              if (piece + 32 * i < pieces) squares = fmaf(sum[i][c], sum[i][c], squares);
        }
        return sum_of_warp(squares);
      });
    }
#pragma unroll 1
    for (int piece = lane; piece < pieces; piece += 32 * PIECES) {
      average(piece);
#pragma unroll
      for (int i = 0; i < PIECES; ++i)
#pragma unroll
        for (int c = 0; c < N; ++c) some.at[i].at[c] = Value(sum[i][c] * factor);
      some.store(y, piece, pieces);
    }
  }
  if (lane == 0) {
    if (merged) *merged = total;
    if (logs) *logs = logf(total);
  }
}

#if FUSED
// The same of x + added + added_shift, and the norm of it. A warp has a whole row in registers: pieces <= 32 PIECES.
template <int N>
__device__ void fused_row_of(const Parameters &p, const Plan &plan, const Value *x, const Value *added, int row, long long at) {
  const int lane = threadIdx.x % 32, pieces = p.width / N;
  int token = plan.origin[row], next = row < plan.from ? p.count : plan.first[row - plan.from];
  const float weight = plan.weight[token];
  float total = weight, sum[PIECES][N];
#pragma unroll 1
  for (int k = next; k < p.count; k = plan.next[k]) total += plan.weight[plan.source[k]];
  float part = weight / total;
  Pieces<N> some, other;
  if (p.added_shift) other.load(p.added_shift, lane, pieces);
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
#pragma unroll
    for (int c = 0; c < N; ++c)
      sum[i][c] = p.added_shift && lane + 32 * i < pieces ? static_cast<float>(other.at[i].at[c]) : 0.f;
#pragma unroll 1
  while (true) {
    some.load(x + token * p.x_row, lane, pieces);
    if (added) other.load(added + static_cast<long long>(token) * p.width, lane, pieces);
    some.add_to(sum, part);
    if (added) other.add_to(sum, part);
    if (next >= p.count) break;
    token = plan.source[next], part = plan.weight[token] / total, next = plan.next[next];
  }
  float mean = 0, variance = 0;
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
#pragma unroll
    for (int c = 0; c < N; ++c) {
      some.at[i].at[c] = Value(sum[i][c]);
      if (lane + 32 * i < pieces) mean += sum[i][c];
    }
  some.store(p.y + at * p.width, lane, pieces);
  mean = sum_of_warp(mean) / p.width;
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
#pragma unroll
    for (int c = 0; c < N; ++c) {
      sum[i][c] -= mean;
      if (lane + 32 * i < pieces) variance = fmaf(sum[i][c], sum[i][c], variance);
    }
  const float inverse = rsqrtf(sum_of_warp(variance) / p.width + p.epsilon);
  some.load(p.gain, lane, pieces);
  if (p.shift) other.load(p.shift, lane, pieces);
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
#pragma unroll
    for (int c = 0; c < N; ++c) {
      float shift = p.shift ? static_cast<float>(other.at[i].at[c]) : 0.f;
      some.at[i].at[c] = Value(fmaf(sum[i][c] * inverse, static_cast<float>(some.at[i].at[c]), shift));
    }
  some.store(p.normed + at * p.width, lane, pieces);
  if (lane == 0) {
    if (p.merged) p.merged[at] = total;
    if (p.logs) p.logs[at] = logf(total);
  }
}
#endif

// All rows of y, by the cluster; the last ones first, since what merges is among them and takes longest.
__device__ void rows(const Parameters &p, const Plan &plan, const Cluster &cluster, int batch, int left) {
  const int warps = cluster.blocks * WARPS, first = threadIdx.x / 32 * cluster.blocks + cluster.rank;
  const Value *x = p.x + batch * p.x_batch;
  for (int row = left - 1 - first; row >= 0; row -= warps) {
    long long at = static_cast<long long>(batch) * left + row;
#if FUSED
    const Value *added = p.added ? p.added + static_cast<long long>(batch) * p.tokens * p.width : nullptr;
    if (p.wide) fused_row_of<16 / sizeof(Value)>(p, plan, x, added, row, at);
    else fused_row_of<1>(p, plan, x, added, row, at);
#else
    float *merged = p.merged ? p.merged + at : nullptr, *logs = p.logs ? p.logs + at : nullptr;
    if (p.wide) row_of<16 / sizeof(Value)>(p, plan, x, row, p.y + at * p.width, merged, logs);
    else row_of<1>(p, plan, x, row, p.y + at * p.width, merged, logs);
#endif
  }
}

// Sizes to shared memory; whoever reads them has to meet before.
__device__ __forceinline__ void weigh(const Parameters &p, float *weight, int batch) {
  const float *sizes = p.sizes ? p.sizes + static_cast<long long>(batch) * p.tokens : nullptr;
  for (int i = threadIdx.x; i < p.tokens; i += THREADS) weight[i] = sizes ? sizes[i] : 1.f;
}
