/* Products with trellis codes with AVX-512 VBMI and VNNI: 32 states at once, of the rows of two
 * columns that follow each other. Lane 2 r belongs to row r of the first column, and lane 2 r + 1
 * to that of the second, so that one instruction sums four bytes of a row: two of each column. */

#include "trellis.h"

#if defined(__AVX512VBMI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "trellis_avx512.h"
#include "vnni.h"

#define VECTOR 64

/* What moves the windows of 32 steps to 32 lanes of 16 bits. Bytes of a pair of rows are gathered
 * first, 4 for each column; then each byte of a window is taken from any bit on. */
typedef struct {
    __m512i bytes, bits, mask;
} picker;

static picker picker_of(int shift, int state_bits) {
    uint8_t bytes[VECTOR], bits[VECTOR];
    for (int i = 0; i < VECTOR; i++) {
        int pair = i / 8, first = 2 * pair * shift; /* the first bit of two rows */
        bytes[i] = (uint8_t)(first / 8 + i % 4 + (i % 8 < 4 ? 0 : 2 * shift));
        int row = i % 8 / 4, column = i % 4 / 2;
        bits[i] = (uint8_t)(first % 8 + row * shift + 32 * column + 8 * (i % 2));
    }
    picker made = {_mm512_loadu_si512(bytes), _mm512_loadu_si512(bits),
                   _mm512_set1_epi16((short)((1 << state_bits) - 1))};
    return made;
}

/* The first 128 bytes of a ring that goes on and on. */
typedef struct {
    __m512i first, second;
} ring;

INLINE ring ring_of(const uint8_t *tile, int bytes) {
    ring r;
    if (bytes == 32) {
        r.first = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)tile));
    } else if (bytes < VECTOR) {
        __mmask64 here = ((__mmask64)1 << bytes) - 1;
        r.first = _mm512_maskz_loadu_epi8(here, tile);
        r.first = _mm512_mask_loadu_epi8(r.first, ~here, tile - bytes);
    } else {
        r.first = _mm512_loadu_si512(tile);
    }
    r.second = r.first;
    if (bytes == 2 * VECTOR) {
        r.second = _mm512_loadu_si512(tile + VECTOR);
    } else if (bytes > VECTOR) {
        __mmask64 here = ((__mmask64)1 << (bytes - VECTOR)) - 1;
        r.second = _mm512_maskz_loadu_epi8(here, tile + VECTOR);
        r.second = _mm512_mask_loadu_epi8(r.second, ~here, tile - (bytes - VECTOR));
    }
    return r;
}

/* The states of two columns. first: the byte of their first bit. Indices count modulo 64 or, in
 * two registers, modulo 128. */
INLINE __m512i states(const ring *r, int bytes, int shift, int first, const picker *pick) {
    const int end = first + 4 * shift + 3; /* the byte after their last bit, at most */
    __m512i index = _mm512_add_epi8(pick->bytes, _mm512_set1_epi8((char)first)), found;
    if (end <= VECTOR || bytes == VECTOR || bytes == VECTOR / 2)
        found = _mm512_permutexvar_epi8(index, r->first);
    else if (first >= VECTOR && end <= 2 * VECTOR)
        found = _mm512_permutexvar_epi8(index, r->second);
    else
        found = _mm512_permutex2var_epi8(r->first, index, r->second);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(pick->bits, found), pick->mask);
}

/* In each lane two bytes, whose sum is the value of the state plus LOWBIT_SUM6_MEAN. */
INLINE __m512i values_of(__m512i state, uint32_t multiplier) {
    const __m512i lower = _mm512_set1_epi16((short)(multiplier & 0xffff));
    const __m512i upper = _mm512_set1_epi16((short)(multiplier >> 16));
    const __m512i six_bits = _mm512_set1_epi32(LOWBIT_SUM6_BITS);
    __m512i low = _mm512_mullo_epi16(state, lower);
    __m512i high =
        _mm512_add_epi16(_mm512_mulhi_epu16(state, lower), _mm512_mullo_epi16(state, upper));
    return _mm512_add_epi8(_mm512_and_si512(low, six_bits), _mm512_and_si512(high, six_bits));
}

