/* Products with trellis codes: what their files share. formats/trellis describes the code.
 *
 * A strip is 16 rows: its tiles follow each other along the inputs. Step t of a tile means row
 * t % 16 of column t / 16, and, with two values, of column t / 16 + 8. A value is the sum of the
 * lower 6 bits of the 4 bytes of state * multiplier, minus 126. */
#ifndef LOWBIT_TRELLIS_H
#define LOWBIT_TRELLIS_H

#include "lowbit_kernels.h"

#define LOWBIT_TILE 16
#define LOWBIT_SUM6_BITS 0x3f3f3f3fu
#define LOWBIT_SUM6_MEAN 126

typedef struct {
    int32_t state_bits, shift, values;
    int32_t bytes; /* of a tile */
    uint32_t multiplier[2];
} lowbit_code;

/* Adds the products of the tiles of a piece of the inputs of one token to sums[row]. The sums are of
 * the values plus LOWBIT_SUM6_MEAN.
 * low, high: q = 128 * high + low, each q repeated in the four bytes of a word; high is NULL with one
 * half. Where columns are multiplied in pairs, every second word holds two bytes of its own q and two
 * of the next. */
typedef void (*lowbit_trellis_piece)(const lowbit_code *, const uint8_t *tile, int64_t tiles,
                                     const uint32_t *low, const uint32_t *high, int32_t *sums);

/* Writes the values of some tiles plus LOWBIT_SUM6_MEAN: codes[column / 4][row][column % 4]. */
typedef void (*lowbit_trellis_decode)(const lowbit_code *, const uint8_t *tile, int64_t tiles,
                                      uint8_t *codes);

typedef struct {
    lowbit_trellis_decode decode;
    lowbit_trellis_piece add; /* faster than decoding for one token; NULL: there is none */
    int pairs;                /* whether `add` multiplies columns in pairs */
} lowbit_trellis_set;

extern const lowbit_trellis_set lowbit_trellis_portable;
extern const lowbit_trellis_set lowbit_trellis_avx512;
extern const lowbit_trellis_set lowbit_trellis_vbmi;

void lowbit_decode_portable(const lowbit_code *, const uint8_t *, int64_t, uint8_t *);

/* The number in the state_bits bits from bit `first` on, in a ring of `bytes` bytes. */
static inline uint32_t lowbit_window(const lowbit_code *code, const uint8_t *tile, int first) {
    uint32_t word = 0;
    for (int i = 0; i < 3; i++)
        word |= (uint32_t)tile[(first / 8 + i) % code->bytes] << 8 * i;
    return word >> first % 8 & ((1u << code->state_bits) - 1);
}

#endif
