/* Products with AVX-512 VNNI: four products of bytes and their sum in each of 16 rows at once. */

#include "lowbit_kernels.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "inline.h"
#include "rounding.h"
#include "sums.h"
#include "words_vbmi.h"

#include <immintrin.h>

#define ROWS 16
#define VECTOR 64
#define AHEAD 2048 /* bytes that are prefetched ahead of a plane */
#define VISIT 1024 /* bytes of a tile that are read before the next tile's */
#define TOKENS 4   /* tokens of a step with several tokens; 8 with one half */

INLINE __m512i four_inputs(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return _mm512_set1_epi32(word);
}

/* Sums of one token, as integers and as floats, while the pieces pass. */
typedef struct {
    __m512i sums;
    __m512 partial, y;
} row_sums;

INLINE __m512 row_scales(const uint8_t *scales, int bytes) {
    return bytes == 4 ? _mm512_loadu_ps(scales)
                      : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
}

/* The same steps as in portable.c, in the same order. */
INLINE void finish_piece(const lowbit_spec *spec, const lowbit_piece *piece, const uint8_t *scales,
                         int32_t sum, float step, __m512i product, row_sums *to) {
    __m512i zero = spec->has_zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128(
                                         (const __m128i *)(scales + ROWS * spec->scale_bytes)))
                                   : _mm512_set1_epi32(spec->zero);
    product = _mm512_sll_epi32(product, _mm_cvtsi32_si128(spec->shift));
    product = _mm512_sub_epi32(product, _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)));
    to->sums = _mm512_add_epi32(to->sums, product);
    if (!piece->ends_sum) return;
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(to->sums), _mm512_set1_ps(step));
    to->partial = _mm512_add_ps(to->partial, value);
    to->sums = _mm512_setzero_si512();
    if (!piece->ends_group) return;
    __m512 scaled = _mm512_mul_ps(to->partial, row_scales(scales, spec->scale_bytes));
    to->y = _mm512_add_ps(to->y, scaled);
    to->partial = _mm512_setzero_ps();
}

/* The product of a piece of a plane with one token. A field is not shifted down; its sums are. */
INLINE __m512i plane_product(const uint8_t *vector, int width, int32_t length, const int8_t *low,
                             const int8_t *high) {
    const int fields = 8 / width;
    __m512i masks[8], lows[8], highs[8];
    UNROLL(8)
    for (int f = 0; f < fields; f++) {
        masks[f] = _mm512_set1_epi8((char)(((1 << width) - 1) << f * width));
        lows[f] = highs[f] = _mm512_setzero_si512();
    }
    for (int32_t i = 0; i < length; i += 4 * fields, vector += VECTOR) {
        __m512i bytes = _mm512_load_si512(vector);
        _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
        UNROLL(8)
        for (int f = 0; f < fields; f++) {
            __m512i codes = width == 8 ? bytes : _mm512_and_si512(bytes, masks[f]);
            lows[f] = _mm512_dpbusd_epi32(lows[f], codes, four_inputs(low + i + 4 * f));
            if (high != NULL)
                highs[f] = _mm512_dpbusd_epi32(highs[f], codes, four_inputs(high + i + 4 * f));
        }
    }
    __m512i sum = _mm512_setzero_si512(), upper = sum;
    UNROLL(8)
    for (int f = 0; f < fields; f++) {
        sum = _mm512_add_epi32(sum, _mm512_srai_epi32(lows[f], f * width));
        if (high != NULL) upper = _mm512_add_epi32(upper, _mm512_srai_epi32(highs[f], f * width));
    }
    return high == NULL ? sum : _mm512_add_epi32(sum, _mm512_slli_epi32(upper, 7));
}

INLINE __m512i any_plane_product(const uint8_t *vector, int width, int32_t length,
                                 const int8_t *low, const int8_t *high) {
    switch (width) {
    case 8: return plane_product(vector, 8, length, low, high);
    case 4: return plane_product(vector, 4, length, low, high);
    case 2: return plane_product(vector, 2, length, low, high);
    default: return plane_product(vector, 1, length, low, high);
    }
}

/* The product of `length` inputs of one token with all planes. Moves the planes' vectors on. */
INLINE __m512i planes_product(const lowbit_part *part, int32_t length, const uint8_t **vector,
                              const int8_t *low, const int8_t *high) {
    __m512i product = _mm512_setzero_si512();
    for (int i = 0; i < part->planes; i++) {
        int width = part->width[i];
        __m512i here = any_plane_product(vector[i], width, length, low, high);
        product =
            _mm512_add_epi32(product, _mm512_sll_epi32(here, _mm_cvtsi32_si128(part->low[i])));
        vector[i] += length / 32 * width * VECTOR;
    }
    return product;
}