INLINE void add_columns(__m512i values, const uint32_t *low, const uint32_t *high, int halves,
                        __m512i *sums) {
    sums[0] = add_products(sums[0], values, low);
    if (halves == 2)
        sums[1] = add_products(sums[1], values, high);
}

INLINE void add_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                      const uint32_t *low, const uint32_t *high, int halves, int shift, int values,
                      int32_t *results) {
    const int bytes = 32 * shift / values, pairs = LOWBIT_TILE / 2 / values;
    const picker pick = picker_of(shift, code->state_bits);
    const __m512i zero = _mm512_setzero_si512();
    tile_sums sums = {{zero, zero}, {zero, zero}};
    for (int64_t i = 0; i < tiles; i++, tile += bytes, low += LOWBIT_TILE, high += LOWBIT_TILE) {
        _mm_prefetch((const char *)tile + 1024, _MM_HINT_T0);
        if (bytes > 64) _mm_prefetch((const char *)tile + 1088, _MM_HINT_T0);
        const ring here = ring_of(tile, bytes);
        UNROLL(8)
        for (int p = 0; p < pairs; p++) {
            __m512i state = states(&here, bytes, shift, 4 * shift * p, &pick);
            for (int v = 0; v < values; v++)
                add_columns(values_of(state, code->multiplier[v]), low + 2 * p + 8 * v,
                            high + 2 * p + 8 * v, halves, sums[(p + v) % 2]);
        }
    }
    add_sums(sums, halves, results);
}

/* Moves the lower bytes of lanes of two pairs of columns side by side: four bytes of each row. */
static const uint8_t BESIDE[4] = {0, 2, VECTOR, VECTOR + 2};

INLINE void decode_tiles(const lowbit_code *code, const uint8_t *tile, int64_t tiles, int shift,
                         int values, uint8_t *codes) {
    const int bytes = 32 * shift / values, pairs = LOWBIT_TILE / 2 / values;
    const picker pick = picker_of(shift, code->state_bits);
    uint8_t order[VECTOR];
    for (int i = 0; i < VECTOR; i++) order[i] = (uint8_t)(BESIDE[i % 4] + i / 4 * 4);
    const __m512i beside = _mm512_loadu_si512(order);
    for (int64_t i = 0; i < tiles; i++, tile += bytes, codes += LOWBIT_TILE * LOWBIT_TILE) {
        const ring here = ring_of(tile, bytes);
        __m512i pair[LOWBIT_TILE / 2];
        UNROLL(8)
        for (int p = 0; p < pairs; p++) {
            __m512i state = states(&here, bytes, shift, 4 * shift * p, &pick);
            for (int v = 0; v < values; v++) {
                __m512i two = values_of(state, code->multiplier[v]);
                pair[p + 4 * v] = _mm512_add_epi8(two, _mm512_srli_epi16(two, 8));
            }
        }
        UNROLL(4)
        for (int c = 0; c < LOWBIT_TILE / 4; c++)
            _mm512_storeu_si512(codes + VECTOR * c, _mm512_permutex2var_epi8(pair[2 * c], beside, pair[2 * c + 1]));
    }
}

static void add(const lowbit_code *code, const uint8_t *tile, int64_t tiles, const uint32_t *low,
                const uint32_t *high, int32_t *sums) {
    function_of(code)(code, tile, tiles, low, high, sums);
}

static void decode(const lowbit_code *code, const uint8_t *tile, int64_t tiles, uint8_t *codes) {
    decoder_of(code)(code, tile, tiles, codes);
}

const lowbit_trellis_set lowbit_trellis_vbmi = {decode, add, 1};

#else

const lowbit_trellis_set lowbit_trellis_vbmi = {lowbit_decode_portable, 0, 1};

#endif
