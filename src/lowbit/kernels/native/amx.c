/* Products of several tokens with AMX: one instruction multiplies the bytes of 16 tokens and 64
 * inputs by those of 16 rows. The codes of a tile, unpacked to bytes, lie as it reads them. */

#include "lowbit_kernels.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)

#include "avx512.h"

#define FEWEST 8       /* tokens; VNNI multiplies fewer faster */
#define TOGETHER 64    /* inputs of an instruction */
#define TILE_BYTES 1024

/* The shape of the registers: palette 1, then bytes of a row and rows of each of eight. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

/* Registers 0 to 3 are sums, [token][row]. 4 and 5 are inputs, [token][input], and the others are
 * codes, [four inputs][row][4]. */
static void begin(int tokens) {
    shapes s = {0};
    s.palette = 1;
    for (int i = 0; i < 8; i++) s.bytes[i] = VECTOR, s.rows[i] = (uint8_t)(i < 6 ? tokens : ROWS);
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&s);
}

/* Registers are named by constants, so these are macros. */
#define MULTIPLY(sums, inputs, codes)                                                              \
    do {                                                                                           \
        if (is_signed)                                                                             \
            _tile_dpbssd(sums, inputs, codes);                                                     \
        else                                                                                       \
            _tile_dpbsud(sums, inputs, codes);                                                     \
    } while (0)
#define CLEAR_SUMS                                                                                 \
    do {                                                                                           \
        _tile_zero(0);                                                                             \
        _tile_zero(1);                                                                             \
        _tile_zero(2);                                                                             \
        _tile_zero(3);                                                                             \
    } while (0)
#define STORE(sums, to) _tile_stored(sums, to, across)

/* Two tiles, or one, and both halves of inputs. across: bytes from one token's sums to the next. */
INLINE void two_halves(const uint8_t *codes, int tiles, int is_signed, const int8_t *low,
                       const int8_t *high, int64_t apart, int steps, int64_t across,
                       int32_t *found) {
    const uint8_t *other = codes + LOWBIT_APART(ROWS);
    CLEAR_SUMS;
    for (int i = 0; i < steps; i++, low += TOGETHER, high += TOGETHER) {
        _tile_loadd(6, codes + i * TILE_BYTES, VECTOR);
        _tile_loadd(4, low, apart);
        MULTIPLY(0, 4, 6);
        _tile_loadd(5, high, apart);
        MULTIPLY(1, 5, 6);
        if (tiles == 2) {
            _tile_loadd(7, other + i * TILE_BYTES, VECTOR);
            MULTIPLY(2, 4, 7);
            MULTIPLY(3, 5, 7);
        }
    }
    STORE(0, found);
    STORE(1, found + UPPER);
    if (tiles == 2) {
        STORE(2, found + ROWS);
        STORE(3, found + UPPER + ROWS);
    }
}

/* Up to four tiles and inputs of one half. */
INLINE void one_half(const uint8_t *codes, int tiles, int is_signed, const int8_t *low,
                     int64_t apart, int steps, int64_t across, int32_t *found) {
    CLEAR_SUMS;
    for (int i = 0; i < steps; i++, low += TOGETHER, codes += TILE_BYTES) {
        _tile_loadd(4, low, apart);
        _tile_loadd(6, codes, VECTOR);
        MULTIPLY(0, 4, 6);
        if (tiles == 1) continue;
        _tile_loadd(7, codes + LOWBIT_APART(ROWS), VECTOR);
        MULTIPLY(1, 4, 7);
        if (tiles == 2) continue;
        _tile_loadd(6, codes + 2 * LOWBIT_APART(ROWS), VECTOR);
        MULTIPLY(2, 4, 6);
        _tile_loadd(7, codes + 3 * LOWBIT_APART(ROWS), VECTOR);
        MULTIPLY(3, 4, 7);
    }
    STORE(0, found);
    if (tiles == 1) return;
    STORE(1, found + ROWS);
    if (tiles == 2) return;
    STORE(2, found + 2 * ROWS);
    STORE(3, found + 3 * ROWS);
}

INLINE void product(const uint8_t *codes, int tiles, int is_signed, const lowbit_inputs *in,
                    const lowbit_piece *piece, int64_t token, int32_t *found) {
    const int64_t at = token * in->padded + piece->begin, across = (int64_t)tiles * VECTOR;
    const int steps = (piece->length + TOGETHER - 1) / TOGETHER;
    const int8_t *low = in->low + at, *high = in->high ? in->high + at : NULL;
    if (in->high) {
        for (int t = 0; t < tiles; t += 2, codes += 2 * LOWBIT_APART(ROWS), found += 2 * ROWS) {
            if (tiles > 1)
                two_halves(codes, 2, is_signed, low, high, in->padded, steps, across, found);
            else
                two_halves(codes, 1, is_signed, low, high, in->padded, steps, across, found);
        }
        return;
    }
    switch (tiles) {
    case 1: one_half(codes, 1, is_signed, low, in->padded, steps, across, found); break;
    case 2: one_half(codes, 2, is_signed, low, in->padded, steps, across, found); break;
    default: one_half(codes, 4, is_signed, low, in->padded, steps, across, found);
    }
}

static void any_product(const uint8_t *codes, int tiles, int is_signed, const lowbit_inputs *in,
                        const lowbit_piece *piece, int64_t token, int count, int32_t *found) {
    (void)count; /* the registers have that many rows */
    __asm__ volatile("" ::: "memory"); /* codes are stored before they are loaded */
    if (is_signed)
        product(codes, tiles, 1, in, piece, token, found);
    else
        product(codes, tiles, 0, in, piece, token, found);
    __asm__ volatile("" ::: "memory");
}

static void multiply(const lowbit_layer *layer, const lowbit_part *part, const lowbit_inputs *in,
                     const int64_t *tile, int tiles, int64_t token, int tokens, float *y) {
    static const lowbit_way way = {any_product, 1, 1};
    if (tokens < FEWEST) {
        lowbit_avx512.multiply(layer, part, in, tile, tiles, token, tokens, y);
        return;
    }
    begin(tokens < STEP ? tokens : STEP);
    lowbit_multiply_tokens(layer, part, in, tile, tiles, token, tokens, &way, y);
    _tile_release();
}

static void bytes(const uint8_t *codes, int tiles, const lowbit_inputs *in,
                  const lowbit_piece *piece, int64_t token, int tokens, int32_t *sums) {
    _Alignas(64) int32_t found[2 * UPPER];
    begin(tokens);
    any_product(codes, tiles, 0, in, piece, token, tokens, found);
    _tile_release();
    lowbit_sum_halves(found, (int64_t)tokens * tiles * ROWS, in->high ? 2 : 1, sums);
}

static void round_inputs(const lowbit_layer *layer, const lowbit_part *part, const float *x,
                         int64_t stride, const lowbit_inputs *in, int64_t begin, int64_t end) {
    lowbit_avx512.round(layer, part, x, stride, in, begin, end);
}

const lowbit_set lowbit_amx = {
    ROWS, LOWBIT_STREAMS, LOWBIT_STREAMS, 0, round_inputs, multiply, bytes, lowbit_avx512_floats};

#else

const lowbit_set lowbit_amx = {0}; /* not compiled for this processor */

#endif
