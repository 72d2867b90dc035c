// What packed functions of TVM are made of: arguments as its C ABI passes them, errors, streams, libraries found at run
// time. No header of CUDA is needed to compile, and no GPU.
#ifndef PLANISH_CALLS_H
#define PLANISH_CALLS_H

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 64

static inline int failed(const char *doing, const char *why, int code) {
  char text[400];
  snprintf(text, sizeof text, "%s: %s (%d)", doing, why, code);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
  return -1;
}

// The tensor that an argument is, or null.
static inline const DLTensor *tensor(const TVMFFIAny *argument) {
  if (argument->type_index == kTVMFFIDLTensorPtr) return (const DLTensor *)argument->v_ptr;
  if (argument->type_index == kTVMFFITensor) return (const DLTensor *)((char *)argument->v_ptr + sizeof(TVMFFIObject));
  return NULL;
}

static inline void *data(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

static inline void *stream(const DLTensor *t) { return TVMFFIEnvGetStream(t->device.device_type, t->device.device_id); }

// CUlaunchAttribute and CUlaunchConfig.
typedef struct {
  int id, padding;
  unsigned value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *on;
  Attribute *attributes;
  unsigned count;
} Settings;

// CUDA's driver functions that are used, and whether they are all there.
typedef struct {
  int (*get_error)(int, const char **);
  int (*device)(int *, int);
  int (*attribute)(int *, int, int);
  int (*load)(void **, const void *);
  int (*function)(void **, void *, const char *);
  int (*set_attribute)(void *, int, int);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
  int (*tensor_map)(void *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *, const uint32_t *,
                    int, int, int, int);
  int (*launch_settings)(const Settings *, void *, void **, void **);
} Driver;

#endif
