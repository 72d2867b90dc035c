/* planish::Relational… on GPUs: generated kernels of a program, run by tables of the graph that its edges are.

   Tables are made on the host when edges are seen for the first time, and kept. Edges that are constants of the model
   are looked at once; others are compared on the GPU with those that tables were made for, and the call waits for that.
   What a CUDA graph captures can not wait: there results become no numbers where edges are other ones. */
#include "cuda_relational_plans.h"

#include <pthread.h>

enum { MOST_SLOTS = 128 };

typedef struct {
  const cuda_relational_op *op;
  int constant; /* edges are */
  graph *fixed;
} layer;

/* Memory for values in between; one for each stream, since what runs on a stream is in order. */
typedef struct space {
  cuda_stream stream;
  void *memory;
  size_t bytes;
  int captured; /* by a CUDA graph */
  struct space *next;
} space;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of graphs, plans and memory */
static space *spaces;
static int layers;

/* ---- what a call uses */

/* The graph of these edges; with `*captured`, that of the call before, whose edges are yet to be compared. */
static ort_status *find_graph(
    layer *own, const relational_graph *asked, const tensor *edges, cuda_stream stream, int capturing, graph **found,
    int *captured) {
  void *context = NULL;
  int equal = 0;
  CHECK(planish_cuda_context(&context));
  *captured = 0;
  if (own->fixed && fits(own->fixed, context, asked)) return *found = own->fixed, NULL;
  /* The one used last first. */
  for (uint64_t before = UINT64_MAX;;) {
    graph *next = NULL;
    for (graph *g = graphs; g; g = g->next)
      if (g->used < before && (!next || g->used > next->used) && fits(g, context, asked)) next = g;
    if (!next) break;
    if (capturing) return ++next->fixed, *captured = 1, *found = next, NULL; /* it has to stay for the CUDA graph */
    CHECK(same(own->op, next, edges, stream, &equal));
    if (equal) *found = next;
    if (equal) break;
    before = next->used;
  }
  if (capturing)
    return planish_error("%s: a CUDA graph captures edges that no call had before", own->op->program->name);
  if (!equal) CHECK(make_graph(context, asked, edges, stream, found));
  if (own->constant && !own->fixed) own->fixed = *found, ++(*found)->fixed;
  return NULL;
}

static ort_status *ready(
    layer *own, const relational_graph *asked, const tensor *edges, cuda_stream stream, int capturing, graph **g,
    plan **p, int *captured) {
  pthread_mutex_lock(&lock);
  ort_status *status = find_graph(own, asked, edges, stream, capturing, g, captured);
  if (!status) {
    (*g)->used = ++turn;
    for (*p = (*g)->plans; *p && (*p)->program != own->op->program; *p = (*p)->next) continue;
    if (!*p) {
      status = make_plan(own->op, *g, p);
      make_room(*g);
    }
  }
  if (!status) ++(*g)->users;
  pthread_mutex_unlock(&lock);
  return status;
}

static ort_status *memory_for(cuda_stream stream, int capturing, size_t bytes, void **memory) {
  pthread_mutex_lock(&lock);
  ort_status *status = NULL;
  space *found = spaces;
  while (found && found->stream != stream) found = found->next;
  if (!found || (found->bytes < bytes && found->captured)) { /* the CUDA graph goes on with what it has */
    if ((found = calloc(1, sizeof *found))) found->stream = stream, found->next = spaces, spaces = found;
  }
  if (!found) status = planish_error("no memory for a kernel");
  if (!status && found->bytes < bytes) {
    void *larger = NULL;
    planish_cuda_free(found->memory); /* waits for what uses it */
    found->memory = NULL, found->bytes = 0;
    if (!(status = planish_cuda_allocate(bytes, &larger))) found->memory = larger, found->bytes = bytes;
  }
  if (!status) *memory = found->memory, found->captured |= capturing;
  pthread_mutex_unlock(&lock);
  return status;
}

/* ---- the operator */

