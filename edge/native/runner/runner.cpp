// What a phone's app would do with a bundle, without Python: forward and backward of every adapter shape and the step
// of AdamW, through the shim, on the bundle's golden vectors. See docs/how-to/phone.md.
//
//     dlora-native-runner BUNDLE
//
// Prints one line a graph and ends with 0 where all are right, 1 where one is wrong, 2 where it could not try.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "dlora_executorch.h"
#include "safetensors.h"

namespace {

struct Kind {
  const char* name;
  std::vector<const char*> inputs, outputs;  // in the order of docs/reference/bundle.md, section Graphs
  double tolerance;                          // that of export is in the manifest; this will do for wide adapters, too
};

const std::vector<Kind> kKinds = {
    {"adapter_forward", {"x", "lora_A", "lora_B", "scale"}, {"z", "delta"}, 5e-6},
    {"adapter_input_grad", {"grad", "lora_A", "lora_B", "scale"}, {"dz", "grad_x"}, 5e-6},
    {"adapter_weight_grad", {"x", "z", "grad", "dz", "scale"}, {"grad_A", "grad_B"}, 5e-6},
    {"core_forward", {"z", "core", "scale"}, {"out"}, 5e-6},
    {"core_input_grad", {"grad", "core", "scale"}, {"dz"}, 5e-6},
    {"core_weight_grad", {"z", "grad", "scale"}, {"grad_core"}, 5e-6},
    {"adamw",
     {"param", "grad", "exp_avg", "exp_avg_sq", "decay", "beta1", "beta2", "step_size", "sqrt_bias_correction2", "eps"},
     {"new_param", "new_exp_avg", "new_exp_avg_sq"},
     2e-7},
};

dlora_et_tensor tensor_of(const Stored& stored, std::vector<float>& values) {
  dlora_et_tensor tensor = {values.data(), DLORA_ET_FP32, static_cast<int32_t>(stored.shape.size()), {}};
  if (stored.shape.size() > DLORA_ET_MAX_DIMS) throw std::runtime_error("a tensor of too many dimensions");
  std::copy(stored.shape.begin(), stored.shape.end(), tensor.sizes);
  return tensor;
}

// Largest difference relative to the largest magnitude that was wanted.
double relative_error(const std::vector<float>& found, const std::vector<float>& wanted) {
  double difference = 0, scale = 1e-30;
  for (size_t index = 0; index < wanted.size(); ++index) {
    const double off = std::fabs(static_cast<double>(found[index]) - wanted[index]);
    difference = off <= difference ? difference : off;  // a NaN stays
    scale = std::max(scale, std::fabs(static_cast<double>(wanted[index])));
  }
  return difference / scale;
}

// Run one graph on its golden inputs; whether its outputs are the golden ones.
bool check(const std::string& bundle, const Safetensors& golden, const Kind& kind, const std::string& stem) {
  // Where the exporter puts it. An app finds it through manifest.json, and checks its digest.
  const std::string path = bundle + "/graphs/" + stem + ".pte";
  char message[400];
  dlora_et_program* program = nullptr;
  if (dlora_et_load(path.c_str(), &program, message, sizeof message) != DLORA_ET_OK) {
    throw std::runtime_error(path + ": " + message);
  }
  std::vector<std::vector<float>> values, found, wanted;
  std::vector<dlora_et_tensor> inputs, outputs;
  // Reserved: tensors point into the vectors.
  values.reserve(kind.inputs.size());
  found.reserve(kind.outputs.size());
  for (const char* name : kind.inputs) {
    const std::string key = stem + ".in." + name;
    values.push_back(golden.floats(key));
    inputs.push_back(tensor_of(golden.tensors().at(key), values.back()));
  }
  for (const char* name : kind.outputs) {
    const std::string key = stem + ".out." + name;
    wanted.push_back(golden.floats(key));
    found.emplace_back(wanted.back().size());
    outputs.push_back(tensor_of(golden.tensors().at(key), found.back()));
  }
  const int32_t status = dlora_et_run(
      program, inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
      static_cast<int32_t>(outputs.size()), message, sizeof message);
  dlora_et_free(program);
  if (status != DLORA_ET_OK) throw std::runtime_error(path + ": " + message);
  double error = 0;
  for (size_t index = 0; index < wanted.size(); ++index) {
    const double one = relative_error(found[index], wanted[index]);
    error = one <= error ? error : one;
  }
  // Twice the tolerance of export: another processor rounds otherwise.
  const bool right = error <= 2 * kind.tolerance;
  std::printf("%-32s error %.1e  allowed %.1e  %s\n", stem.c_str(), error, 2 * kind.tolerance, right ? "ok" : "WRONG");
  return right;
}

} // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s BUNDLE\n", arguments[0]);
    return 2;
  }
  try {
    if (dlora_et_abi() != DLORA_ET_ABI) throw std::runtime_error("the shim is of another dlora");
    const std::string bundle = arguments[1];
    const Safetensors golden(bundle + "/golden.safetensors");
    int graphs = 0, wrong = 0;
    for (const Kind& kind : kKinds) {
      // "adapter_forward.576x192.in.x" is of the graph "adapter_forward.576x192".
      std::set<std::string> stems;
      for (const auto& [name, stored] : golden.tensors()) {
        const size_t end = name.find(".in.");
        const std::string stem = name.substr(0, end);
        if (end != std::string::npos && stem.substr(0, stem.find('.')) == kind.name) stems.insert(stem);
      }
      if (stems.empty()) throw std::runtime_error(std::string("no golden vectors of ") + kind.name);
      for (const std::string& stem : stems) {
        ++graphs;
        wrong += check(bundle, golden, kind, stem) ? 0 : 1;
      }
    }
    std::printf("ExecuTorch %s: %d of %d graphs are right\n", dlora_et_version(), graphs - wrong, graphs);
    return wrong == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
