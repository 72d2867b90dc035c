/* Memory of the GPU that kernels need inside, one block for each stream, since what runs on a stream is in order. What a
   CUDA graph was made with stays where it is: when more is needed, another block is made. Held by a lock of the caller. */
#ifndef PLANISH_CUDA_SPACE_H
#define PLANISH_CUDA_SPACE_H

#include <stdlib.h>

#include "driver.h"

typedef struct cuda_space {
  cuda_stream stream;
  void *memory;
  size_t bytes;
  struct cuda_space *next;
} cuda_space;

/* Holds zeros when it is made. */
static inline ort_status *cuda_space_for(cuda_space **spaces, cuda_stream stream, size_t bytes, void **memory) {
  cuda_space *found = *spaces;
  while (found && (found->stream != stream || found->bytes < bytes)) found = found->next;
  if (!found) {
    void *made = NULL;
    CHECK(planish_cuda_allocate(bytes, &made));
    if (!(found = calloc(1, sizeof *found))) return planish_cuda_free(made), planish_error("no memory for a kernel");
    *found = (cuda_space){stream, made, bytes, *spaces};
    *spaces = found;
  }
  *memory = found->memory;
  return NULL;
}

static inline void cuda_space_free(cuda_space **spaces) {
  while (*spaces) {
    cuda_space *next = (*spaces)->next;
    planish_cuda_free((*spaces)->memory);
    free(*spaces);
    *spaces = next;
  }
}

#endif
