/* The CUDA driver as kernels inside ONNX Runtime use it: found in the process when a kernel first runs, so that a library
   with kernels can be linked, and a model with it exported, on a machine without one. */
#ifndef PLANISH_CUDA_DRIVER_H
#define PLANISH_CUDA_DRIVER_H

#include "host.h"

typedef void *cuda_stream;

/* A kernel of a fat binary. */
typedef struct {
  const char *name;
  const unsigned char *code;
  int shared_75, shared_80, shared_90; /* bytes of dynamic shared memory, by generation */
} cuda_code;

typedef struct {
  void *function;
  int arch, processors, shared; /* of the GPU: 10 · major + minor; multiprocessors; what a block asks for */
} cuda_kernel;

/* The kernel in the context that is current; it is loaded once for each context. */
ort_status *planish_cuda_kernel(const cuda_code *, cuda_kernel *);
/* The stream that ONNX Runtime runs this node on. */
ort_status *planish_cuda_stream(ort_context *, cuda_stream *);
ort_status *planish_cuda_launch(
    const cuda_kernel *, unsigned x, unsigned y, unsigned z, unsigned threads, cuda_stream, void **arguments);
/* The same for a kernel that waits by itself for what is in front of it on the stream (griddepcontrol, on Hopper), so that
   it may start before that is over. */
ort_status *planish_cuda_launch_early(
    const cuda_kernel *, unsigned x, unsigned y, unsigned z, unsigned threads, cuda_stream, void **arguments);
/* A grid of `clusters` rows of `cluster` blocks, which run at once (more than 1 from Hopper on), with `shared` bytes of
   dynamic shared memory, at most 48 KB. */
ort_status *planish_cuda_launch_clusters(
    const cuda_kernel *, unsigned cluster, unsigned clusters, unsigned threads, unsigned shared, cuda_stream,
    void **arguments);
/* Describes (batch, rows, heads, size) of 16-bit elements for Hopper's copies of boxes of 64 × 64; `map` has 128 bytes
   at a multiple of 64. `strides`: of rows, heads and batch, in elements. */
ort_status *planish_cuda_map(
    void *map, void *data, const int64_t *rows_heads_batch, int size, const int64_t *strides);
/* Memory of the GPU that holds zeros, until `planish_cuda_free`. */
ort_status *planish_cuda_allocate(size_t bytes, void **);
void planish_cuda_free(void *);
/* The context that is current. */
ort_status *planish_cuda_context(void **);
/* Memory of the GPU with a copy of `data`; to be freed with `planish_cuda_free`. These two wait. */
ort_status *planish_cuda_upload(const void *data, size_t bytes, void **);
ort_status *planish_cuda_download(void *to, const void *data, size_t bytes, cuda_stream);
/* On a stream, without a wait. */
ort_status *planish_cuda_clear(void *to, size_t bytes, cuda_stream);
ort_status *planish_cuda_copy(void *to, const void *from, size_t bytes, cuda_stream);
ort_status *planish_cuda_wait(cuda_stream);
/* Not 0 if what is launched goes to a CUDA graph. */
ort_status *planish_cuda_capturing(cuda_stream, int *);
/* Memory of the host that kernels write to. */
ort_status *planish_cuda_host(size_t bytes, void **);
void planish_cuda_free_host(void *);

/* Completes an operator that runs on the CUDA provider. */
void planish_cuda_fill(planish_op *);

#endif
