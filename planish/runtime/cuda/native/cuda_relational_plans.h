/* Graphs that layers have seen, and programs that are ready for one. Everything here is called under `lock`. */
#ifndef PLANISH_CUDA_RELATIONAL_PLANS_H
#define PLANISH_CUDA_RELATIONAL_PLANS_H

#include "cuda_relational.h"

enum { MOST_GRAPHS = 8, COMPARED = 256, MOST_COMPARING = 4096 };
static const size_t most_bytes = (size_t)1 << 30; /* of the tables of graphs that no constant edges are */

/* A launch, a clear or a copy. */
typedef struct {
  const relational_step *step;
  cuda_kernel kernel;
  unsigned x, y;
  relational_move move;
  uint64_t *slots; /* of a launch: addresses of values, which calls fill in, then tables and the rest */
} prepared;

/* A program, ready for a graph. */
typedef struct plan {
  const relational_program *program;
  relational_place *places;
  prepared *calls;
  int count;
  int64_t arena, workspace;
  struct plan *next;
} plan;

typedef struct block {
  void *memory;
  struct block *next;
} block;

typedef struct graph {
  void *context;
  relational_graph host;
  int64_t asked_types; /* edge types as the model says; -1: as the edges do */
  int32_t *given;      /* (3, edges) on the host */
  void *known, *there[TABLES]; /* on the GPU: the same, and tables */
  int *differs;   /* on the host */
  void *captured; /* on the GPU: the same for CUDA graphs */
  block *blocks;
  plan *plans;
  int users, fixed; /* calls that run now; nodes whose constant edges these are */
  uint64_t used;
  size_t bytes;
  struct graph *next;
} graph;

static graph *graphs;
static uint64_t turn;

/* ---- what is kept */

static void free_plan(plan *p) {
  for (int i = 0; p->calls && i < p->count; ++i) free(p->calls[i].slots);
  free(p->calls), free(p->places), free(p);
}

static void free_graph(graph *g) {
  for (graph **at = &graphs; *at; at = &(*at)->next)
    if (*at == g) {
      *at = g->next;
      break;
    }
  while (g->plans) {
    plan *next = g->plans->next;
    free_plan(g->plans);
    g->plans = next;
  }
  while (g->blocks) {
    block *next = g->blocks->next;
    planish_cuda_free(g->blocks->memory);
    free(g->blocks);
    g->blocks = next;
  }
  planish_cuda_free_host(g->differs);
  relational_forget(&g->host);
  free((void *)g->host.node_ptr), free(g->given), free(g);
}

/* The graphs that were used last stay. */
static void make_room(const graph *now) {
  for (;;) {
    int count = 0;
    size_t bytes = 0;
    graph *oldest = NULL;
    for (graph *g = graphs; g; g = g->next) {
      if (g->fixed) continue;
      ++count, bytes += g->bytes;
      if (g != now && !g->users && (!oldest || g->used < oldest->used)) oldest = g;
    }
    if (!oldest || (count <= MOST_GRAPHS && bytes <= most_bytes)) return;
    free_graph(oldest);
  }
}

static ort_status *kept(graph *g, const void *data, size_t bytes, void **there) {
  block *made = calloc(1, sizeof *made);
  if (!made) return planish_error("no memory for a graph");
  made->next = g->blocks, g->blocks = made;
  CHECK(planish_cuda_upload(data, bytes, &made->memory));
  g->bytes += bytes;
  if (there) *there = made->memory;
  return NULL;
}

static ort_status *table_there(graph *g, int table, void **there) {
  if (relational_table(&g->host, table)) return planish_error("%s", g->host.wrong);
  if (!g->there[table]) CHECK(kept(g, g->host.tables[table], (size_t)g->host.lengths[table] * 4, &g->there[table]));
  *there = g->there[table];
  return NULL;
}

/* ---- plans */

