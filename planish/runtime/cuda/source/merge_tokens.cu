// Token merging (ToMe, arXiv:2210.09461) in one launch: planish::MergeTokens, and with `max_norm` MergeTokensMaxNorm
// (ToFu, arXiv:2312.01026). A cluster of thread blocks, or one block before Hopper, has an image to itself:
//   1. the mean of each token's keys over heads, of length 1;
//   2. for every other token (side A) the most similar one of those between (side B), on tensor cores;
//   3. the `count` tokens of A that are most similar go, each block finds out for itself which;
//   4. rows of the output: copies, or means by size of a token of B and of those that go into it.
// Between the steps things lie in `scratch`, a few hundred bytes a token, which stays in the L2 cache.
//
// Similarities are decided in float32: a direction is the sum of two float16 numbers, of which all products count but
// that of both low parts. Equal rows of keys give equal similarities to the last bit, and of those the lower index wins.
//
// Compiled with -D VALUE=0|1|2: float16, bfloat16, float32.
#include "tiles.cuh"

#ifndef VALUE
#define VALUE 0
#endif
#if VALUE == 0
typedef __half Value;
#elif VALUE == 1
typedef __nv_bfloat16 Value;
#else
typedef float Value;
#endif

#define THREADS 384
#define WARPS (THREADS / 32)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BLOCKS 2              // on a multiprocessor
#else
#define BLOCKS 1
#endif
#define ALL 0xFFFFFFFFu
#define COLUMNS 16            // of B that a warp compares 16 rows of A with
#define SCALE 256.f           // keeps both parts of a direction clear of float16's denormals
#define TINY 1e-12f

typedef unsigned long long Key;  // a similarity above, the complement of an index below: the highest is the best

