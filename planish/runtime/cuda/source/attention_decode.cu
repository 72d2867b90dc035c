// Attention of one query behind a cache, with the keys split among thread blocks (flash decoding): each part gives a sum
// that is weighted by its own maximum and log-sum-exp, and the last part of a head to finish combines them. Memory
// bandwidth is what counts, so there are no tensor cores here and the kernel is the same on all architectures.
//
// Compiled with -D HEAD=64|128, SHARED=1|2|4|8 (query heads that share a key head and a layout), ELEMENT_BF16=0|1,
// BEYOND=0|1 (behind the last row of the lists a query sees nothing, or everything).
#include "tiles.cuh"

#ifndef HEAD
#define HEAD 128
#endif
#ifndef SHARED
#define SHARED 1
#endif
#ifndef BEYOND
#define BEYOND 0
#endif
#define WARPS 8
#define LANES (HEAD / 8)          // lanes that hold a row, 8 elements each
#define TEAMS (32 / LANES)        // rows that a warp reads at once
#define MAX_SPLITS 64
#define EARLY 16
// Tiles that are on their way while one is used; a lane copies the chunks that it will read, so that no lane waits for
// another. Turing has no such copies.
#if ASYNC_COPY
#define STAGES 2
#else
#define STAGES 1
#endif
#define ROWS (TILE / WARPS / TEAMS)  // rows of a tile for each of a warp's teams

struct Parameters {
  const Element *q, *k, *v;
  Element *out;
  float *parts;    // (batch, q_heads, splits, HEAD + 2): sums, maximum, sum of weights
  unsigned *done;  // (batch, q_heads / SHARED), zeros before and after
  long long q_batch, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_head;
  const int *indptr, *indices, *head_layout;
  const int *lengths;
  int keys, q_heads, kv_heads, rows, block, splits;
  float scale;  // times log2(e)
  int fixed;    // what is in front of this kernel does not write the lists, which may then be read before that is over
};

__device__ __forceinline__ void widen(const uint4 &data, float (&to)[8]) {
  const uint32_t words[4] = {data.x, data.y, data.z, data.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if ELEMENT_BF16
    float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&words[i]));
#else
    float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
#endif
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ uint4 read_chunk(uint32_t at) {
  uint4 data;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w) : "r"(at) : "memory");
  return data;
}

// One head's part: a sum of values weighted by exp2(score - maximum), and the sum of the weights.
struct Part {
  float value[8] = {}, maximum = -INFINITY, sum = 0;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_decode(const __grid_constant__ Parameters p) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, team = lane / LANES, column = lane % LANES * 8;
  const int split = blockIdx.x, group = blockIdx.y, batch = blockIdx.z, first_head = group * SHARED;
  const int kv_head = first_head / (p.q_heads / p.kv_heads);
  const bool early = p.fixed && !p.lengths;  // a length says which row of the lists it is
  if (!early) wait_for_inputs();
  const int keys = p.lengths ? min(p.lengths[batch], p.keys) : p.keys;
  const Element *k = p.k + batch * p.k_batch + kv_head * p.k_head + column;
  const Element *v = p.v + batch * p.v_batch + kv_head * p.v_head + column;

  // The tiles of the last position's row of the layout, divided evenly among the parts: by the rows of a warp.
  const int row = p.indptr ? (keys - 1) / p.block : 0;
  const bool listed = p.indptr && (!BEYOND || row < p.rows);
  const int factor = listed ? p.block / TILE : 1;
  int begin = 0, count = (keys + TILE - 1) / TILE;
  if (listed) {
    const int *borders = p.indptr + p.head_layout[first_head] * (p.rows + 1);
    begin = row < p.rows ? borders[row] : 0;
    count = (row < p.rows ? borders[row + 1] - begin : 0) * factor;
  }
  auto border = [&](int part) { return static_cast<int>(static_cast<long long>(count) * WARPS * part / p.splits); };
  const int from = border(split), to = border(split + 1), last = (to + WARPS - 1) / WARPS;
  int i = from / WARPS, coming = i;
  extern __shared__ __align__(16) char memory[];
  const uint32_t base = shared_address(memory) + thread * 16;
  auto chunk_at = [&](int stage, int row, int value) {
    return base + ((stage * ROWS + row) * 2 + value) * WARPS * 32 * 16;
  };
  auto first_row = [&](int i) {
    int tile = listed ? p.indices[begin + i / factor] * factor + i % factor : i;
    return tile * TILE + warp * (TILE / WARPS) + team;  // a team's rows are TEAMS apart
  };
  int ends[STAGES];  // rows from here on are not there
  auto load = [&](int stage, int first) {
    if (coming < last) {
      int of_warp = coming++ * WARPS + warp;
      int end = ends[stage] = of_warp >= from && of_warp < to ? keys - first : 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        int key = first + r * TEAMS;
        bool there = r * TEAMS < end;
        copy_chunk(chunk_at(stage, r, 0), k + (there ? key * p.k_row : 0), there);
        copy_chunk(chunk_at(stage, r, 1), v + (there ? key * p.v_row : 0), there);
      }
    }
    commit_copies();
  };
  int firsts[STAGES];
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) firsts[stage] = i + stage < last ? first_row(i + stage) : 0;
  if (early) wait_for_inputs();
  // Not before it waited: blocks of kernels that are not due yet would crowd some multiprocessors, and a kernel with two
  // blocks on one takes a third longer.
  let_next_start();
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) load(stage, firsts[stage]);

  float q[SHARED][8];
  Part part[SHARED];
