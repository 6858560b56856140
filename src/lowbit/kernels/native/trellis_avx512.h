/* What the two AVX-512 files for trellis codes share: the end of a product, and the choice of the
 * function for a rate. Each file defines `add_tiles`, in which shift and values are constants. */
#ifndef LOWBIT_TRELLIS_AVX512_H
#define LOWBIT_TRELLIS_AVX512_H

#include "inline.h"
#include "trellis.h"

#include <immintrin.h>

#define TOKENS LOWBIT_TILE_TOKENS

/* Sums of even and of odd columns or pairs, so that sums do not wait: for each token one of the
 * lower half of the inputs and, with two halves, one of the upper. */
typedef __m512i tile_sums[2][2 * TOKENS];

INLINE void clear_sums(tile_sums sums, int tokens, int halves) {
    for (int i = 0; i < halves * tokens; i++) sums[0][i] = sums[1][i] = _mm512_setzero_si512();
}

/* Adds the sums to results[token][row]. */
INLINE void add_sums(tile_sums sums, int tokens, int halves, int32_t *results) {
    for (int m = 0; m < tokens; m++) {
        __m512i sum = _mm512_add_epi32(sums[0][m * halves], sums[1][m * halves]);
        if (halves == 2) {
            __m512i upper = _mm512_add_epi32(sums[0][m * halves + 1], sums[1][m * halves + 1]);
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(upper, 7));
        }
        int32_t *to = results + m * LOWBIT_TILE;
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), sum));
    }
}

INLINE void add_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                      const uint32_t *low, const uint32_t *high, int64_t apart, int tokens,
                      int halves, int shift, int values, int32_t *results);

#define RATE(name, shift, values)                                                                  \
    static void name(const lowbit_code *code, const uint8_t *tile, int64_t tiles,                  \
                     const uint32_t *low, const uint32_t *high, int64_t apart, int tokens,         \
                     int32_t *sums) {                                                              \
        if (tokens == 1 && high)                                                                   \
            add_tiles(code, tile, tiles, low, high, apart, 1, 2, shift, values, sums);             \
        else if (tokens == 1)                                                                      \
            add_tiles(code, tile, tiles, low, low, apart, 1, 1, shift, values, sums);              \
        else if (high)                                                                             \
            add_tiles(code, tile, tiles, low, high, apart, TOKENS, 2, shift, values, sums);        \
        else                                                                                       \
            add_tiles(code, tile, tiles, low, low, apart, TOKENS, 1, shift, values, sums);         \
    }

RATE(rate_1, 1, 1)
RATE(rate_2, 2, 1)
RATE(rate_3, 3, 1)
RATE(rate_4, 4, 1)
RATE(rate_1_5, 3, 2)
RATE(rate_2_5, 5, 2)

static inline lowbit_trellis_piece function_of(const lowbit_code *code) {
    static const lowbit_trellis_piece ONE[] = {rate_1, rate_2, rate_3, rate_4};
    if (code->values == 1) return ONE[code->shift - 1];
    return code->shift == 3 ? rate_1_5 : rate_2_5;
}

#endif
