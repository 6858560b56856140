/* What the two AVX-512 files for trellis codes share: the end of a product, and the choice of the
 * function for a rate. Each file defines `add_tiles` and `decode_tiles`, in which shift and values
 * are constants. */
#ifndef LOWBIT_TRELLIS_AVX512_H
#define LOWBIT_TRELLIS_AVX512_H

#include "inline.h"
#include "trellis.h"

#include <immintrin.h>

/* Sums of even and of odd columns or pairs, so that sums do not wait: one of the lower half of the
 * inputs and, with two halves, one of the upper. */
typedef __m512i tile_sums[2][2];

/* Adds the sums to results[row]. */
INLINE void add_sums(tile_sums sums, int halves, int32_t *results) {
    __m512i sum = _mm512_add_epi32(sums[0][0], sums[1][0]);
    if (halves == 2) {
        __m512i upper = _mm512_add_epi32(sums[0][1], sums[1][1]);
        sum = _mm512_add_epi32(sum, _mm512_slli_epi32(upper, 7));
    }
    _mm512_storeu_si512(results, _mm512_add_epi32(_mm512_loadu_si512(results), sum));
}

INLINE void add_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                      const uint32_t *low, const uint32_t *high, int halves, int shift, int values,
                      int32_t *results);
INLINE void decode_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles, int shift,
                         int values, uint8_t *codes);

#define RATE(name, shift, values)                                                                  \
    static void name(const lowbit_code *code, const uint8_t *tile, int64_t tiles,                  \
                     const uint32_t *low, const uint32_t *high, int32_t *sums) {                   \
        if (high)                                                                                  \
            add_tiles(code, tile, tiles, low, high, 2, shift, values, sums);                       \
        else                                                                                       \
            add_tiles(code, tile, tiles, low, low, 1, shift, values, sums);                        \
    }                                                                                              \
    static void decode_##name(const lowbit_code *code, const uint8_t *tile, int64_t tiles,         \
                              uint8_t *codes) {                                                    \
        decode_tiles(code, tile, tiles, shift, values, codes);                                     \
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

static inline lowbit_trellis_decode decoder_of(const lowbit_code *code) {
    static const lowbit_trellis_decode ONE[] = {decode_rate_1, decode_rate_2, decode_rate_3,
                                                decode_rate_4};
    if (code->values == 1) return ONE[code->shift - 1];
    return code->shift == 3 ? decode_rate_1_5 : decode_rate_2_5;
}

#endif
