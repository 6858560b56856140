/* A step of the Viterbi encoder with AVX2: 8 states at once. */

#include "inline.h"
#include "viterbi.h"

#if defined(__AVX2__)

#include <immintrin.h>

/* The least of the costs of 8 states, and which they were. */
INLINE __m256 least_of(const float *cost, int64_t uppers, int shift, __m256i *from) {
    __m256 least = _mm256_loadu_ps(cost), choice = _mm256_setzero_ps();
    for (int j = 1; j < 1 << shift; j++) {
        __m256 other = _mm256_loadu_ps(cost + j * uppers);
        __m256 less = _mm256_cmp_ps(other, least, _CMP_LT_OQ);
        least = _mm256_blendv_ps(least, other, less);
        choice = _mm256_blendv_ps(choice, _mm256_castsi256_ps(_mm256_set1_epi32(j)), less);
    }
    *from = _mm256_castps_si256(choice);
    return least;
}

INLINE void least_costs(const lowbit_trellis *code, const float *cost, float *best,
                        uint8_t *choice, int shift) {
    for (int64_t m = 0; m < code->uppers; m += 16) {
        __m256i low, high;
        _mm256_storeu_ps(best + m, least_of(cost + m, code->uppers, shift, &low));
        _mm256_storeu_ps(best + m + 8, least_of(cost + m + 8, code->uppers, shift, &high));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                         _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(choice + m), bytes);
    }
}

INLINE void add_distances(const lowbit_trellis *code, float *cost, const float *best,
                          const float *target, const float *const *weight, int shift, int values) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 x = _mm256_set1_ps(target[0]), y = _mm256_set1_ps(target[values - 1]);
    for (int64_t m = 0; m < code->uppers; m += 8) {
        const __m256 least = _mm256_loadu_ps(best + m);
        for (int o = 0; o < 1 << shift; o++) {
            int64_t s = (m << shift) + 8 * o;
            __m256i index = _mm256_srli_epi32(_mm256_add_epi32(lanes, _mm256_set1_epi32(8 * o)),
                                              shift);
            __m256 distance = _mm256_sub_ps(x, _mm256_loadu_ps(weight[0] + s));
            distance = _mm256_mul_ps(distance, distance);
            if (values == 2) {
                __m256 second = _mm256_sub_ps(y, _mm256_loadu_ps(weight[1] + s));
                distance = _mm256_add_ps(distance, _mm256_mul_ps(second, second));
            }
            __m256 sum = _mm256_add_ps(_mm256_permutevar8x32_ps(least, index), distance);
            _mm256_storeu_ps(cost + s, sum);
        }
    }
}

#define LOWBIT_STEP lowbit_viterbi_avx2
#include "viterbi_step.h"

#else

void lowbit_viterbi_avx2(const lowbit_trellis *code, float *cost, float *best, uint8_t *choice,
                         const float *target, const float *const *weight, int first) {
    lowbit_viterbi_portable(code, cost, best, choice, target, weight, first);
}

#endif
