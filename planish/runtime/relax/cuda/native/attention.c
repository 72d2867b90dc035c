// Attention by planish's own kernels: of many queries, and of one token a row behind a cache that is updated in place.
#define BINARIES "attention_binaries.h"
#include "kernels.h"
#include "launch_attention.h"

enum { PREFILL, DECODE, STEP, APART };  // sources
enum { HALF, BFLOAT, SINGLE };   // forms of cache_step.cu
static const char too_large[] = "an axis is longer than 2^31, or the batch than 65535";

// For Hopper's copies of tiles; others do not read them.
static int maps(const attention_call *c, unsigned char (*made)[128]) {
  attention_map map = attention_map_of(c);
  void *const sources[] = {c->k, c->v};
  for (int i = 0; i < 2; ++i) {
    int code = cu.tensor_map(made[i], ATTENTION_MAP_TYPE, 4, sources[i], map.sizes, map.strides, map.box, map.ones, 0,
                             ATTENTION_MAP_SWIZZLE, ATTENTION_MAP_L2, 0);
    if (code) return wrong("describing keys and values", code);
  }
  return 0;
}

static int is_bfloat(const DLTensor *t) { return t->dtype.code == kDLBfloat; }

// The element types of attention.cu: form is groups, bias and type.
static int prefill_form(int groups, int bias, int bfloat) { return groups + 2 * bias + 4 * bfloat; }

static int prefill(const attention_call *c, int device, int bfloat, void *on) {
  int arch = arch_of(device), bias = c->bias != NULL;
  if (!arch) return -1;
  if (c->queries > ATTENTION_LONGEST || c->keys > ATTENTION_LONGEST) return failed("attention", too_large, 0);
  attention_plan plan = attention_plan_of(c, arch);
  int shared = plan.apart ? attention_apart_shared(c->size, plan.groups, bias)
                          : attention_shared(arch, c->size, plan.groups, bias, AHEAD);
  // Of the form apart the first number says whether there are lists.
  int source = plan.apart ? APART : PREFILL, form = prefill_form(plan.apart ? c->indptr != NULL : plan.groups, bias, bfloat);
  void *function = NULL;
  if (kernel(device, source, (int)c->size, form, "attention", 0, shared, &function)) return -1;
  attention_prefill p;
  attention_fill_prefill(&p, c);
  _Alignas(64) unsigned char described[2][128] = {{0}};
  if (arch == 90 && maps(c, described)) return -1;
  void *arguments[] = {&p, described[0], described[1]};
  return launch(function, "attention", plan.grid, (unsigned)c->heads, (unsigned)c->batch, plan.threads, shared, on,
                arguments);
}

// (q (batch, queries, heads · size), k, v (batch, keys, kv heads · size), [bias (batch or 1, keys) float32], size,
// causal, scale, out as q); 16-bit elements
EXPORT int __tvm_ffi_planish_attention(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  int biased = count == 8;
  const TVMFFIAny *rest = args + 3 + biased;
  if (count < 7 || count > 8 || rest[2].type_index != kTVMFFIFloat)
    return failed("planish_attention", "arguments", count);
  const DLTensor *q = tensor(args), *k = tensor(args + 1), *v = tensor(args + 2), *out = tensor(rest + 3);
  attention_call c;
  memset(&c, 0, sizeof c);
  c.q = data(q), c.k = data(k), c.v = data(v), c.out = data(out);
  c.size = rest[0].v_int64, c.causal = (int)rest[1].v_int64, c.scale = (float)rest[2].v_float64;
  c.batch = q->shape[0], c.queries = q->shape[1], c.keys = k->shape[1];
  c.heads = q->shape[2] / c.size, c.kv_heads = k->shape[2] / c.size;
  attention_side_by_side(&c);
  if (biased) c.bias = data(tensor(args + 3)), c.bias_batch = tensor(args + 3)->shape[0] == 1 ? 0 : c.keys;
  return prefill(&c, q->device.device_id, is_bfloat(q), stream(q));
}

static int decode(const attention_call *c, int device, int bfloat, int shared, const DLTensor *workspace, void *on) {
  int arch = arch_of(device);
  if (!arch) return -1;
  int splits = attention_splits(c, arch, processors[device], shared);
  while (splits > 1 && attention_counters(c) + attention_parts(c, splits) > (size_t)workspace->shape[0]) --splits;
  attention_step p;
  attention_fill_step(&p, c, data(workspace), splits);
  void *function = NULL, *arguments[] = {&p};
  int bytes = attention_decode_shared(arch, c->size);
  if (kernel(device, DECODE, (int)c->size, shared + 16 * bfloat, "attention_decode", 0, bytes, &function)) return -1;
  return launch(function, "attention_decode", (unsigned)splits, (unsigned)(c->heads / shared), (unsigned)c->batch,
                ATTENTION_DECODE_THREADS, bytes, on, arguments);
}

// As cache_step.cu has them.
typedef struct {
  void *q, *new_k, *new_v, *k, *v, *out;
  const int *lengths;
  unsigned *done;
  int heads, kv_heads, capacity, window;
  float scale, softcap;
} Step;

// Zeros for the counters of a decode; with caches, the new key and value too.
static int clear(Step *p, int device, int size, int bfloat, int64_t batch, void *on) {
  void *function = NULL, *arguments[] = {p};
  if (kernel(device, STEP, size, bfloat ? BFLOAT : HALF, "cache_append", 1, 0, &function)) return -1;
  return launch(function, "cache_append", (unsigned)p->kv_heads, (unsigned)batch, 1, 128, 0, on, arguments);
}

