/* The search for nearest words with AVX2. */

#include "search.h"

#if defined(__AVX2__)

#define LOWBIT_SEARCH lowbit_search_avx2
#include "search_lanes.h"

#else

void lowbit_search_avx2(const lowbit_search_tables *tables, const float *x, int each_shift,
                        int32_t code[2][LOWBIT_LANES]) {
    lowbit_search_portable(tables, x, each_shift, code);
}

#endif
