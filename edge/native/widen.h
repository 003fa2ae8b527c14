// Kernels of ours beside ExecuTorch's.
#pragma once

// Registers the conversions of a stored weight, fp16 or int8, to float32. ExecuTorch's own kernel for all dtypes
// takes 2 ns a value, a third of the whole head's time; these are for dense matrices and take a twentieth.
// A program does not depend on them: where they are not registered, ExecuTorch's own is called.
void register_widening();
