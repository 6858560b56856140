/* Products of several tokens with AVX-512. The codes of a piece of some tiles are unpacked to bytes
 * once for all tokens of a block. Then, STEP tokens at a time, a function multiplies the bytes by
 * the inputs (here with VNNI; amx.c has another one), and the sums of 16 rows are finished at once. */

#include "lowbit_kernels.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "avx512.h"
#include "words_vbmi.h"

#define TILES LOWBIT_STREAMS
#define TOKENS 4 /* tokens whose sums are held in registers; 8 with one half */

/* Writes the codes of a plane as bytes, 64 for every four inputs, or adds them to those there. */
INLINE void unpack_width(const uint8_t *vector, int width, int low, int adds, int32_t length,
                         uint8_t *codes) {
    const int fields = 8 / width;
    const __m512i mask = _mm512_set1_epi8((char)((1 << width) - 1));
    const __m128i up = _mm_cvtsi32_si128(low);
    for (int32_t i = 0; i < length; i += 4 * fields, vector += VECTOR) {
        __m512i bytes = _mm512_load_si512(vector);
        _mm_prefetch((const char *)vector + AHEAD, _MM_HINT_T0);
        UNROLL(8)
        for (int f = 0; f < fields; f++, codes += VECTOR) {
            __m512i field = width == 8 ? bytes : _mm512_srli_epi16(bytes, (unsigned)(f * width));
            field = _mm512_and_si512(field, mask);
            if (adds)
                field = _mm512_or_si512(_mm512_sll_epi16(field, up), _mm512_load_si512(codes));
            _mm512_store_si512(codes, field);
        }
    }
}

INLINE void unpack_plane(const uint8_t *vector, int width, int low, int adds, int32_t length,
                         uint8_t *codes) {
    switch (width) {
    case 8: unpack_width(vector, 8, low, adds, length, codes); break;
    case 4: unpack_width(vector, 4, low, adds, length, codes); break;
    case 2: unpack_width(vector, 2, low, adds, length, codes); break;
    default: unpack_width(vector, 1, low, adds, length, codes);
    }
}

static void unpack(const lowbit_layer *layer, const lowbit_part *part, int64_t tile,
                   const lowbit_piece *piece, uint8_t *codes) {
    if (part->spec.kind == LOWBIT_WORDS) {
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[0]) +
                                tile * part->tile_bytes[0] + (int64_t)piece->begin / 16 * VECTOR;
        lowbit_words_unpack(lowbit_at(layer, part->table), piece->length, vector, codes);
        return;
    }
    for (int plane = 0; plane < part->planes; plane++) {
        int width = part->width[plane];
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[plane]) +
                                tile * part->tile_bytes[plane] +
                                (int64_t)piece->begin / 32 * width * VECTOR;
        if (plane)
            unpack_plane(vector, width, part->low[plane], 1, piece->length, codes);
        else
            unpack_plane(vector, width, 0, 0, piece->length, codes);
    }
}

/* Whether (code << shift) - zero fits in a signed byte for all codes and rows. */
static int fits_signed(const lowbit_spec *spec, const uint8_t *scales) {
    const int top = ((1 << spec->bits) - 1) << spec->shift;
    const __m512i zero = row_zeros(spec, scales);
    return !_mm512_cmpgt_epi32_mask(zero, _mm512_set1_epi32(128)) &&
           !_mm512_cmplt_epi32_mask(zero, _mm512_set1_epi32(top - 127));
}

/* Replaces each code by (code << shift) - zero. */
static void center(const lowbit_spec *spec, const uint8_t *scales, int32_t length, uint8_t *codes) {
    const __m512i zeros =
        _mm512_mullo_epi32(row_zeros(spec, scales), _mm512_set1_epi32(0x01010101));
    const __m128i up = _mm_cvtsi32_si128(spec->shift);
    for (int32_t i = 0; i < length; i += 4, codes += VECTOR) {
        __m512i code = _mm512_sll_epi16(_mm512_load_si512(codes), up);
        _mm512_store_si512(codes, _mm512_sub_epi8(code, zeros));
    }
}

