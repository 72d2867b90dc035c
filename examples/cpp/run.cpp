// Runs an artifact of planish without Python: its model with its generated kernels, on its golden inputs, and compares
// with its golden outputs.
//
//   run ARTIFACT LIBONNXRUNTIME [--entry NAME] [--threads N] [--without-kernels]
//
// Prints a line for each output; the exit status is 0 if every relative error (L2) is below 1e-5.

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "ort.hpp"
#include "safetensors.hpp"

namespace {

constexpr double kLimit = 1e-5;

struct Options {
  std::string artifact, library, entry = "main";
  int threads = 1;
  bool kernels = true;
};

Options parse(int count, char** words) {
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "--without-kernels") options.kernels = false;
    else if (word == "--entry" && i + 1 < count) options.entry = words[++i];
    else if (word == "--threads" && i + 1 < count) options.threads = std::stoi(words[++i]);
    else if (word.rfind("--", 0) == 0) throw std::runtime_error("unknown option " + word);
    else places.push_back(word);
  }
  if (places.size() != 2)
    throw std::runtime_error("usage: run ARTIFACT LIBONNXRUNTIME [--entry NAME] [--threads N] [--without-kernels]");
  options.artifact = places[0];
  options.library = places[1];
  return options;
}

// Element types as ONNX counts them, by safetensors' names.
int element_type(const std::string& dtype) {
  static const std::map<std::string, int> kTypes = {{"F32", 1}, {"I32", 6}, {"I64", 7}, {"BOOL", 9}, {"F64", 11}};
  return kTypes.at(dtype);
}

double number(const std::string& dtype, const void* data, size_t at) {
  if (dtype == "F32") return static_cast<const float*>(data)[at];
  if (dtype == "F64") return static_cast<const double*>(data)[at];
  if (dtype == "I32") return static_cast<const int32_t*>(data)[at];
  if (dtype == "I64") return static_cast<double>(static_cast<const int64_t*>(data)[at]);
  return static_cast<const unsigned char*>(data)[at];
}

// Loads the kernels into the session's options; a model with planish's operators runs without them too, slower.
int register_kernels(const ort::Api& api, const ort::Object& settings, const std::filesystem::path& folder) {
  int found = 0;
  if (!std::filesystem::is_directory(folder)) return found;
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    if (item.path().extension() != ".so") continue;
    void* handle = nullptr;  // stays open: the session calls into it
    const std::string path = item.path().string();
    api.call(ort::kRegisterCustomOpsLibrary, settings.get(), path.c_str(), &handle);
    ++found;
  }
  return found;
}

// Relative error of an output, ||got - want|| / ||want||; the norm goes to `norm`. Infinite where the shapes differ.
double compare(const ort::Api& api, void* value, const safetensors::Tensor& want, double* norm) {
  ort::Object info = api.make(ort::kGetTensorTypeAndShape, ort::kReleaseTensorTypeAndShapeInfo, value);
  int type = 0;
  size_t rank = 0;
  void* data = nullptr;
  api.call(ort::kGetTensorElementType, info.get(), &type);
  api.call(ort::kGetDimensionsCount, info.get(), &rank);
  std::vector<int64_t> shape(rank);
  api.call(ort::kGetDimensions, info.get(), shape.data(), rank);
  api.call(ort::kGetTensorMutableData, value, &data);
  *norm = 0;
  if (type != element_type(want.dtype) || shape != want.shape) return INFINITY;
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.data.size() / safetensors::width(want.dtype); ++i) {
    const double a = number(want.dtype, data, i), b = number(want.dtype, want.data.data(), i);
    difference += (a - b) * (a - b);
    size += b * b;
    *norm += a * a;
  }
  *norm = std::sqrt(*norm);
  return difference == 0 ? 0 : std::sqrt(difference / size);
}

int run(const Options& options) {
  const std::filesystem::path artifact = options.artifact;
  const std::string golden = (artifact / "golden" / (options.entry + ".0.")).string();
  auto inputs = safetensors::read(golden + "inputs.safetensors");
  const auto outputs = safetensors::read(golden + "outputs.safetensors");

  const ort::Api api(options.library);
  const ort::Object env = api.make(ort::kCreateEnv, ort::kReleaseEnv, 2 /* warnings */, "planish");
  const ort::Object settings = api.make(ort::kCreateSessionOptions, ort::kReleaseSessionOptions);
  api.call(ort::kSetIntraOpNumThreads, settings.get(), options.threads);
  const int libraries = options.kernels ? register_kernels(api, settings, artifact / "kernels") : 0;
  const std::string model = (artifact / (options.entry + ".onnx")).string();
  const ort::Object session =
      api.make(ort::kCreateSession, ort::kReleaseSession, env.get(), model.c_str(), settings.get());
  std::printf("ONNX Runtime %s, libraries of kernels: %d\n", api.version().c_str(), libraries);

  const ort::Object memory =
      api.make(ort::kCreateCpuMemoryInfo, ort::kReleaseMemoryInfo, 1 /* arena */, 0 /* default */);
  std::vector<ort::Object> given, got;
  std::vector<void*> values, results(outputs.size(), nullptr);
  std::vector<const char*> names, wanted;
  for (auto& [name, tensor] : inputs) {
    given.push_back(api.make(ort::kCreateTensorWithData, ort::kReleaseValue, memory.get(),
                             static_cast<void*>(tensor.data.data()), tensor.data.size(), tensor.shape.data(),
                             tensor.shape.size(), element_type(tensor.dtype)));
    values.push_back(given.back().get());
    names.push_back(name.c_str());
  }
  for (const auto& item : outputs) wanted.push_back(item.first.c_str());
  api.call(ort::kRun, session.get(), nullptr, names.data(), values.data(), names.size(), wanted.data(), wanted.size(),
           results.data());
  bool close = true;
  size_t at = 0;
  for (const auto& [name, tensor] : outputs) {
    got.emplace_back(results[at], api.release(ort::kReleaseValue));
    double norm = 0;
    const double error = compare(api, results[at++], tensor, &norm);
    std::printf("%s: relative error %.3e, norm %.9e\n", name.c_str(), error, norm);
    close = close && error < kLimit;  // false for NaN
  }
  return close ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
