/* Products with trellis codes with AVX-512 VNNI: 16 states, of the rows of a column, at once. The
 * four bytes of a mixed state are multiplied by the same input and summed by one instruction. */

#include "trellis.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "trellis_avx512.h"
#include "vnni.h"

#include <string.h>

/* What moves the windows of 16 steps from 16 bytes to 16 words. */
typedef struct {
    __m512i bytes, shifts, mask;
} picker;

static picker picker_of(const lowbit_code *code) {
    uint8_t bytes[64];
    uint32_t shifts[16];
    for (int i = 0; i < 16; i++) {
        for (int b = 0; b < 3; b++) bytes[4 * i + b] = (uint8_t)(i * code->shift / 8 + b);
        bytes[4 * i + 3] = 0x80; /* a byte of zeros */
        shifts[i] = (uint32_t)(i * code->shift % 8);
    }
    picker made = {_mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts),
                   _mm512_set1_epi32((1 << code->state_bits) - 1)};
    return made;
}

/* 16 bytes of a ring from byte `at` on. */
INLINE __m128i ring(const uint8_t *tile, int bytes, int at) {
    static const uint8_t RAMP[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (at + 16 <= bytes) return _mm_loadu_si128((const __m128i *)(tile + at));
    int over = at + 16 - bytes; /* bytes that are missing at the end */
    __m128i index = _mm_add_epi8(_mm_loadu_si128((const __m128i *)RAMP), _mm_set1_epi8((char)over));
    __m128i end = _mm_loadu_si128((const __m128i *)(tile + bytes - 16));
    __m128i begin = _mm_loadu_si128((const __m128i *)tile);
    /* An index with bit 7 gives a byte of zeros. */
    end = _mm_shuffle_epi8(end, _mm_adds_epu8(index, _mm_set1_epi8(0x70)));
    begin = _mm_shuffle_epi8(begin, _mm_sub_epi8(index, _mm_set1_epi8(16)));
    return _mm_or_si128(end, begin);
}

INLINE __m512i states(const uint8_t *tile, int bytes, int shift, int group, const picker *pick) {
    __m512i words = _mm512_broadcast_i32x4(ring(tile, bytes, 2 * shift * group));
    words = _mm512_srlv_epi32(_mm512_shuffle_epi8(words, pick->bytes), pick->shifts);
    return _mm512_and_si512(words, pick->mask);
}

/* The four bytes of mixed states whose sum is the value plus LOWBIT_SUM6_MEAN. */
INLINE __m512i mixed(__m512i state, uint32_t multiplier) {
    __m512i all = _mm512_mullo_epi32(state, _mm512_set1_epi32((int)multiplier));
    return _mm512_and_si512(all, _mm512_set1_epi32(LOWBIT_SUM6_BITS));
}

INLINE void add_column(__m512i values, const uint32_t *low, const uint32_t *high, int halves,
                       __m512i *sums) {
    sums[0] = add_products(sums[0], values, low);
    if (halves == 2)
        sums[1] = add_products(sums[1], values, high);
}

INLINE void add_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                      const uint32_t *low, const uint32_t *high, int halves, int shift, int values,
                      int32_t *results) {
    const int bytes = 32 * shift / values, groups = LOWBIT_TILE / values;
    const picker pick = picker_of(code);
    const __m512i zero = _mm512_setzero_si512();
    tile_sums sums = {{zero, zero}, {zero, zero}};
    for (int64_t i = 0; i < tiles; i++, tile += bytes, low += LOWBIT_TILE, high += LOWBIT_TILE) {
        _mm_prefetch((const char *)tile + 1024, _MM_HINT_T0);
        if (bytes > 64) _mm_prefetch((const char *)tile + 1088, _MM_HINT_T0);
        UNROLL(16)
        for (int g = 0; g < groups; g++) {
            __m512i state = states(tile, bytes, shift, g, &pick);
            for (int v = 0; v < values; v++)
                add_column(mixed(state, code->multiplier[v]), low + g + 8 * v, high + g + 8 * v,
                           halves, sums[(g + v) % 2]);
        }
    }
    add_sums(sums, halves, results);
}

INLINE void decode_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles, int shift,
                         int values, uint8_t *codes) {
    const int bytes = 32 * shift / values, groups = LOWBIT_TILE / values;
    const picker pick = picker_of(code);
    const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi32(0x01010101);
    for (int64_t i = 0; i < tiles; i++, tile += bytes, codes += LOWBIT_TILE * LOWBIT_TILE) {
        __m512i four[LOWBIT_TILE / 4];
        UNROLL(16)
        for (int g = 0; g < groups; g++) {
            __m512i state = states(tile, bytes, shift, g, &pick);
            for (int v = 0; v < values; v++) {
                const int column = g + 8 * v;
                __m512i value = _mm512_dpbusd_epi32(zero, mixed(state, code->multiplier[v]), ones);
                value = _mm512_slli_epi32(value, (unsigned)(column % 4 * 8));
                four[column / 4] =
                    column % 4 ? _mm512_or_si512(four[column / 4], value) : value;
            }
        }
        UNROLL(4)
        for (int c = 0; c < LOWBIT_TILE / 4; c++) _mm512_storeu_si512(codes + 64 * c, four[c]);
    }
}

static void add(const lowbit_code *code, const uint8_t *tile, int64_t tiles, const uint32_t *low,
                const uint32_t *high, int32_t *sums) {
    function_of(code)(code, tile, tiles, low, high, sums);
}

static void decode(const lowbit_code *code, const uint8_t *tile, int64_t tiles, uint8_t *codes) {
    decoder_of(code)(code, tile, tiles, codes);
}

const lowbit_trellis_set lowbit_trellis_avx512 = {decode, add, 0};

#else

const lowbit_trellis_set lowbit_trellis_avx512 = {lowbit_decode_portable, 0, 0};

#endif
