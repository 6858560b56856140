/* Rounds inputs to integers. The instruction sets include this file, each compiles it with its own
 * flags, and the compiler makes vector code of it; therefore everything is static. All steps are
 * exact or IEEE operations in a fixed order, so that the results are equal bit by bit. */
#ifndef LOWBIT_ROUNDING_H
#define LOWBIT_ROUNDING_H

#include "lowbit_kernels.h"

#include <string.h>

#define LOWBIT_LARGEST 1.2676506e30f /* 2^100; sums of larger inputs might overflow */
#define LOWBIT_TO_INT 12582912.0f    /* 1.5 * 2^23: adding it rounds to an integer, ties to even */

static inline int32_t float_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float bits_float(int32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The largest |x|; NaN and infinity are larger than all numbers. Magnitudes of floats compare as
 * integers do, and the maximum of integers is vector code. */
static float largest(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = float_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return bits_float(most);
}

/* An order of integers that is the order of floats; its own inverse. */
static inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

static void range_of(const float *x, int64_t count, float *low, float *high) {
    int32_t least = 0, most = 0; /* the range always includes 0 */
    for (int64_t i = 0; i < count; i++) {
        int32_t value = ordered(float_bits(x[i]));
        least = value < least ? value : least;
        most = value > most ? value : most;
    }
    *low = bits_float(ordered(least)), *high = bits_float(most);
}

/* q = round(x / step) + zero within [least, most], minus zero. */
typedef struct {
    float step, zero, least, most;
} lowbit_grid;

static void quantize(const float *x, int64_t count, lowbit_grid grid, int16_t *q) {
    /* The ratio is clamped first, because adding LOWBIT_TO_INT rounds below 2^22 only. */
    float bound = 2097152.0f;
    for (int64_t i = 0; i < count; i++) {
        float ratio = x[i] / grid.step;
        ratio = ratio > bound ? bound : ratio;
        ratio = ratio < -bound ? -bound : ratio;
        float code = (ratio + LOWBIT_TO_INT) - LOWBIT_TO_INT + grid.zero;
        code = code > grid.most ? grid.most : code;
        code = code < grid.least ? grid.least : code;
        q[i] = (int16_t)(int32_t)(code - grid.zero);
    }
}

static lowbit_grid symmetric_grid(float most, int32_t top) {
    lowbit_grid grid = {most / (float)top, 0, -(float)top, (float)top};
    return grid;
}

/* The grid of kernels/tokens.py. */
static lowbit_grid token_grid(const float *x, int64_t count, int32_t top, int symmetric) {
    float low, high;
    range_of(x, count, &low, &high);
    float span = symmetric ? 2 * (high > -low ? high : -low) : high - low;
    float step = span / (float)top;
    if (step < 1.17549435e-38f) step = 1.17549435e-38f;
    lowbit_grid grid = {span > 0 ? step : 1, 0, 0, (float)top};
    float ratio = -low / grid.step;
    grid.zero = symmetric ? (float)((top + 1) / 2) : (ratio + LOWBIT_TO_INT) - LOWBIT_TO_INT;
    return grid;
}

/* Brings the integers of a piece into the order of the inputs of words. */
static void order_for_words(int16_t *q, int32_t length) {
    for (int16_t here[32]; length > 0; length -= 32, q += 32) {
        memcpy(here, q, sizeof(here));
        for (int c = 0; c < 8; c++)
            for (int w = 0; w < 4; w++) q[4 * c + w] = here[8 * w + c];
    }
}

/* Stores the integers of a piece and returns their sum. */
static int32_t store_piece(const int16_t *q, const lowbit_piece *piece, const lowbit_inputs *in,
                           int64_t token) {
    int64_t at = token * in->padded + piece->begin;
    int32_t sum = 0, length = piece->length;
    int8_t *restrict low = in->low + at;
    for (int32_t i = 0; i < length; i++) sum += q[i];
    if (in->high == NULL) {
        for (int32_t i = 0; i < length; i++) low[i] = (int8_t)q[i];
    } else {
        int8_t *restrict high = in->high + at;
        for (int32_t i = 0; i < length; i++) {
            int16_t upper = (int16_t)((q[i] + 64) >> 7);
            high[i] = (int8_t)upper;
            low[i] = (int8_t)(q[i] - 128 * upper);
        }
    }
    if (in->wide != NULL) {
        for (int32_t i = 0; i < piece->length; i += 4) {
            int16_t *four = in->wide + at + i;
            four[0] = q[i], four[1] = q[i + 2], four[2] = q[i + 1], four[3] = q[i + 3];
        }
    }
    return sum;
}

static void round_token(const lowbit_layer *layer, const lowbit_part *part, const float *x,
                        const lowbit_inputs *in, int64_t token) {
    const lowbit_spec *spec = &part->spec;
    const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
    const float *columns = part->columns ? lowbit_at(layer, part->columns) : NULL;
    float scaled[LOWBIT_PIECE], total = 0;
    int16_t q[LOWBIT_PIECE];
    lowbit_grid grid = {1, 0, 0, 0};
    float most = 0;
    int large = spec->rounding == LOWBIT_EXACT ? 0 : 1;
    int broken = 0, is_large = 0;
    if (spec->rounding == LOWBIT_TOKENS) {
        most = largest(x, spec->inputs);
        if (most <= 3.402823466e38f)
            grid = token_grid(x, spec->inputs, spec->top, spec->symmetric);
    }
    for (int64_t p = 0; p < part->pieces; p++, piece++) {
        const float *values = x + piece->source;
        if (columns != NULL) {
            for (int32_t i = 0; i < piece->count; i++)
                scaled[i] = values[i] * columns[piece->source + i];
            values = scaled;
        }
        if (spec->rounding != LOWBIT_TOKENS && piece->span) {
            most = largest(values, piece->span);
            grid = symmetric_grid(most, spec->top);
        }
        int finite = most <= 3.402823466e38f;
        broken |= !finite;
        is_large |= large && most > LOWBIT_LARGEST;
        memset(q, 0, sizeof(q));
        if (finite && grid.step > 0) quantize(values, piece->count, grid, q);
        if (spec->kind == LOWBIT_WORDS) order_for_words(q, piece->length);
        int32_t sum = store_piece(q, piece, in, token);
        in->step[token * in->pieces + p] = grid.step;
        in->sum[token * in->pieces + p] = sum;
        total += grid.step * (float)sum;
    }
    in->total[token] = total;
    in->state[token] = (uint8_t)(broken ? LOWBIT_BROKEN : is_large ? LOWBIT_LARGE : LOWBIT_FINE);
}

static void round_inputs(const lowbit_layer *layer, const lowbit_part *part, const float *x,
                         int64_t stride, const lowbit_inputs *in, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++)
        round_token(layer, part, x + token * stride + part->spec.first, in, token);
}

#endif
