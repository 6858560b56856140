/* Decodes words with byte permutes: the 256 patterns lie in eight registers. Linear maps of bits
 * (GFNI) make codes of them: two codes to a byte, of which the upper one is never shifted down; its
 * sums are. */

#if defined(__AVX512VBMI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "words_vbmi.h"

#include "vnni.h"

#include <string.h>

#define AHEAD 2048 /* bytes that are prefetched ahead */

/* A map of bytes: each bit becomes the parity of the bits that a mask names. Bits 0 to 3 are the
 * code of an even coordinate, and bits 4 to 7 that of the next one; see words.c. */
#define MAP(m0, m1, m2, m3, m4, m5, m6, m7)                                                        \
    ((uint64_t)(m0) << 56 | (uint64_t)(m1) << 48 | (uint64_t)(m2) << 40 | (uint64_t)(m3) << 32 |   \
     (uint64_t)(m4) << 24 | (uint64_t)(m5) << 16 | (uint64_t)(m6) << 8 | (uint64_t)(m7))
#define LEVELS(first) MAP(0, 1 << (first), 2 << (first), 0, 0, 4 << (first), 8 << (first), 0)
#define SIGNS(even, odd) MAP(0x80, even, even, even, 0x80, odd, odd, odd)
#define PARITY MAP(0, 0, 0, 0, 0, 0x55, 0x55, 0x55)
#define ONES 0x99 /* bit 0 of a code is 1 if 1/4 is added, and bit 3 if the sign is plus */

typedef struct {
    __m512i patterns[8], lower, upper;
} tables;

INLINE tables load_tables(const uint8_t *table) {
    tables t;
    UNROLL(8)
    for (int i = 0; i < 8; i++) t.patterns[i] = _mm512_loadu_si512(table + 64 * i);
    t.lower = _mm512_set1_epi8(0x0f);
    t.upper = _mm512_set1_epi8((char)0xf0);
    return t;
}

#define MAPPED(bytes, map, ones) \
    _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64((long long)(map)), ones)

/* The bytes of a table of 256 bytes in four registers. */
INLINE __m512i look_up(const __m512i *table, __m512i index, __mmask64 upper) {
    __m512i low = _mm512_permutex2var_epi8(table[0], index, table[1]);
    __m512i high = _mm512_permutex2var_epi8(table[2], index, table[3]);
    return _mm512_mask_blend_epi8(upper, low, high);
}

/* The codes of 4 words of 16 rows, two coordinates to a byte. */
INLINE void decode(const tables *t, const uint8_t *vector, __m512i pairs[4]) {
    const __m512i pattern = _mm512_loadu_si512(vector), word = _mm512_loadu_si512(vector + 64);
    const __mmask64 half = _mm512_movepi8_mask(pattern);
    const __m512i low = look_up(t->patterns, pattern, half);
    const __m512i high = look_up(t->patterns + 4, pattern, half);
    const __m512i parity = MAPPED(_mm512_xor_si512(low, high), PARITY, 0);
    pairs[0] = _mm512_xor_si512(MAPPED(low, LEVELS(0), 0), MAPPED(word, SIGNS(1, 2), ONES));
    pairs[1] = _mm512_xor_si512(MAPPED(low, LEVELS(4), 0), MAPPED(word, SIGNS(4, 8), ONES));
    pairs[2] = _mm512_xor_si512(MAPPED(high, LEVELS(0), 0), MAPPED(word, SIGNS(16, 32), ONES));
    pairs[3] = _mm512_ternarylogic_epi32(MAPPED(high, LEVELS(4), 0),
                                         MAPPED(word, SIGNS(64, 127), ONES), parity, 0x96);
}

/* The sum of the sums of lower and upper codes, which take turns. */
INLINE __m512i halves_together(const __m512i sums[4]) {
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(sums[1], sums[3]), 4);
    return _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[2]), upper);
}

INLINE __m512i words_product(const uint8_t *table, int32_t length, const uint8_t **vector,
                             const int8_t *low, const int8_t *high, int halves, int ahead) {
    const tables t = load_tables(table);
    const uint8_t *from = *vector;
    __m512i lows[4], highs[4], pairs[4];
    UNROLL(8)
    for (int f = 0; f < 4; f++) lows[f] = highs[f] = _mm512_setzero_si512();
    for (int32_t i = 0; i < length; i += 32, from += 128) {
        if (ahead) _mm_prefetch((const char *)from + ahead, _MM_HINT_T0);
        if (ahead) _mm_prefetch((const char *)from + ahead + 64, _MM_HINT_T0);
        decode(&t, from, pairs);
        UNROLL(8)
        for (int c = 0; c < 8; c++) {
            __m512i codes = _mm512_and_si512(pairs[c / 2], c % 2 ? t.upper : t.lower);
            lows[c % 4] = add_products(lows[c % 4], codes, low + i + 4 * c);
            if (halves == 2)
                highs[c % 4] =
                    add_products(highs[c % 4], codes, high + i + 4 * c);
        }
    }
    *vector = from;
    __m512i sum = halves_together(lows);
    return halves == 1 ? sum : _mm512_add_epi32(sum, _mm512_slli_epi32(halves_together(highs), 7));
}

__m512i lowbit_words_product(const uint8_t *table, int32_t length, const uint8_t **vector,
                             const int8_t *low, const int8_t *high, int ahead) {
    return high == NULL ? words_product(table, length, vector, low, high, 1, ahead)
                        : words_product(table, length, vector, low, high, 2, ahead);
}

void lowbit_words_unpack(const uint8_t *table, int32_t length, const uint8_t *vector,
                         uint8_t *to) {
    const tables t = load_tables(table);
    __m512i pairs[4];
    for (int32_t i = 0; i < length; i += 32, vector += 128) {
        _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)vector + AHEAD + 64, _MM_HINT_T0);
        decode(&t, vector, pairs);
        UNROLL(8)
        for (int c = 0; c < 8; c++, to += 64) {
            __m512i code = c % 2 ? _mm512_srli_epi16(pairs[c / 2], 4) : pairs[c / 2];
            _mm512_storeu_si512(to, _mm512_and_si512(code, t.lower));
        }
    }
}

#endif