/* One token and several tiles, which are read side by side: a processor core reads memory up to
 * twice as fast in several places as in one (12 and 19 GB/s on a Sapphire Rapids). */
INLINE void multiply_one(const lowbit_layer *layer, const lowbit_part *part,
                         const lowbit_inputs *in, const int64_t *tile, int tiles, int64_t token,
                         int halves, float *y) {
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    const int8_t *low = in->low + token * in->padded;
    const int8_t *high = halves == 2 ? in->high + token * in->padded : NULL;
    const float *step = in->step + token * in->pieces;
    const int32_t *sum = in->sum + token * in->pieces;
    const uint8_t *vector[LOWBIT_STREAMS][LOWBIT_MOST_PLANES];
    row_sums to[LOWBIT_STREAMS];
    int32_t visit = VISIT / ROWS * 8 / part->spec.bits / LOWBIT_PADDING * LOWBIT_PADDING;
    int words = part->spec.kind == LOWBIT_WORDS;
    if (words) visit = LOWBIT_PIECE;
    for (int t = 0; t < tiles; t++) {
        for (int i = 0; i < part->planes; i++)
            vector[t][i] = (const uint8_t *)lowbit_at(layer, part->plane[i]) +
                           tile[t] * part->tile_bytes[i];
        to[t].sums = _mm512_setzero_si512();
        to[t].partial = to[t].y = _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        __m512i product[LOWBIT_STREAMS];
        for (int t = 0; t < tiles; t++) product[t] = _mm512_setzero_si512();
        for (int32_t done = 0; done < piece->length; done += visit) {
            int32_t length = piece->length - done < visit ? piece->length - done : visit;
            const int8_t *q = low + piece->begin + done;
            const int8_t *upper = halves == 2 ? high + piece->begin + done : NULL;
            for (int t = 0; t < tiles; t++) {
                __m512i here =
                    words ? lowbit_words_product(lowbit_at(layer, part->table), length,
                                                 &vector[t][0], q, upper)
                          : planes_product(part, length, vector[t], q, upper);
                product[t] = _mm512_add_epi32(product[t], here);
            }
        }
        for (int t = 0; t < tiles; t++)
            finish_piece(&part->spec, piece, scales_of(layer, part, tile[t], piece->group), sum[p],
                         step[p], product[t], &to[t]);
    }
    for (int t = 0; t < tiles; t++) _mm512_storeu_ps(y + t * ROWS, to[t].y);
}

/* Writes the codes of a piece of a tile as bytes, 64 for every four inputs. */
static void unpack(const lowbit_layer *layer, const lowbit_part *part, int64_t tile,
                   const lowbit_piece *piece, uint8_t *codes) {
    if (part->spec.kind == LOWBIT_WORDS) {
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[0]) +
                                tile * part->tile_bytes[0] + (int64_t)piece->begin / 16 * VECTOR;
        lowbit_words_unpack(lowbit_at(layer, part->table), piece->length, vector, codes);
        return;
    }
    for (int plane = 0; plane < part->planes; plane++) {
        int width = part->width[plane], fields = 8 / width;
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[plane]) +
                                tile * part->tile_bytes[plane] +
                                (int64_t)piece->begin / 32 * width * VECTOR;
        __m512i mask = _mm512_set1_epi8((char)((1 << width) - 1));
        __m128i low = _mm_cvtsi32_si128(part->low[plane]);
        uint8_t *to = codes;
        for (int32_t i = 0; i < piece->length; i += 4 * fields, vector += VECTOR) {
            __m512i bytes = _mm512_load_si512(vector);
            _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
            for (int f = 0; f < fields; f++, to += VECTOR) {
                __m512i field = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(f * width));
                field = _mm512_sll_epi16(_mm512_and_si512(field, mask), low);
                if (plane) field = _mm512_or_si512(field, _mm512_load_si512(to));
                _mm512_store_si512(to, field);
            }
        }
    }
}

