// See dlora_executorch.h. Built by build.py against the headers and libraries of the executorch wheel.
#include "dlora_executorch.h"

#include "kernels.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <array>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::extension::MmapDataLoader;

// The wheel ships the thread pool but no header of it. These declarations are its exported names.
namespace executorch::extension::threadpool {
class ThreadPool final {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

extern "C" {
struct pthreadpool;
void pthreadpool_parallelize_1d(struct pthreadpool*, void (*)(void*, size_t), void*, size_t, uint32_t);
size_t pthreadpool_get_threads_count(struct pthreadpool*);
}
namespace executorch::extension::threadpool {
struct ::pthreadpool* get_pthreadpool();
}

namespace {

constexpr char kMethod[] = "forward";
constexpr uint32_t kYieldWorkers = 2;  // PTHREADPOOL_FLAG_YIELD_WORKERS

// What ExecuTorch last complained of in this thread: its error codes alone say little.
thread_local char complaint[256];

void remember(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* text, size_t) {
  if (level == kError || level == kFatal) std::snprintf(complaint, sizeof complaint, "%s", text);
}

// Where ExecuTorch finds in the middle of a run that a program is not sound, it ends the process. A program is a file of
// somebody else's: it is to be an error, and is never run again. In a worker thread nobody catches it, and it ends the
// process all the same.
struct Unsound : std::exception {
  const char* what() const noexcept override { return "the program is not sound"; }
};

void give_up() { throw Unsound(); }

void start_runtime() {
  // Not std::call_once: that asks for glibc 2.34, where all else here runs on 2.28.
  [[maybe_unused]] static const bool started = [] {
    et::register_pal(et::PalImpl::create(
        nullptr, &give_up, nullptr, nullptr, &remember, nullptr, nullptr, __FILE__));
    et::runtime_init();
    register_kernels_of_ours();
    return true;
  }();
}

int32_t status_of(et::Error error) {
  switch (error) {
    case et::Error::Ok:
      return DLORA_ET_OK;
    case et::Error::InvalidProgram:
    case et::Error::InvalidExternalData:
      return DLORA_ET_DAMAGED;
    case et::Error::OperatorMissing:
    case et::Error::NotSupported:
    case et::Error::NotImplemented:
    case et::Error::DelegateInvalidCompatibility:
      return DLORA_ET_INCOMPATIBLE;
    case et::Error::AccessFailed:
      return DLORA_ET_UNREADABLE;
    case et::Error::MemoryAllocationFailed:
    case et::Error::OutOfResources:
    case et::Error::DelegateMemoryAllocationFailed:
      return DLORA_ET_MEMORY;
    case et::Error::InvalidArgument:
    case et::Error::InvalidType:
      return DLORA_ET_ARGUMENT;
    default:
      return DLORA_ET_FAILED;
  }
}

int32_t fail(int32_t status, const char* what, char* message, size_t capacity) {
  if (message != nullptr && capacity > 0) {
    std::snprintf(message, capacity, complaint[0] ? "%s: %s" : "%s", what, complaint);
  }
  return status;
}

int32_t fail(et::Error error, const char* what, char* message, size_t capacity) {
  char text[128];
  std::snprintf(text, sizeof text, "%s (%s)", what, et::to_string(error) + sizeof "Error::" - 1);
  return fail(status_of(error), text, message, capacity);
}

// Runs `work`, which returns a status, and lets no exception out.
template <typename Work>
int32_t guarded(char* message, size_t capacity, Work work) noexcept {
  complaint[0] = '\0';
  if (message != nullptr && capacity > 0) message[0] = '\0';
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return fail(DLORA_ET_MEMORY, "out of memory", message, capacity);
  } catch (const std::exception& error) {
    return fail(DLORA_ET_FAILED, error.what(), message, capacity);
  } catch (...) {
    return fail(DLORA_ET_FAILED, "an unknown exception", message, capacity);
  }
}

constexpr std::array<ScalarType, 4> kTypes = {ScalarType::Float, ScalarType::Half, ScalarType::Char, ScalarType::Long};

int32_t dtype_of(ScalarType type) {
  for (size_t index = 0; index < kTypes.size(); ++index) {
    if (kTypes[index] == type) return static_cast<int32_t>(index);
  }
  return DLORA_ET_OTHER;
}

// ExecuTorch's view of a caller's tensor; it must not move while in use.
class View {
 public:
  View(const dlora_et_tensor& tensor)
      : sizes_{}, order_{}, strides_{}, impl_(make(tensor)) {}
  View(const View&) = delete;
  executorch::aten::Tensor tensor() { return executorch::aten::Tensor(&impl_); }

