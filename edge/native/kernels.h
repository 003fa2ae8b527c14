// Kernels of ours beside ExecuTorch's, for dense matrices of two dimensions:
//
// - fp16 and int8 to float32: its own kernel, for all dtypes, takes 2 ns a value; these take a twentieth of that.
// - linear and mm in float32: its own reach a third of what the processor can do.
//
// A program does not depend on them. Where they are not registered, ExecuTorch's own are called.
#pragma once

void register_kernels_of_ours();

// out (rows, columns) = x (rows, inner) w^T, w (columns, inner); row-major all.
void multiply_transposed(const float* x, const float* w, float* out, long rows, long inner, long columns);

// out (rows, columns) = x (rows, inner) w, w (inner, columns).
void multiply(const float* x, const float* w, float* out, long rows, long inner, long columns);

// Whether this processor can run the two above.
bool can_multiply();
