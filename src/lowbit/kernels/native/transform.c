/* Runs the transforms of transform.h on torch's threads, and has them in plain C. */

#include <stdint.h>

static int64_t short_steps(float *values, int64_t n, int64_t power) {
    (void)values, (void)n, (void)power;
    return 1;
}

#define LOWBIT_TRANSFORM lowbit_transform_portable
#include "transform.h"

#include <stdlib.h>

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function, void *);

enum { TOKENS_FOR_THREADS = 8 };

typedef struct {
    const lowbit_transform_call *call;
    lowbit_transform_range range;
    int32_t failed;
} work;

static lowbit_transform_range range_of(int32_t set) {
    switch (set) {
    case LOWBIT_AVX2: return lowbit_transform_avx2;
    case LOWBIT_AVX512:
    case LOWBIT_VBMI:
    case LOWBIT_AMX: return lowbit_transform_avx512;
    default: return lowbit_transform_portable;
    }
}

static void transform_range(int64_t begin, int64_t end, void *context) {
    work *w = context;
    float *spare = w->call->matrix ? malloc((size_t)w->call->n * sizeof(float)) : NULL;
    if (w->call->matrix && spare == NULL) {
        w->failed = 1;
        return;
    }
    w->range(w->call, begin, end, spare);
    free(spare);
}

/* Transforms with an instruction set. parallel: torch_parallel_for, or NULL for one thread. Returns 0,
 * or 1 if there is not enough memory. */
LOWBIT_EXPORT int32_t lowbit_transform(const lowbit_transform_call *call, int32_t set,
                                       parallel_for parallel) {
    work w = {call, range_of(set), 0};
    if (parallel == NULL || call->tokens <= TOKENS_FOR_THREADS)
        transform_range(0, call->tokens, &w);
    else
        parallel(0, call->tokens, TOKENS_FOR_THREADS, transform_range, &w);
    return w.failed;
}
