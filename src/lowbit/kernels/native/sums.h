/* The float steps after the integer sums, written once for all instruction sets: plain loops over
 * the rows of a tile. Everything is static, because each file compiles it with its own flags. */
#ifndef LOWBIT_SUMS_H
#define LOWBIT_SUMS_H

#include "lowbit_kernels.h"

#include <string.h>

static inline const uint8_t *scales_of(const lowbit_layer *layer, const lowbit_part *part,
                                       int64_t tile, int64_t group) {
    return (const uint8_t *)lowbit_at(layer, part->scales) +
           (tile * part->groups + group) * part->scale_stride;
}

static inline float scale_of(const uint8_t *scales, int bytes, int row) {
    if (bytes == 4) {
        float value;
        memcpy(&value, scales + 4 * row, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, scales + 2 * row, 2);
    return lowbit_half(half);
}

#endif