static Step step_of(const TVMFFIAny *args, int64_t size) {
  Step p;
  memset(&p, 0, sizeof p);
  const DLTensor *cache = tensor(args + 3);
  p.q = data(tensor(args)), p.new_k = data(tensor(args + 1)), p.new_v = data(tensor(args + 2));
  p.k = data(cache), p.v = data(tensor(args + 4)), p.lengths = data(tensor(args + 5));
  p.heads = (int)(tensor(args)->shape[2] / size), p.kv_heads = (int)cache->shape[1], p.capacity = (int)cache->shape[2];
  return p;
}

// (q (batch, 1, heads · size), k, v (batch, 1, kv heads · size), keys, values (batch, kv heads, capacity, size), held
// (batch) int32, size, window, scale, softcap, out as q): the new key and value are written behind the `held` first.
EXPORT int __tvm_ffi_planish_cache_step(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count != 11 || args[8].type_index != kTVMFFIFloat) return failed("planish_cache_step", "arguments", count);
  const DLTensor *q = tensor(args);
  int64_t size = args[6].v_int64;
  if (tensor(args + 3)->shape[2] > ATTENTION_LONGEST) return failed("planish_cache_step", too_large, 0);
  Step p = step_of(args, size);
  p.out = data(tensor(args + 10));
  p.window = (int)args[7].v_int64, p.scale = (float)args[8].v_float64, p.softcap = (float)args[9].v_float64;
  int form = q->dtype.bits == 32 ? SINGLE : is_bfloat(q) ? BFLOAT : HALF;
  void *function = NULL, *arguments[] = {&p};
  if (kernel(q->device.device_id, STEP, (int)size, form, "cache_step", 0, 0, &function)) return -1;
  return launch(function, "cache_step", (unsigned)p.heads, (unsigned)q->shape[0], 1, 256, 0, stream(q), arguments);
}

// (as planish_cache_step: q … held; total (batch) int32, held + 1; size, heads that share keys, scale, out as q,
// workspace (bytes)): the keys are split among thread blocks.
EXPORT int __tvm_ffi_planish_cache_decode(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count != 12 || args[9].type_index != kTVMFFIFloat) return failed("planish_cache_decode", "arguments", count);
  const DLTensor *q = tensor(args), *cache = tensor(args + 3), *workspace = tensor(args + 11);
  int device = q->device.device_id, bfloat = is_bfloat(q), shared = (int)args[8].v_int64;
  attention_call c;
  memset(&c, 0, sizeof c);
  c.q = data(q), c.k = data(cache), c.v = data(tensor(args + 4)), c.out = data(tensor(args + 10));
  c.size = args[7].v_int64, c.scale = (float)args[9].v_float64;
  c.batch = q->shape[0], c.queries = 1, c.keys = cache->shape[2];
  c.heads = q->shape[2] / c.size, c.kv_heads = cache->shape[1];
  if (c.keys > ATTENTION_LONGEST) return failed("planish_cache_decode", too_large, 0);
  attention_side_by_side(&c);
  attention_by_heads(&c, c.keys);
  c.lengths = data(tensor(args + 6));
  Step append = step_of(args, c.size);
  append.done = data(workspace);
  if (clear(&append, device, (int)c.size, bfloat, c.batch, stream(q))) return -1;
  return decode(&c, device, bfloat, shared, workspace, stream(q));
}

// (q, k, v as planish_attention; indptr (layouts, rows + 1), indices, head_layout (heads), int32; size, block, flags (1:
// causal, 2: lists of neighbouring tiles are nearly alike), scale, out as q, [workspace (bytes)]): with a workspace one
// query is at the end of the keys, which are split.
EXPORT int __tvm_ffi_planish_block_sparse(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count < 11 || count > 12 || args[9].type_index != kTVMFFIFloat)
    return failed("planish_block_sparse", "arguments", count);
  const DLTensor *q = tensor(args), *k = tensor(args + 1), *indptr = tensor(args + 3);
  int device = q->device.device_id, bfloat = is_bfloat(q);
  attention_call c;
  memset(&c, 0, sizeof c);
  c.q = data(q), c.k = data(k), c.v = data(tensor(args + 2)), c.out = data(tensor(args + 10));
  c.size = args[6].v_int64, c.block = args[7].v_int64, c.scale = (float)args[9].v_float64;
  c.causal = (int)args[8].v_int64 & 1, c.together = (int)args[8].v_int64 >> 1;
  c.batch = q->shape[0], c.queries = q->shape[1], c.keys = k->shape[1];
  c.heads = q->shape[2] / c.size, c.kv_heads = k->shape[2] / c.size;
  if (c.causal && c.queries > c.keys) return failed("planish_block_sparse", "there are more queries than keys", 0);
  attention_side_by_side(&c);
  c.indptr = data(indptr), c.indices = data(tensor(args + 4)), c.head_layout = data(tensor(args + 5));
  c.rows = indptr->shape[1] - 1;
  if (count == 11 || c.queries != 1) return prefill(&c, device, bfloat, stream(q));
  Step counters;
  memset(&counters, 0, sizeof counters);
  counters.heads = counters.kv_heads = (int)c.heads, counters.done = data(tensor(args + 11));
  if (clear(&counters, device, (int)c.size, bfloat, c.batch, stream(q))) return -1;
  return decode(&c, device, bfloat, 1, tensor(args + 11), stream(q));
}
