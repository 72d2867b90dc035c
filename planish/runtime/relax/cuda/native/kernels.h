// Our kernels, which are in this library as fat binaries: found by what they are compiled for, loaded when first called.
#ifndef PLANISH_KERNELS_H
#define PLANISH_KERNELS_H

#include "calls.h"

enum { ATTRIBUTE_PROCESSORS = 16, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, MAX_DYNAMIC_SHARED = 8 };
enum { CLUSTER_DIMENSION = 4 };  // CUlaunchAttributeID

// What BINARY(number, source, size, form) lists: the number is of its file; the rest is what a call asks for. FORM says
// of what form a source was compiled, as in assemble.py.
typedef struct {
  const unsigned char *code;
  int source, size, form;
} Binary;

// A list of BINARY lines, made when the library is linked.
#define BINARY(n, source, size, form)                                                          \
  __asm__(".section .rodata\n.balign 64\n.hidden planish_code_" #n "\n.globl planish_code_" #n \
          "\nplanish_code_" #n ":\n.incbin \"code" #n ".fatbin\"\n.byte 0\n.previous\n");      \
  extern const unsigned char planish_code_##n[];
#include BINARIES
#undef BINARY
#define BINARY(n, source, size, form) {planish_code_##n, source, size, form},
static const Binary binaries[] = {
#include BINARIES
};
#define COUNT (int)(sizeof binaries / sizeof *binaries)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Driver cu;
// A source has two kernels at most.
static void *functions[DEVICES][sizeof binaries / sizeof *binaries][2];
static int arches[DEVICES], processors[DEVICES];

static int wrong(const char *doing, int code) {
  const char *why = "the driver refuses";
  if (cu.get_error) cu.get_error(code, &why);
  return failed(doing, why ? why : "the driver refuses", code);
}

static int find_driver(void) {
  static const char *const names[] = {"cuGetErrorString", "cuDeviceGet", "cuDeviceGetAttribute", "cuModuleLoadData",
                                      "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel",
                                      "cuTensorMapEncodeTiled", "cuLaunchKernelEx"};
  if (cu.launch_settings) return 0;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), *found[sizeof names / sizeof *names];
  if (!library) return failed("kernels", "there is no NVIDIA driver", 0);
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
    if (!(found[i] = dlsym(library, names[i]))) return failed("kernels: the driver lacks", names[i], 0);
  memcpy(&cu, found, sizeof cu);
  return 0;
}

static int know(int device) {
  int code, major, minor, handle;
  if (device < 0 || device >= DEVICES) return failed("kernels", "no such GPU", device);
  if (find_driver()) return -1;
  if (arches[device]) return 0;
  if ((code = cu.device(&handle, device)) || (code = cu.attribute(&major, ATTRIBUTE_MAJOR, handle)) ||
      (code = cu.attribute(&minor, ATTRIBUTE_MINOR, handle)) ||
      (code = cu.attribute(&processors[device], ATTRIBUTE_PROCESSORS, handle)))
    return wrong("kernels", code);
  arches[device] = 10 * major + minor;
  return 0;
}

// The architecture of a GPU, 10 · major + minor; 0 after an error.
static int arch_of(int device) {
  pthread_mutex_lock(&lock);
  int code = know(device);
  pthread_mutex_unlock(&lock);
  return code ? 0 : arches[device];
}

static int load(int device, int source, int size, int form, const char *name, int second, int shared, void **function) {
  if (know(device)) return -1;
  for (int i = 0; i < COUNT; ++i) {
    if (binaries[i].source != source || binaries[i].size != size || binaries[i].form != form) continue;
    void **kept = &functions[device][i][second], *module;
    if (!*kept) {
      int code = cu.load(&module, binaries[i].code);
      if (!code) code = cu.function(kept, module, name);
      if (!code && shared > 48 << 10) code = cu.set_attribute(*kept, MAX_DYNAMIC_SHARED, shared);
      if (code) {
        *kept = NULL;
        return wrong(name, code);
      }
    }
    *function = *kept;
    return 0;
  }
  return failed(name, "this library has no kernel for the size", size);
}

// A kernel on a GPU whose context is current; `second`: it is the other one of its source.
static int kernel(int device, int source, int size, int form, const char *name, int second, int shared, void **function) {
  pthread_mutex_lock(&lock);
  int code = load(device, source, size, form, name, second, shared, function);
  pthread_mutex_unlock(&lock);
  return code;
}

static inline int launch(void *function, const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, int shared,
                  void *on, void **arguments) {
  if (y > 65535 || z > 65535) return failed(name, "a grid of more than 65535 rows or heads", (int)(y > z ? y : z));
  if (!x || !y || !z) return 0;
  int code = cu.launch(function, x, y, z, threads, 1, 1, (unsigned)shared, on, arguments, NULL);
  return code ? wrong(name, code) : 0;
}

// `clusters` groups of `cluster` blocks that run at once; more than one block in a group from Hopper on.
static inline int launch_clusters(void *function, const char *name, unsigned cluster, unsigned clusters, unsigned threads,
                           int shared, void *on, void **arguments) {
  if (cluster <= 1) return launch(function, name, 1, clusters, 1, threads, shared, on, arguments);
  if (clusters > 65535) return failed(name, "a grid of more than 65535 clusters", (int)clusters);
  Attribute dimension = {CLUSTER_DIMENSION, 0, {cluster, 1, 1}};
  Settings settings = {{cluster, clusters, 1}, {threads, 1, 1}, (unsigned)shared, on, &dimension, 1};
  int code = clusters ? cu.launch_settings(&settings, function, arguments, NULL) : 0;
  return code ? wrong(name, code) : 0;
}

#endif
