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
    const float *x;
    float *y;
    lowbit_transform_tokens tokens;
    int32_t failed;
} work;

static lowbit_transform_tokens of_set(int32_t set) {
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
    int64_t n = w->call->n;
    float *spare = w->call->matrix ? malloc((size_t)n * sizeof(float)) : NULL;
    if (w->call->matrix && spare == NULL) {
        w->failed = 1;
        return;
    }
    w->tokens(w->call, w->x + begin * n, w->y + begin * n, end - begin, spare);
    free(spare);
}

/* Transforms tokens, x to y, with an instruction set. parallel: torch_parallel_for, or NULL for one
 * thread. Returns 0, or 1 if there is not enough memory. */
LOWBIT_EXPORT int32_t lowbit_transform(const lowbit_transform_call *call, const float *x, float *y,
                                       int64_t tokens, int32_t set, parallel_for parallel) {
    work w = {call, x, y, of_set(set), 0};
    if (parallel == NULL || tokens <= TOKENS_FOR_THREADS)
        transform_range(0, tokens, &w);
    else
        parallel(0, tokens, TOKENS_FOR_THREADS, transform_range, &w);
    return w.failed;
}