static ort_status *fill_call(
    const cuda_relational_op *op, graph *g, const relational_step *s, const relational_launch *l,
    const relational_work *work, void *const items[6], prepared *call) {
  int values = s->value_count, tail = values + s->table_count, own = l->grid == GRID_ITEMS ? 0 : 3;
  const relational_work *parts = work + 1;
  int64_t rows = relational_rows(&g->host, s->domain, s->index);
  call->step = s, call->y = (unsigned)l->columns;
  call->x = (unsigned)relational_grid(l, rows, work[0].starts ? work : NULL, parts->starts ? parts : NULL);
  if (!call->x) return NULL;
  if (!(call->slots = calloc((size_t)tail + 5, sizeof *call->slots))) return planish_error("no memory for a plan");
  for (int i = 0; i < s->table_count; ++i) {
    void *there = NULL;
    CHECK(table_there(g, s->tables[i], &there));
    call->slots[values + i] = (uint64_t)(uintptr_t)there;
  }
  call->slots[tail] = (uint64_t)(uintptr_t)items[own];
  call->slots[tail + 1] = (uint64_t)(uintptr_t)items[items[4] ? 4 : 1];
  call->slots[tail + 2] = (uint64_t)(uintptr_t)items[5];
  call->slots[tail + 4] = (uint64_t)(s->segments != NO_TABLE && s->long_table >= 0 ? parts->segments : rows);
  return planish_cuda_kernel(&op->codes[l->code], &call->kernel);
}

static ort_status *fill_steps(const cuda_relational_op *op, graph *g, plan *p, int processors, relational_work *work) {
  const relational_program *program = op->program;
  for (int i = 0; i < program->step_count; ++i) {
    const relational_step *s = &program->steps[i];
    if (s->kind != STEP_CALL) {
      prepared *call = &p->calls[p->count++];
      call->move = relational_moved(program, s, &g->host, p->places);
      continue;
    }
    relational_work_free(&work[0]), relational_work_free(&work[1]);
    if (relational_step_work(s, &g->host, processors, &work[0], &work[1])) return planish_error("%s", g->host.wrong);
    int64_t needs = 4 * relational_workspace(s, &work[0], &work[1]);
    if (needs > p->workspace) p->workspace = needs;
    void *items[6] = {0};
    for (int k = 0; k < 2; ++k) {
      if (!work[k].starts) continue;
      CHECK(kept(g, work[k].items, (size_t)work[k].count * 16, &items[3 * k]));
      CHECK(kept(g, work[k].starts, ((size_t)work[k].segments + 1) * 4, &items[3 * k + 1]));
      if (work[k].listed) CHECK(kept(g, work[k].listed, (size_t)work[k].segments * 4, &items[3 * k + 2]));
    }
    for (int k = 0; k < s->launch_count; ++k)
      CHECK(fill_call(op, g, s, &s->launches[k], work, items, &p->calls[p->count++]));
  }
  return NULL;
}

static ort_status *make_plan(const cuda_relational_op *op, graph *g, plan **made) {
  const relational_program *program = op->program;
  int calls = 0;
  for (int i = 0; i < program->step_count; ++i)
    calls += program->steps[i].kind == STEP_CALL ? program->steps[i].launch_count : 1;
  plan *p = calloc(1, sizeof *p);
  if (!p) return planish_error("no memory for a plan");
  p->program = program;
  p->places = calloc((size_t)program->value_count + 1, sizeof *p->places);
  p->calls = calloc((size_t)calls + 1, sizeof *p->calls);
  cuda_kernel known;
  relational_work work[2];
  memset(work, 0, sizeof work);
  ort_status *status = p->places && p->calls ? NULL : planish_error("no memory for a plan");
  if (!status && (p->arena = relational_placed(program, &g->host, p->places)) < 0)
    status = planish_error("%s: %s", program->name, g->host.wrong);
  if (!status) status = planish_cuda_kernel(&op->edges, &known);
  if (!status) status = fill_steps(op, g, p, known.processors, work);
  relational_work_free(&work[0]), relational_work_free(&work[1]);
  if (status) return free_plan(p), status;
  p->next = g->plans, g->plans = p, *made = p;
  return NULL;
}

/* ---- graphs */

static int fits(const graph *g, const void *context, const relational_graph *asked) {
  return g->context == context && g->host.edges == asked->edges && g->asked_types == asked->edge_types &&
         g->host.node_types == asked->node_types &&
         !memcmp(g->host.node_ptr, asked->node_ptr, ((size_t)asked->node_types + 1) * sizeof(int64_t));
}

