/* Products in plain C, for every processor, and the oracle for the other instruction sets. */

#include "rounding.h"
#include "sums.h"

#define ROWS 8

/* Adds the products of a piece to the integer sums of the rows of a tile. */
static inline void add_piece(const uint8_t *codes, int rows, const lowbit_inputs *in,
                             const lowbit_piece *piece, int64_t token, uint32_t *sums) {
    const int8_t *low = in->low + token * in->padded + piece->begin;
    const int8_t *high = in->high ? in->high + token * in->padded + piece->begin : NULL;
    for (int32_t i = 0; i < piece->length; i++) {
        int32_t q = high ? 128 * high[i] + low[i] : low[i];
        const uint8_t *four = codes + i / 4 * 4 * rows + i % 4;
        for (int row = 0; row < rows; row++) sums[row] += (uint32_t)(q * four[4 * row]);
    }
}

/* Continues the sums of one token: y + scale * partial, where partial + step * sums. */
static void finish_piece(const lowbit_layer *layer, const lowbit_part *part,
                         const lowbit_inputs *in, const lowbit_piece *piece, int64_t tile,
                         int64_t token, int64_t number, uint32_t *sums, float *partial, float *y) {
    const lowbit_spec *spec = &part->spec;
    const uint8_t *scales = scales_of(layer, part, tile, piece->group);
    int32_t sum = in->sum[token * in->pieces + number];
    float step = in->step[token * in->pieces + number];
    for (int row = 0; row < ROWS; row++) {
        int32_t zero = spec->has_zeros ? scales[ROWS * spec->scale_bytes + row] : spec->zero;
        sums[row] -= (uint32_t)zero * (uint32_t)sum;
        if (!piece->ends_sum) continue;
        partial[row] += (float)(int32_t)sums[row] * step;
        sums[row] = 0;
        if (!piece->ends_group) continue;
        y[row] += partial[row] * scale_of(scales, spec->scale_bytes, row);
        partial[row] = 0;
    }
}

static void multiply(const lowbit_layer *layer, const lowbit_part *part, const lowbit_inputs *in,
                     const int64_t *tile, int tiles, int64_t token, int tokens, float *y) {
    uint8_t codes[(LOWBIT_PIECE + LOWBIT_PADDING) * ROWS];
    uint32_t sums[LOWBIT_BLOCK][ROWS];
    float partial[LOWBIT_BLOCK][ROWS];
    for (int t = 0; t < tiles; t++) {
        const lowbit_piece *piece = lowbit_at(layer, part->piece_table);
        memset(sums, 0, sizeof(sums));
        memset(partial, 0, sizeof(partial));
        for (int m = 0; m < tokens; m++) memset(y + (m * tiles + t) * ROWS, 0, ROWS * sizeof(float));
        for (int64_t p = 0; p < part->pieces; p++, piece++) {
            lowbit_unpack_piece(layer, part, tile[t], piece, codes);
            for (int m = 0; m < tokens; m++) {
                uint32_t here[ROWS] = {0};
                add_piece(codes, ROWS, in, piece, token + m, here);
                for (int row = 0; row < ROWS; row++)
                    sums[m][row] += here[row] << part->spec.shift;
                finish_piece(layer, part, in, piece, tile[t], token + m, p, sums[m], partial[m],
                             y + (m * tiles + t) * ROWS);
            }
        }
    }
}

void lowbit_plain_bytes(const uint8_t *codes, int rows, int tiles, const lowbit_inputs *in,
                        const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    memset(sums, 0, (size_t)(tokens * tiles * rows) * sizeof(*sums));
    for (int m = 0; m < tokens; m++)
        for (int t = 0; t < tiles; t++, sums += rows)
            add_piece(codes + t * LOWBIT_APART(rows), rows, in, piece, token + m, (uint32_t *)sums);
}

static void bytes(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                  const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    lowbit_plain_bytes(codes, ROWS, tiles, in, piece, token, tokens, sums);
}

void lowbit_plain_floats(const lowbit_layer *layer, const lowbit_part *part, int64_t tile,
                         const float *x, int64_t stride, int tokens, float *y, int64_t apart) {
    const int rows = layer->rows, size = part->spec.scale_bytes;
    const uint8_t *weights = (const uint8_t *)lowbit_at(layer, part->scales) +
                             tile * part->spec.inputs * rows * size;
    for (int64_t i = 0; i < part->spec.inputs; i++, weights += rows * size)
        for (int m = 0; m < tokens; m++)
            for (int row = 0; row < rows; row++)
                y[m * apart + row] += x[m * stride + i] * scale_of(weights, size, row);
}

const lowbit_set lowbit_portable = {ROWS,         1,        1,     0,
                                    round_inputs, multiply, bytes, lowbit_plain_floats};