/* Sums of one or two tiles and `count` tokens. all: tiles of `found`. */
INLINE void some_products(const uint8_t *codes, int tiles, const int8_t *low, const int8_t *high,
                          int64_t apart, int32_t length, int count, int halves, int all,
                          int32_t *found) {
    const uint8_t *other = codes + (tiles == 2 ? LOWBIT_APART(ROWS) : 0);
    __m512i lows[2][8], highs[2][8];
    UNROLL(8)
    for (int m = 0; m < count; m++)
        lows[0][m] = lows[1][m] = highs[0][m] = highs[1][m] = _mm512_setzero_si512();
    for (int32_t i = 0; i < length; i += 4, codes += VECTOR, other += VECTOR) {
        __m512i first = _mm512_load_si512(codes);
        __m512i second = tiles == 2 ? _mm512_load_si512(other) : first;
        UNROLL(8)
        for (int m = 0; m < count; m++) {
            __m512i q = four_inputs(low + m * apart + i);
            lows[0][m] = _mm512_dpbusd_epi32(lows[0][m], first, q);
            if (tiles == 2) lows[1][m] = _mm512_dpbusd_epi32(lows[1][m], second, q);
            if (halves == 2) {
                q = four_inputs(high + m * apart + i);
                highs[0][m] = _mm512_dpbusd_epi32(highs[0][m], first, q);
                if (tiles == 2) highs[1][m] = _mm512_dpbusd_epi32(highs[1][m], second, q);
            }
        }
    }
    int32_t *upper = found + UPPER;
    UNROLL(8)
    for (int m = 0; m < count; m++) {
        for (int t = 0; t < tiles; t++) {
            _mm512_store_si512(found + (m * all + t) * ROWS, lows[t][m]);
            if (halves == 2) _mm512_store_si512(upper + (m * all + t) * ROWS, highs[t][m]);
        }
    }
}

INLINE void tokens_products(const uint8_t *codes, int tiles, const int8_t *low, const int8_t *high,
                            int64_t apart, int32_t length, int count, int halves, int all,
                            int32_t *found) {
    const int most = halves == 2 ? TOKENS : 2 * TOKENS;
    int m = 0;
#define SOME(some)                                                                                 \
    for (; most >= some && m + some <= count; m += some)                                           \
        some_products(codes, tiles, low + m * apart, high + m * apart, apart, length, some,        \
                      halves, all, found + m * all * ROWS);
    SOME(8)
    SOME(4)
    SOME(2)
    SOME(1)
#undef SOME
}

void lowbit_vnni_product(const uint8_t *codes, int tiles, int is_signed, const lowbit_inputs *in,
                         const lowbit_piece *piece, int64_t token, int count, int32_t *found) {
    const int64_t at = token * in->padded + piece->begin, apart = in->padded;
    const int8_t *low = in->low + at, *high = in->high ? in->high + at : low;
    (void)is_signed;
    for (int t = 0; t < tiles; t += 2, codes += 2 * LOWBIT_APART(ROWS), found += 2 * ROWS) {
        if (tiles - t >= 2 && in->high)
            tokens_products(codes, 2, low, high, apart, piece->length, count, 2, tiles, found);
        else if (tiles - t >= 2)
            tokens_products(codes, 2, low, low, apart, piece->length, count, 1, tiles, found);
        else if (in->high)
            tokens_products(codes, 1, low, high, apart, piece->length, count, 2, tiles, found);
        else
            tokens_products(codes, 1, low, low, apart, piece->length, count, 1, tiles, found);
    }
}

void lowbit_sum_halves(const int32_t *found, int64_t count, int halves, int32_t *sums) {
    for (int64_t i = 0; i < count; i += ROWS) {
        __m512i sum = _mm512_load_si512(found + i);
        if (halves == 2)
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(found + UPPER + i), 7));
        _mm512_storeu_si512(sums + i, sum);
    }
}

