/* What the files for packed layers with AVX-512 share. */
#ifndef LOWBIT_AVX512_H
#define LOWBIT_AVX512_H

#include "inline.h"
#include "sums.h"

#include <immintrin.h>

#define ROWS 16
#define VECTOR 64
#define AHEAD 2048 /* bytes that are prefetched ahead of a plane */
#define STEP LOWBIT_AT_ONCE
#define UPPER (STEP * LOWBIT_STREAMS * ROWS) /* where sums of upper halves begin */

INLINE __m512i four_inputs(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return _mm512_set1_epi32(word);
}

INLINE __m512 row_scales(const uint8_t *scales, int bytes) {
    return bytes == 4 ? _mm512_loadu_ps(scales)
                      : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
}

/* The zero points of the rows of a tile, behind their scales. */
INLINE __m512i row_zeros(const lowbit_spec *spec, const uint8_t *scales) {
    if (!spec->has_zeros) return _mm512_set1_epi32(spec->zero);
    const uint8_t *zeros = scales + ROWS * spec->scale_bytes;
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros));
}

/* Writes the products of a piece of `tiles` tiles and `count` tokens, at most STEP:
 * found[m][tile][row] for q or its lower half, and from UPPER on the same for the upper half.
 * codes: [tile][LOWBIT_APART(ROWS)], bytes, which are signed if is_signed. */
typedef void (*lowbit_bytes_product)(const uint8_t *codes, int tiles, int is_signed,
                                     const lowbit_inputs *, const lowbit_piece *, int64_t token,
                                     int count, int32_t *found);

/* How several tokens are multiplied. */
typedef struct {
    lowbit_bytes_product product;
    int takes_signed; /* whether codes may be signed, so that zero points are subtracted before */
    int whole;        /* whether `count` is always STEP, if there are as many tokens */
} lowbit_way;

/* Multiplies several tokens by some tiles; see `multiply` of lowbit_set. */
void lowbit_multiply_tokens(const lowbit_layer *, const lowbit_part *, const lowbit_inputs *,
                            const int64_t *tile, int tiles, int64_t token, int tokens,
                            const lowbit_way *, float *y);

/* `bytes` and `floats` of lowbit_set. */
void lowbit_vnni_bytes(const uint8_t *codes, int tiles, const lowbit_inputs *, const lowbit_piece *,
                       int64_t token, int tokens, int32_t *sums);
void lowbit_avx512_floats(const lowbit_layer *, const lowbit_part *, int64_t tile, const float *x,
                          int64_t stride, int tokens, float *y, int64_t apart);

/* Writes 128 times the upper sums plus the lower ones, which a lowbit_bytes_product found. */
void lowbit_sum_halves(const int32_t *found, int64_t count, int halves, int32_t *sums);

/* The product of bytes with VNNI. */
void lowbit_vnni_product(const uint8_t *codes, int tiles, int is_signed, const lowbit_inputs *,
                         const lowbit_piece *, int64_t token, int count, int32_t *found);

#endif
