/* The orthogonal transforms of kernels/hadamard: what their files share. Each instruction set
 * includes this file and compiles it with its own flags; before it, the file defines
 *
 *     static int64_t short_steps(float *values, int64_t n, int64_t power)
 *
 * which makes the first steps of the transforms of n / power runs, in which values nearer than a
 * vector are added, and returns the distance of the next step. Every value is the result of the same
 * operations in all files. */
#ifndef LOWBIT_TRANSFORM_H
#define LOWBIT_TRANSFORM_H

#include "lowbit_kernels.h"

#include <string.h>

/* y = after * scale * (M (x) I)(I (x) H)(before * x) for a token, where H is the Sylvester matrix of
 * `power` rows and M has n / power rows. matrix, before, after: NULL where they are 1. */
typedef struct {
    int64_t n, power;
    const float *matrix;
    float scale;
    const float *before, *after;
} lowbit_transform_call;

/* Transforms tokens, x to y. spare: n floats, if there is a matrix. */
typedef void (*lowbit_transform_tokens)(const lowbit_transform_call *, const float *x, float *y,
                                        int64_t tokens, float *spare);

void lowbit_transform_portable(const lowbit_transform_call *, const float *, float *, int64_t,
                               float *);
void lowbit_transform_avx2(const lowbit_transform_call *, const float *, float *, int64_t, float *);
void lowbit_transform_avx512(const lowbit_transform_call *, const float *, float *, int64_t,
                             float *);

#if defined(LOWBIT_TRANSFORM)

/* Replaces each run of `power` values by the sums of its Sylvester-Hadamard transform. */
static void butterflies(float *values, int64_t n, int64_t power) {
    for (int64_t half = short_steps(values, n, power); half < power; half *= 2) {
        for (int64_t start = 0; start < n; start += 2 * half) {
            float *restrict a = values + start, *restrict b = values + start + half;
            for (int64_t i = 0; i < half; i++) {
                float sum = a[i] + b[i];
                b[i] = a[i] - b[i];
                a[i] = sum;
            }
        }
    }
}

/* to[i][column] = sum over j of matrix[i][j] * from[j][column], for all `power` columns. */
static void mix(const float *matrix, int64_t order, const float *restrict from, int64_t power,
                float *restrict to) {
    memset(to, 0, (size_t)(order * power) * sizeof(float));
    for (int64_t i = 0; i < order; i++, to += power, matrix += order) {
        int64_t j = 0;
        for (; j + 4 <= order; j += 4) { /* four at a time: `to` is read and written less often */
            const float *rows = from + j * power;
            for (int64_t c = 0; c < power; c++) {
                float sum = to[c] + matrix[j] * rows[c];
                sum += matrix[j + 1] * rows[power + c];
                sum += matrix[j + 2] * rows[2 * power + c];
                to[c] = sum + matrix[j + 3] * rows[3 * power + c];
            }
        }
        for (; j < order; j++)
            for (int64_t c = 0; c < power; c++) to[c] += matrix[j] * from[j * power + c];
    }
}

void LOWBIT_TRANSFORM(const lowbit_transform_call *call, const float *restrict x, float *y,
                      int64_t tokens, float *spare) {
    const int64_t n = call->n;
    for (int64_t token = 0; token < tokens; token++, x += n, y += n) {
        float *values = call->matrix ? spare : y;
        for (int64_t i = 0; i < n; i++) values[i] = call->before ? x[i] * call->before[i] : x[i];
        butterflies(values, n, call->power);
        if (call->matrix) mix(call->matrix, n / call->power, values, call->power, y);
        for (int64_t i = 0; i < n; i++) y[i] = y[i] * call->scale;
        if (call->after)
            for (int64_t i = 0; i < n; i++) y[i] = y[i] * call->after[i];
    }
}

#endif

#endif