void lowbit_vnni_bytes(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                       const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    _Alignas(64) int32_t found[2 * UPPER];
    lowbit_vnni_product(codes, tiles, 0, in, piece, token, tokens, found);
    lowbit_sum_halves(found, (int64_t)tokens * tiles * ROWS, in->high ? 2 : 1, sums);
}

/* Float weights, for `count` tokens whose sums are held in registers. */
INLINE void some_floats(const uint8_t *weights, int size, int64_t inputs, const float *x,
                        int64_t stride, int count, float *y, int64_t apart) {
    __m512 sums[8];
    UNROLL(8)
    for (int m = 0; m < count; m++) sums[m] = _mm512_loadu_ps(y + m * apart);
    for (int64_t i = 0; i < inputs; i++, weights += ROWS * size) {
        __m512 weight = row_scales(weights, size);
        UNROLL(8)
        for (int m = 0; m < count; m++) {
            __m512 product = _mm512_mul_ps(_mm512_set1_ps(x[m * stride + i]), weight);
            sums[m] = _mm512_add_ps(sums[m], product);
        }
    }
    UNROLL(8)
    for (int m = 0; m < count; m++) _mm512_storeu_ps(y + m * apart, sums[m]);
}

void lowbit_avx512_floats(const lowbit_layer *layer, const lowbit_part *part, int64_t tile,
                          const float *x, int64_t stride, int tokens, float *y, int64_t apart) {
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

/* What is known while the pieces pass, [token][tile][row]. sums, partial: they are zero before a
 * piece that begins a group. */
typedef struct {
    int32_t *sums;
    float *partial, *y;
} running;

/* A piece of some tokens, whose products were found. */
typedef struct {
    const lowbit_layer *layer;
    const lowbit_part *part;
    const lowbit_piece *piece;
    const int64_t *tile;
    const int32_t *found, *sum; /* sum: of the first token, as step */
    const float *step;
    running to;
    int64_t apart; /* of tokens in sum and step */
    int tiles, count;
    int halves, alone, centered; /* alone: the piece is a group. centered: without zero points */
} found_piece;

/* The same steps as in portable.c, in the same order. */
INLINE void finish(const found_piece *f, int halves, int alone, int centered) {
    const lowbit_spec *spec = &f->part->spec;
    const running to = f->to;
    const __m128i up = _mm_cvtsi32_si128(spec->shift);
    for (int t = 0; t < f->tiles; t++) {
        const uint8_t *scales = scales_of(f->layer, f->part, f->tile[t], f->piece->group);
        const __m512i zero = row_zeros(spec, scales);
        const __m512 scale = row_scales(scales, spec->scale_bytes);
        for (int m = 0; m < f->count; m++) {
            const int at = (m * f->tiles + t) * ROWS;
            __m512i product = _mm512_load_si512(f->found + at);
            if (halves == 2) {
                __m512i upper = _mm512_load_si512(f->found + at + UPPER);
                product = _mm512_add_epi32(product, _mm512_slli_epi32(upper, 7));
            }
            if (!centered) {
                __m512i sum = _mm512_set1_epi32(f->sum[m * f->apart]);
                product = _mm512_sub_epi32(_mm512_sll_epi32(product, up),
                                           _mm512_mullo_epi32(zero, sum));
            }
            if (!alone) {
                product = _mm512_add_epi32(product, _mm512_load_si512(to.sums + at));
                __m512i kept = f->piece->ends_sum ? _mm512_setzero_si512() : product;
                _mm512_store_si512(to.sums + at, kept);
                if (!f->piece->ends_sum) continue;
            }
            __m512 step = _mm512_set1_ps(f->step[m * f->apart]);
            __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(product), step);
            if (!alone) {
                value = _mm512_add_ps(_mm512_load_ps(to.partial + at), value);
                __m512 kept = f->piece->ends_group ? _mm512_setzero_ps() : value;
                _mm512_store_ps(to.partial + at, kept);
                if (!f->piece->ends_group) continue;
            }
            value = _mm512_mul_ps(value, scale);
            _mm512_store_ps(to.y + at, _mm512_add_ps(_mm512_load_ps(to.y + at), value));
        }
    }
}

