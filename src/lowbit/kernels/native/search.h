/* The search for the nearest word of the codebook E8P12: what its files share.
 *
 * formats/lattice/search.py describes the search and is its definition. LOWBIT_LANES vectors are
 * searched at once, each number by the same float operations in the same order as there, so that
 * all files give equal codes. */
#ifndef LOWBIT_SEARCH_H
#define LOWBIT_SEARCH_H

#include "lowbit_kernels.h"

#define LOWBIT_LANES 32 /* of loops of 16 the compiler makes no vector instructions */
#define LOWBIT_WORD 8    /* coordinates of a word */
#define LOWBIT_TRIPLES 29

typedef struct {
    const int32_t *triples; /* [LOWBIT_TRIPLES][3], the coordinates of magnitude 1/2 */
    const int32_t *numbers; /* [3^LOWBIT_WORD], the number of a pattern by its levels */
} lowbit_search_tables;

/* Finds the words of LOWBIT_LANES vectors.
 * x: [LOWBIT_WORD][LOWBIT_LANES].
 * each_shift: whether to find the nearest word with +1/4 and the nearest one with -1/4, in code[0]
 * and code[1]; otherwise the nearest of all is in code[0]. */
typedef void (*lowbit_search)(const lowbit_search_tables *, const float *x, int each_shift,
                              int32_t code[2][LOWBIT_LANES]);

void lowbit_search_portable(const lowbit_search_tables *, const float *, int,
                            int32_t[2][LOWBIT_LANES]);
void lowbit_search_avx2(const lowbit_search_tables *, const float *, int,
                        int32_t[2][LOWBIT_LANES]);
void lowbit_search_avx512(const lowbit_search_tables *, const float *, int,
                          int32_t[2][LOWBIT_LANES]);

#endif
