#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define API(slot, ...) (((ort_status * (*)(__VA_ARGS__)) planish_api[slot]))
enum { SLOT_COMPUTE_STREAM = 193 };

/* CUdevice_attribute and CUfunction_attribute, by CUDA's documentation. */
enum { PROCESSORS = 16, MAJOR = 75, MINOR = 76, MAX_DYNAMIC_SHARED = 8, DEFAULT_SHARED = 48 << 10 };

/* CUlaunchAttribute, whose value is 64 bytes, and CUlaunchConfig. */
enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_SERIALIZATION = 6 };
typedef struct {
  int id, padding;
  unsigned value[16];
} launch_attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  cuda_stream stream;
  launch_attribute *attributes;
  unsigned count;
} launch_settings;

static struct {
  int (*error)(int, const char **);
  int (*context)(void **);
  int (*device)(int *);
  int (*attribute)(int *, int, int);
  int (*load)(void **, const void *);
  int (*function)(void **, void *, const char *);
  int (*set_function)(void *, int, int);
  int (*launch)(
      void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cuda_stream, void **, void **);
  int (*launch_settings)(const launch_settings *, void *, void **, void **);
  int (*map)(
      void *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *, const uint32_t *, int, int,
      int, int);
  int (*allocate)(uintptr_t *, size_t);
  int (*fill)(uintptr_t, unsigned char, size_t);
  int (*release)(uintptr_t);
  int (*upload)(uintptr_t, const void *, size_t);
  int (*download)(void *, uintptr_t, size_t);
  int (*clear)(uintptr_t, unsigned char, size_t, cuda_stream);
  int (*copy)(uintptr_t, uintptr_t, size_t, cuda_stream);
  int (*wait)(cuda_stream);
  int (*capturing)(cuda_stream, int *);
  int (*host)(void **, size_t, unsigned);
  int (*release_host)(void *);
} driver;

static const struct {
  const char *name;
  void *slot;
  int optional;
} symbols[] = {
    {"cuGetErrorString", &driver.error, 0},      {"cuCtxGetCurrent", &driver.context, 0},
    {"cuCtxGetDevice", &driver.device, 0},       {"cuDeviceGetAttribute", &driver.attribute, 0},
    {"cuModuleLoadData", &driver.load, 0},       {"cuModuleGetFunction", &driver.function, 0},
    {"cuFuncSetAttribute", &driver.set_function, 0}, {"cuLaunchKernel", &driver.launch, 0},
    {"cuTensorMapEncodeTiled", &driver.map, 1},  {"cuMemAlloc_v2", &driver.allocate, 0},
    {"cuMemsetD8_v2", &driver.fill, 0},          {"cuMemFree_v2", &driver.release, 0},
    {"cuMemcpyHtoD_v2", &driver.upload, 0},      {"cuMemcpyDtoH_v2", &driver.download, 0},
    {"cuMemsetD8Async", &driver.clear, 0},       {"cuMemcpyDtoDAsync_v2", &driver.copy, 0},
    {"cuStreamSynchronize", &driver.wait, 0},    {"cuStreamIsCapturing", &driver.capturing, 0},
    {"cuMemHostAlloc", &driver.host, 0},         {"cuMemFreeHost", &driver.release_host, 0},
    {"cuLaunchKernelEx", &driver.launch_settings, 1},
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* A kernel that is loaded in a context. */
typedef struct loaded {
  const cuda_code *code;
  void *context;
  cuda_kernel kernel;
  struct loaded *next;
} loaded;
static loaded *all_loaded;

static ort_status *said(int code, const char *doing) {
  const char *text = NULL;
  if (!code) return NULL;
  driver.error(code, &text);
  return planish_error("%s: the CUDA driver says '%s' (error %d)", doing, text ? text : "?", code);
}

static ort_status *open_driver(void) {
  static int opened;
  if (opened) return NULL;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!library) return planish_error("kernels for CUDA found no NVIDIA driver (libcuda.so.1)");
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; ++i) {
    void *found = dlsym(library, symbols[i].name);
    if (!found && !symbols[i].optional) return planish_error("the NVIDIA driver is too old: it has no %s", symbols[i].name);
    memcpy(symbols[i].slot, &found, sizeof found);
  }
  opened = 1;
  return NULL;
}

