/* The orthogonal transforms of kernels/hadamard, for inputs and outputs of lattice layers. */

#include "lowbit_kernels.h"

#include <string.h>

/* Replaces each run of `power` values by the sums of its Sylvester-Hadamard transform. */
static void butterflies(float *values, int64_t n, int64_t power) {
    for (int64_t half = 1; half < power; half *= 2) {
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

/* For each token: y = after * scale * (M (x) I)(I (x) H)(before * x), where H is the Sylvester matrix
 * of `power` rows and M has n / power rows. Vectors are read and written token by token.
 * matrix, before, after: NULL where they are 1. spare: n floats. */
LOWBIT_EXPORT void lowbit_transform(const float *x, float *y, int64_t tokens, int64_t n,
                                    int64_t power, const float *matrix, float scale,
                                    const float *before, const float *after, float *spare) {
    for (int64_t token = 0; token < tokens; token++, x += n, y += n) {
        float *values = matrix ? spare : y;
        for (int64_t i = 0; i < n; i++) values[i] = before ? x[i] * before[i] : x[i];
        butterflies(values, n, power);
        if (matrix) mix(matrix, n / power, values, power, y);
        for (int64_t i = 0; i < n; i++) y[i] = y[i] * scale;
        if (after)
            for (int64_t i = 0; i < n; i++) y[i] = y[i] * after[i];
    }
}
