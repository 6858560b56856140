/* Products with AVX2. Products of bytes are summed in 16 bits, which saturate at 32,767: their sums
 * are widened to 32 bits before they can. Codes of 8 bits are multiplied as 16-bit numbers. */

#include "lowbit_kernels.h"

#if defined(__AVX2__)

#include "inline.h"
#include "rounding.h"
#include "sums.h"

#include <immintrin.h>

#define ROWS 8
#define VECTOR 32
#define AHEAD 2048 /* bytes that are prefetched ahead of a plane */
#define VISIT 1024 /* bytes of a tile that are read before the next tile's */
#define TOKENS 2   /* tokens of a step with several tokens */

INLINE __m256i four_inputs(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return _mm256_set1_epi32(word);
}

INLINE __m256i two_inputs(const int16_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return _mm256_set1_epi32(word);
}

INLINE __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

/* Sums of one token, as integers and as floats, while the pieces pass. */
typedef struct {
    __m256i sums;
    __m256 partial, y;
} row_sums;

INLINE __m256 row_scales(const uint8_t *scales, int bytes) {
    return bytes == 4 ? _mm256_loadu_ps((const float *)scales)
                      : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
}

/* The same steps as in portable.c, in the same order. */
INLINE void finish_piece(const lowbit_spec *spec, const lowbit_piece *piece, const uint8_t *scales,
                         int32_t sum, float step, __m256i product, row_sums *to) {
    __m256i zero = spec->has_zeros ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                         (const __m128i *)(scales + ROWS * spec->scale_bytes)))
                                   : _mm256_set1_epi32(spec->zero);
    product = _mm256_sll_epi32(product, _mm_cvtsi32_si128(spec->shift));
    product = _mm256_sub_epi32(product, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sum)));
    to->sums = _mm256_add_epi32(to->sums, product);
    if (!piece->ends_sum) return;
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(to->sums), _mm256_set1_ps(step));
    to->partial = _mm256_add_ps(to->partial, value);
    to->sums = _mm256_setzero_si256();
    if (!piece->ends_group) return;
    __m256 scaled = _mm256_mul_ps(to->partial, row_scales(scales, spec->scale_bytes));
    to->y = _mm256_add_ps(to->y, scaled);
    to->partial = _mm256_setzero_ps();
}

/* Codes of 4 or 2 bits. A term of a 16-bit sum is at most 2 * 15 * 127 = 3,810 at 4 bits, so 8
 * terms fit, and 762 at 2 bits, so 43 fit. */
INLINE __m256i shifted_product(const uint8_t *vector, int width, int32_t length, const int8_t *q) {
    const int fields = 8 / width, most = width == 4 ? 4 : 8; /* vectors before widening */
    const __m256i mask = _mm256_set1_epi8((char)((1 << width) - 1));
    __m256i sum = _mm256_setzero_si256();
    for (int32_t i = 0; i < length;) {
        __m256i part = _mm256_setzero_si256();
        for (int v = 0; v < most && i < length; v++, i += 4 * fields, vector += VECTOR) {
            __m256i bytes = _mm256_load_si256((const __m256i *)vector);
            _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
            UNROLL(4)
            for (int f = 0; f < fields; f++) {
                __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes, f * width), mask);
                __m256i terms = _mm256_maddubs_epi16(codes, four_inputs(q + i + 4 * f));
                part = _mm256_add_epi16(part, terms);
            }
        }
        sum = _mm256_add_epi32(sum, widened(part));
    }
    return sum;
}

/* Codes of 1 bit, at bits 0 to 3 of the vector and of the vector shifted by 4: 16 terms of at most
 * 8 * 2 * 127 = 2,032 fit. */
INLINE __m256i bit_product(const uint8_t *vector, int32_t length, const int8_t *q) {
    __m256i sum = _mm256_setzero_si256();
    for (int32_t i = 0; i < length;) {
        __m256i parts[4];
        UNROLL(4)
        for (int bit = 0; bit < 4; bit++) parts[bit] = _mm256_setzero_si256();
        for (int v = 0; v < 8 && i < length; v++, i += 32, vector += VECTOR) {
            __m256i bytes = _mm256_load_si256((const __m256i *)vector);
            __m256i upper = _mm256_srli_epi16(bytes, 4);
            _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
            UNROLL(4)
            for (int bit = 0; bit < 4; bit++) {
                __m256i mask = _mm256_set1_epi8((char)(1 << bit));
                __m256i terms = _mm256_maddubs_epi16(_mm256_and_si256(bytes, mask),
                                                     four_inputs(q + i + 4 * bit));
                __m256i more = _mm256_maddubs_epi16(_mm256_and_si256(upper, mask),
                                                    four_inputs(q + i + 16 + 4 * bit));
                parts[bit] = _mm256_add_epi16(parts[bit], _mm256_add_epi16(terms, more));
            }
        }
        __m256i all = parts[0];
        UNROLL(4)
        for (int bit = 1; bit < 4; bit++)
            all = _mm256_add_epi16(all, _mm256_srai_epi16(parts[bit], bit));
        sum = _mm256_add_epi32(sum, widened(all));
    }
    return sum;
}

