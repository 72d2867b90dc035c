/* How attention.cu and attention_decode.cu are launched: their parameters, as the sources have them, and the choice of
   kernel, grid and shared memory. Nothing here asks for a runtime or a driver; whoever launches brings both. */
#ifndef PLANISH_LAUNCH_ATTENTION_H
#define PLANISH_LAUNCH_ATTENTION_H

#include <stdint.h>
#include <string.h>

enum {
  ATTENTION_TILE = 64,
  ATTENTION_MOST_SPLITS = 64,
  ATTENTION_GROUP_THREADS = 128,
  ATTENTION_DECODE_THREADS = 256,
  ATTENTION_LONGEST = 0x7fffffff,
};
static const float attention_log2_e = 1.44269504088896f; /* kernels use powers of two */

/* Tensors of 16-bit elements by batch, row and head; strides in elements. Null lists: every query sees every key. */
typedef struct {
  void *q, *k, *v, *out;
  int64_t batch, queries, keys, heads, kv_heads, size;
  int64_t q_batch, q_row, q_head, kv_batch, kv_row, kv_head; /* out is strided as q, v as k */
  const int *indptr, *indices, *head_layout, *lengths;
  int64_t rows, block;
  int together; /* lists of neighbouring tiles are nearly alike: two are worth walking together */
  int causal;
  float scale; /* of the scores */
  const float *bias;
  int64_t bias_batch;
} attention_call;

typedef struct {
  void *q, *k, *v, *out;
  float *lse;
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head;
  const int *indptr, *indices, *head_layout, *lengths;
  int queries, keys, q_heads, kv_heads, causal, rows, block;
  float scale;
  const float *bias;
  long long bias_batch;
} attention_prefill;

typedef struct {
  void *q, *k, *v, *out;
  float *parts;
  unsigned *done;
  long long q_batch, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_head;
  const int *indptr, *indices, *head_layout, *lengths;
  int keys, q_heads, kv_heads, rows, block, splits;
  float scale;
  int fixed; /* the kernel in front on the stream does not write the lists */
} attention_step;

/* Strides of q (batch, queries, heads · size) and of keys and values alike. */
static inline void attention_side_by_side(attention_call *c) {
  c->q_head = c->kv_head = c->size;
  c->q_row = c->heads * c->size, c->q_batch = c->queries * c->q_row;
  c->kv_row = c->kv_heads * c->size, c->kv_batch = c->keys * c->kv_row;
}

/* Strides of keys and values that are (batch, heads, capacity, size). */
static inline void attention_by_heads(attention_call *c, int64_t capacity) {
  c->kv_row = c->size, c->kv_head = capacity * c->size, c->kv_batch = c->kv_heads * c->kv_head;
}

/* Shared memory of a block of attention.cu: tiles of queries, of keys and values by stage, barriers, biases. `ahead`: as
   compiled. And of attention_hopper.cu, which has two stages of 128 keys and values. */
static inline int attention_shared(int arch, int64_t size, int groups, int bias, int ahead) {
  int stages = arch == 90 ? ahead + 2 : arch >= 80 ? 2 : 1;
  return (groups + 2 * stages) * ATTENTION_TILE * (int)size * 2 + 64 + bias * stages * ATTENTION_TILE * 4;
}
static inline int attention_apart_shared(int64_t size, int groups, int bias) {
  return (groups + 8) * ATTENTION_TILE * (int)size * 2 + 128 + bias * 1024;
}

/* What computes a call, and how it is launched; the grid's other axes are heads and batch.
   apart: attention_hopper.cu, where whoever copies keys is apart from those who compute; else attention.cu.
   groups: tiles of 64 queries of a block. */
typedef struct {
  int apart, groups;
  unsigned threads, grid;
} attention_plan;

static inline attention_plan attention_plan_with(int apart, int groups, int64_t tiles) {
  attention_plan plan = {
      apart, groups, (unsigned)(groups + apart) * ATTENTION_GROUP_THREADS, (unsigned)((tiles + groups - 1) / groups)};
  return plan;
}

/* Tiles of queries and of keys have common borders, so that a tile is in one row of the lists. */
static inline int64_t attention_tiles(const attention_call *c) {
  int64_t offset = c->causal ? c->keys - c->queries : 0;
  return (offset + c->queries + ATTENTION_TILE - 1) / ATTENTION_TILE - offset / ATTENTION_TILE;
}

/* With attention.cu. Two tiles of queries share the keys that they load; with lists they would have to share these too, and
   of three tiles the second of two blocks would be half empty. */
static inline attention_plan attention_plan_tiled(const attention_call *c, int arch) {
  int three = c->queries > 2 * ATTENTION_TILE && c->queries <= 3 * ATTENTION_TILE;
  int two = c->queries > ATTENTION_TILE && !three && !c->indptr && arch >= 80;
  return attention_plan_with(0, two ? 2 : 1, attention_tiles(c));
}

