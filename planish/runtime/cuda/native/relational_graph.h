/* Tables of a typed graph on the host, as planish/ir/relational/graph_tables.py makes them; plain C. */
#ifndef PLANISH_RELATIONAL_GRAPH_H
#define PLANISH_RELATIONAL_GRAPH_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DOMAIN_NONE, DOMAIN_NODE, DOMAIN_EDGE, DOMAIN_SRC_PAIR, DOMAIN_DST_PAIR, DOMAIN_EDGE_TYPE, DOMAIN_NODE_TYPE };

/* `order` is where each sorted edge was given, `place` the inverse; the rest is as `Graph.table` says. */
enum {
  TABLE_ORDER, TABLE_PLACE, TABLE_SRC, TABLE_DST, TABLE_TYPE, TABLE_EDGE_PTR,
  TABLE_DST_PAIR_NODE, TABLE_DST_PAIR_TYPE, TABLE_DST_PAIR_PTR, TABLE_DST_PAIR_TYPE_PTR, TABLE_DST_PAIR_OF,
  TABLE_SRC_PAIR_NODE, TABLE_SRC_PAIR_TYPE, TABLE_SRC_PAIR_PTR, TABLE_SRC_PAIR_TYPE_PTR, TABLE_SRC_PAIR_OF,
  TABLE_SRC_PAIR_EDGES, TABLE_IN_PTR, TABLE_IN_EDGES, TABLE_OUT_PTR, TABLE_OUT_EDGES,
  TABLE_DST_NODE_PTR, TABLE_DST_NODE_PAIRS, TABLE_SRC_NODE_PTR, TABLE_SRC_NODE_PAIRS,
  TABLE_NODE_PTR, TABLE_NODE_TYPE, TABLE_EDGE_ENDS, TABLE_SRC_KIND, TABLE_DST_KIND, TABLES
};

typedef struct {
  int64_t nodes, edges, edge_types, node_types;
  const int64_t *node_ptr;          /* (node types + 1,) */
  const int32_t *given[3];          /* sources, destinations and types, in the order of the model */
  int32_t *tables[TABLES];          /* made when they are asked for */
  int64_t lengths[TABLES];
  char wrong[256];                  /* why a table could not be made */
} relational_graph;

static inline int relational_failed(relational_graph *g, const char *why) {
  if (!g->wrong[0]) snprintf(g->wrong, sizeof g->wrong, "%s", why);
  return -1;
}

static inline int32_t *relational_new(relational_graph *g, int table, int64_t length) {
  int32_t *made = calloc((size_t)length + 1, sizeof *made);
  if (!made) relational_failed(g, "no memory for the tables of a graph");
  g->tables[table] = made, g->lengths[table] = length;
  return made;
}

static inline void relational_forget(relational_graph *g) {
  for (int i = 0; i < TABLES; ++i) free(g->tables[i]), g->tables[i] = NULL;
}

/* Pointers (count + 1,) to the runs of 0 ... count - 1 in `values`, sorted or to be sorted. */
static inline void relational_starts(const int32_t *values, int64_t length, int64_t count, int32_t *starts) {
  memset(starts, 0, ((size_t)count + 1) * sizeof *starts);
  for (int64_t i = 0; i < length; ++i) ++starts[values[i] + 1];
  for (int64_t i = 0; i < count; ++i) starts[i + 1] += starts[i];
}

/* `order` by ascending keys[order[i]], equal ones as they are; `from` NULL: of 0 ... length - 1. */
static inline int relational_sort(
    relational_graph *g, const int32_t *keys, int64_t count, const int32_t *from, int64_t length, int32_t *order) {
  int32_t *starts = malloc(((size_t)count + 1) * sizeof *starts);
  if (!starts) return relational_failed(g, "no memory for the tables of a graph");
  relational_starts(keys, length, count, starts);
  for (int64_t i = 0; i < length; ++i) {
    int32_t item = from ? from[i] : (int32_t)i;
    order[starts[keys[item]]++] = item;
  }
  free(starts);
  return 0;
}

static inline int relational_table(relational_graph *g, int table);

#define NEED(table)                                     \
  do {                                                  \
    if (relational_table(g, table)) return -1;          \
  } while (0)