/* Codes of up to 8 bits in bytes, with 16-bit inputs: even and odd bytes apart. */
INLINE __m256i byte_product(const uint8_t *vector, int32_t length, const int16_t *q) {
    const __m256i mask = _mm256_set1_epi16(0xff);
    __m256i sum = _mm256_setzero_si256(), odd = sum;
    for (int32_t i = 0; i < length; i += 4, vector += VECTOR) {
        __m256i bytes = _mm256_load_si256((const __m256i *)vector);
        _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
        sum = _mm256_add_epi32(
            sum, _mm256_madd_epi16(_mm256_and_si256(bytes, mask), two_inputs(q + i)));
        odd = _mm256_add_epi32(
            odd, _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), two_inputs(q + i + 2)));
    }
    return _mm256_add_epi32(sum, odd);
}

INLINE __m256i half_product(const uint8_t *vector, int width, int32_t length, const int8_t *q) {
    switch (width) {
    case 4: return shifted_product(vector, 4, length, q);
    case 2: return shifted_product(vector, 2, length, q);
    default: return bit_product(vector, length, q);
    }
}

/* at: where the inputs begin. */
INLINE __m256i plane_product(const uint8_t *vector, int width, int32_t length,
                             const lowbit_inputs *in, int64_t at) {
    if (width == 8) return byte_product(vector, length, in->wide + at);
    __m256i sum = half_product(vector, width, length, in->low + at);
    if (in->high == NULL) return sum;
    __m256i upper = half_product(vector, width, length, in->high + at);
    return _mm256_add_epi32(sum, _mm256_slli_epi32(upper, 7));
}

/* The product of `length` inputs with all planes. Moves the planes' vectors on. */
INLINE __m256i planes_product(const lowbit_part *part, int32_t length, const uint8_t **vector,
                              const lowbit_inputs *in, int64_t at) {
    __m256i product = _mm256_setzero_si256();
    for (int i = 0; i < part->planes; i++) {
        int width = part->width[i];
        __m256i here = plane_product(vector[i], width, length, in, at);
        product =
            _mm256_add_epi32(product, _mm256_sll_epi32(here, _mm_cvtsi32_si128(part->low[i])));
        vector[i] += length / 32 * width * VECTOR;
    }
    return product;
}

/* One token and several tiles, which are read side by side; see avx512.c. */
static void multiply_one(const lowbit_layer *layer, const lowbit_part *part,
                         const lowbit_inputs *in, const int64_t *tile, int tiles, int64_t token,
                         float *y) {
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    const uint8_t *vector[LOWBIT_STREAMS][LOWBIT_MOST_PLANES];
    row_sums to[LOWBIT_STREAMS];
    int32_t visit = VISIT / ROWS * 8 / part->spec.bits / LOWBIT_PADDING * LOWBIT_PADDING;
    for (int t = 0; t < tiles; t++) {
        for (int i = 0; i < part->planes; i++)
            vector[t][i] = (const uint8_t *)lowbit_at(layer, part->plane[i]) +
                           tile[t] * part->tile_bytes[i];
        to[t].sums = _mm256_setzero_si256();
        to[t].partial = to[t].y = _mm256_setzero_ps();
    }
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        int64_t number = token * in->pieces + p, at = token * in->padded + piece->begin;
        __m256i product[LOWBIT_STREAMS];
        for (int t = 0; t < tiles; t++) product[t] = _mm256_setzero_si256();
        for (int32_t done = 0; done < piece->length; done += visit) {
            int32_t length = piece->length - done < visit ? piece->length - done : visit;
            for (int t = 0; t < tiles; t++)
                product[t] = _mm256_add_epi32(
                    product[t], planes_product(part, length, vector[t], in, at + done));
        }
        for (int t = 0; t < tiles; t++)
            finish_piece(&part->spec, piece, scales_of(layer, part, tile[t], piece->group),
                         in->sum[number], in->step[number], product[t], &to[t]);
    }
    for (int t = 0; t < tiles; t++) _mm256_storeu_ps(y + t * ROWS, to[t].y);
}