static inline attention_plan attention_plan_of(const attention_call *c, int arch) {
  int apart = arch == 90 && !c->lengths && c->queries >= (c->size == 64 ? 1536 : 128) && (!c->indptr || c->together);
  if (!apart) return attention_plan_tiled(c, arch);
  if (c->indptr) return attention_plan_with(1, 2, attention_tiles(c));
  return attention_plan_with(1, c->size == 64 ? 3 : 2, (c->queries + ATTENTION_TILE - 1) / ATTENTION_TILE);
}

static inline int attention_decode_shared(int arch, int64_t size) {
  return (arch >= 80 ? 2 : 1) * 2 * ATTENTION_TILE * (int)size * 2;
}

static inline void attention_fill_prefill(attention_prefill *p, const attention_call *c) {
  memset(p, 0, sizeof *p);
  p->q = c->q, p->k = c->k, p->v = c->v, p->out = c->out;
  p->q_batch = p->out_batch = c->q_batch, p->q_row = p->out_row = c->q_row, p->q_head = p->out_head = c->q_head;
  p->k_batch = p->v_batch = c->kv_batch, p->k_row = p->v_row = c->kv_row, p->k_head = p->v_head = c->kv_head;
  p->indptr = c->indptr, p->indices = c->indices, p->head_layout = c->head_layout, p->lengths = c->lengths;
  p->queries = (int)c->queries, p->keys = (int)c->keys, p->q_heads = (int)c->heads, p->kv_heads = (int)c->kv_heads;
  p->causal = c->causal, p->rows = (int)c->rows, p->block = c->block ? (int)c->block : ATTENTION_TILE;
  p->scale = c->scale * attention_log2_e, p->bias = c->bias, p->bias_batch = c->bias_batch;
}

/* Parts that the keys are split into: all blocks run at once, each with a tile or more. On Hopper one block has copies
   enough on their way for its multiprocessor, and leaves room for the next kernel to begin; parts of few tiles are halved.
   Turing has shared memory for one block of wide heads. */
static inline int attention_splits(const attention_call *c, int arch, int processors, int shared) {
  int64_t blocks = c->batch * c->heads / shared, tiles = (c->keys + ATTENTION_TILE - 1) / ATTENTION_TILE;
  int64_t splits = processors / (blocks ? blocks : 1);
  int twice = arch >= 90 ? 4 * splits > tiles : arch >= 80 || c->size == 64;
  if (twice) splits = 2 * (int64_t)processors / (blocks ? blocks : 1);
  splits = splits > tiles ? tiles : splits;
  splits = splits > ATTENTION_MOST_SPLITS ? ATTENTION_MOST_SPLITS : splits;
  return splits < 1 ? 1 : (int)splits;
}

/* Bytes of the counters, which are zeros before and after a launch, and of the parts behind them. */
static inline size_t attention_counters(const attention_call *c) {
  return ((size_t)(c->batch * c->heads) * 4 + 255) / 256 * 256;
}
static inline size_t attention_parts(const attention_call *c, int splits) {
  return (size_t)(c->batch * c->heads) * (size_t)splits * ((size_t)c->size + 2) * sizeof(float);
}

static inline void attention_fill_step(attention_step *p, const attention_call *c, void *workspace, int splits) {
  memset(p, 0, sizeof *p);
  p->q = c->q, p->k = c->k, p->v = c->v, p->out = c->out;
  p->done = workspace, p->parts = (float *)((char *)workspace + attention_counters(c));
  p->q_batch = p->out_batch = c->q_batch, p->q_head = p->out_head = c->q_head;
  p->k_batch = p->v_batch = c->kv_batch, p->k_row = p->v_row = c->kv_row, p->k_head = p->v_head = c->kv_head;
  p->indptr = c->indptr, p->indices = c->indices, p->head_layout = c->head_layout, p->lengths = c->lengths;
  p->keys = (int)c->keys, p->q_heads = (int)c->heads, p->kv_heads = (int)c->kv_heads;
  p->rows = (int)c->rows, p->block = c->block ? (int)c->block : ATTENTION_TILE, p->splits = splits;
  p->scale = c->scale * attention_log2_e;
}

/* What cuTensorMapEncodeTiled is told of keys or values, for Hopper's copies of boxes of 64 × 64 16-bit elements. */
typedef struct {
  uint64_t sizes[4], strides[3]; /* innermost first; strides in bytes */
  uint32_t box[4], ones[4];
} attention_map;
enum { ATTENTION_MAP_TYPE = 6, ATTENTION_MAP_SWIZZLE = 3, ATTENTION_MAP_L2 = 2 }; /* 16 bits; 128 bytes; 128 bytes */

static inline attention_map attention_map_of(const attention_call *c) {
  attention_map map = {
      {(uint64_t)c->size, (uint64_t)c->keys, (uint64_t)c->kv_heads, (uint64_t)c->batch},
      {2 * (uint64_t)c->kv_row, 2 * (uint64_t)c->kv_head, 2 * (uint64_t)c->kv_batch},
      {64, ATTENTION_TILE, 1, 1},
      {1, 1, 1, 1},
  };
  return map;
}

#endif
