/* Products with trellis codes in plain C: the definition. */

#include "trellis.h"

/* The values of a tile plus LOWBIT_SUM6_MEAN: [column][row]. */
static void decode(const lowbit_code *code, const uint8_t *tile, uint8_t *values) {
    int steps = LOWBIT_TILE * LOWBIT_TILE / code->values;
    for (int t = 0; t < steps; t++) {
        uint32_t state = lowbit_window(code, tile, t * code->shift);
        for (int v = 0; v < code->values; v++) {
            uint32_t mixed = state * code->multiplier[v] & LOWBIT_SUM6_BITS;
            mixed = (mixed & 0x00ff00ffu) + (mixed >> 8 & 0x00ff00ffu);
            values[t + v * steps] = (uint8_t)((mixed + (mixed >> 16)) & 0xff);
        }
    }
}

void lowbit_trellis_portable(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                             const uint32_t *low, const uint32_t *high, int64_t apart, int tokens,
                             int32_t *sums) {
    uint8_t values[LOWBIT_TILE * LOWBIT_TILE];
    for (int64_t i = 0; i < tiles; i++, tile += code->bytes) {
        decode(code, tile, values);
        for (int m = 0; m < tokens; m++) {
            for (int c = 0; c < LOWBIT_TILE; c++) {
                int64_t at = m * apart + i * LOWBIT_TILE + c;
                int32_t q = (int8_t)(low[at] & 0xff);
                if (high) q += 128 * (int8_t)(high[at] & 0xff);
                for (int row = 0; row < LOWBIT_TILE; row++)
                    sums[m * LOWBIT_TILE + row] += q * values[c * LOWBIT_TILE + row];
            }
        }
    }
}