struct Parameters {
  const Value *x, *keys;
  const float *sizes;         // (batch, tokens), or null: ones
  Value *y;                   // (batch, left, width)
  float *merged, *logs;       // (batch, left): sizes, and their logarithms (or null)
  long long *index;           // (batch, tokens): where each token went; or null
  char *scratch;
  long long x_batch, x_row, keys_batch, keys_row, keys_head, scratch_batch;
  int tokens, width, heads, size, count, protect, max_norm, wide;  // wide: everything can be read 16 bytes at a time
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

template <int N> __device__ __forceinline__ void read(float (&to)[N], const Value *from) {
  Some<N> some = *reinterpret_cast<const Some<N> *>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = static_cast<float>(some.at[i]);
}

template <int N> __device__ __forceinline__ void write(Value *to, const float (&from)[N]) {
  Some<N> some;
#pragma unroll
  for (int i = 0; i < N; ++i) some.at[i] = Value(from[i]);
  *reinterpret_cast<Some<N> *>(to) = some;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// A direction in scratch: for each 32 columns their high parts, then their low ones.
__device__ __forceinline__ __half *place(__half *row, int column) { return row + (column / 32) * 64 + column % 32; }

// Lanes by heads and columns: `lanes` of them side by side read a head's columns, N at a time.
template <int N>
__device__ void directions(const Parameters &p, const Value *keys, __half *units, int padded, int first, int step) {
  const int lane = threadIdx.x % 32, pieces = p.size / N;
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  const int at = lane & (lanes - 1), group = lane / lanes, groups = 32 / lanes;
  const float share = 1.f / p.heads;
  for (int token = first; token < p.tokens; token += step) {
    const Value *row = keys + token * p.keys_row;
    float mean[N];
    auto average = [&](int piece) {
#pragma unroll
      for (int i = 0; i < N; ++i) mean[i] = 0;
      if (piece < pieces) {
#pragma unroll 4
        for (int head = group; head < p.heads; head += groups) {
          float some[N];
          read<N>(some, row + head * p.keys_head + piece * N);
#pragma unroll
          for (int i = 0; i < N; ++i) mean[i] += some[i];
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        for (int step = lanes; step < 32; step *= 2) mean[i] += __shfl_xor_sync(ALL, mean[i], step);
        mean[i] *= share;
      }
    };
    float square = 0;
    for (int piece = 0; piece < pieces; piece += lanes) {  // the whole warp takes part
      average(piece + at);
#pragma unroll
      for (int i = 0; i < N; ++i) square = fmaf(mean[i], mean[i], square);
    }
    for (int step = 1; step < lanes; step *= 2) square += __shfl_xor_sync(ALL, square, step);
    const float factor = SCALE / fmaxf(sqrtf(square), TINY);
    __half *to = units + static_cast<long long>(token) * 2 * padded;
    for (int piece = 0; piece < pieces; piece += lanes) {
      if (pieces > lanes) average(piece + at);
      if (group == 0 && piece + at < pieces) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float value = mean[i] * factor;
          __half high = __float2half_rn(value), *cell = place(to, (piece + at) * N + i);
          cell[0] = high, cell[32] = __float2half_rn(value - __half2float(high));
        }
      }
    }
    for (int column = p.size + lane; column < padded; column += 32) {
      __half *cell = place(to, column);
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

// For 16 tokens of A the most similar of 32 of B. A lane has eight numbers in a row of every row's 32, so that the
// product's columns are those of the direction in another order, the same for both sides.
__device__ void compare(const __half *units, int padded, int a, int b, int first_a, int first_b, int row, int column,
                        Key *best) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4 *from = reinterpret_cast<const uint4 *>(units) + t;
  auto line = [&](int token) { return token * (padded / 4); };  // where it begins, in 16 bytes
  int left[2], right[COLUMNS / 8];
#pragma unroll
  for (int i = 0; i < 2; ++i) left[i] = line(first_a + 2 * min(row + g + 8 * i, a - 1));
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n) right[n] = line(first_b + 2 * min(column + 8 * n + g, b - 1));
  float sum[COLUMNS / 8][4] = {};
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

// Who goes where, in shared memory: `origin` of each row of y its token; for each of B the first that goes into it, by
// rank (`first`), and for each that goes the next one (`next`); `source` and `target` by rank.
struct Plan {
  Key *order;
  int *origin, *first, *next, *source, *target;

  __device__ Plan(char *memory, int a, int b, int count, int left) {
    order = reinterpret_cast<Key *>(memory);
    origin = reinterpret_cast<int *>(order + a);
    first = origin + left, next = first + b, source = next + count, target = source + count;
  }
};

__device__ void choose(const Parameters &p, const Plan &plan, const Key *best, int a, int b, int front, int first_a,
                       int first_b, const Cluster &cluster, long long *index) {
  const int thread = threadIdx.x, before_b = front + a - p.count, writes = index && cluster.rank == 0;
  for (int i = thread; i < b; i += THREADS) {
    plan.first[i] = p.count;
    plan.origin[before_b + i] = first_b + 2 * i;
    if (writes) index[first_b + 2 * i] = before_b + i;
  }
  for (int i = thread; i < front; i += THREADS) {
    plan.origin[i] = i;
    if (writes) index[i] = i;
  }
  if (p.count > 0)
    for (int i = thread; i < a; i += THREADS) plan.order[i] = __ldcg(best + i);
  __syncthreads();
  if (p.count > 0) {  // four threads count who is before a token: by similarity, then by index
    for (int i = thread / 4; i < (a + THREADS / 4 - 1) / (THREADS / 4) * (THREADS / 4); i += THREADS / 4) {
      Key mine = plan.order[min(i, a - 1)];
      unsigned score = mine >> 32;
      int rank = 0;
      for (int j = thread % 4; j < a; j += 4) {
        unsigned other = plan.order[j] >> 32;
        rank += other > score || (other == score && j < i);
      }
      rank += __shfl_xor_sync(ALL, rank, 1);
      rank += __shfl_xor_sync(ALL, rank, 2);
      if (thread % 4 == 0 && i < a && rank < p.count) {
        plan.source[rank] = first_a + 2 * i;
        plan.target[rank] = ALL - static_cast<unsigned>(mine);
      }
    }
    __syncthreads();
    for (int k = thread; k < p.count; k += THREADS) {
      int to = plan.target[k], next = k + 1;
      while (next < p.count && plan.target[next] != to) ++next;
      plan.next[k] = next;
      atomicMin(plan.first + to, k);
      plan.order[(plan.source[k] - first_a) / 2] = 0;  // of no similarity: it goes
      if (writes) index[plan.source[k]] = before_b + to;
    }
    __syncthreads();
  }
  if (thread < 32)  // what stays of A moves up
    for (int i = 0, stay = front; i < a; i += 32) {
      bool stays = i + thread < a && (p.count == 0 || plan.order[i + thread] != 0);
      unsigned who = __ballot_sync(ALL, stays);
      int position = stay + __popc(who & ((1u << thread) - 1)), token = first_a + 2 * (i + thread);
      if (stays) {
        plan.origin[position] = token;
        if (writes) index[token] = position;
      }
      stay += __popc(who);
    }
  __syncthreads();
}

// One row of y by a warp.
template <int N>
__device__ void row_of(const Parameters &p, const Plan &plan, const Value *x, const float *sizes, int before_b, int row,
                       Value *y, float *merged, float *logs) {
  const int lane = threadIdx.x % 32, pieces = p.width / N, token = plan.origin[row];
  const int first = row < before_b ? p.count : plan.first[row - before_b];
  const Value *own = x + token * p.x_row;
  float total = sizes ? sizes[token] : 1.f;
  if (first == p.count) {
    for (int piece = lane; piece < pieces; piece += 128) {  // all reads first: the compiler can not know that they may be
      Some<N> some[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (piece + 32 * i < pieces) some[i] = *reinterpret_cast<const Some<N> *>(own + (piece + 32 * i) * N);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (piece + 32 * i < pieces) *reinterpret_cast<Some<N> *>(y + (piece + 32 * i) * N) = some[i];
    }
  } else {
    const float weight = total;
    for (int k = first; k < p.count; k = plan.next[k]) total += sizes ? sizes[plan.source[k]] : 1.f;
    const float share = weight / total;
    float sum[N];
    auto average = [&](int piece) {
      float some[N];
      read<N>(some, own + piece * N);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = some[i] * share;
      for (int k = first; k < p.count; k = plan.next[k]) {
        int source = plan.source[k];
        float part = (sizes ? sizes[source] : 1.f) / total;
        read<N>(some, x + source * p.x_row + piece * N);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = fmaf(some[i], part, sum[i]);
      }
    };
    float factor = 1;
    if (p.max_norm) {
      auto square = [&](const Value *from) {
        float squares = 0, some[N];
        for (int piece = lane; piece < pieces; piece += 32) {
          read<N>(some, from + piece * N);
#pragma unroll
          for (int i = 0; i < N; ++i) squares = fmaf(some[i], some[i], squares);
        }
        return sum_of_warp(squares);
      };
      float longest = square(own), squares = 0;
      for (int k = first; k < p.count; k = plan.next[k]) longest = fmaxf(longest, square(x + plan.source[k] * p.x_row));
      for (int piece = lane; piece < pieces; piece += 32) {
        average(piece);
#pragma unroll
        for (int i = 0; i < N; ++i) squares = fmaf(sum[i], sum[i], squares);
      }
      factor = sqrtf(longest) / fmaxf(sqrtf(sum_of_warp(squares)), TINY);
    }
    for (int piece = lane; piece < pieces; piece += 32) {
      average(piece);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] *= factor;
      write<N>(y + piece * N, sum);
    }
  }
  if (lane == 0) {
    *merged = total;
    if (logs) *logs = logf(total);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) merge_tokens(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char memory[];
  const int batch = blockIdx.y;
  const int odd = p.protect % 2, front = min(p.protect, p.tokens), left = p.tokens - p.count;
  const int first_a = p.protect + odd, first_b = p.protect + 1 - odd;
  const int a = p.tokens > first_a ? (p.tokens - first_a + 1) / 2 : 0;
  const int b = p.tokens > first_b ? (p.tokens - first_b + 1) / 2 : 0;
  const int padded = (p.size + 31) / 32 * 32;
  constexpr int WIDE = 16 / sizeof(Value);
  char *scratch = p.scratch + batch * p.scratch_batch;
  __half *units = reinterpret_cast<__half *>(scratch);
  Key *best = reinterpret_cast<Key *>(scratch + static_cast<long long>(p.tokens) * padded * 4);

  if (p.count > 0) {
    const Cluster cluster;
    const int warps = cluster.blocks * WARPS, first = threadIdx.x / 32 * cluster.blocks + cluster.rank;
    const Value *keys = p.keys + batch * p.keys_batch;
    if (cluster.rank == 0)
      for (int i = threadIdx.x; i < a; i += THREADS) best[i] = 0;
    if (p.wide) directions<WIDE>(p, keys, units, padded, first, warps);
    else directions<1>(p, keys, units, padded, first, warps);
    cluster.meet();
    const int down = (a + 15) / 16, across = (b + COLUMNS - 1) / COLUMNS;
    for (int at = first; at < down * across; at += warps)
      compare(units, padded, a, b, first_a, first_b, at / across * 16, at % across * COLUMNS, best);
    cluster.meet();
  }
  const Cluster cluster;
  const int warps = cluster.blocks * WARPS, first = threadIdx.x / 32 * cluster.blocks + cluster.rank;
  const Plan plan(memory, a, b, p.count, left);
  choose(p, plan, best, a, b, front, first_a, first_b, cluster,
         p.index ? p.index + static_cast<long long>(batch) * p.tokens : nullptr);
  const Value *x = p.x + batch * p.x_batch;
  const float *sizes = p.sizes ? p.sizes + static_cast<long long>(batch) * p.tokens : nullptr;
  for (int row = first; row < left; row += warps) {
    long long at = static_cast<long long>(batch) * left + row;
    float *logs = p.logs ? p.logs + at : nullptr;
    if (p.wide) row_of<WIDE>(p, plan, x, sizes, front + a - p.count, row, p.y + at * p.width, p.merged + at, logs);
    else row_of<1>(p, plan, x, sizes, front + a - p.count, row, p.y + at * p.width, p.merged + at, logs);
  }
}