/* Writes the codes of a piece of a tile as bytes, 32 for every four inputs. */
static void unpack(const lowbit_layer *layer, const lowbit_part *part, int64_t tile,
                   const lowbit_piece *piece, uint8_t *codes) {
    for (int plane = 0; plane < part->planes; plane++) {
        int width = part->width[plane], fields = 8 / width;
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[plane]) +
                                tile * part->tile_bytes[plane] +
                                (int64_t)piece->begin / 32 * width * VECTOR;
        __m256i mask = _mm256_set1_epi8((char)((1 << width) - 1));
        __m128i low = _mm_cvtsi32_si128(part->low[plane]);
        uint8_t *to = codes;
        for (int32_t i = 0; i < piece->length; i += 4 * fields, vector += VECTOR) {
            __m256i bytes = _mm256_load_si256((const __m256i *)vector);
            _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
            for (int f = 0; f < fields; f++, to += VECTOR) {
                __m256i field = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(f * width));
                field = _mm256_sll_epi16(_mm256_and_si256(field, mask), low);
                if (plane) field = _mm256_or_si256(field, _mm256_load_si256((__m256i *)to));
                _mm256_store_si256((__m256i *)to, field);
            }
        }
    }
}

/* The products of a piece with `count` tokens, for codes of at most 4 bits: 8 terms fit. */
INLINE void small_products(const uint8_t *codes, const lowbit_inputs *in, const lowbit_piece *piece,
                           int64_t token, int count, int halves, __m256i *products) {
    const int8_t *low = in->low + token * in->padded + piece->begin;
    const int8_t *high = halves == 2 ? in->high + token * in->padded + piece->begin : low;
    __m256i lows[TOKENS], highs[TOKENS];
    UNROLL(4)
    for (int m = 0; m < count; m++) lows[m] = highs[m] = _mm256_setzero_si256();
    for (int32_t i = 0; i < piece->length;) {
        __m256i low_part[TOKENS], high_part[TOKENS];
        UNROLL(4)
        for (int m = 0; m < count; m++) low_part[m] = high_part[m] = _mm256_setzero_si256();
        for (int v = 0; v < 8; v++, i += 4, codes += VECTOR) {
            __m256i four = _mm256_load_si256((const __m256i *)codes);
            UNROLL(4)
            for (int m = 0; m < count; m++) {
                const int64_t at = m * in->padded + i;
                low_part[m] = _mm256_add_epi16(
                    low_part[m], _mm256_maddubs_epi16(four, four_inputs(low + at)));
                if (halves == 2)
                    high_part[m] = _mm256_add_epi16(
                        high_part[m], _mm256_maddubs_epi16(four, four_inputs(high + at)));
            }
        }
        UNROLL(4)
        for (int m = 0; m < count; m++) {
            lows[m] = _mm256_add_epi32(lows[m], widened(low_part[m]));
            if (halves == 2) highs[m] = _mm256_add_epi32(highs[m], widened(high_part[m]));
        }
    }
    UNROLL(4)
    for (int m = 0; m < count; m++)
        products[m] = halves == 2 ? _mm256_add_epi32(lows[m], _mm256_slli_epi32(highs[m], 7))
                                  : lows[m];
}

/* The same for codes of up to 8 bits. */
INLINE void large_products(const uint8_t *codes, const lowbit_inputs *in, const lowbit_piece *piece,
                           int64_t token, int count, __m256i *products) {
    const __m256i mask = _mm256_set1_epi16(0xff);
    const int16_t *q = in->wide + token * in->padded + piece->begin;
    __m256i sums[2 * TOKENS];
    UNROLL(4)
    for (int m = 0; m < count; m++) sums[m] = _mm256_setzero_si256();
    for (int32_t i = 0; i < piece->length; i += 4, codes += VECTOR) {
        __m256i bytes = _mm256_load_si256((const __m256i *)codes);
        __m256i even = _mm256_and_si256(bytes, mask), odd = _mm256_srli_epi16(bytes, 8);
        UNROLL(4)
        for (int m = 0; m < count; m++) {
            const int16_t *at = q + m * in->padded + i;
            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(even, two_inputs(at)));
            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(odd, two_inputs(at + 2)));
        }
    }
    UNROLL(4)
    for (int m = 0; m < count; m++) products[m] = sums[m];
}

