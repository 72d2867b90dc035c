/* How generated relational kernels are launched for a graph: where values lie, items of work, grids and arguments, as
   planish/runtime/cuda/relational/engine.py has it. Plain C: whoever launches brings the driver and memory. */
#ifndef PLANISH_LAUNCH_RELATIONAL_H
#define PLANISH_LAUNCH_RELATIONAL_H

#include "relational_graph.h"

enum { RELATIONAL_THREADS = 256, RELATIONAL_ALIGN = 64, RELATIONAL_BLOCKS = 6, RELATIONAL_ITEMS = 4, RELATIONAL_PART = 64 };

/* ---- what is generated with a program */

typedef struct {
  int domain, index, rank;
  int64_t width; /* numbers of a row */
  const int64_t *shape;
  int root;              /* the value in whose memory it is: itself, or another */
  int picked;            /* the node type whose rows it is of that; -1: all of it */
  int argument, output;  /* which; -1 */
  int first, last;       /* steps that touch what is in its memory; of roots */
} relational_value;

enum { GRID_GROUPS, GRID_ROWS, GRID_ONE, GRID_ITEMS, GRID_LISTED, GRID_PARTS };
typedef struct {
  int code; /* in the table of code that comes with the program */
  int grid, per, columns;
} relational_launch;

enum { STEP_CALL, STEP_CLEAR, STEP_COPY };
enum { NO_TABLE = -1, ALL_ROWS = -2 };
typedef struct {
  int kind;
  /* Of a clear or copy: values; from or to the first node of a type, and the rows of that type, if it is not -1. */
  int to, from, to_type, from_type;
  /* Of a call. */
  int domain, index;
  const int *values, *tables;
  int value_count, table_count;
  const relational_launch *launches;
  int launch_count;
  int segments, unit, most, by_node; /* items of work: tables, or what NO_TABLE and ALL_ROWS say */
  int long_table, long_from, long_most;
  int64_t room, long_room, long_rows;
} relational_step;

typedef struct {
  const char *name;
  const relational_value *values;
  int value_count, arguments, outputs, node_types;
  const int *argument_values, *output_values;
  const relational_step *steps;
  int step_count;
} relational_program;

/* ---- items of work */

typedef struct {
  int32_t *items; /* (count, 4): which segment, begin, end, number */
  int32_t *starts; /* (segments + 1,): the items of each segment */
  int32_t *listed; /* (segments,): the rows, if these are not all */
  int64_t count, segments;
} relational_work;

static inline void relational_work_free(relational_work *w) {
  free(w->items), free(w->starts), free(w->listed);
  memset(w, 0, sizeof *w);
}

/* Cuts segments, or those with more than `longest` rows if it is not negative, into items of up to unit · most rows. */
static inline int relational_items(
    const int32_t *pointers, int64_t segments, int64_t unit, int64_t most, int64_t longest, int processors,
    relational_work *w) {
  int64_t total = 0, chosen = 0, wanted = (int64_t)processors * RELATIONAL_BLOCKS * RELATIONAL_ITEMS;
  memset(w, 0, sizeof *w);
  for (int64_t s = 0; s < segments; ++s) {
    int64_t count = pointers[s + 1] - pointers[s];
    if (count > longest) total += count, ++chosen;
  }
  int64_t times = (total + wanted * unit - 1) / (wanted * unit);
  int64_t rows = unit * (times < 1 ? 1 : times > most ? most : times);
  w->segments = chosen;
  w->starts = calloc((size_t)chosen + 1, sizeof *w->starts);
  w->listed = longest >= 0 ? calloc((size_t)chosen + 1, sizeof *w->listed) : NULL;
  if (!w->starts || (longest >= 0 && !w->listed)) return -1;
  for (int64_t s = 0, at = 0; s < segments; ++s) {
    int64_t count = pointers[s + 1] - pointers[s];
    if (count <= longest) continue;
    if (w->listed) w->listed[at] = (int32_t)s;
    w->count += (count + rows - 1) / rows;
    w->starts[++at] = (int32_t)w->count;
  }
  if (!(w->items = calloc((size_t)w->count * 4 + 1, sizeof *w->items))) return -1;
  int32_t *item = w->items;
  for (int64_t s = 0, at = 0; s < segments; ++s) {
    int64_t count = pointers[s + 1] - pointers[s];
    if (count <= longest) continue;
    for (int64_t begin = 0; begin < count; begin += rows, item += 4) {
      item[0] = (int32_t)at, item[1] = (int32_t)(pointers[s] + begin);
      item[2] = (int32_t)(pointers[s] + (begin + rows < count ? begin + rows : count));
      item[3] = (int32_t)((item - w->items) / 4);
    }
    ++at;
  }
  return 0;
}

