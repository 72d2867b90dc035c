/* The part of the CUDA driver that operators use, on memory of the host: what is launched is written down, not run, but
   for the comparison of edges. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int pending; /* what the default stream does may not be over, and other streams do not wait for it */

#define OK(name, ...) \
  int name(__VA_ARGS__) { return 0; }

int cuGetErrorString(int code, const char **text) { return (void)code, *text = "an error", 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int name, int device) {
  return (void)device, *value = name == 75 ? 9 : name == 76 ? 0 : 132, 0;
}
int cuModuleLoadData(void **module, const void *code) { return *module = (void *)code, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return (void)module, *function = strdup(name), 0;
}
OK(cuFuncSetAttribute, void *f, int a, int v)
OK(cuLaunchKernelEx, void *s, void *f, void **a, void **e)
OK(cuTensorMapEncodeTiled, void *m)

int cuStreamSynchronize(void *stream) { return pending = pending && stream, 0; }

int cuLaunchKernel(
    const char *function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned shared,
    void *stream, void **arguments, void **more) {
  (void)a, (void)b, (void)c, (void)shared, (void)stream, (void)more;
  if (pending) printf("race\n");
  printf("launch %s %u %u %u\n", function, x, y, z);
  if (strcmp(function, "relational_edges")) return 0;
  const int64_t *index = *(void **)arguments[0], *types = *(void **)arguments[1], edges = *(int64_t *)arguments[3];
  const int *known = *(void **)arguments[2];
  int *differs = *(void **)arguments[4];
  for (int64_t e = 0; e < edges; ++e)
    if (index[e] != known[e] || index[edges + e] != known[edges + e] || types[e] != known[2 * edges + e]) *differs = 1;
  return 0;
}

int cuMemAlloc_v2(void **made, size_t bytes) { return !(*made = malloc(bytes)); }
int cuMemsetD8_v2(void *to, unsigned char value, size_t bytes) { return pending = 1, memset(to, value, bytes), 0; }
int cuMemFree_v2(void *memory) { return free(memory), 0; }
int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { return pending = 1, memcpy(to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) {
  if (pending) printf("race\n");
  return (void)stream, printf("clear %zu\n", bytes), memset(to, value, bytes), 0;
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
  if (pending) printf("race\n");
  return (void)stream, printf("copy %zu\n", bytes), memmove(to, from, bytes), 0;
}
int cuStreamIsCapturing(void *stream, int *capturing) { return (void)stream, *capturing = 0; }
int cuMemHostAlloc(void **made, size_t bytes, unsigned flags) { return (void)flags, !(*made = malloc(bytes)); }
int cuMemFreeHost(void *memory) { return free(memory), 0; }
