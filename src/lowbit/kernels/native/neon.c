/* Products with NEON's dot products (ARMv8.2 dotprod): four products of bytes and their sum in each
 * of four rows at once. A tile of 8 rows is two registers. */

#include "lowbit_kernels.h"

#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_NEON)

#include "inline.h"
#include "rounding.h"
#include "sums.h"

#include <arm_neon.h>

#define ROWS 8
#define VECTOR 32
#define AHEAD 1024 /* bytes that are prefetched ahead of a plane */
#define TOKENS 4   /* tokens of a step */

/* Integers or floats of the rows of a tile. */
typedef struct {
    int32x4_t half[2];
} row_ints;

/* Sums of one token, as integers and as floats, while the pieces pass. */
typedef struct {
    row_ints sums;
    float32x4_t partial[2], y[2];
} row_sums;

INLINE float32x4_t row_scales(const uint8_t *scales, int bytes, int half) {
    if (bytes == 4) {
        float32x4_t values;
        memcpy(&values, scales + 16 * half, 16);
        return values;
    }
    uint16x4_t halves;
    memcpy(&halves, scales + 8 * half, 8);
    return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

/* The same steps as in portable.c, in the same order. */
INLINE void finish_piece(const lowbit_spec *spec, const lowbit_piece *piece, const uint8_t *scales,
                         int32_t sum, float step, row_ints product, row_sums *to) {
    int32x4_t zero[2] = {vdupq_n_s32(spec->zero), vdupq_n_s32(spec->zero)};
    if (spec->has_zeros) {
        uint16x8_t wide = vmovl_u8(vld1_u8(scales + ROWS * spec->scale_bytes));
        zero[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
        zero[1] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(wide)));
    }
    for (int h = 0; h < 2; h++) {
        int32x4_t here = vshlq_s32(product.half[h], vdupq_n_s32(spec->shift));
        here = vmlsq_s32(here, zero[h], vdupq_n_s32(sum));
        to->sums.half[h] = vaddq_s32(to->sums.half[h], here);
        if (!piece->ends_sum) continue;
        float32x4_t value = vmulq_f32(vcvtq_f32_s32(to->sums.half[h]), vdupq_n_f32(step));
        to->partial[h] = vaddq_f32(to->partial[h], value);
        to->sums.half[h] = vdupq_n_s32(0);
        if (!piece->ends_group) continue;
        float32x4_t scaled = vmulq_f32(to->partial[h], row_scales(scales, spec->scale_bytes, h));
        to->y[h] = vaddq_f32(to->y[h], scaled);
        to->partial[h] = vdupq_n_f32(0);
    }
}

/* Field f of the bytes of a plane. Both operands of a dot product are signed: codes of 8 bits lie
 * 128 lower, which `plane_products` makes up for. */
INLINE int8x16_t field_of(uint8x16_t bytes, int width, int f) {
    if (width == 8) return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
    uint8x16_t shifted = vshlq_u8(bytes, vdupq_n_s8((int8_t)(-f * width)));
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((uint8_t)((1 << width) - 1))));
}