typedef struct {
  int32_t item[4], node;
} relational_keyed;

static inline int relational_by_node(const void *a, const void *b) {
  const relational_keyed *x = a, *y = b;
  return x->node != y->node ? (x->node < y->node ? -1 : 1) : x->item[3] < y->item[3] ? -1 : x->item[3] > y->item[3];
}

/* Items whose rows are of the same nodes run at the same time: these stay in the cache. */
static inline int relational_order(relational_work *w, const int32_t *nodes) {
  relational_keyed *keyed = malloc(((size_t)w->count + 1) * sizeof *keyed);
  if (!keyed) return -1;
  for (int64_t i = 0; i < w->count; ++i) {
    memcpy(keyed[i].item, w->items + 4 * i, sizeof keyed[i].item);
    keyed[i].node = nodes[w->items[4 * i + 1]];
  }
  qsort(keyed, (size_t)w->count, sizeof *keyed, relational_by_node);
  for (int64_t i = 0; i < w->count; ++i) memcpy(w->items + 4 * i, keyed[i].item, sizeof keyed[i].item);
  free(keyed);
  return 0;
}

/* ---- memory */

/* Where a value is: the number of an argument, that of an output behind them, or -1, the arena. */
typedef struct {
  int base;
  int64_t offset;
} relational_place;

static inline int64_t relational_bytes(const relational_program *p, relational_graph *g, int value) {
  const relational_value *v = &p->values[value];
  int64_t rows = relational_rows(g, v->domain, v->index);
  return rows < 0 ? -1 : 4 * rows * v->width;
}

/* Places of all values, so that those in the arena that are alive at the same time do not overlap: largest first, each
   at the lowest gap. Returns the size of the arena, or -1. */
static inline int64_t relational_placed(const relational_program *p, relational_graph *g, relational_place *places) {
  int count = p->value_count, done = 0;
  int64_t arena = 0, *sizes = calloc((size_t)count + 1, sizeof *sizes);
  int *order = calloc((size_t)count + 1, sizeof *order);
  if (!sizes || !order) {
    free(sizes), free(order);
    return relational_failed(g, "no memory for a plan");
  }
  for (int i = 0; i < count; ++i) {
    const relational_value *v = &p->values[i];
    places[i].base = v->argument >= 0 ? v->argument : v->output >= 0 ? p->arguments + v->output : -1;
    places[i].offset = 0;
    sizes[i] = -1;
    if (places[i].base >= 0 || v->root != i || v->first < 0) continue;
    int64_t bytes = relational_bytes(p, g, i);
    if (bytes < 0) arena = -1;
    sizes[i] = (bytes + RELATIONAL_ALIGN - 1) / RELATIONAL_ALIGN * RELATIONAL_ALIGN;
  }
  while (arena >= 0) {
    int next = -1;
    for (int i = 0; i < count; ++i)
      if (sizes[i] >= 0 && (next < 0 || sizes[i] > sizes[next])) next = i;
    if (next < 0) break;
    int64_t at = 0;
    const relational_value *v = &p->values[next];
    for (int moved = 1; moved;) { /* beyond whatever it overlaps with, until nothing is left */
      moved = 0;
      for (int k = 0; k < done; ++k) {
        const relational_value *o = &p->values[order[k]];
        int64_t begin = places[order[k]].offset, end = begin + (-2 - sizes[order[k]]);
        if (o->last < v->first || v->last < o->first || end <= at || begin >= at + sizes[next]) continue;
        at = end, moved = 1;
      }
    }
    places[next].offset = at;
    if (at + sizes[next] > arena) arena = at + sizes[next];
    sizes[next] = -2 - sizes[next]; /* placed */
    order[done++] = next;
  }
  for (int i = 0; i < count; ++i) {
    const relational_value *v = &p->values[i];
    if (v->root == i) continue;
    places[i] = places[v->root];
    if (v->picked >= 0) places[i].offset += 4 * g->node_ptr[v->picked] * v->width;
  }
  free(sizes), free(order);
  return arena;
}

