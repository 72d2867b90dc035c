/* What the generated table says of a feed-forward network. */
#ifndef PLANISH_FEED_FORWARD_H
#define PLANISH_FEED_FORWARD_H

#include "linear.h"

typedef struct {
  planish_op base;
  int gated; /* two weights before the activation, and no bias for them */
  const linear_form *form;
} feed_forward_op;

void planish_feed_forward(feed_forward_op *op);

#endif
