/* Encodes sequences of weights as trellis codes; see viterbi.h. */

#include "viterbi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function, void *);

typedef struct {
    const float *target; /* [sequences][LOWBIT_SEQUENCE]; NaN: any value will do */
    const float *table;  /* [values][2^state_bits] */
    uint8_t *codes;      /* [sequences][steps * shift / 8] */
    int64_t sequences;
    int32_t state_bits, shift, values, set;
    parallel_for parallel; /* torch_parallel_for, or NULL for one thread */
    int32_t failed;        /* set to 1 if there is not enough memory */
    int32_t reserved;
} lowbit_encode_call;

/* Memory of one thread. */
typedef struct {
    lowbit_trellis code;
    lowbit_viterbi_step step;
    float *cost, *best, *zeros; /* [states], [uppers], [states] */
    uint8_t *choice;            /* [steps][uppers] */
    int32_t state[LOWBIT_SEQUENCE];
} encoder;

static void walk_step(encoder *e, const float *x, int32_t t, int first) {
    const lowbit_trellis *code = &e->code;
    float target[2] = {0, 0};
    const float *weight[2] = {e->zeros, e->zeros};
    for (int v = 0; v < code->values; v++) {
        float value = x[t + v * code->steps];
        if (isnan(value)) continue;
        target[v] = value;
        weight[v] = code->table + v * code->states;
    }
    e->step(code, e->cost, e->best, e->choice + t * code->uppers, target, weight, first);
}

/* The state of step t with the least cost among s, s + apart, ...; of equal ones the first. */
static int32_t least_state(const encoder *e, int64_t begin, int64_t apart) {
    int64_t found = begin;
    for (int64_t s = begin; s < e->code.states; s += apart)
        if (e->cost[s] < e->cost[found]) found = s;
    return (int32_t)found;
}

/* The state of step t + 1 from which that of step t was reached. */
static int32_t before(const encoder *e, int32_t t, int32_t state) {
    int64_t upper = state >> e->code.shift;
    return (int32_t)(upper + e->choice[t * e->code.uppers + upper] * e->code.uppers);
}

/* The bits that the states of steps 0 and steps - 1 share: from a walk that begins and ends, with
 * any states, in the middle of the sequence. */
static int64_t find_seam(encoder *e, const float *x) {
    int32_t steps = e->code.steps, middle = steps / 2;
    memset(e->best, 0, (size_t)e->code.uppers * sizeof(float));
    for (int32_t i = 0; i < steps; i++) walk_step(e, x, (middle - 1 - i + steps) % steps, i == 0);
    int32_t state = least_state(e, 0, 1);
    for (int32_t t = middle; t < steps; t++) state = before(e, t, state);
    return state & (e->code.uppers - 1); /* the state is that of step 0 */
}

/* Walks through the sequence with a given seam, and finds the states of all steps. */
static void find_states(encoder *e, const float *x, int64_t seam) {
    int32_t last = e->code.steps - 1;
    for (int64_t m = 0; m < e->code.uppers; m++) e->best[m] = INFINITY;
    e->best[seam] = 0;
    for (int32_t t = last; t >= 0; t--) walk_step(e, x, t, t == last);
    e->state[0] = least_state(e, seam, e->code.uppers);
    for (int32_t t = 0; t < last; t++) e->state[t + 1] = before(e, t, e->state[t]);
}

static void write_codes(const encoder *e, uint8_t *codes) {
    int32_t shift = e->code.shift;
    memset(codes, 0, (size_t)(e->code.steps * shift / 8));
    for (int32_t t = 0; t < e->code.steps; t++)
        for (int32_t b = 0; b < shift; b++)
            codes[(t * shift + b) / 8] |=
                (uint8_t)((e->state[t] >> b & 1) << ((t * shift + b) % 8));
}

static int allocate(encoder *e) {
    const lowbit_trellis *code = &e->code;
    e->cost = malloc((size_t)code->states * sizeof(float));
    e->best = malloc((size_t)code->uppers * sizeof(float));
    e->zeros = calloc((size_t)code->states, sizeof(float));
    e->choice = malloc((size_t)(code->steps * code->uppers));
    return e->cost != NULL && e->best != NULL && e->zeros != NULL && e->choice != NULL;
}

static void encode_range(int64_t begin, int64_t end, void *context) {
    lowbit_encode_call *call = context;
    static const lowbit_viterbi_step STEPS[] = {
        [LOWBIT_PORTABLE] = lowbit_viterbi_portable, [LOWBIT_AVX2] = lowbit_viterbi_avx2,
        [LOWBIT_AVX512] = lowbit_viterbi_avx512,     [LOWBIT_NEON] = lowbit_viterbi_portable,
        [LOWBIT_VBMI] = lowbit_viterbi_avx512,       [LOWBIT_AMX] = lowbit_viterbi_avx512,
    };
    encoder e;
    lowbit_trellis code = {call->state_bits, call->shift, call->values,
                           LOWBIT_SEQUENCE / call->values, (int64_t)1 << call->state_bits,
                           (int64_t)1 << (call->state_bits - call->shift), call->table};
    e.code = code;
    e.step = code.uppers < 16 ? lowbit_viterbi_portable : STEPS[call->set];
    if (allocate(&e)) {
        int64_t bytes = code.steps * code.shift / 8;
        for (int64_t i = begin; i < end; i++) {
            const float *x = call->target + i * LOWBIT_SEQUENCE;
            find_states(&e, x, find_seam(&e, x));
            write_codes(&e, call->codes + i * bytes);
        }
    } else {
        call->failed = 1;
    }
    free(e.cost), free(e.best), free(e.zeros), free(e.choice);
}

/* Encodes. Returns 0, or 1 if there is not enough memory. */
LOWBIT_EXPORT int32_t lowbit_encode(lowbit_encode_call *call) {
    call->failed = 0;
    if (call->parallel == NULL || call->sequences == 1)
        encode_range(0, call->sequences, call);
    else
        call->parallel(0, call->sequences, 1, encode_range, call);
    return call->failed;
}
