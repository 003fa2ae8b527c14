// See widen.h.
#include "widen.h"

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

// For a matrix in row-major order only: dtype 5 (Half) or 1 (Char) to 6 (Float), dimensions in the order 0, 1. The
// result stands twice, as an argument and as what is returned.
const et::Kernel kKernels[] = {
    et::Kernel("dim_order_ops::_to_dim_order_copy.out", et::KernelKey("v1/5;0,1|6;0,1|6;0,1"), &widen<Half>),
    et::Kernel("dim_order_ops::_to_dim_order_copy.out", et::KernelKey("v1/1;0,1|6;0,1|6;0,1"), &widen<int8_t>),
};

} // namespace

void register_widening() {
  for (const et::Kernel& kernel : kKernels) {
    // register_kernels() would end the process where a later ExecuTorch has a kernel of its own for these.
    bool taken = false;
    for (const et::Kernel& known : et::get_registered_kernels()) {
      taken = taken || (known.name_ != nullptr && std::strcmp(known.name_, kernel.name_) == 0 &&
                        known.kernel_key_ == kernel.kernel_key_);
    }
    if (!taken) static_cast<void>(et::register_kernel(kernel));
  }
}
