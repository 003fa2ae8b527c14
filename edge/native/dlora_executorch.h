/* ExecuTorch programs behind a C ABI: load, describe, run. What calls it is edge/engine/executorch_engine.py and runner/.
 *
 * - Every function that can fail returns a dlora_et_status, and writes one line about it into `message` (always
 *   ended with a zero, cut to `capacity` bytes; it may be NULL). No exception leaves this library.
 * - A program may be used by several threads: its runs wait for one another. Free it when none is running.
 * - Tensors are dense, row-major, and the caller's: inputs are read where they lie, outputs are written where the
 *   caller wants them. Nothing of either is copied, and nothing is kept after the call.
 */
#ifndef DLORA_EXECUTORCH_H
#define DLORA_EXECUTORCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DLORA_ET_API __attribute__((visibility("default")))

/* Raised by any change to this file that a caller built before it would notice. */
#define DLORA_ET_ABI 1
#define DLORA_ET_MAX_DIMS 4

typedef enum {
  DLORA_ET_OK = 0,
  DLORA_ET_UNREADABLE = 1,   /* the file cannot be read */
  DLORA_ET_DAMAGED = 2,      /* it is no program, or not whole */
  DLORA_ET_INCOMPATIBLE = 3, /* it needs what this version of ExecuTorch does not have */
  DLORA_ET_ARGUMENT = 4,     /* number, dtype or shape of the tensors is not the program's, or beyond its bounds */
  DLORA_ET_MEMORY = 5,       /* no memory */
  DLORA_ET_FAILED = 6        /* anything else */
} dlora_et_status;

typedef enum {
  DLORA_ET_FP32 = 0,
  DLORA_ET_FP16 = 1,
  DLORA_ET_INT8 = 2,
  DLORA_ET_INT64 = 3,
  DLORA_ET_OTHER = -1
} dlora_et_dtype;

/* A tensor of the caller, or, from dlora_et_describe, what a program wants: `data` is NULL then, and a dynamic
 * dimension has its upper bound. */
typedef struct {
  void *data;
  int32_t dtype; /* dlora_et_dtype */
  int32_t dims;
  int64_t sizes[DLORA_ET_MAX_DIMS];
} dlora_et_tensor;

typedef struct dlora_et_program dlora_et_program;

/* DLORA_ET_ABI of the library, to be compared before anything else is called. */
DLORA_ET_API int32_t dlora_et_abi(void);

/* The version of ExecuTorch that it was built with: "1.5.1". */
DLORA_ET_API const char *dlora_et_version(void);

/* Threads of all programs together, from 1; 0: one for each core. Not while a program runs. */
DLORA_ET_API int32_t dlora_et_set_threads(int32_t threads, char *message, size_t capacity);

/* Load the program of a .pte file and its method "forward". */
DLORA_ET_API int32_t dlora_et_load(const char *path, dlora_et_program **program, char *message, size_t capacity);

DLORA_ET_API void dlora_et_free(dlora_et_program *program);

DLORA_ET_API int32_t dlora_et_count(const dlora_et_program *program, int32_t *inputs, int32_t *outputs);

/* Describe the input (output == 0) or output of that index. */
DLORA_ET_API int32_t dlora_et_describe(
    const dlora_et_program *program, int32_t output, int32_t index, dlora_et_tensor *tensor);

/* Run once. `outputs` have the shapes that the caller expects, and memory for them. */
DLORA_ET_API int32_t dlora_et_run(
    dlora_et_program *program, const dlora_et_tensor *inputs, int32_t input_count, const dlora_et_tensor *outputs,
    int32_t output_count, char *message, size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
