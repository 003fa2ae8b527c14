// Reads a .safetensors file of numbers into memory: an 8-byte length, a JSON header, the data.
// https://github.com/huggingface/safetensors, section Format. Only what dlora-export writes is understood.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Stored {
  std::string dtype;  // "F32", "I64", …
  std::vector<int64_t> shape;
  size_t begin = 0, end = 0;  // in the data
};

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    uint64_t length = 0;
    if (!file.read(reinterpret_cast<char*>(&length), sizeof length) || length > (64u << 20)) fail(path);
    header_.resize(length);
    if (!file.read(header_.data(), static_cast<std::streamsize>(length))) fail(path);
    data_.assign(std::istreambuf_iterator<char>(file), {});
    try {
      parse();
    } catch (const std::out_of_range&) {
      fail(path);
    }
    for (const auto& [name, stored] : tensors_) {
      if (stored.begin > stored.end || stored.end > data_.size()) fail(path);
    }
  }

  const std::map<std::string, Stored>& tensors() const { return tensors_; }
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // The numbers of a tensor, aligned for them.
  std::vector<float> floats(const std::string& name) const {
    const Stored& stored = tensors_.at(name);
    if (stored.dtype != "F32") throw std::runtime_error(name + " is not float32");
    std::vector<float> values((stored.end - stored.begin) / sizeof(float));
    std::memcpy(values.data(), data_.data() + stored.begin, values.size() * sizeof(float));
    return values;
  }

 private:
  [[noreturn]] static void fail(const std::string& path) { throw std::runtime_error(path + " is no safetensors file"); }

  void skip() {
    while (std::strchr(" \t\r\n,:", header_.at(at_)) != nullptr) ++at_;
  }

  std::string text() {
    skip();
    if (header_.at(at_) != '"') throw std::out_of_range("text");
    const size_t start = ++at_;
    while (header_.at(at_) != '"') ++at_;  // names have no escapes
    return header_.substr(start, at_++ - start);
  }

  std::vector<int64_t> numbers() {
    skip();
    if (header_.at(at_++) != '[') throw std::out_of_range("numbers");
    std::vector<int64_t> found;
    for (skip(); header_.at(at_) != ']'; skip()) {
      size_t used = 0;
      try {
        found.push_back(std::stoll(header_.substr(at_, 20), &used));
      } catch (const std::invalid_argument&) {
        throw std::out_of_range("number");
      }
      at_ += used;
    }
    ++at_;
    return found;
  }

  void parse() {
    for (at_ = header_.find('{') + 1, skip(); header_.at(at_) != '}'; skip()) {
      const std::string name = text();
      Stored stored;
      bool tensor = false;
      skip();
      if (header_.at(at_++) != '{') throw std::out_of_range("tensor");
      for (skip(); header_.at(at_) != '}'; skip()) {
        const std::string field = text();
        if (field == "shape") {
          stored.shape = numbers();
        } else if (field == "data_offsets") {
          const std::vector<int64_t> offsets = numbers();
          stored.begin = static_cast<size_t>(offsets.at(0));
          stored.end = static_cast<size_t>(offsets.at(1));
          tensor = true;
        } else {
          const std::string value = text();
          if (field == "dtype") stored.dtype = value;
        }
      }
      ++at_;
      if (tensor) tensors_[name] = stored;
    }
  }

  std::string header_;
  std::string data_;
  std::map<std::string, Stored> tensors_;
  size_t at_ = 0;
};