/* The products of a piece with `count` tokens and one or two tiles. */
INLINE void piece_products(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                           const lowbit_piece *piece, int64_t token, int count, int halves,
                           __m512i *products) {
    enum { APART = (LOWBIT_PIECE + LOWBIT_PADDING) * ROWS };
    const int8_t *low = in->low + token * in->padded + piece->begin;
    const int8_t *high = halves == 2 ? in->high + token * in->padded + piece->begin : low;
    int64_t padded = in->padded;
    __m512i lows[2][8], highs[2][8];
    UNROLL(8)
    for (int m = 0; m < count; m++)
        lows[0][m] = lows[1][m] = highs[0][m] = highs[1][m] = _mm512_setzero_si512();
    for (int32_t i = 0; i < piece->length; i += 4, codes += VECTOR) {
        __m512i first = _mm512_load_si512(codes);
        __m512i second = tiles == 2 ? _mm512_load_si512(codes + APART) : first;
        UNROLL(8)
        for (int m = 0; m < count; m++) {
            __m512i q = four_inputs(low + m * padded + i);
            lows[0][m] = _mm512_dpbusd_epi32(lows[0][m], first, q);
            if (tiles == 2) lows[1][m] = _mm512_dpbusd_epi32(lows[1][m], second, q);
            if (halves == 2) {
                q = four_inputs(high + m * padded + i);
                highs[0][m] = _mm512_dpbusd_epi32(highs[0][m], first, q);
                if (tiles == 2) highs[1][m] = _mm512_dpbusd_epi32(highs[1][m], second, q);
            }
        }
    }
    UNROLL(8)
    for (int m = 0; m < count; m++)
        for (int t = 0; t < tiles; t++)
            products[m * tiles + t] =
                halves == 2 ? _mm512_add_epi32(lows[t][m], _mm512_slli_epi32(highs[t][m], 7))
                            : lows[t][m];
}

typedef void (*products_function)(const uint8_t *, const lowbit_inputs *, const lowbit_piece *,
                                  int64_t, __m512i *);

#define PRODUCTS(tiles, count, halves)                                                             \
    static void products_##tiles##_##count##_##halves(                                             \
        const uint8_t *codes, const lowbit_inputs *in, const lowbit_piece *piece, int64_t token,   \
        __m512i *products) {                                                                       \
        piece_products(codes, tiles, in, piece, token, count, halves, products);                   \
    }
#define FOR_TOKENS(tiles)                                                                          \
    PRODUCTS(tiles, 1, 1)                                                                          \
    PRODUCTS(tiles, 2, 1)                                                                          \
    PRODUCTS(tiles, 4, 1)                                                                          \
    PRODUCTS(tiles, 8, 1) PRODUCTS(tiles, 1, 2) PRODUCTS(tiles, 2, 2) PRODUCTS(tiles, 4, 2)
FOR_TOKENS(1)
FOR_TOKENS(2)

/* By tiles - 1, halves - 1 and the binary logarithm of the number of tokens. */
static const products_function PRODUCTS_OF[2][2][4] = {
    {{products_1_1_1, products_1_2_1, products_1_4_1, products_1_8_1},
     {products_1_1_2, products_1_2_2, products_1_4_2, products_1_4_2}},
    {{products_2_1_1, products_2_2_1, products_2_4_1, products_2_8_1},
     {products_2_1_2, products_2_2_2, products_2_4_2, products_2_4_2}},
};

static void multiply_many(const lowbit_layer *layer, const lowbit_part *part,
                          const lowbit_inputs *in, const int64_t *tile, int tiles, int64_t token,
                          int tokens, float *y) {
    enum { APART = (LOWBIT_PIECE + LOWBIT_PADDING) * ROWS };
    _Alignas(64) uint8_t codes[2 * APART];
    _Alignas(64) row_sums sums[LOWBIT_BLOCK * 2];
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    int halves = in->high ? 2 : 1, most = halves == 2 ? TOKENS : 2 * TOKENS;
    memset(sums, 0, sizeof(row_sums) * (size_t)(tokens * tiles));
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        for (int t = 0; t < tiles; t++) unpack(layer, part, tile[t], piece, codes + t * APART);
        for (int m = 0; m < tokens;) {
            __m512i products[16];
            int power = 3, count = 8;
            while (count > most || count > tokens - m) power--, count /= 2;
            PRODUCTS_OF[tiles - 1][halves - 1][power](codes, in, piece, token + m, products);
            for (int i = 0; i < count; i++) {
                int64_t at = (token + m + i) * in->pieces + p;
                for (int t = 0; t < tiles; t++)
                    finish_piece(&part->spec, piece, scales_of(layer, part, tile[t], piece->group),
                                 in->sum[at], in->step[at], products[i * tiles + t],
                                 &sums[(m + i) * tiles + t]);
            }
            m += count;
        }
    }
    for (int i = 0; i < tokens * tiles; i++) _mm512_storeu_ps(y + i * ROWS, sums[i].y);
}

static void multiply(const lowbit_layer *layer, const lowbit_part *part, const lowbit_inputs *in,
                     const int64_t *tile, int tiles, int64_t token, int tokens, float *y) {
    if (tokens > 1)
        multiply_many(layer, part, in, tile, tiles, token, tokens, y);
    else if (in->high)
        multiply_one(layer, part, in, tile, tiles, token, 2, y);
    else
        multiply_one(layer, part, in, tile, tiles, token, 1, y);
}

const lowbit_set lowbit_avx512 = {ROWS, LOWBIT_STREAMS, 2, 0, round_inputs, multiply};

#else

const lowbit_set lowbit_avx512 = {0, 0, 0, 0, 0, 0}; /* not compiled for this processor */

#endif
