// Matrix products in float32 for ExecuTorch's linear and mm: see kernels.h.
//
// Both keep a tile of the result in registers, 3 by 4 or 6 by 16, and read both matrices where they lie. With a weight
// that is used for 32 rows, copying it into another order first, as large libraries do, would cost more than it brings.
// Vectors of eight floats are the compiler's: one AVX register on x86_64, two NEON registers on aarch64.
#include "kernels.h"

#include <algorithm>
#include <cstring>

namespace {

using V8 = float __attribute__((vector_size(32)));
using V4 = float __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE void load(V8& to, const float* from) { __builtin_memcpy(&to, from, sizeof to); }

// The sums of four vectors, in order.
INLINE void sums(const V8 from[4], float* to) {
  V4 half[4];
  for (int index = 0; index < 4; ++index) {
    half[index] = __builtin_shufflevector(from[index], from[index], 0, 1, 2, 3) +
                  __builtin_shufflevector(from[index], from[index], 4, 5, 6, 7);
  }
  const V4 ab = __builtin_shufflevector(half[0], half[1], 0, 4, 1, 5) + __builtin_shufflevector(half[0], half[1], 2, 6, 3, 7);
  const V4 cd = __builtin_shufflevector(half[2], half[3], 0, 4, 1, 5) + __builtin_shufflevector(half[2], half[3], 2, 6, 3, 7);
  const V4 all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  __builtin_memcpy(to, &all, sizeof all);
}

// ROWS rows of x by four of w, and the tail of the inner dimension that makes no whole vector.
template <int ROWS>
INLINE void dots(const float* x, const float* w, float* out, long inner, long columns) {
  V8 total[ROWS][4] = {};
  long k = 0;
  for (; k + 8 <= inner; k += 8) {
    V8 left[ROWS];
    for (int row = 0; row < ROWS; ++row) load(left[row], x + row * inner + k);
    for (int column = 0; column < 4; ++column) {
      V8 right;
      load(right, w + column * inner + k);
      for (int row = 0; row < ROWS; ++row) total[row][column] += left[row] * right;
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    float found[4];
    sums(total[row], found);
    for (long rest = k; rest < inner; ++rest) {
      for (int column = 0; column < 4; ++column) found[column] += x[row * inner + rest] * w[column * inner + rest];
    }
    __builtin_memcpy(out + row * columns, found, sizeof found);
  }
}

INLINE void times_transposed(const float* x, const float* w, float* out, long rows, long inner, long columns) {
  long column = 0;
  for (; column + 4 <= columns; column += 4) {  // these four stay in the first cache while all of x passes by
    const float* some = w + column * inner;
    long row = 0;
    for (; row + 3 <= rows; row += 3) dots<3>(x + row * inner, some, out + row * columns + column, inner, columns);
    if (rows - row == 2) dots<2>(x + row * inner, some, out + row * columns + column, inner, columns);
    if (rows - row == 1) dots<1>(x + row * inner, some, out + row * columns + column, inner, columns);
  }
  for (; column < columns; ++column) {
    for (long row = 0; row < rows; ++row) {
      float total = 0;
      for (long k = 0; k < inner; ++k) total += x[row * inner + k] * w[column * inner + k];
      out[row * columns + column] = total;
    }
  }
}

// ROWS rows of x by WIDTH vectors of columns of w, over `inner` of the inner dimension, added to out or put there.
template <int ROWS, int WIDTH>
INLINE void outers(const float* x, const float* w, float* out, long inner, long stride, long columns, bool add) {
  V8 total[ROWS][WIDTH] = {};
  for (long k = 0; k < inner; ++k) {
    V8 right[WIDTH];
    for (int part = 0; part < WIDTH; ++part) load(right[part], w + k * columns + part * 8);
    for (int row = 0; row < ROWS; ++row) {
      const float left = x[row * stride + k];
      for (int part = 0; part < WIDTH; ++part) total[row][part] += left * right[part];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int part = 0; part < WIDTH; ++part) {
      float* place = out + row * columns + part * 8;
      V8 before = {};
      if (add) load(before, place);
      before += total[row][part];
      __builtin_memcpy(place, &before, sizeof before);
    }
  }
}

template <int WIDTH>
INLINE void outer_rows(
    const float* x, const float* w, float* out, long rows, long inner, long stride, long columns, bool add) {
  long row = 0;
  for (; row + 6 <= rows; row += 6) {
    outers<6, WIDTH>(x + row * stride, w, out + row * columns, inner, stride, columns, add);
  }
  const float* last = x + row * stride;
  float* place = out + row * columns;
  switch (rows - row) {
    case 5: return outers<5, WIDTH>(last, w, place, inner, stride, columns, add);
    case 4: return outers<4, WIDTH>(last, w, place, inner, stride, columns, add);
    case 3: return outers<3, WIDTH>(last, w, place, inner, stride, columns, add);
    case 2: return outers<2, WIDTH>(last, w, place, inner, stride, columns, add);
    case 1: return outers<1, WIDTH>(last, w, place, inner, stride, columns, add);
  }
}

constexpr long kInner = 256;  // rows of w at once: what they hold of a model's width stays in the second cache

INLINE void times(const float* x, const float* w, float* out, long rows, long inner, long columns) {
  for (long k = 0; k < inner; k += kInner) {
    const long depth = std::min(kInner, inner - k);
    const float* left = x + k;
    const float* right = w + k * columns;
    const bool add = k > 0;
    long column = 0;
    for (; column + 16 <= columns; column += 16) {
      outer_rows<2>(left, right + column, out + column, rows, depth, inner, columns, add);
    }
    for (; column + 8 <= columns; column += 8) {
      outer_rows<1>(left, right + column, out + column, rows, depth, inner, columns, add);
    }
    for (; column < columns; ++column) {
      for (long row = 0; row < rows; ++row) {
        float total = add ? out[row * columns + column] : 0;
        for (long step = 0; step < depth; ++step) total += left[row * inner + step] * right[step * columns + column];
        out[row * columns + column] = total;
      }
    }
  }
}

} // namespace

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void multiply_transposed(
    const float* x, const float* w, float* out, long rows, long inner, long columns) {
  times_transposed(x, w, out, rows, inner, columns);
}

__attribute__((target("avx2,fma"))) void multiply(
    const float* x, const float* w, float* out, long rows, long inner, long columns) {
  times(x, w, out, rows, inner, columns);
}

bool can_multiply() {
  static const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return can;
}
#else
void multiply_transposed(const float* x, const float* w, float* out, long rows, long inner, long columns) {
  times_transposed(x, w, out, rows, inner, columns);
}

void multiply(const float* x, const float* w, float* out, long rows, long inner, long columns) {
  times(x, w, out, rows, inner, columns);
}

bool can_multiply() { return true; }
#endif
