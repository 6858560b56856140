/* A step of the Viterbi encoder in plain C: the definition, and the oracle for the others. */

#include "viterbi.h"

static void least_costs(const lowbit_trellis *code, const float *restrict cost,
                        float *restrict best, uint8_t *restrict choice) {
    for (int64_t m = 0; m < code->uppers; m++) best[m] = cost[m], choice[m] = 0;
    for (int j = 1; j < 1 << code->shift; j++) {
        const float *other = cost + j * code->uppers;
        for (int64_t m = 0; m < code->uppers; m++) {
            int less = other[m] < best[m];
            best[m] = less ? other[m] : best[m];
            choice[m] = (uint8_t)(less ? j : choice[m]);
        }
    }
}

void lowbit_viterbi_portable(const lowbit_trellis *code, float *cost, float *best, uint8_t *choice,
                             const float *target, const float *const *weight, int first) {
    if (!first) least_costs(code, cost, best, choice);
    for (int64_t s = 0; s < code->states; s++) {
        float distance = target[0] - weight[0][s];
        distance *= distance;
        if (code->values == 2) {
            float second = target[1] - weight[1][s];
            distance += second * second;
        }
        cost[s] = best[s >> code->shift] + distance;
    }
}