 private:
  executorch::aten::TensorImpl make(const dlora_et_tensor& tensor) {
    int32_t stride = 1;
    for (int32_t dim = tensor.dims - 1; dim >= 0; --dim) {
      sizes_[dim] = static_cast<int32_t>(tensor.sizes[dim]);
      order_[dim] = static_cast<uint8_t>(dim);
      strides_[dim] = stride;
      stride *= sizes_[dim];
    }
    return executorch::aten::TensorImpl(
        kTypes[tensor.dtype], tensor.dims, sizes_, tensor.data, order_, strides_,
        executorch::aten::TensorShapeDynamism::STATIC);
  }

  executorch::aten::SizesType sizes_[DLORA_ET_MAX_DIMS];
  executorch::aten::DimOrderType order_[DLORA_ET_MAX_DIMS];
  executorch::aten::StridesType strides_[DLORA_ET_MAX_DIMS];
  executorch::aten::TensorImpl impl_;
};

bool is_sound(const dlora_et_tensor& tensor) {
  if (tensor.dims < 0 || tensor.dims > DLORA_ET_MAX_DIMS) return false;
  if (tensor.dtype < 0 || tensor.dtype >= static_cast<int32_t>(kTypes.size())) return false;
  int64_t numbers = 1;
  for (int32_t dim = 0; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] < 1 || tensor.sizes[dim] > INT32_MAX / numbers) return false;
    numbers *= tensor.sizes[dim];
  }
  return tensor.data != nullptr;
}

void do_nothing(void*, size_t) {}

// Idle workers spin for milliseconds before they sleep, and the server may share these cores. What they do is
// what the last job asked for.
void let_workers_sleep() {
  auto* pool = executorch::extension::threadpool::get_pthreadpool();
  if (pool == nullptr) return;
  const size_t threads = pthreadpool_get_threads_count(pool);
  if (threads > 1) pthreadpool_parallelize_1d(pool, &do_nothing, nullptr, threads, kYieldWorkers);
}

} // namespace

struct dlora_et_program {
  std::optional<MmapDataLoader> loader;
  std::optional<et::Program> program;
  std::vector<std::unique_ptr<uint8_t[]>> arenas;
  std::vector<et::Span<uint8_t>> spans;
  std::unique_ptr<et::HierarchicalAllocator> planned;
  std::unique_ptr<et::MemoryAllocator> allocator;
  std::unique_ptr<et::MemoryAllocator> temporary;
  std::unique_ptr<et::MemoryManager> memory;
  std::optional<et::Method> method;
  std::mutex running;
};

namespace {

// malloc behind ExecuTorch's interface: what it allocates lives as long as the allocator, or until reset().
class Malloc : public et::MemoryAllocator {
 public:
  Malloc() : et::MemoryAllocator(0, nullptr) {}
  ~Malloc() override { reset(); }

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) return nullptr;
    if (alignment < alignof(std::max_align_t)) alignment = alignof(std::max_align_t);
    void* block = nullptr;
    if (posix_memalign(&block, alignment, size == 0 ? alignment : size) != 0) return nullptr;
    try {
      blocks_.push_back(block);
    } catch (...) {
      std::free(block);
      return nullptr;
    }
    return block;
  }

  void reset() override {
    for (void* block : blocks_) std::free(block);
    blocks_.clear();
  }

 private:
  std::vector<void*> blocks_;
};