#pragma unroll
  for (int h = 0; h < SHARED; ++h) {
    widen(*reinterpret_cast<const uint4 *>(p.q + batch * p.q_batch + (first_head + h) * p.q_head + column), q[h]);
#pragma unroll
    for (int c = 0; c < 8; ++c) q[h][c] *= p.scale;
  }
  while (i < last)
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
    if (i == last) break;
    ++i;
    wait_copies<STAGES - 1>();
    const int end = ends[stage];
    uint4 kd[ROWS], vd[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) kd[r] = read_chunk(chunk_at(stage, r, 0)), vd[r] = read_chunk(chunk_at(stage, r, 1));
#pragma unroll
    for (int h = 0; h < SHARED; ++h) {
      float s[ROWS], top = -INFINITY;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float row[8];
        widen(kd[r], row);
        s[r] = 0;
#pragma unroll
        for (int c = 0; c < 8; ++c) s[r] = fmaf(q[h][c], row[c], s[r]);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) s[r] += __shfl_xor_sync(~0u, s[r], step);
        if (r * TEAMS >= end) s[r] = -INFINITY;
        top = fmaxf(top, s[r]);
      }
      float now = fmaxf(part[h].maximum, top), from = now == -INFINITY ? 0.f : now;
      float shrink = exp2_fast(part[h].maximum - from);
      part[h].maximum = now;
      part[h].sum *= shrink;
#pragma unroll
      for (int c = 0; c < 8; ++c) part[h].value[c] *= shrink;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float weight = exp2_fast(s[r] - from), row[8];
        widen(vd[r], row);
        part[h].sum += weight;
#pragma unroll
        for (int c = 0; c < 8; ++c) part[h].value[c] = fmaf(weight, row[c], part[h].value[c]);
      }
    }
    load(stage, coming < last ? first_row(coming) : 0);
  }

  // The teams of all warps → one part, in shared memory.
  __shared__ float values[WARPS * TEAMS][HEAD], maxima[WARPS * TEAMS], sums[WARPS * TEAMS];
  __shared__ bool combines;
  float *parts = p.parts + (static_cast<long long>(batch) * p.q_heads + first_head) * p.splits * (HEAD + 2);
#pragma unroll
  for (int h = 0; h < SHARED; ++h) {
    __syncthreads();
    int slot = warp * TEAMS + team;
#pragma unroll
    for (int c = 0; c < 8; ++c) values[slot][column + c] = part[h].value[c];
    if (column == 0) maxima[slot] = part[h].maximum, sums[slot] = part[h].sum;
    __syncthreads();
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < WARPS * TEAMS; ++i) top = fmaxf(top, maxima[i]);
    float from = top == -INFINITY ? 0.f : top;
    float *mine = parts + (static_cast<long long>(h) * p.splits + split) * (HEAD + 2);
    for (int c = thread; c < HEAD; c += WARPS * 32) {
      float value = 0;
#pragma unroll
      for (int i = 0; i < WARPS * TEAMS; ++i) value += values[i][c] * exp2_fast(maxima[i] - from);
      mine[c] = value;
    }
    if (thread == 0) {
#pragma unroll
      for (int i = 0; i < WARPS * TEAMS; ++i) total += sums[i] * exp2_fast(maxima[i] - from);
      mine[HEAD] = top, mine[HEAD + 1] = total;
    }
  }

  // Who finishes last combines: all parts of these heads are in memory then.
  unsigned *done = p.done + batch * gridDim.y + group;
  __syncthreads();
  if (thread == 0) {  // a fence of one thread, behind the barrier, orders what all of them wrote
    __threadfence();
    combines = atomicAdd(done, 1) == p.splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!combines) return;
  __shared__ float weights[MAX_SPLITS];
  for (int h = 0; h < SHARED; ++h) {
    const float *from = parts + static_cast<long long>(h) * p.splits * (HEAD + 2);
    float early[EARLY];  // of a column, which are on their way while the weights are found
#pragma unroll
    for (int i = 0; i < EARLY; ++i) early[i] = thread < HEAD && i < p.splits ? __ldcg(from + i * (HEAD + 2) + thread) : 0;
    __syncthreads();
    if (warp == 0) {  // a split or two for each lane: its weight among all
      float top[2], sum[2], most = -INFINITY, total = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int at = lane + 32 * i;
        top[i] = at < p.splits ? __ldcg(from + at * (HEAD + 2) + HEAD) : -INFINITY;
        sum[i] = at < p.splits ? __ldcg(from + at * (HEAD + 2) + HEAD + 1) : 0;
        most = fmaxf(most, top[i]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      float base = most == -INFINITY ? 0.f : most;
#pragma unroll
      for (int i = 0; i < 2; ++i) top[i] = exp2_fast(top[i] - base), total += sum[i] * top[i];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
      float inverse = total > 0 ? 1 / total : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane + 32 * i < p.splits) weights[lane + 32 * i] = top[i] * inverse;
    }
    __syncthreads();
    if (thread < HEAD) {
      float value = 0;
#pragma unroll
      for (int i = 0; i < EARLY; ++i)
        if (i < p.splits) value = fmaf(early[i], weights[i], value);
#pragma unroll 16
      for (int i = EARLY; i < p.splits; ++i) value = fmaf(__ldcg(from + i * (HEAD + 2) + thread), weights[i], value);
      p.out[batch * p.out_batch + (first_head + h) * p.out_head + thread] = Element(value);
    }
  }
  if (thread == 0) *done = 0;
}
