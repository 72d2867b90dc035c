// Reads safetensors files: the size of a JSON header in 8 bytes, the header (name -> dtype, shape, data_offsets), data.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace safetensors {

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

inline size_t width(const std::string& dtype) {
  static const std::map<std::string, size_t> kWidths = {{"F32", 4}, {"F64", 8}, {"I32", 4}, {"I64", 8}, {"BOOL", 1}};
  auto found = kWidths.find(dtype);
  if (found == kWidths.end()) throw std::runtime_error("dtype " + dtype + " is not one that this program reads");
  return found->second;
}

// The subset of JSON that headers are made of: objects, strings, arrays of whole numbers.
class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  template <typename Member>
  void object(Member member) {
    expect('{');
    if (take('}')) return;
    do {
      std::string key = string();
      expect(':');
      member(key);
    } while (take(','));
    expect('}');
  }

  std::string string() {
    expect('"');
    std::string result;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        if (at_ == text_.size()) break;
        c = text_[at_++];
        if (c != '"' && c != '\\' && c != '/') fail("an escape that this program does not read");
      }
      result += c;
    }
    expect('"');
    return result;
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> result;
    expect('[');
    if (take(']')) return result;
    do {
      skip();
      int64_t value = 0;
      size_t first = at_;
      for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
        if (at_ - first == 18) fail("a number of more than 18 digits");
        value = 10 * value + (text_[at_] - '0');
      }
      if (at_ == first) fail("no whole number");
      result.push_back(value);
    } while (take(','));
    expect(']');
    return result;
  }

 private:
  void skip() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }
  bool take(char c) {
    skip();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("no '") + c + "'");
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("the header has " + what + " at character " + std::to_string(at_));
  }

  const std::string& text_;
  size_t at_ = 0;
};

inline std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + " can not be opened");
  std::vector<char> bytes(static_cast<size_t>(file.tellg()));
  file.seekg(0);
  if (!bytes.empty() && !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error(path + " can not be read");
  return bytes;
}

inline std::map<std::string, Tensor> read(const std::string& path) {
  std::vector<char> bytes = bytes_of(path);
  uint64_t length = 0;  // little endian, as every machine that this runs on
  if (bytes.size() < sizeof length) throw std::runtime_error(path + " is too short");
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - sizeof length) throw std::runtime_error(path + " is shorter than its header");
  const size_t start = sizeof length + static_cast<size_t>(length), size = bytes.size() - start;
  const std::string header(bytes.data() + sizeof length, static_cast<size_t>(length));
  std::map<std::string, Tensor> tensors;
  Parser parser(header);
  parser.object([&](const std::string& name) {
    if (name == "__metadata__") {
      parser.object([&](const std::string&) { parser.string(); });
      return;
    }
    Tensor& tensor = tensors[name];
    std::vector<int64_t> range;
    parser.object([&](const std::string& key) {
      if (key == "dtype") tensor.dtype = parser.string();
      else if (key == "shape") tensor.shape = parser.numbers();
      else if (key == "data_offsets") range = parser.numbers();
      else throw std::runtime_error(path + ": unknown key " + key);
    });
    uint64_t wanted = width(tensor.dtype);
    for (int64_t n : tensor.shape)
      if (__builtin_mul_overflow(wanted, static_cast<uint64_t>(n), &wanted))
        throw std::runtime_error(path + ": " + name + " is too large");
    if (range.size() != 2 || range[0] > range[1] || static_cast<uint64_t>(range[1]) > size ||
        static_cast<uint64_t>(range[1] - range[0]) != wanted)
      throw std::runtime_error(path + ": the data of " + name + " is not where the header says");
    const char* data = bytes.data() + start;
    tensor.data.assign(data + range[0], data + range[1]);
  });
  return tensors;
}

}  // namespace safetensors