int32_t load(const char* path, dlora_et_program& made, char* message, size_t capacity) {
  auto loader = MmapDataLoader::from(path, MmapDataLoader::MlockConfig::NoMlock);
  if (!loader.ok()) return fail(DLORA_ET_UNREADABLE, "the file cannot be read", message, capacity);
  made.loader.emplace(std::move(*loader));
  auto program = et::Program::load(&*made.loader, et::Program::Verification::InternalConsistency);
  if (!program.ok()) return fail(DLORA_ET_DAMAGED, "not an ExecuTorch program", message, capacity);
  made.program.emplace(std::move(*program));
  auto meta = made.program->method_meta(kMethod);
  if (!meta.ok()) return fail(DLORA_ET_DAMAGED, "the program has no method forward", message, capacity);
  for (size_t index = 0; index < meta->num_memory_planned_buffers(); ++index) {
    auto size = meta->memory_planned_buffer_size(index);
    if (!size.ok() || *size < 0) return fail(DLORA_ET_DAMAGED, "a buffer has no size", message, capacity);
    // Not zeroed: pages that a run never touches are never resident, however large the bounds are.
    made.arenas.emplace_back(new uint8_t[static_cast<size_t>(*size)]);
    made.spans.emplace_back(made.arenas.back().get(), static_cast<size_t>(*size));
  }
  made.planned = std::make_unique<et::HierarchicalAllocator>(
      et::Span<et::Span<uint8_t>>(made.spans.data(), made.spans.size()));
  made.allocator = std::make_unique<Malloc>();
  made.temporary = std::make_unique<Malloc>();
  made.memory = std::make_unique<et::MemoryManager>(made.allocator.get(), made.planned.get(), made.temporary.get());
  auto method = made.program->load_method(kMethod, made.memory.get());
  if (!method.ok()) return fail(method.error(), "the program does not load", message, capacity);
  made.method.emplace(std::move(*method));
  return DLORA_ET_OK;
}

int32_t run(
    dlora_et_program& program, const dlora_et_tensor* inputs, int32_t input_count, const dlora_et_tensor* outputs,
    int32_t output_count, char* message, size_t capacity) {
  et::Method& method = *program.method;
  if (input_count < 0 || output_count < 0 || static_cast<size_t>(input_count) != method.inputs_size() ||
      static_cast<size_t>(output_count) != method.outputs_size()) {
    return fail(DLORA_ET_ARGUMENT, "the number of tensors is not the program's", message, capacity);
  }
  for (int32_t index = 0; index < input_count; ++index) {
    if (!is_sound(inputs[index])) return fail(DLORA_ET_ARGUMENT, "an input is malformed", message, capacity);
    View view(inputs[index]);
    const auto error = method.set_input(et::EValue(view.tensor()), static_cast<size_t>(index));
    if (error != et::Error::Ok) return fail(error, "an input does not fit", message, capacity);
  }
  for (int32_t index = 0; index < output_count; ++index) {
    const dlora_et_tensor& wanted = outputs[index];
    const et::EValue& value = method.get_output(static_cast<size_t>(index));
    if (!is_sound(wanted) || !value.isTensor() || value.toTensor().scalar_type() != kTypes[wanted.dtype]) {
      return fail(DLORA_ET_ARGUMENT, "an output is malformed", message, capacity);
    }
    executorch::aten::SizesType sizes[DLORA_ET_MAX_DIMS];
    for (int32_t dim = 0; dim < wanted.dims; ++dim) sizes[dim] = static_cast<int32_t>(wanted.sizes[dim]);
    executorch::aten::Tensor tensor = value.toTensor();
    auto error = et::resize_tensor(tensor, {sizes, static_cast<size_t>(wanted.dims)});
    if (error != et::Error::Ok) return fail(error, "an output does not fit", message, capacity);
    error = method.set_output_data_ptr(wanted.data, tensor.nbytes(), static_cast<size_t>(index));
    if (error != et::Error::Ok) return fail(error, "an output has no place", message, capacity);
  }
  const auto error = method.execute();
  if (error != et::Error::Ok) return fail(error, "the program failed", message, capacity);
  for (int32_t index = 0; index < output_count; ++index) {
    const executorch::aten::Tensor tensor = method.get_output(static_cast<size_t>(index)).toTensor();
    bool as_wanted = tensor.dim() == outputs[index].dims && tensor.const_data_ptr() == outputs[index].data;
    for (int32_t dim = 0; as_wanted && dim < outputs[index].dims; ++dim) {
      as_wanted = tensor.size(dim) == outputs[index].sizes[dim];
    }
    if (!as_wanted) return fail(DLORA_ET_FAILED, "an output has another shape than expected", message, capacity);
  }
  return DLORA_ET_OK;
}

} // namespace

