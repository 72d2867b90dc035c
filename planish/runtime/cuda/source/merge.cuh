// What kernels of token merging share: directions of keys, similarities on tensor cores, ranks, rows of the output. A
// cluster of thread blocks, or one block before Hopper, has an image to itself.
//
// Similarities are decided in float32: a direction is the sum of two float16 numbers, of which all products count but
// that of both low parts. Equal rows of keys give equal similarities to the last bit, and of those the lower index wins.
//
// Compiled with -D VALUE=0|1|2: float16, bfloat16, float32; FUSED=0|1: tokens are x + added, and there is a layer norm of y.
#pragma once
#include "tiles.cuh"

#ifndef VALUE
#define VALUE 0
#endif
#ifndef FUSED
#define FUSED 0
#endif
#if VALUE == 0
typedef __half Value;
#elif VALUE == 1
typedef __nv_bfloat16 Value;
#else
typedef float Value;
#endif

#define THREADS 512
#define WARPS (THREADS / 32)
#if FUSED
#define DIRECTIONS __noinline__  // which leaves registers for the rest
#else
#define DIRECTIONS
#endif
#define ALL 0xFFFFFFFFu
#define COLUMNS 16            // of B that a warp compares 16 rows of A with
#define HEADS 4               // of a token that a lane reads at a time
#define PIECES 4              // of a row that a lane reads at a time
#define SCALE 256.f           // keeps both parts of a direction clear of float16's denormals
#define TINY 1e-12f

typedef unsigned long long Key;  // a similarity above, the complement of an index below: the highest is the best

struct Parameters {
  const Value *x, *keys;
  const float *sizes;         // (batch, tokens), or null: ones
  Value *y;                   // (batch, left, width)
  float *merged, *logs;       // (batch, left): sizes, and their logarithms; or null
  long long *index;           // (batch, tokens): where each token went; or null
  char *scratch;
  long long x_batch, x_row, keys_batch, keys_row, keys_head, scratch_batch;
  int tokens, width, heads, size, count, protect, max_norm, wide;  // wide: everything can be read 16 bytes at a time
  float margin, alpha;        // of energies
  const Value *added;         // for FUSED: (batch, tokens, width), compact, or null
  const Value *gain, *shift;  // (width) of the norm; shift may be null
  Value *normed;              // (batch, left, width)
  float epsilon;
  const Value *added_shift;   // for FUSED: (width), a third summand of all tokens, or null
  const float *key_shift;     // (size), added to the mean of a token's keys over heads, or null
};

struct Cluster {
  int rank, blocks;
  __device__ Cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));  // volatile: read again rather than kept
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#else
    rank = 0, blocks = 1;
#endif
  }
  // What any block of the cluster wrote to global memory is seen behind this.
  __device__ void meet() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __threadfence();
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
  }
};

template <int N> struct alignas(N * sizeof(Value)) Some { Value at[N]; };
template <int N> struct alignas(N * 2) Halves { __half at[N]; };

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// A direction in scratch: for each 32 columns their high parts, then their low ones.
__device__ __forceinline__ __half *place(__half *row, int column) { return row + (column / 32) * 64 + column % 32; }

// Lanes by heads and columns: `lanes` of them side by side read a head's columns, N at a time; of two tokens at once.
template <int N>
__device__ DIRECTIONS void directions(const Parameters &p, const Value *keys, __half *units, int padded, int first, int step) {
  const int lane = threadIdx.x % 32, pieces = p.size / N;
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  const int at = lane & (lanes - 1), group = lane / lanes, groups = 32 / lanes;
  const float share = 1.f / p.heads;
  for (int token = first; token < p.tokens; token += 2 * step) {
    const int tokens[2] = {token, min(token + step, p.tokens - 1)};
    float mean[2][N];
    auto average = [&](int piece) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) mean[u][i] = 0;
      for (int head = group; head < p.heads; head += HEADS * groups) {
        Some<N> some[2][HEADS];  // all reads come first
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
          for (int u = 0; u < 2; ++u)
            if (piece < pieces && head + h * groups < p.heads)
              some[u][h] = *reinterpret_cast<const Some<N> *>(keys + tokens[u] * p.keys_row +
                                                              (head + h * groups) * p.keys_head + piece * N);
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
          if (piece < pieces && head + h * groups < p.heads)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int i = 0; i < N; ++i) mean[u][i] += static_cast<float>(some[u][h].at[i]);
      }
      for (int step = lanes; step < 32; step *= 2)
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int i = 0; i < N; ++i) mean[u][i] += __shfl_xor_sync(ALL, mean[u][i], step);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float shift = p.key_shift && piece < pieces ? p.key_shift[piece * N + i] : 0.f;
#pragma unroll
        for (int u = 0; u < 2; ++u) mean[u][i] = fmaf(mean[u][i], share, shift);
      }
    };
    float square[2] = {};
    for (int piece = 0; piece < pieces; piece += lanes) {  // the whole warp takes part
      average(piece + at);
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) square[u] = fmaf(mean[u][i], mean[u][i], square[u]);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      for (int step = 1; step < lanes; step *= 2) square[u] += __shfl_xor_sync(ALL, square[u], step);
      square[u] = SCALE / fmaxf(sqrtf(square[u]), TINY);
    }
    for (int piece = 0; piece < pieces; piece += lanes) {
      if (pieces > lanes) average(piece + at);
      if (group == 0 && piece + at < pieces)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          Halves<N> high, low;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            float value = mean[u][i] * square[u];
            high.at[i] = __float2half_rn(value), low.at[i] = __float2half_rn(value - __half2float(high.at[i]));
          }
          __half *cell = place(units + static_cast<long long>(tokens[u]) * 2 * padded, (piece + at) * N);
          *reinterpret_cast<Halves<N> *>(cell) = high, *reinterpret_cast<Halves<N> *>(cell + 32) = low;
        }
    }
    for (int column = p.size + lane; column < padded; column += 32)
      for (int u = 0; u < 2; ++u) {
        __half *cell = place(units + static_cast<long long>(tokens[u]) * 2 * padded, column);
        cell[0] = cell[32] = __float2half_rn(0.f);
      }
  }
}