static void destroy(void *given) {
  layer *own = given;
  pthread_mutex_lock(&lock);
  if (own->fixed) --own->fixed->fixed;
  if (!--layers) {
    while (graphs) free_graph(graphs);
    while (spaces) {
      space *next = spaces->next;
      planish_cuda_free(spaces->memory);
      free(spaces);
      spaces = next;
    }
  }
  pthread_mutex_unlock(&lock);
  free(own);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  int constant[2] = {0, 0};
  for (size_t i = 0; i < 2; ++i) {
    tensor t; /* it lies on the GPU: it is read when the layer first runs */
    CHECK(planish_constant(info, i, 8, &t, &constant[i]));
    planish_release(&t);
  }
  layer *own = calloc(1, sizeof *own);
  if (!own) return planish_error("no memory for a kernel");
  own->op = (const cuda_relational_op *)given;
  own->constant = constant[0] && constant[1];
  pthread_mutex_lock(&lock);
  ++layers;
  pthread_mutex_unlock(&lock);
  *made = own;
  return NULL;
}

/* What the inputs say of the graph; `node_ptr` has room for the node types of the program. */
static ort_status *read_shapes(
    const relational_program *p, const tensor *edges, const tensor *inputs, relational_graph *g, int64_t *node_ptr) {
  if (edges[0].rank != 2 || edges[0].shape[0] != 2 || edges[1].rank != 1 || edges[1].shape[0] != edges[0].shape[1])
    return planish_error("%s: edge_index must be (2, edges) and edge_type (edges,)", p->name);
  g->edges = edges[1].shape[0], g->edge_types = -1;
  int64_t nodes = -1, weights = -1;
  for (int k = 0; k <= p->node_types; ++k) node_ptr[k] = -1;
  for (int i = 0; i < p->arguments; ++i) {
    const relational_value *v = &p->values[p->argument_values[i]];
    size_t lead = v->domain != DOMAIN_NONE;
    const int64_t *shape = inputs[i].shape;
    if (inputs[i].rank != lead + (size_t)v->rank || memcmp(shape + lead, v->shape, (size_t)v->rank * sizeof *shape))
      return planish_error("%s: input %d has another shape than its program says", p->name, i + 2);
    int64_t unknown = -1, *rows = &unknown;
    if (v->domain == DOMAIN_NODE) rows = v->index < 0 ? &nodes : &node_ptr[v->index + 1];
    if (v->domain == DOMAIN_EDGE) rows = &g->edges;
    if (v->domain == DOMAIN_EDGE_TYPE) rows = &g->edge_types;
    if (v->domain == DOMAIN_NODE_TYPE) rows = &weights;
    if (lead && *rows >= 0 && *rows != shape[0])
      return planish_error("%s: input %d has %lld rows, and others %lld", p->name, i + 2, (long long)shape[0], (long long)*rows);
    if (lead) *rows = shape[0];
  }
  if (p->node_types == 1 && node_ptr[1] < 0) node_ptr[1] = nodes;
  node_ptr[0] = 0;
  for (int k = 0; k < p->node_types; ++k) {
    if (node_ptr[k + 1] < 0) return planish_error("%s: no input says how many nodes of type %d there are", p->name, k);
    node_ptr[k + 1] += node_ptr[k];
  }
  g->node_types = p->node_types, g->node_ptr = node_ptr, g->nodes = node_ptr[p->node_types];
  if ((nodes >= 0 && nodes != g->nodes) || (weights >= 0 && weights != g->node_types))
    return planish_error("%s: inputs have rows for other numbers of nodes or node types", p->name);
  if (g->edges > INT32_MAX || g->nodes > INT32_MAX || g->edge_types > INT32_MAX)
    return planish_error("%s: more than 2^31 - 1 nodes or edges", p->name);
  return NULL;
}

