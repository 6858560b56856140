/* The search for nearest words with AVX-512. */

#include "search.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#define LOWBIT_SEARCH lowbit_search_avx512
#include "search_lanes.h"

#else

void lowbit_search_avx512(const lowbit_search_tables *tables, const float *x, int each_shift,
                          int32_t code[2][LOWBIT_LANES]) {
    lowbit_search_portable(tables, x, each_shift, code);
}

#endif