static ort_status *load(const cuda_code *code, void *context, cuda_kernel *kernel) {
  void *module = NULL;
  int device = 0, major = 0, minor = 0;
  CHECK(said(driver.device(&device), code->name));
  CHECK(said(driver.attribute(&major, MAJOR, device), code->name));
  CHECK(said(driver.attribute(&minor, MINOR, device), code->name));
  CHECK(said(driver.attribute(&kernel->processors, PROCESSORS, device), code->name));
  kernel->arch = 10 * major + minor;
  kernel->shared = kernel->arch == 90 ? code->shared_90 : kernel->arch >= 80 ? code->shared_80 : code->shared_75;
  CHECK(said(driver.load(&module, code->code), code->name));
  CHECK(said(driver.function(&kernel->function, module, code->name), code->name));
  if (kernel->shared > DEFAULT_SHARED)
    CHECK(said(driver.set_function(kernel->function, MAX_DYNAMIC_SHARED, kernel->shared), code->name));
  loaded *entry = calloc(1, sizeof *entry);
  if (!entry) return planish_error("no memory for a kernel");
  *entry = (loaded){code, context, *kernel, all_loaded};
  all_loaded = entry;
  return NULL;
}

static ort_status *find(const cuda_code *code, cuda_kernel *kernel) {
  void *context = NULL;
  CHECK(open_driver());
  CHECK(said(driver.context(&context), code->name));
  if (!context) return planish_error("%s: there is no CUDA context", code->name);
  for (const loaded *entry = all_loaded; entry; entry = entry->next)
    if (entry->code == code && entry->context == context) {
      *kernel = entry->kernel;
      return NULL;
    }
  return load(code, context, kernel);
}

ort_status *planish_cuda_kernel(const cuda_code *code, cuda_kernel *kernel) {
  pthread_mutex_lock(&lock);
  ort_status *status = find(code, kernel);
  pthread_mutex_unlock(&lock);
  return status;
}

ort_status *planish_cuda_stream(ort_context *context, cuda_stream *stream) {
  return API(SLOT_COMPUTE_STREAM, const ort_context *, void **)(context, stream);
}

static ort_status *launch(
    const cuda_kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, cuda_stream stream,
    void **arguments, int early) {
  if (y > 65535 || z > 65535) return planish_error("a grid of %u × %u × %u blocks; the limit is 65535 of the last two", x, y, z);
  if (!x || !y || !z) return NULL;
  unsigned shared = (unsigned)kernel->shared;
  launch_attribute attribute = {PROGRAMMATIC_SERIALIZATION, 0, {1}};
  launch_settings settings = {{x, y, z}, {threads, 1, 1}, shared, stream, &attribute, 1};
  return said(
      early ? driver.launch_settings(&settings, kernel->function, arguments, NULL)
            : driver.launch(kernel->function, x, y, z, threads, 1, 1, shared, stream, arguments, NULL),
      "launching a kernel");
}

ort_status *planish_cuda_launch(
    const cuda_kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, cuda_stream stream,
    void **arguments) {
  return launch(kernel, x, y, z, threads, stream, arguments, 0);
}

ort_status *planish_cuda_launch_early(
    const cuda_kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, cuda_stream stream,
    void **arguments) {
  /* Of the code there is, that for sm_90a alone waits: later GPUs translate what is for an earlier one. */
  return launch(kernel, x, y, z, threads, stream, arguments, kernel->arch == 90 && driver.launch_settings);
}

ort_status *planish_cuda_launch_clusters(
    const cuda_kernel *kernel, unsigned cluster, unsigned clusters, unsigned threads, unsigned shared,
    cuda_stream stream, void **arguments) {
  if (clusters > 65535) return planish_error("a grid of %u clusters of blocks; the limit is 65535", clusters);
  if (!clusters) return NULL;
  if (cluster == 1)
    return said(
        driver.launch(kernel->function, 1, clusters, 1, threads, 1, 1, shared, stream, arguments, NULL),
        "launching a kernel");
  if (!driver.launch_settings) return planish_error("the NVIDIA driver is too old: it has no cuLaunchKernelEx");
  launch_attribute attribute = {CLUSTER_DIMENSION, 0, {cluster, 1, 1}};
  launch_settings settings = {{cluster, clusters, 1}, {threads, 1, 1}, shared, stream, &attribute, 1};
  return said(driver.launch_settings(&settings, kernel->function, arguments, NULL), "launching a kernel");
}

