/* A step of the Viterbi encoder, for a file that defines before it:

   INLINE         static and inlined
   LOWBIT_STEP    the name of the function
   least_costs    for each state, the least cost of the steps that lead to it, and its choice
   add_distances  the costs of all steps that leave the states

   Both are inlined for each number of bits, so that their loops have constant bounds. */

INLINE void step(const lowbit_trellis *code, float *cost, float *best, uint8_t *choice,
                 const float *target, const float *const *weight, int first, int shift) {
    if (!first) least_costs(code, cost, best, choice, shift);
    if (code->values == 2)
        add_distances(code, cost, best, target, weight, shift, 2);
    else
        add_distances(code, cost, best, target, weight, shift, 1);
}

void LOWBIT_STEP(const lowbit_trellis *code, float *cost, float *best, uint8_t *choice,
                 const float *target, const float *const *weight, int first) {
    switch (code->shift) {
    case 1: step(code, cost, best, choice, target, weight, first, 1); break;
    case 2: step(code, cost, best, choice, target, weight, first, 2); break;
    case 3: step(code, cost, best, choice, target, weight, first, 3); break;
    case 4: step(code, cost, best, choice, target, weight, first, 4); break;
    default: step(code, cost, best, choice, target, weight, first, 5);
    }
}