static unsigned blocks_for(int64_t count) {
  int64_t blocks = (count + COMPARED - 1) / COMPARED;
  return (unsigned)(blocks < MOST_COMPARING ? blocks : MOST_COMPARING);
}

/* Sets `*differs` if a graph has other edges. */
static ort_status *compare(
    const cuda_relational_op *op, const graph *g, const tensor *edges, cuda_stream stream, int *differs) {
  cuda_kernel kernel;
  int64_t count = g->host.edges;
  if (!count) return NULL;
  CHECK(planish_cuda_kernel(&op->edges, &kernel));
  void *arguments[] = {(void *)&edges[0].data, (void *)&edges[1].data, (void *)&g->known, &count, &differs};
  return planish_cuda_launch(&kernel, blocks_for(count), 1, 1, COMPARED, stream, arguments);
}

static ort_status *same(
    const cuda_relational_op *op, const graph *g, const tensor *edges, cuda_stream stream, int *equal) {
  *(volatile int *)g->differs = 0;
  CHECK(compare(op, g, edges, stream, g->differs));
  CHECK(planish_cuda_wait(stream));
  *equal = !*(volatile int *)g->differs;
  return NULL;
}

/* Makes the results of other edges no numbers. */
static ort_status *refuse(const cuda_relational_op *op, const graph *g, const tensor *y, cuda_stream stream) {
  cuda_kernel kernel;
  int64_t count = (int64_t)(y->bytes / 4);
  if (!count) return NULL;
  CHECK(planish_cuda_kernel(&op->refuse, &kernel));
  void *arguments[] = {(void *)&g->captured, (void *)&y->data, &count};
  return planish_cuda_launch(&kernel, blocks_for(count), 1, 1, COMPARED, stream, arguments);
}

static ort_status *read_edges(graph *g, const tensor *edges, cuda_stream stream) {
  int64_t count = g->host.edges;
  int64_t *all = malloc(((size_t)count * 3 + 1) * sizeof *all);
  g->given = malloc(((size_t)count * 3 + 1) * sizeof *g->given);
  ort_status *status = all && g->given ? NULL : planish_error("no memory for %lld edges", (long long)count);
  if (!status) status = planish_cuda_download(all, edges[0].data, (size_t)count * 16, stream);
  if (!status) status = planish_cuda_download(all + 2 * count, edges[1].data, (size_t)count * 8, stream);
  if (!status && g->asked_types < 0) {
    g->host.edge_types = 0;
    for (int64_t e = 0; e < count; ++e)
      if (all[2 * count + e] >= g->host.edge_types) g->host.edge_types = all[2 * count + e] + 1;
    if (g->host.edge_types > INT32_MAX) status = planish_error("an edge has type %lld", (long long)g->host.edge_types - 1);
  }
  int32_t *to[3] = {g->given, g->given + count, g->given + 2 * count};
  if (!status && relational_check(&g->host, all, all + 2 * count, to)) status = planish_error("%s", g->host.wrong);
  free(all);
  CHECK(status);
  CHECK(planish_cuda_host(sizeof *g->differs, (void **)&g->differs));
  CHECK(kept(g, g->differs, sizeof *g->differs, &g->captured));
  return kept(g, g->given, (size_t)count * 12, &g->known);
}

static ort_status *make_graph(
    void *context, const relational_graph *asked, const tensor *edges, cuda_stream stream, graph **made) {
  size_t pointers = ((size_t)asked->node_types + 1) * sizeof(int64_t);
  graph *g = calloc(1, sizeof *g);
  int64_t *node_ptr = malloc(pointers);
  if (!g || !node_ptr) return free(g), free(node_ptr), planish_error("no memory for a graph");
  memcpy(node_ptr, asked->node_ptr, pointers);
  g->host = *asked, g->host.node_ptr = node_ptr, g->context = context, g->asked_types = asked->edge_types;
  ort_status *status = read_edges(g, edges, stream);
  if (status) return free_graph(g), status;
  g->next = graphs, graphs = g, *made = g;
  return NULL;
}

#endif