static ort_status *run(const plan *p, uint64_t *addresses, uint64_t arena, cuda_stream stream) {
  for (int i = 0; i < p->count; ++i) {
    const prepared *call = &p->calls[i];
    const relational_step *s = call->step;
    if (!s) {
      const relational_move *m = &call->move;
      void *to = (void *)(uintptr_t)((m->to.base < 0 ? arena : addresses[m->to.base]) + (uint64_t)m->to.offset);
      const void *from = (void *)(uintptr_t)((m->from.base < 0 ? arena : addresses[m->from.base]) + (uint64_t)m->from.offset);
      CHECK(m->copies ? planish_cuda_copy(to, from, (size_t)m->bytes, stream) : planish_cuda_clear(to, (size_t)m->bytes, stream));
      continue;
    }
    if (!call->x) continue;
    int tail = s->value_count + s->table_count;
    uint64_t slots[MOST_SLOTS];
    void *arguments[MOST_SLOTS];
    memcpy(slots, call->slots, ((size_t)tail + 5) * sizeof *slots);
    for (int k = 0; k < s->value_count; ++k) {
      relational_place place = p->places[s->values[k]];
      slots[k] = (place.base < 0 ? arena : addresses[place.base]) + (uint64_t)place.offset;
    }
    slots[tail + 3] = arena + (uint64_t)p->arena;
    for (int k = 0; k < tail + 5; ++k) arguments[k] = &slots[k];
    CHECK(planish_cuda_launch(&call->kernel, call->x, call->y, 1, RELATIONAL_THREADS, stream, arguments));
  }
  return NULL;
}

static ort_status *compute_with(layer *own, ort_context *context, tensor *all, uint64_t *addresses, int64_t *node_ptr) {
  const relational_program *p = own->op->program;
  cuda_stream stream = NULL;
  relational_graph asked;
  graph *g = NULL;
  plan *made = NULL;
  void *memory = NULL;
  int capturing = 0, captured = 0;
  memset(&asked, 0, sizeof asked);
  for (int i = 0; i < p->arguments + 2; ++i) {
    CHECK(planish_input_there(context, (size_t)i, i < 2 ? 8 : 4, &all[i]));
    if (i > 1) addresses[i - 2] = (uint64_t)(uintptr_t)all[i].data;
  }
  CHECK(read_shapes(p, all, all + 2, &asked, node_ptr));
  CHECK(planish_cuda_stream(context, &stream));
  CHECK(planish_cuda_capturing(stream, &capturing));
  CHECK(ready(own, &asked, all, stream, capturing, &g, &made, &captured));
  ort_status *status = NULL;
  if (captured) status = planish_cuda_clear(g->captured, sizeof(int), stream);
  if (captured && !status) status = compare(own->op, g, all, stream, g->captured);
  for (int i = 0; i < p->outputs && !status; ++i) {
    const relational_value *v = &p->values[p->output_values[i]];
    int64_t shape[MAX_RANK], lead = v->domain != DOMAIN_NONE;
    shape[0] = relational_rows(&g->host, v->domain, v->index);
    memcpy(shape + lead, v->shape, (size_t)v->rank * sizeof *shape);
    tensor *y = &all[p->arguments + 2 + i];
    status = planish_output_there(context, (size_t)i, 4, shape, (size_t)(lead + v->rank), y);
    addresses[p->arguments + i] = (uint64_t)(uintptr_t)y->data;
  }
  size_t bytes = (size_t)(made->arena + made->workspace);
  if (!status && bytes) status = memory_for(stream, capturing, bytes, &memory);
  if (!status) status = run(made, addresses, (uint64_t)(uintptr_t)memory, stream);
  for (int i = 0; i < p->outputs && captured && !status; ++i)
    status = refuse(own->op, g, &all[p->arguments + 2 + i], stream);
  pthread_mutex_lock(&lock);
  --g->users;
  pthread_mutex_unlock(&lock);
  return status;
}

static ort_status *compute(void *given, ort_context *context) {
  layer *own = given;
  const relational_program *p = own->op->program;
  size_t count = (size_t)(p->arguments + p->outputs + 2);
  tensor *all = calloc(count, sizeof *all);
  uint64_t *addresses = calloc(count, sizeof *addresses);
  int64_t *node_ptr = calloc((size_t)p->node_types + 1, sizeof *node_ptr);
  ort_status *status = all && addresses && node_ptr ? compute_with(own, context, all, addresses, node_ptr)
                                                    : planish_error("no memory for a call");
  free(all), free(addresses), free(node_ptr);
  return status;
}

void planish_cuda_relational(cuda_relational_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