static inline int relational_sorted_edges(relational_graph *g) {
  int64_t edges = g->edges;
  int32_t *order = relational_new(g, TABLE_ORDER, edges), *other = malloc(((size_t)edges + 1) * sizeof *other);
  static const int ends[3] = {TABLE_SRC, TABLE_DST, TABLE_TYPE};
  int failed = !order || !other;
  failed = failed || relational_sort(g, g->given[0], g->nodes, NULL, edges, order);
  failed = failed || relational_sort(g, g->given[1], g->nodes, order, edges, other);
  failed = failed || relational_sort(g, g->given[2], g->edge_types, other, edges, order);
  free(other);
  if (failed) return relational_failed(g, "no memory for the tables of a graph");
  for (int i = 0; i < 3; ++i) {
    int32_t *made = relational_new(g, ends[i], edges);
    if (!made) return -1;
    for (int64_t e = 0; e < edges; ++e) made[e] = g->given[i][order[e]];
  }
  int32_t *starts = relational_new(g, TABLE_EDGE_PTR, g->edge_types + 1);
  if (!starts) return -1;
  relational_starts(g->given[2], edges, g->edge_types, starts);
  return 0;
}

/* Distinct (node, type) of one end, by type, then node. `first`: the first of its five tables, as they are listed. */
static inline int relational_pairs(relational_graph *g, int end, int first) {
  NEED(TABLE_ORDER);
  const int32_t *node = g->tables[end], *type = g->tables[TABLE_TYPE];
  int32_t *edges = NULL;
  if (end == TABLE_SRC) { /* sorted edges are by destination */
    int32_t *by_node = malloc(((size_t)g->edges + 1) * sizeof *by_node);
    edges = relational_new(g, TABLE_SRC_PAIR_EDGES, g->edges);
    int failed = !by_node || !edges || relational_sort(g, node, g->nodes, NULL, g->edges, by_node) ||
                 relational_sort(g, type, g->edge_types, by_node, g->edges, edges);
    free(by_node);
    if (failed) return relational_failed(g, "no memory for the tables of a graph");
  }
  int64_t pairs = 0;
  for (int pass = 0; pass < 2; ++pass) {
    int32_t *made[5] = {0};
    if (pass) {
      const int64_t lengths[5] = {pairs, pairs, pairs + 1, g->edge_types + 1, g->edges};
      for (int i = 0; i < 5; ++i)
        if (!(made[i] = relational_new(g, first + i, lengths[i]))) return -1;
    }
    int32_t last_node = -1, last_type = -1;
    pairs = 0;
    for (int64_t i = 0; i < g->edges; ++i) {
      int32_t e = edges ? edges[i] : (int32_t)i;
      if (node[e] != last_node || type[e] != last_type) {
        if (pass) made[0][pairs] = node[e], made[1][pairs] = type[e], made[2][pairs] = (int32_t)i;
        ++pairs, last_node = node[e], last_type = type[e];
      }
      if (pass) made[4][e] = (int32_t)pairs - 1;
    }
    if (pass) made[2][pairs] = (int32_t)g->edges, relational_starts(made[1], pairs, g->edge_types, made[3]);
  }
  return 0;
}

/* Rows of `node` listed by it. */
static inline int relational_lists(relational_graph *g, int node, int pointers, int rows) {
  NEED(node);
  int32_t *starts = relational_new(g, pointers, g->nodes + 1), *order = relational_new(g, rows, g->lengths[node]);
  if (!starts || !order) return -1;
  relational_starts(g->tables[node], g->lengths[node], g->nodes, starts);
  return relational_sort(g, g->tables[node], g->nodes, NULL, g->lengths[node], order);
}

/* Node types at the ends of each edge type; of types without edges, 0 and 0. */
static inline int relational_ends(relational_graph *g) {
  NEED(TABLE_NODE_TYPE);
  int32_t *ends = relational_new(g, TABLE_EDGE_ENDS, 2 * g->edge_types);
  unsigned char *seen = calloc((size_t)g->edge_types + 1, 1);
  if (!ends || !seen) return free(seen), relational_failed(g, "no memory for the tables of a graph");
  for (int64_t e = 0; e < g->edges; ++e) {
    int32_t type = g->given[2][e];
    const int32_t kinds[2] = {g->tables[TABLE_NODE_TYPE][g->given[0][e]], g->tables[TABLE_NODE_TYPE][g->given[1][e]]};
    if (seen[type] && (ends[2 * type] != kinds[0] || ends[2 * type + 1] != kinds[1])) {
      free(seen);
      snprintf(
          g->wrong, sizeof g->wrong, "edges of type %d lead between different types of nodes (edge %lld is one of them)",
          (int)type, (long long)e);
      return -1;
    }
    seen[type] = 1, ends[2 * type] = kinds[0], ends[2 * type + 1] = kinds[1];
  }
  free(seen);
  return 0;
}