/* ---- steps */

/* The number of blocks of a launch along its first axis. */
static inline int64_t relational_grid(
    const relational_launch *l, int64_t rows, const relational_work *work, const relational_work *parts) {
  switch (l->grid) {
    case GRID_GROUPS: return (rows + l->per - 1) / l->per;
    case GRID_ROWS: return work ? work->segments : rows;
    case GRID_ONE: return rows > 0;
    case GRID_ITEMS: return work ? work->count : 0;
    case GRID_LISTED: return parts ? parts->segments : 0;
    default: return parts ? parts->count : 0;
  }
}

/* Items of a step; NULL pointers where it has none. */
static inline int relational_step_work(
    const relational_step *s, relational_graph *g, int processors, relational_work *work, relational_work *parts) {
  memset(work, 0, sizeof *work), memset(parts, 0, sizeof *parts);
  int64_t rows = relational_rows(g, s->domain, s->index);
  if (rows < 0) return -1;
  if (s->segments != NO_TABLE) {
    const int32_t all[2] = {0, (int32_t)rows}, *pointers = all;
    int64_t segments = 1;
    if (s->segments >= 0) {
      NEED(s->segments);
      pointers = g->tables[s->segments], segments = g->lengths[s->segments] - 1;
    }
    if (relational_items(pointers, segments, s->unit, s->most, -1, processors, work))
      return relational_failed(g, "no memory for items of work");
    if (s->by_node >= 0) {
      NEED(s->by_node);
      if (relational_order(work, g->tables[s->by_node])) return relational_failed(g, "no memory for items of work");
    }
  }
  if (s->long_table >= 0) {
    NEED(s->long_table);
    if (relational_items(
            g->tables[s->long_table], g->lengths[s->long_table] - 1, RELATIONAL_PART, s->long_most, s->long_from, processors, parts))
      return relational_failed(g, "no memory for items of work");
    if (!parts->segments) relational_work_free(parts);
  }
  return 0;
}

/* Numbers of the workspace that a step needs. */
static inline int64_t relational_workspace(
    const relational_step *s, const relational_work *work, const relational_work *parts) {
  int64_t own = work->count * s->room, more = parts->count * s->long_room + parts->segments * s->long_rows;
  return own > more ? own : more;
}

/* `bytes` of zeros, or where it `copies`, of what is at `from`; without bytes there is nothing to do. */
typedef struct {
  relational_place to, from;
  int copies;
  int64_t bytes;
} relational_move;

static inline relational_move relational_moved(
    const relational_program *p, const relational_step *s, relational_graph *g, const relational_place *places) {
  relational_move move = {places[s->to], {0, 0}, s->kind == STEP_COPY, relational_bytes(p, g, s->to)};
  int64_t width = 4 * p->values[s->to].width;
  if (move.copies) move.from = places[s->from];
  if (s->to_type >= 0) {
    move.to.offset += width * g->node_ptr[s->to_type];
    move.bytes = width * (g->node_ptr[s->to_type + 1] - g->node_ptr[s->to_type]);
  }
  if (s->from_type >= 0) {
    move.from.offset += width * g->node_ptr[s->from_type];
    move.bytes = width * (g->node_ptr[s->from_type + 1] - g->node_ptr[s->from_type]);
  }
  return move;
}

#endif
