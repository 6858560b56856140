/* Decodes trellis codes in plain C: the definition. */

#include "trellis.h"

#include <stddef.h>

void lowbit_decode_portable(const lowbit_code *code, const uint8_t *tile, int64_t tiles,
                            uint8_t *codes) {
    const int size = LOWBIT_TILE * LOWBIT_TILE, steps = size / code->values;
    for (int64_t i = 0; i < tiles; i++, tile += code->bytes, codes += size) {
        for (int t = 0; t < steps; t++) {
            uint32_t state = lowbit_window(code, tile, t * code->shift);
            for (int v = 0; v < code->values; v++) {
                int column = (t + v * steps) / LOWBIT_TILE, row = t % LOWBIT_TILE;
                uint32_t mixed = state * code->multiplier[v] & LOWBIT_SUM6_BITS;
                mixed = (mixed & 0x00ff00ffu) + (mixed >> 8 & 0x00ff00ffu);
                codes[(column / 4 * LOWBIT_TILE + row) * 4 + column % 4] =
                    (uint8_t)((mixed + (mixed >> 16)) & 0xff);
            }
        }
    }
}

const lowbit_trellis_set lowbit_trellis_portable = {lowbit_decode_portable, NULL, 0};