static void finish_tokens(const found_piece *f) {
    if (f->halves == 2 && f->alone && f->centered)
        finish(f, 2, 1, 1);
    else if (f->halves == 2 && f->alone)
        finish(f, 2, 1, 0);
    else if (f->halves == 2)
        finish(f, 2, 0, f->centered);
    else if (f->alone)
        finish(f, 1, 1, f->centered);
    else
        finish(f, 1, 0, f->centered);
}

/* Unpacks a piece of some tiles, with zeros behind it; returns whether codes are signed bytes, of
 * which zero points are subtracted. */
static int unpack_tiles(const found_piece *f, int takes_signed, uint8_t *codes) {
    const int32_t length = f->piece->length;
    int centered = takes_signed;
    for (int t = 0; t < f->tiles && centered; t++)
        centered = fits_signed(&f->part->spec,
                               scales_of(f->layer, f->part, f->tile[t], f->piece->group));
    for (int t = 0; t < f->tiles; t++, codes += LOWBIT_APART(ROWS)) {
        unpack(f->layer, f->part, f->tile[t], f->piece, codes);
        if (centered)
            center(&f->part->spec, scales_of(f->layer, f->part, f->tile[t], f->piece->group),
                   length, codes);
        memset(codes + length * ROWS, 0, LOWBIT_PADDING * ROWS);
    }
    return centered;
}

void lowbit_multiply_tokens(const lowbit_layer *layer, const lowbit_part *part,
                            const lowbit_inputs *in, const int64_t *tile, int tiles, int64_t token,
                            int tokens, const lowbit_way *way, float *y) {
    _Alignas(64) uint8_t codes[TILES * LOWBIT_APART(ROWS)];
    _Alignas(64) int32_t found[2][2 * UPPER];
    _Alignas(64) int32_t sums[LOWBIT_BLOCK * TILES * ROWS];
    _Alignas(64) float partial[LOWBIT_BLOCK * TILES * ROWS];
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    const size_t bytes = (size_t)(tokens * tiles) * VECTOR;
    int begins = 1, turn = 0; /* begins: whether the piece begins a group */
    found_piece last = {0};
    memset(y, 0, bytes);
    if (part->pieces > part->groups) memset(sums, 0, bytes), memset(partial, 0, bytes);
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        found_piece f = {0};
        f.layer = layer, f.part = part, f.piece = piece, f.tile = tile;
        f.apart = in->pieces, f.tiles = tiles, f.halves = in->high ? 2 : 1;
        f.alone = begins && piece->ends_group;
        f.centered = unpack_tiles(&f, way->takes_signed, codes);
        begins = piece->ends_group;
        for (int m = 0; m < tokens; m += STEP, turn = !turn) {
            f.count = tokens - m < STEP ? tokens - m : STEP;
            /* The last tokens may be multiplied together with some before them. */
            const int back = way->whole && m ? STEP - f.count : 0;
            const int64_t first = token + m, at = first * in->pieces + p, start = m * tiles * ROWS;
            way->product(codes, tiles, f.centered, in, piece, first - back, f.count + back,
                         found[turn]);
            /* Sums are finished after the next products have begun, so that both run at once. */
            if (last.count) finish_tokens(&last);
            f.found = found[turn] + back * tiles * ROWS, f.sum = in->sum + at, f.step = in->step + at;
            f.to = (running){sums + start, partial + start, y + start};
            last = f;
        }
    }
    finish_tokens(&last);
}

#endif