__device__ __forceinline__ Key key_of(float score, int index) {
  unsigned bits = __float_as_uint(score == 0 ? 0.f : score);  // of both zeros one
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(bits) << 32 | (ALL - index);
}

__device__ __forceinline__ void better(Key &best, Key other) { best = other > best ? other : best; }

// Directions of all tokens to scratch, by the cluster.
__device__ void directions_of(const Parameters &p, const Cluster &cluster, int batch, __half *units, int padded) {
  const int warps = cluster.blocks * WARPS, first = threadIdx.x / 32 * cluster.blocks + cluster.rank;
  const Value *keys = p.keys + batch * p.keys_batch;
  if (p.wide) directions<16 / sizeof(Value)>(p, keys, units, padded, first, warps);
  else directions<1>(p, keys, units, padded, first, warps);
}

// Similarities, times SCALE squared, of 16 tokens with COLUMNS others, as mma has them; `left` and `right`: of a lane's rows
// where they begin, in 16 bytes. A lane has eight numbers in a row of every row's 32, so that the product's columns are
// those of the direction in another order, the same for both sides.
__device__ __forceinline__ void similarities(float (&sum)[COLUMNS / 8][4], const __half *units, int padded,
                                             const int (&left)[2], const int (&right)[COLUMNS / 8]) {
  const uint4 *from = reinterpret_cast<const uint4 *>(units) + threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < padded / 32; ++chunk) {
    uint4 x[2][2];  // high and low parts of both rows
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i / 2][i % 2] = __ldcg(from + left[i % 2] + chunk * 8 + i / 2 * 4);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
      uint4 y[2];
      for (int part = 0; part < 2; ++part) y[part] = __ldcg(from + right[n] + chunk * 8 + part * 4);
#pragma unroll
      for (int product = 0; product < 3; ++product) {  // small ones first
        const uint4 *l = x[product == 0], r = y[product == 1];
        uint32_t one[4] = {l[0].x, l[1].x, l[0].y, l[1].y}, two[4] = {l[0].z, l[1].z, l[0].w, l[1].w};
        multiply(sum[n], one, r.x, r.y);
        multiply(sum[n], two, r.z, r.w);
      }
    }
  }
}

// For 16 tokens of A the most similar of COLUMNS of B; `a_at` and `b_at` say which tokens these are.
template <class A, class B>
__device__ void compare(const __half *units, int padded, int a, int b, A a_at, B b_at, int row, int column, Key *best) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int left[2], right[COLUMNS / 8];
#pragma unroll
  for (int i = 0; i < 2; ++i) left[i] = a_at(min(row + g + 8 * i, a - 1)) * (padded / 4);
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n) right[n] = b_at(min(column + 8 * n + g, b - 1)) * (padded / 4);
  float sum[COLUMNS / 8][4];
  similarities(sum, units, padded, left, right);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Key mine = 0;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int at = column + 8 * n + 2 * t + c;
        if (at < b) better(mine, key_of(sum[n][2 * i + c], at));
      }
    better(mine, __shfl_xor_sync(ALL, mine, 1));
    better(mine, __shfl_xor_sync(ALL, mine, 2));
    if (t == 0 && row + g + 8 * i < a) atomicMax(best + row + g + 8 * i, mine);
  }
}

// Who goes where, in shared memory: `origin` of each row of y its token; for rows from `from` on the first that goes into
// it, by rank (`first`), and for each that goes the next one (`next`); `source` and `target` by rank, targets less `from`.
struct Plan {
  int *origin, *first, *next, *source, *target;
  int from, count;
  const float *weight;  // of each token

  // Behind source and target: what goes into one is linked, the most similar first. All threads, which meet in the end.
  __device__ void link() const {
    for (int k = threadIdx.x; k < count; k += THREADS) {
      int to = target[k], later = k + 1;
      while (later < count && target[later] != to) ++later;
      next[k] = later;
      atomicMin(first + to, k);
    }
    __syncthreads();
  }
};

// Calls `ranked(rank, i, key)` for the tokens of the `count` highest keys; of equal scores the lower index is before.
template <class Ranked> __device__ __forceinline__ void rank(const Key *order, int number, int count, Ranked ranked) {
  // Four threads count who is before a token.
  for (int i = threadIdx.x / 4; i < (number + THREADS / 4 - 1) / (THREADS / 4) * (THREADS / 4); i += THREADS / 4) {
    Key mine = order[min(i, number - 1)];
    unsigned score = mine >> 32;
    int before = 0;
    for (int j = threadIdx.x % 4; j < number; j += 4) {
      unsigned other = order[j] >> 32;
      before += other > score || (other == score && j < i);
    }
    before += __shfl_xor_sync(ALL, before, 1);
    before += __shfl_xor_sync(ALL, before, 2);
    if (threadIdx.x % 4 == 0 && i < number && before < count) ranked(before, i, mine);
  }
}

// One warp: calls `stay(position, i)` for those of `number` that `stays`, counted from `position` on.
template <class Stays, class Stay> __device__ __forceinline__ void compact(int number, int position, Stays stays, Stay stay) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < number; i += 32) {
    bool is = i + lane < number && stays(i + lane);
    unsigned who = __ballot_sync(ALL, is);
    if (is) stay(position + __popc(who & ((1u << lane) - 1)), i + lane);
    position += __popc(who);
  }
}
