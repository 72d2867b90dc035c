// The part of ONNX Runtime's C API that an artifact is run with, declared from its public documentation, so that the
// shared library of the Python package is all that is needed: no headers, nothing to link with.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace ort {

// OrtApi is a table of function pointers that only grows at its end: a slot keeps its number in all versions.
enum Slot {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetIntraOpNumThreads = 24,
  kRegisterCustomOpsLibrary = 29,
  kCreateTensorWithData = 49,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kReleaseEnv = 92,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseSession = 95,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseSessionOptions = 100,
};
constexpr uint32_t kVersion = 16;

// Every object of the API is a pointer to something unknown that one of its functions frees.
class Object {
 public:
  Object() = default;
  Object(void* pointer, void (*release)(void*)) : held_(pointer, release) {}
  void* get() const { return held_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> held_{nullptr, [](void*) {}};
};

class Api {
 public:
  // `library`: path of libonnxruntime.so.
  explicit Api(const std::string& library) {
    void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!opened) throw std::runtime_error(dlerror());
    struct Base {
      const void* const* (*get_api)(uint32_t);
      const char* (*version)();
    };
    auto get_base = reinterpret_cast<const Base* (*)()>(dlsym(opened, "OrtGetApiBase"));
    if (!get_base) throw std::runtime_error(library + " is not ONNX Runtime: it has no OrtGetApiBase");
    table_ = get_base()->get_api(kVersion);
    if (!table_) throw std::runtime_error(library + " does not have API version " + std::to_string(kVersion));
    version_ = get_base()->version();
  }

  const std::string& version() const { return version_; }

  // Calls a function that returns a status.
  template <typename... Arguments>
  void call(Slot slot, Arguments... arguments) const {
    void* status = reinterpret_cast<void* (*)(Arguments...)>(const_cast<void*>(table_[slot]))(arguments...);
    if (!status) return;
    auto text = reinterpret_cast<const char* (*)(const void*)>(const_cast<void*>(table_[kGetErrorMessage]));
    std::string message(text(status));
    release(kReleaseStatus)(status);
    throw std::runtime_error(message);
  }

  // Calls a function whose last argument is where the new object goes.
  template <typename... Arguments>
  Object make(Slot slot, Slot releasing, Arguments... arguments) const {
    void* made = nullptr;
    call(slot, arguments..., &made);
    return Object(made, release(releasing));
  }

  void (*release(Slot slot) const)(void*) { return reinterpret_cast<void (*)(void*)>(const_cast<void*>(table_[slot])); }

 private:
  const void* const* table_ = nullptr;
  std::string version_;
};

}  // namespace ort
