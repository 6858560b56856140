/* Finds the nearest words of vectors; see search.h. */

#include "search.h"

#include <stddef.h>

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function, void *);

typedef struct {
    const float *x; /* [vectors][LOWBIT_WORD] */
    int32_t *codes; /* [1 + each_shift][vectors] */
    lowbit_search_tables tables;
    int64_t vectors;
    int32_t each_shift, set;
    parallel_for parallel; /* torch_parallel_for, or NULL for one thread */
} lowbit_search_call;

static void search_range(int64_t begin, int64_t end, void *context) {
    static const lowbit_search SEARCHES[] = {
        [LOWBIT_PORTABLE] = lowbit_search_portable, [LOWBIT_AVX2] = lowbit_search_avx2,
        [LOWBIT_AVX512] = lowbit_search_avx512,     [LOWBIT_NEON] = lowbit_search_portable,
        [LOWBIT_VBMI] = lowbit_search_avx512,       [LOWBIT_AMX] = lowbit_search_avx512,
    };
    const lowbit_search_call *call = context;
    for (int64_t b = begin; b < end; b++) {
        float x[LOWBIT_WORD * LOWBIT_LANES];
        int32_t code[2][LOWBIT_LANES];
        int64_t first = b * LOWBIT_LANES, left = call->vectors - first;
        int count = (int)(left < LOWBIT_LANES ? left : LOWBIT_LANES);
        for (int l = 0; l < LOWBIT_LANES; l++) /* lanes that are left over repeat the last vector */
            for (int i = 0; i < LOWBIT_WORD; i++)
                x[i * LOWBIT_LANES + l] =
                    call->x[(first + (l < count ? l : count - 1)) * LOWBIT_WORD + i];
        SEARCHES[call->set](&call->tables, x, call->each_shift, code);
        for (int s = 0; s <= call->each_shift; s++)
            for (int l = 0; l < count; l++) call->codes[s * call->vectors + first + l] = code[s][l];
    }
}

LOWBIT_EXPORT void lowbit_nearest_words(lowbit_search_call *call) {
    int64_t blocks = (call->vectors + LOWBIT_LANES - 1) / LOWBIT_LANES;
    if (call->parallel == NULL || blocks == 1)
        search_range(0, blocks, call);
    else
        call->parallel(0, blocks, 64, search_range, call);
}
