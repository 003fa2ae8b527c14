// See kernels.h.
#include "kernels.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace et = executorch::runtime;

namespace {

using Half = executorch::aten::Half;

void widen_some(const Half* from, float* to, int64_t count) {
#if defined(__aarch64__)
  const auto* halves = reinterpret_cast<const __fp16*>(from);
  for (int64_t index = 0; index < count; ++index) to[index] = halves[index];
#else
  for (int64_t index = 0; index < count; ++index) to[index] = static_cast<float>(from[index]);
#endif
}

void widen_some(const int8_t* from, float* to, int64_t count) {
  for (int64_t index = 0; index < count; ++index) to[index] = static_cast<float>(from[index]);
}

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) void widen_wide(const Half* from, float* to, int64_t count) {
  const int64_t whole = count / 8 * 8;
  for (int64_t index = 0; index < whole; index += 8) {
    _mm256_storeu_ps(to + index, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + index))));
  }
  widen_some(from + whole, to + whole, count - whole);
}

__attribute__((target("avx2"))) void widen_wide(const int8_t* from, float* to, int64_t count) {
  const int64_t whole = count / 8 * 8;
  for (int64_t index = 0; index < whole; index += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + index));
    _mm256_storeu_ps(to + index, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  }
  widen_some(from + whole, to + whole, count - whole);
}

bool has_wide() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}
#endif

// _to_dim_order_copy.out(Tensor self, *, bool non_blocking, int[]? dim_order, Tensor(a!) out)
template <typename Stored>
void widen(et::KernelRuntimeContext& context, et::Span<et::EValue*> arguments) {
  const executorch::aten::Tensor& from = arguments[0]->toTensor();
  executorch::aten::Tensor out = arguments[3]->toTensor();
  const et::Error error = et::resize_tensor(out, from.sizes());
  if (error != et::Error::Ok) {
    context.fail(error);
    return;
  }
#if defined(__x86_64__)
  if (has_wide()) return widen_wide(from.const_data_ptr<Stored>(), out.mutable_data_ptr<float>(), from.numel());
#endif
  widen_some(from.const_data_ptr<Stored>(), out.mutable_data_ptr<float>(), from.numel());
}

et::OpFunction linear_of_executorch = nullptr;
constexpr long kShort = 32;  // an inner dimension below this is left to ExecuTorch: sums of short rows are all overhead

// linear.out(Tensor input, Tensor weight, Tensor? bias, *, Tensor(a!) out)
void linear(et::KernelRuntimeContext& context, et::Span<et::EValue*> arguments) {
  const executorch::aten::Tensor& x = arguments[0]->toTensor();
  const executorch::aten::Tensor& w = arguments[1]->toTensor();
  executorch::aten::Tensor out = arguments[3]->toTensor();
  if (!arguments[2]->isNone() || x.size(1) != w.size(1) || x.size(1) < kShort) {
    return linear_of_executorch(context, arguments);
  }
  const executorch::aten::SizesType sizes[] = {static_cast<executorch::aten::SizesType>(x.size(0)),
                                               static_cast<executorch::aten::SizesType>(w.size(0))};
  const et::Error error = et::resize_tensor(out, {sizes, 2});
  if (error != et::Error::Ok) return context.fail(error);
  multiply_transposed(
      x.const_data_ptr<float>(), w.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(0), x.size(1),
      w.size(0));
}

// mm.out(Tensor self, Tensor mat2, *, Tensor(a!) out)
void mm(et::KernelRuntimeContext& context, et::Span<et::EValue*> arguments) {
  const executorch::aten::Tensor& x = arguments[0]->toTensor();
  const executorch::aten::Tensor& w = arguments[1]->toTensor();
  executorch::aten::Tensor out = arguments[2]->toTensor();
  const executorch::aten::SizesType sizes[] = {static_cast<executorch::aten::SizesType>(x.size(0)),
                                               static_cast<executorch::aten::SizesType>(w.size(1))};
  const et::Error error = x.size(1) == w.size(0) ? et::resize_tensor(out, {sizes, 2}) : et::Error::InvalidArgument;
  if (error != et::Error::Ok) return context.fail(error);
  multiply(
      x.const_data_ptr<float>(), w.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(0), x.size(1),
      w.size(1));
}

// For matrices in row-major order only: dtypes 5 (Half), 1 (Char) and 6 (Float), dimensions in the order 0, 1. The
// result stands twice, as an argument and as what is returned.
constexpr char kHalf[] = "v1/5;0,1|6;0,1|6;0,1", kChar[] = "v1/1;0,1|6;0,1|6;0,1";
constexpr char kTwo[] = "v1/6;0,1|6;0,1|6;0,1|6;0,1";

void add(const char* name, const char* key, et::OpFunction function) {
  // register_kernel() would end the process where a later ExecuTorch has a kernel of its own for these.
  for (const et::Kernel& known : et::get_registered_kernels()) {
    if (known.name_ != nullptr && std::strcmp(known.name_, name) == 0 && known.kernel_key_ == et::KernelKey(key)) return;
  }
  static_cast<void>(et::register_kernel(et::Kernel(name, et::KernelKey(key), function)));
}

} // namespace

void register_kernels_of_ours() {
  add("dim_order_ops::_to_dim_order_copy.out", kHalf, &widen<Half>);
  add("dim_order_ops::_to_dim_order_copy.out", kChar, &widen<int8_t>);
  const auto known = et::get_op_function_from_registry("aten::linear.out");
  if (!known.ok() || !can_multiply()) return;
  linear_of_executorch = *known;
  add("aten::linear.out", kTwo, &linear);
  add("aten::mm.out", kTwo, &mm);
}