ort_status *planish_cuda_map(
    void *map, void *data, const int64_t *rows_heads_batch, int size, const int64_t *strides) {
  if (!driver.map) return planish_error("the NVIDIA driver is too old: it has no cuTensorMapEncodeTiled");
  uint64_t sizes[4] = {(uint64_t)size}, steps[3];
  const uint32_t box[4] = {64, 64, 1, 1}, ones[4] = {1, 1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = (uint64_t)rows_heads_batch[i];
    steps[i] = 2 * (uint64_t)strides[i];
  }
  /* 6: 16-bit floats. Not interleaved, the swizzle of 128 bytes, L2 sectors of 128 bytes, zeros outside. */
  return said(driver.map(map, 6, 4, data, sizes, steps, box, ones, 0, 3, 2, 0), "describing a tensor");
}

/* Waits for what the default stream does: zeros, and the last part of a copy from pageable memory, may be under way when
   the driver returns, and ONNX Runtime's streams do not wait for that one. */
static ort_status *settle(void) { return planish_cuda_wait(NULL); }

ort_status *planish_cuda_allocate(size_t bytes, void **made) {
  uintptr_t address = 0;
  CHECK(said(driver.allocate(&address, bytes), "memory for kernels"));
  *made = (void *)address;
  CHECK(said(driver.fill(address, 0, bytes), "memory for kernels"));
  return settle();
}

void planish_cuda_free(void *memory) {
  if (memory && driver.release) driver.release((uintptr_t)memory); /* fails where the context is gone, and so is it */
}

ort_status *planish_cuda_context(void **context) {
  pthread_mutex_lock(&lock);
  ort_status *status = open_driver();
  pthread_mutex_unlock(&lock);
  CHECK(status);
  CHECK(said(driver.context(context), "asking for the context"));
  return *context ? NULL : planish_error("there is no CUDA context");
}

ort_status *planish_cuda_upload(const void *data, size_t bytes, void **made) {
  uintptr_t address = 0;
  CHECK(said(driver.allocate(&address, bytes ? bytes : 1), "memory for tables"));
  *made = (void *)address;
  if (!bytes) return NULL;
  CHECK(said(driver.upload(address, data, bytes), "copying tables to the GPU"));
  return settle();
}

ort_status *planish_cuda_download(void *to, const void *data, size_t bytes, cuda_stream stream) {
  CHECK(planish_cuda_wait(stream));
  return bytes ? said(driver.download(to, (uintptr_t)data, bytes), "copying to the host") : NULL;
}

ort_status *planish_cuda_clear(void *to, size_t bytes, cuda_stream stream) {
  return bytes ? said(driver.clear((uintptr_t)to, 0, bytes, stream), "clearing memory") : NULL;
}

ort_status *planish_cuda_copy(void *to, const void *from, size_t bytes, cuda_stream stream) {
  return bytes ? said(driver.copy((uintptr_t)to, (uintptr_t)from, bytes, stream), "copying memory") : NULL;
}

ort_status *planish_cuda_wait(cuda_stream stream) { return said(driver.wait(stream), "waiting for the GPU"); }

ort_status *planish_cuda_capturing(cuda_stream stream, int *capturing) {
  void *context = NULL;
  *capturing = 0;
  CHECK(planish_cuda_context(&context));
  return said(driver.capturing(stream, capturing), "asking a stream");
}

/* 3: kernels of any context may write to it. */
ort_status *planish_cuda_host(size_t bytes, void **made) { return said(driver.host(made, bytes, 3), "memory of the host"); }

void planish_cuda_free_host(void *memory) {
  if (memory && driver.release_host) driver.release_host(memory);
}

static const char *provider(const ort_custom_op *op) { return (void)op, "CUDAExecutionProvider"; }

void planish_cuda_fill(planish_op *op) {
  planish_fill(op);
  op->op.provider = provider;
}
