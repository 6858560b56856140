/* Compares an instruction set with plain C, bit by bit: the only test that runs without Python, so
 * that it can run on an emulated processor. Its argument is the number of the set. Prints how many
 * layers it compared; exits with 1 if the processor lacks the set, and with 2 if a bit differs. */

#include "lowbit_kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *),
                                void *);
int32_t lowbit_has(int32_t set);
int32_t lowbit_rows(int32_t set);
int64_t lowbit_layout(lowbit_layer *, const lowbit_spec *, int32_t, int64_t, int32_t);
void lowbit_begin(void *, const lowbit_layer *);
void lowbit_codes(void *, int32_t, uint8_t *, int64_t, int32_t, int64_t, int64_t, int32_t);
void lowbit_scales(void *, int32_t, const uint8_t *, const uint8_t *);
int32_t lowbit_multiply(const float *, int64_t, int64_t, int32_t, int32_t,
                        const lowbit_layer *const *, float *const *, parallel_for);

enum { OUTPUTS = 37, TOKENS = 21, MOST_INPUTS = 1100 };

static uint64_t state = 88172645463325252u;

static uint64_t draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* Packs codes, scales and zero points that are the same in every call with the same seed. */
static void *packed(const lowbit_spec *spec, int32_t set, uint64_t seed, int top) {
    lowbit_layer layer;
    int64_t bytes = lowbit_layout(&layer, spec, 1, OUTPUTS, lowbit_rows(set));
    void *blob = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    lowbit_begin(blob, &layer);
    state = seed;
    int64_t groups = layer.part[0].groups, stride = spec->inputs;
    uint8_t *codes = malloc((size_t)(OUTPUTS * stride)), *zeros = malloc((size_t)(OUTPUTS * groups));
    uint16_t *scales = malloc((size_t)(OUTPUTS * groups) * 2);
    for (int64_t i = 0; i < OUTPUTS * stride; i++)
        codes[i] = (uint8_t)((top ? 255 : draw()) & ((1u << spec->bits) - 1));
    for (int64_t i = 0; i < OUTPUTS * groups; i++) {
        scales[i] = (uint16_t)(0x1400 + draw() % 2048);
        zeros[i] = (uint8_t)(draw() & ((1u << spec->bits) - 1));
    }
    lowbit_codes(blob, 0, codes, stride, 8, 0, OUTPUTS, 0);
    lowbit_scales(blob, 0, (const uint8_t *)scales, spec->has_zeros ? zeros : NULL);
    free(codes), free(scales), free(zeros);
    return blob;
}

static int equal(const lowbit_spec *spec, int32_t set, int top) {
    static float x[TOKENS * MOST_INPUTS], wanted[TOKENS * OUTPUTS], found[TOKENS * OUTPUTS];
    void *plain = packed(spec, 0, 1234567, top), *other = packed(spec, set, 1234567, top);
    for (int64_t i = 0; i < TOKENS * spec->inputs; i++)
        x[i] = top ? -3.0f : (float)((int64_t)(draw() >> 40) - (1 << 23)) / (1 << 22);
    const lowbit_layer *a = plain, *b = other;
    float *to = wanted;
    lowbit_multiply(x, TOKENS, spec->inputs, 0, 1, &a, &to, NULL);
    int same = 1;
    for (int64_t tokens = 1; tokens <= TOKENS; tokens = 4 * tokens + 1) {
        to = found;
        lowbit_multiply(x, tokens, spec->inputs, set, 1, &b, &to, NULL);
        same &= !memcmp(wanted, found, (size_t)tokens * OUTPUTS * sizeof(float));
    }
    free(plain), free(other);
    return same;
}

int main(int count, char **arguments) {
    static const int64_t shapes[][2] = {{96, 32}, {256, 128}, {160, 64}, {100, 48}, {1100, 1100}};
    int32_t set = count > 1 ? atoi(arguments[1]) : 0, compared = 0;
    if (!lowbit_has(set)) return 1;
    for (int bits = 1; bits <= 8; bits++) {
        for (size_t shape = 0; shape < sizeof(shapes) / sizeof(*shapes); shape++) {
            for (int variant = 0; variant < 12; variant++) {
                lowbit_spec spec = {0};
                spec.inputs = shapes[shape][0], spec.group_size = shapes[shape][1];
                spec.bits = bits, spec.scale_bytes = 2, spec.has_zeros = variant % 2;
                spec.zero = 1 << (bits - 1), spec.shift = bits < 8 && variant % 4 == 3;
                spec.unit = 1, spec.halves = 1 + variant / 4 % 2;
                spec.top = spec.halves == 2 ? 16200 : 127;
                compared++;
                if (!equal(&spec, set, variant >= 8)) {
                    printf("%d bits, %d inputs in groups of %d, variant %d: other bits\n", bits,
                           (int)spec.inputs, (int)spec.group_size, variant);
                    return 2;
                }
            }
        }
    }
    printf("%d\n", compared);
    return 0;
}