/* Returns how many tokens it multiplied. */
static int some_products(const uint8_t *codes, const lowbit_inputs *in, const lowbit_piece *piece,
                         int64_t token, int left, int bits, __m256i *products) {
    if (bits > 4) {
        if (left >= 4) return large_products(codes, in, piece, token, 4, products), 4;
        return large_products(codes, in, piece, token, 1, products), 1;
    }
    if (in->high) {
        if (left >= 2) return small_products(codes, in, piece, token, 2, 2, products), 2;
        return small_products(codes, in, piece, token, 1, 2, products), 1;
    }
    if (left >= 2) return small_products(codes, in, piece, token, 2, 1, products), 2;
    return small_products(codes, in, piece, token, 1, 1, products), 1;
}

static void multiply(const lowbit_layer *layer, const lowbit_part *part, const lowbit_inputs *in,
                     const int64_t *tile, int tiles, int64_t token, int tokens, float *y) {
    if (tokens == 1) {
        multiply_one(layer, part, in, tile, tiles, token, y);
        return;
    }
    _Alignas(32) uint8_t codes[(LOWBIT_PIECE + LOWBIT_PADDING) * ROWS];
    _Alignas(32) row_sums sums[LOWBIT_BLOCK];
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    memset(sums, 0, sizeof(row_sums) * (size_t)tokens);
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        unpack(layer, part, *tile, piece, codes);
        for (int m = 0; m < tokens;) {
            __m256i products[2 * TOKENS];
            int count = some_products(codes, in, piece, token + m, tokens - m, part->spec.bits,
                                      products);
            for (int i = 0; i < count; i++, m++) {
                int64_t at = (token + m) * in->pieces + p;
                finish_piece(&part->spec, piece, scales_of(layer, part, *tile, piece->group),
                             in->sum[at], in->step[at], products[i], &sums[m]);
            }
        }
    }
    for (int m = 0; m < tokens; m++) _mm256_storeu_ps(y + m * ROWS, sums[m].y);
}

static void bytes(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                  const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    for (int t = 0; t < tiles; t++, codes += LOWBIT_APART(ROWS)) {
        for (int m = 0; m < tokens;) {
            __m256i products[2 * TOKENS];
            int count = some_products(codes, in, piece, token + m, tokens - m, 8, products);
            for (int i = 0; i < count; i++, m++)
                _mm256_storeu_si256((__m256i *)(sums + (m * tiles + t) * ROWS), products[i]);
        }
    }
}

/* Float weights, for `count` tokens whose sums are held in registers. */
INLINE void some_floats(const uint8_t *weights, int size, int64_t inputs, const float *x,
                        int64_t stride, int count, float *y, int64_t apart) {
    __m256 sums[8];
    UNROLL(8)
    for (int m = 0; m < count; m++) sums[m] = _mm256_loadu_ps(y + m * apart);
    for (int64_t i = 0; i < inputs; i++, weights += ROWS * size) {
        __m256 weight = row_scales(weights, size);
        UNROLL(8)
        for (int m = 0; m < count; m++) {
            __m256 product = _mm256_mul_ps(_mm256_set1_ps(x[m * stride + i]), weight);
            sums[m] = _mm256_add_ps(sums[m], product);
        }
    }
    UNROLL(8)
    for (int m = 0; m < count; m++) _mm256_storeu_ps(y + m * apart, sums[m]);
}

static void floats(const lowbit_layer *layer, const lowbit_part *part, int64_t tile, const float *x,
                   int64_t stride, int tokens, float *y, int64_t apart) {
    const int64_t inputs = part->spec.inputs;
    const int size = part->spec.scale_bytes;
    const uint8_t *weights = (const uint8_t *)lowbit_at(layer, part->scales) +
                             tile * inputs * ROWS * size;
    int m = 0;
    for (; m + 8 <= tokens; m += 8)
        some_floats(weights, size, inputs, x + m * stride, stride, 8, y + m * apart, apart);
    for (; m < tokens; m++)
        some_floats(weights, size, inputs, x + m * stride, stride, 1, y + m * apart, apart);
}

const lowbit_set lowbit_avx2 = {ROWS,         LOWBIT_STREAMS, 1,     1,
                                round_inputs, multiply,       bytes, floats};

#else

const lowbit_set lowbit_avx2 = {0}; /* not compiled for this processor */

#endif
