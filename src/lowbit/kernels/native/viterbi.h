/* The Viterbi encoder of trellis codes: what its files share.
 *
 * A sequence of LOWBIT_SEQUENCE weights takes `steps` = LOWBIT_SEQUENCE / values steps, each of
 * `shift` new bits. The state of step t is the number in bits [t shift, t shift + state_bits) of
 * the sequence's bit string, read as a ring, low bits first. It means `values` weights: weight
 * t + v * steps is table[v][state]. The encoder finds the bit string with the least sum of squared
 * differences from the target.
 *
 * It walks from the last step to the first. A state of step t then has its new bits lowest, and
 * differs in its 2^(state_bits - shift) upper parts `m`: all states with the same m continue the
 * same 2^shift states m + j 2^(state_bits - shift) of step t + 1.
 *
 * Every number is computed by the same float operations in the same order in all files, and in
 * solvers/viterbi.py: best = least cost (of equal ones the first j), distance = sum over v of
 * (target - value)^2, cost = best + distance. */
#ifndef LOWBIT_VITERBI_H
#define LOWBIT_VITERBI_H

#include "lowbit_kernels.h"

#define LOWBIT_SEQUENCE 256
#define LOWBIT_MOST_SHIFT 5

typedef struct {
    int32_t state_bits, shift, values, steps;
    int64_t states;    /* 2^state_bits */
    int64_t uppers;    /* 2^(state_bits - shift), at least 16 */
    const float *table; /* [values][states] */
} lowbit_trellis;

/* One step: best[m] and choice[m] from the costs of step t + 1, then the costs of step t.
 * cost: [states], read and written. best: [uppers]. weight[v]: the table of value v, or zeros.
 * `first`: keep the given `best` instead of computing it. */
typedef void (*lowbit_viterbi_step)(const lowbit_trellis *, float *cost, float *best,
                                    uint8_t *choice, const float *target,
                                    const float *const *weight, int first);

void lowbit_viterbi_portable(const lowbit_trellis *, float *, float *, uint8_t *, const float *,
                             const float *const *, int);
void lowbit_viterbi_avx2(const lowbit_trellis *, float *, float *, uint8_t *, const float *,
                         const float *const *, int);
void lowbit_viterbi_avx512(const lowbit_trellis *, float *, float *, uint8_t *, const float *,
                           const float *const *, int);

#endif
