// One token a row behind a cache that is updated in place: its key and value are written where the row ends.
//
// cache_append writes them and no more, for attention_decode.cu behind it. cache_step attends over the cache too, in any
// dtype and size of heads, with a window of the last keys or a soft limit of scores; it is not split among blocks.
//
// Compiled with -D HEAD=<size of heads>, ELEMENT_F32=0|1, ELEMENT_BF16=0|1.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef HEAD
#define HEAD 64
#endif
#ifndef ELEMENT_F32
#define ELEMENT_F32 0
#endif
#ifndef ELEMENT_BF16
#define ELEMENT_BF16 0
#endif
#if ELEMENT_F32
typedef float Element;
#elif ELEMENT_BF16
typedef __nv_bfloat16 Element;
#else
typedef __half Element;
#endif
#define WARPS 8
#define OWN ((HEAD + 31) / 32)  // numbers of a row that a lane holds
#define AT_ONCE 4               // keys that a warp scores together

struct Parameters {
  const Element *q, *new_k, *new_v;  // (batch, heads, HEAD), (batch, kv_heads, HEAD)
  Element *k, *v;                    // (batch, kv_heads, capacity, HEAD)
  Element *out;                      // as q
  const int *lengths;                // (batch): tokens that the cache holds; null: there is no cache
  unsigned *done;                    // (batch, heads): cache_append makes them zeros, for attention_decode
  int heads, kv_heads, capacity, window;  // window: keys that are seen, the new one among them; 0: all
  float scale, softcap;              // of the scores; softcap 0: none
};

extern "C" __global__ void __launch_bounds__(128) cache_append(const __grid_constant__ Parameters p) {
  const int head = blockIdx.x, row = blockIdx.y, share = p.heads / p.kv_heads;
  for (int h = threadIdx.x; h < share; h += blockDim.x) p.done[row * p.heads + head * share + h] = 0;
  if (!p.lengths) return;
  const int held = p.lengths[row];
  const long long from = (static_cast<long long>(row) * p.kv_heads + head) * HEAD;
  if (held >= 0 && held < p.capacity) {
    const long long to = from * p.capacity + static_cast<long long>(held) * HEAD;
    for (int c = threadIdx.x; c < HEAD; c += blockDim.x) p.k[to + c] = p.new_k[from + c], p.v[to + c] = p.new_v[from + c];
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) cache_step(const __grid_constant__ Parameters p) {
  const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = p.heads / p.kv_heads, kv_head = head / share;
  const long long new_at = (static_cast<long long>(row) * p.kv_heads + kv_head) * HEAD, base = new_at * p.capacity;
  const long long q_at = (static_cast<long long>(row) * p.heads + head) * HEAD;
  const int held = min(max(p.lengths[row], 0), p.capacity - 1);
  const int first = p.window > 0 ? max(0, held + 1 - p.window) : 0;
  if (head % share == 0) {  // no block reads what this one writes: all take the new key and value where they come from
    for (int c = threadIdx.x; c < HEAD; c += WARPS * 32) {
      p.k[base + static_cast<long long>(held) * HEAD + c] = p.new_k[new_at + c];
      p.v[base + static_cast<long long>(held) * HEAD + c] = p.new_v[new_at + c];
    }
  }
  float q[OWN], sum[OWN] = {}, top = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int c = lane + 32 * i;
    q[i] = c < HEAD ? static_cast<float>(p.q[q_at + c]) * p.scale : 0.f;
  }
  for (int key = first + warp * AT_ONCE; key <= held; key += WARPS * AT_ONCE) {
    float score[AT_ONCE], value[AT_ONCE][OWN];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int at = min(key + j, held);
      const bool fresh = at == held;
      const Element *k = fresh ? p.new_k + new_at : p.k + base + static_cast<long long>(at) * HEAD;
      const Element *v = fresh ? p.new_v + new_at : p.v + base + static_cast<long long>(at) * HEAD;
      score[j] = 0;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        int c = lane + 32 * i;
        score[j] = fmaf(q[i], c < HEAD ? static_cast<float>(k[c]) : 0.f, score[j]);
        value[j][i] = c < HEAD ? static_cast<float>(v[c]) : 0.f;
      }
    }
    float most = top;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) score[j] += __shfl_xor_sync(~0u, score[j], step);
      if (p.softcap > 0) score[j] = p.softcap * tanhf(score[j] / p.softcap);
      if (key + j > held) score[j] = -INFINITY;
      most = fmaxf(most, score[j]);
    }
    const float shrink = expf(top - most);  // most is finite: the warp's first key is there
    top = most, total *= shrink;
#pragma unroll
    for (int i = 0; i < OWN; ++i) sum[i] *= shrink;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const float weight = expf(score[j] - top);
      total += weight;
#pragma unroll
      for (int i = 0; i < OWN; ++i) sum[i] = fmaf(weight, value[j][i], sum[i]);
    }
  }
  __shared__ float sums[WARPS][HEAD], tops[WARPS], totals[WARPS];
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (lane + 32 * i < HEAD) sums[warp][lane + 32 * i] = sum[i];
  if (lane == 0) tops[warp] = top, totals[warp] = total;
  __syncthreads();
  float most = tops[0];  // the first warp has a key, whatever the others have
  for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[w]);
  float all = 0;
  for (int w = 0; w < WARPS; ++w) all += totals[w] * expf(tops[w] - most);
  for (int c = threadIdx.x; c < HEAD; c += WARPS * 32) {
    float made = 0;
    for (int w = 0; w < WARPS; ++w) made = fmaf(sums[w][c], expf(tops[w] - most), made);
    p.out[q_at + c] = Element(made / all);
  }
}
