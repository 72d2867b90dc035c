// What the attention kernels share: their parameters, the running softmax, and how sums become rows.
//
// HEAD: size of heads. BIAS: a number for each key is added to its scores, such as the logarithm of the size of a merged
// token. SHIFT: numbers are added to queries and to values, (heads · HEAD) each, which are the bias of their projection; that
// of keys changes no probability.
#pragma once
#include "wgmma.cuh"

#ifndef HEAD
#define HEAD 128
#endif
#ifndef BIAS
#define BIAS 0
#endif
#ifndef SHIFT
#define SHIFT 0
#endif

struct Parameters {
  const Element *q, *k, *v;
  Element *out;
  float *lse;                              // (batch, q_heads, queries), or null
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head;
  const int *indptr, *indices, *head_layout;  // null: all keys; indices ascend within a row
  const int *lengths;                      // keys of each batch row, or null: all
  int queries, keys, q_heads, kv_heads, causal, rows, block;
  float scale;                             // times log2(e)
  const float *bias;                       // (batch, keys), for BIAS
  long long bias_batch;
#if SHIFT
  const Element *q_shift, *v_shift;
#endif
};

#define NONE 0x7FFFFFFF

// The key tiles that COUNT tiles of queries list, in ascending order, each once.
template <int COUNT> struct Cursor {
  const int *indices;
  int at[COUNT], end[COUNT], next[COUNT], limit[COUNT];  // limit: the first tile that is hidden from the group
  int factor, sub;

  __device__ void start(const Parameters &p, int first_tile, int offset, int head, int tiles) {
    const bool lists = !BIAS && p.indptr;
    indices = lists ? p.indices : nullptr;
    factor = lists ? p.block / TILE : 1;
    sub = 0;
    const int *ends = lists ? p.indptr + p.head_layout[head] * (p.rows + 1) : nullptr;
#pragma unroll
    for (int g = 0; g < COUNT; ++g) {
      int tile = first_tile + g;
      bool there = tile * TILE < offset + p.queries;
      limit[g] = !there ? 0 : p.causal ? min(tile + 1, tiles) : tiles;
      if (ends) {
        int row = tile / factor;
        at[g] = row < p.rows ? ends[row] : 0;
        end[g] = row < p.rows && there ? ends[row + 1] : 0;
        next[g] = at[g] < end[g] ? indices[at[g]] : NONE;
      } else {
        at[g] = 0, end[g] = limit[g], next[g] = limit[g] > 0 ? 0 : NONE;
      }
    }
  }

  // The next tile, and in bit g of `seen` whether group g sees it; NONE at the end.
  __device__ int step(uint32_t &seen) {
    while (true) {
      int block = next[0];
      for (int g = 1; g < COUNT; ++g) block = min(block, next[g]);
      if (block == NONE) return NONE;
      int tile = block * factor + sub;
      seen = 0;
#pragma unroll
      for (int g = 0; g < COUNT; ++g)
        if (next[g] == block && tile < limit[g]) seen |= 1u << g;
      if (++sub == factor) {
        sub = 0;
#pragma unroll
        for (int g = 0; g < COUNT; ++g)
          if (next[g] == block) next[g] = ++at[g] < end[g] ? (indices ? indices[at[g]] : at[g]) : NONE;
      }
      if (seen) return tile;
    }
  }
};

// Running softmax of the two rows of a tile of COLUMNS keys that a thread shares with the three beside it.
template <int COLUMNS> struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Scores of the first 8 · EIGHTS keys → probabilities (up to the rows' factors), those of others are 0; `factor`: what
  // earlier sums of a row shrink by.
  template <int EIGHTS = COLUMNS / 8>
  __device__ __forceinline__ void step(float (&s)[COLUMNS / 8][4], float scale, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < EIGHTS; ++j) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float now = fmaxf(maximum[r], top * scale);
      float base = now == -INFINITY ? 0.f : now;
      factor[r] = exp2_fast(maximum[r] - base);
      maximum[r] = now;
      float total = 0;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &x = s[j][2 * r + c];
          x = j < EIGHTS ? exp2_fast(fmaf(x, scale, -base)) : 0.f;
          total += x;
        }
      sum[r] = sum[r] * factor[r] + total;
    }
  }
};

#if SHIFT
// Adds 8 numbers to a chunk in shared memory.
__device__ __forceinline__ void add_to_chunk(uint32_t at, const Element *shift) {
  uint4 sum, other = __ldg(reinterpret_cast<const uint4 *>(shift));
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w) : "r"(at) : "memory");
  uint32_t *one = &sum.x, *two = &other.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if ELEMENT_BF16
    __nv_bfloat162 x = __hadd2(reinterpret_cast<__nv_bfloat162 &>(one[i]), reinterpret_cast<__nv_bfloat162 &>(two[i]));
#else
    __half2 x = __hadd2(reinterpret_cast<__half2 &>(one[i]), reinterpret_cast<__half2 &>(two[i]));
#endif
    one[i] = reinterpret_cast<uint32_t &>(x);
  }
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(sum.x), "r"(sum.y), "r"(sum.z), "r"(sum.w) : "memory");
}
#endif

// Probabilities as the rows of the next product.
template <int STEPS> __device__ __forceinline__ void to_operand(const float (&s)[2 * STEPS][4], uint32_t (&p)[STEPS][4]) {
#pragma unroll
  for (int j = 0; j < STEPS; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      p[j][2 * i] = pack(s[2 * j + i][0], s[2 * j + i][1]);
      p[j][2 * i + 1] = pack(s[2 * j + i][2], s[2 * j + i][3]);
    }
}

__device__ __forceinline__ void shrink(float (&o)[HEAD / 8][4], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < HEAD / 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) o[j][c] *= factor[c >> 1];
}

// Sums of a thread's two rows, `row` and the eighth after it, over their weights; nothing for rows that are not there.
__device__ __forceinline__ void write_rows(const Parameters &p, const float (&o)[HEAD / 8][4], const float (&maximum)[2],
                                           const float (&sums)[2], int row, int lane, int head, int kv_head, int batch) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int at = row + 8 * r;
    if (at < 0 || at >= p.queries) continue;
    const float inverse = sum > 0 ? 1 / sum : 0;
    Element *to = p.out + batch * p.out_batch + at * p.out_row + head * p.out_head;
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) {
      float one = o[j][2 * r] * inverse, two = o[j][2 * r + 1] * inverse;
#if SHIFT  // weights sum to 1, so that what is added to all values is added to their mean
      const Element *shift = p.v_shift + kv_head * HEAD + j * 8 + lane % 4 * 2;
      one += static_cast<float>(shift[0]), two += static_cast<float>(shift[1]);
#endif
      *reinterpret_cast<uint32_t *>(to + j * 8 + lane % 4 * 2) = pack(one, two);
    }
    if (p.lse && lane % 4 == 0)
      p.lse[(static_cast<long long>(batch) * p.q_heads + head) * p.queries + at] =
          sum > 0 ? (maximum[r] + log2f(sum)) * 0.69314718056f : -INFINITY;
  }
}