static inline int relational_made(relational_graph *g, int table) {
  int32_t *made;
  switch (table) {
    case TABLE_PLACE:
      NEED(TABLE_ORDER);
      if (!(made = relational_new(g, table, g->edges))) return -1;
      for (int64_t e = 0; e < g->edges; ++e) made[g->tables[TABLE_ORDER][e]] = (int32_t)e;
      return 0;
    case TABLE_ORDER: case TABLE_SRC: case TABLE_DST: case TABLE_TYPE: case TABLE_EDGE_PTR:
      return relational_sorted_edges(g);
    case TABLE_IN_PTR: case TABLE_IN_EDGES:
      return relational_lists(g, TABLE_DST, TABLE_IN_PTR, TABLE_IN_EDGES);
    case TABLE_OUT_PTR: case TABLE_OUT_EDGES:
      return relational_lists(g, TABLE_SRC, TABLE_OUT_PTR, TABLE_OUT_EDGES);
    case TABLE_DST_NODE_PTR: case TABLE_DST_NODE_PAIRS:
      return relational_lists(g, TABLE_DST_PAIR_NODE, TABLE_DST_NODE_PTR, TABLE_DST_NODE_PAIRS);
    case TABLE_SRC_NODE_PTR: case TABLE_SRC_NODE_PAIRS:
      return relational_lists(g, TABLE_SRC_PAIR_NODE, TABLE_SRC_NODE_PTR, TABLE_SRC_NODE_PAIRS);
    case TABLE_NODE_PTR:
      if (!(made = relational_new(g, table, g->node_types + 1))) return -1;
      for (int64_t k = 0; k <= g->node_types; ++k) made[k] = (int32_t)g->node_ptr[k];
      return 0;
    case TABLE_NODE_TYPE:
      if (!(made = relational_new(g, table, g->nodes))) return -1;
      for (int64_t k = 0; k < g->node_types; ++k)
        for (int64_t n = g->node_ptr[k]; n < g->node_ptr[k + 1]; ++n) made[n] = (int32_t)k;
      return 0;
    case TABLE_EDGE_ENDS:
      return relational_ends(g);
    case TABLE_SRC_KIND: case TABLE_DST_KIND:
      NEED(TABLE_EDGE_ENDS);
      if (!(made = relational_new(g, table, g->edge_types))) return -1;
      for (int64_t t = 0; t < g->edge_types; ++t) made[t] = g->tables[TABLE_EDGE_ENDS][2 * t + (table == TABLE_DST_KIND)];
      return 0;
    default:
      if (table >= TABLE_DST_PAIR_NODE && table <= TABLE_DST_PAIR_OF) return relational_pairs(g, TABLE_DST, TABLE_DST_PAIR_NODE);
      if (table >= TABLE_SRC_PAIR_NODE && table <= TABLE_SRC_PAIR_EDGES) return relational_pairs(g, TABLE_SRC, TABLE_SRC_PAIR_NODE);
      return relational_failed(g, "there is no such table");
  }
}

/* Makes a table if it is not there; not 0 if it can not be made. */
static inline int relational_table(relational_graph *g, int table) {
  return g->tables[table] ? 0 : relational_made(g, table);
}

/* Sources, destinations and types as the kernels have them, from a model's; not 0 if one is out of range. */
static inline int relational_check(relational_graph *g, const int64_t *index, const int64_t *types, int32_t *to[3]) {
  static const char *const names[3] = {"sources", "destinations", "edge types"};
  for (int i = 0; i < 3; ++i) {
    const int64_t *from = i < 2 ? index + i * g->edges : types, limit = i < 2 ? g->nodes : g->edge_types;
    for (int64_t e = 0; e < g->edges; ++e) {
      if (from[e] < 0 || from[e] >= limit) {
        snprintf(
            g->wrong, sizeof g->wrong, "%s: edge %lld has %lld; there are %lld, so 0 to %lld", names[i], (long long)e,
            (long long)from[e], (long long)limit, (long long)limit - 1);
        return -1;
      }
      to[i][e] = (int32_t)from[e];
    }
    g->given[i] = to[i];
  }
  return 0;
}

/* Rows of a domain; -1 if a table for it can not be made. */
static inline int64_t relational_rows(relational_graph *g, int domain, int index) {
  switch (domain) {
    case DOMAIN_NODE: return index < 0 ? g->nodes : g->node_ptr[index + 1] - g->node_ptr[index];
    case DOMAIN_EDGE: return g->edges;
    case DOMAIN_SRC_PAIR: NEED(TABLE_SRC_PAIR_NODE); return g->lengths[TABLE_SRC_PAIR_NODE];
    case DOMAIN_DST_PAIR: NEED(TABLE_DST_PAIR_NODE); return g->lengths[TABLE_DST_PAIR_NODE];
    case DOMAIN_EDGE_TYPE: return g->edge_types;
    case DOMAIN_NODE_TYPE: return g->node_types;
    default: return 1;
  }
}

#endif