INLINE int8x16_t four_inputs(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

/* Adds the products of a piece of a plane with `count` tokens, which lie `apart` bytes apart. */
INLINE void plane_products(const uint8_t *vector, int width, int low_bit, int32_t length,
                           const int8_t *low, const int8_t *high, int64_t apart, int count,
                           row_ints *products) {
    const int fields = 8 / width;
    int32x4_t lows[TOKENS][2], highs[TOKENS][2];
    UNROLL(8)
    for (int m = 0; m < count; m++)
        lows[m][0] = lows[m][1] = highs[m][0] = highs[m][1] = vdupq_n_s32(0);
    for (int32_t i = 0; i < length; i += 4 * fields, vector += VECTOR) {
        uint8x16_t bytes[2] = {vld1q_u8(vector), vld1q_u8(vector + 16)};
        __builtin_prefetch(vector + AHEAD);
        UNROLL(8)
        for (int f = 0; f < fields; f++) {
            int8x16_t first = field_of(bytes[0], width, f), second = field_of(bytes[1], width, f);
            UNROLL(8)
            for (int m = 0; m < count; m++) {
                int8x16_t q = four_inputs(low + m * apart + i + 4 * f);
                lows[m][0] = vdotq_s32(lows[m][0], first, q);
                lows[m][1] = vdotq_s32(lows[m][1], second, q);
                if (high != NULL) {
                    q = four_inputs(high + m * apart + i + 4 * f);
                    highs[m][0] = vdotq_s32(highs[m][0], first, q);
                    highs[m][1] = vdotq_s32(highs[m][1], second, q);
                }
            }
        }
    }
    int32x4_t up = vdupq_n_s32(low_bit);
    UNROLL(8)
    for (int m = 0; m < count; m++) {
        for (int h = 0; h < 2; h++) {
            int32x4_t here = lows[m][h];
            if (high != NULL) here = vaddq_s32(here, vshlq_n_s32(highs[m][h], 7));
            products[m].half[h] = vaddq_s32(products[m].half[h], vshlq_s32(here, up));
        }
    }
}

INLINE void any_plane_products(const uint8_t *vector, int width, int low_bit, int32_t length,
                               const int8_t *low, const int8_t *high, int64_t apart, int count,
                               row_ints *products) {
    switch (width) {
    case 8: plane_products(vector, 8, low_bit, length, low, high, apart, count, products); break;
    case 4: plane_products(vector, 4, low_bit, length, low, high, apart, count, products); break;
    case 2: plane_products(vector, 2, low_bit, length, low, high, apart, count, products); break;
    default: plane_products(vector, 1, low_bit, length, low, high, apart, count, products);
    }
}

/* Multiplies a tile by a piece of `count` tokens, and continues their sums. */
INLINE void multiply_piece(const lowbit_layer *layer, const lowbit_part *part,
                           const lowbit_inputs *in, const lowbit_piece *piece, int64_t number,
                           int64_t tile, int64_t token, int count, row_sums *to) {
    const int8_t *low = in->low + token * in->padded + piece->begin;
    const int8_t *high = in->high ? in->high + token * in->padded + piece->begin : NULL;
    row_ints products[TOKENS];
    UNROLL(8)
    for (int m = 0; m < count; m++)
        products[m].half[0] = products[m].half[1] = vdupq_n_s32(0);
    for (int i = 0; i < part->planes; i++) {
        int width = part->width[i];
        const uint8_t *vector = (const uint8_t *)lowbit_at(layer, part->plane[i]) +
                                tile * part->tile_bytes[i] +
                                (int64_t)piece->begin / 32 * width * VECTOR;
        if (high == NULL)
            any_plane_products(vector, width, part->low[i], piece->length, low, NULL, in->padded,
                               count, products);
        else
            any_plane_products(vector, width, part->low[i], piece->length, low, high, in->padded,
                               count, products);
    }
    for (int m = 0; m < count; m++) {
        int64_t at = (token + m) * in->pieces + number;
        if (part->width[0] == 8) { /* its codes were 128 lower */
            int32x4_t more = vdupq_n_s32(128 * in->sum[at]);
            for (int h = 0; h < 2; h++)
                products[m].half[h] = vaddq_s32(products[m].half[h], more);
        }
        finish_piece(&part->spec, piece, scales_of(layer, part, tile, piece->group), in->sum[at],
                     in->step[at], products[m], &to[m]);
    }
}

static void multiply(const lowbit_layer *layer, const lowbit_part *part, const lowbit_inputs *in,
                     const int64_t *tile, int tiles, int64_t token, int tokens, float *y) {
    row_sums sums[LOWBIT_BLOCK];
    for (int t = 0; t < tiles; t++) {
        const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
        memset(sums, 0, sizeof(row_sums) * (size_t)tokens);
        for (int64_t p = 0; p < part->pieces; p++, piece++) {
            int m = 0;
            for (; m + TOKENS <= tokens; m += TOKENS)
                multiply_piece(layer, part, in, piece, p, tile[t], token + m, TOKENS, &sums[m]);
            for (; m < tokens; m++)
                multiply_piece(layer, part, in, piece, p, tile[t], token + m, 1, &sums[m]);
        }
        for (int m = 0; m < tokens; m++)
            for (int h = 0; h < 2; h++)
                vst1q_f32(y + (m * tiles + t) * ROWS + 4 * h, sums[m].y[h]);
    }
}

static void bytes(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                  const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    lowbit_plain_bytes(codes, ROWS, tiles, in, piece, token, tokens, sums);
}

const lowbit_set lowbit_neon = {ROWS,         1,        1,     0,
                                round_inputs, multiply, bytes, lowbit_plain_floats};

#else

const lowbit_set lowbit_neon = {0}; /* not compiled for this processor */

#endif