extern "C" {

int32_t dlora_et_abi(void) { return DLORA_ET_ABI; }

const char* dlora_et_version(void) { return DLORA_EXECUTORCH_VERSION; }

int32_t dlora_et_set_threads(int32_t threads, char* message, size_t capacity) {
  return guarded(message, capacity, [&] {
    start_runtime();
    if (threads < 0) return fail(DLORA_ET_ARGUMENT, "threads below 0", message, capacity);
    const uint32_t wanted = threads > 0 ? static_cast<uint32_t>(threads) : std::thread::hardware_concurrency();
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool == nullptr || !pool->_unsafe_reset_threadpool(wanted > 0 ? wanted : 1)) {
      return fail(DLORA_ET_FAILED, "the thread pool does not take that many threads", message, capacity);
    }
    return static_cast<int32_t>(DLORA_ET_OK);
  });
}

int32_t dlora_et_load(const char* path, dlora_et_program** program, char* message, size_t capacity) {
  return guarded(message, capacity, [&] {
    start_runtime();
    *program = nullptr;
    auto made = std::make_unique<dlora_et_program>();
    const int32_t status = load(path, *made, message, capacity);
    if (status == DLORA_ET_OK) *program = made.release();
    return status;
  });
}

void dlora_et_free(dlora_et_program* program) { delete program; }

int32_t dlora_et_count(const dlora_et_program* program, int32_t* inputs, int32_t* outputs) {
  *inputs = static_cast<int32_t>(program->method->inputs_size());
  *outputs = static_cast<int32_t>(program->method->outputs_size());
  return DLORA_ET_OK;
}

int32_t dlora_et_describe(
    const dlora_et_program* program, int32_t output, int32_t index, dlora_et_tensor* tensor) {
  return guarded(nullptr, 0, [&] {
    const et::MethodMeta meta = program->method->method_meta();
    const auto number = static_cast<size_t>(index);
    const auto info = output != 0 ? meta.output_tensor_meta(number) : meta.input_tensor_meta(number);
    if (!info.ok() || info->sizes().size() > DLORA_ET_MAX_DIMS) return static_cast<int32_t>(DLORA_ET_ARGUMENT);
    *tensor = {nullptr, dtype_of(info->scalar_type()), static_cast<int32_t>(info->sizes().size()), {}};
    for (size_t dim = 0; dim < info->sizes().size(); ++dim) tensor->sizes[dim] = info->sizes()[dim];
    return static_cast<int32_t>(DLORA_ET_OK);
  });
}

int32_t dlora_et_run(
    dlora_et_program* program, const dlora_et_tensor* inputs, int32_t input_count, const dlora_et_tensor* outputs,
    int32_t output_count, char* message, size_t capacity) {
  return guarded(message, capacity, [&] {
    const std::lock_guard<std::mutex> lock(program->running);
    const int32_t status = run(*program, inputs, input_count, outputs, output_count, message, capacity);
    program->temporary->reset();
    let_workers_sleep();
    return status;
  });
}

} // extern "C"
