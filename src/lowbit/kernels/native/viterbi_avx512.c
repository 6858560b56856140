/* A step of the Viterbi encoder with AVX-512: 16 states at once. */

#include "inline.h"
#include "viterbi.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include <immintrin.h>

INLINE void least_costs(const lowbit_trellis *code, const float *cost, float *best,
                        uint8_t *choice, int shift) {
    for (int64_t m = 0; m < code->uppers; m += 16) {
        __m512 least = _mm512_loadu_ps(cost + m);
        __m512i from = _mm512_setzero_si512();
        for (int j = 1; j < 1 << shift; j++) {
            __m512 other = _mm512_loadu_ps(cost + m + j * code->uppers);
            __mmask16 less = _mm512_cmp_ps_mask(other, least, _CMP_LT_OQ);
            least = _mm512_mask_mov_ps(least, less, other);
            from = _mm512_mask_mov_epi32(from, less, _mm512_set1_epi32(j));
        }
        _mm512_storeu_ps(best + m, least);
        _mm_storeu_si128((__m128i *)(choice + m), _mm512_cvtepi32_epi8(from));
    }
}

INLINE void add_distances(const lowbit_trellis *code, float *cost, const float *best,
                          const float *target, const float *const *weight, int shift, int values) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 x = _mm512_set1_ps(target[0]), y = _mm512_set1_ps(target[values - 1]);
    for (int64_t m = 0; m < code->uppers; m += 16) {
        const __m512 least = _mm512_loadu_ps(best + m);
        for (int o = 0; o < 1 << shift; o++) {
            int64_t s = (m << shift) + 16 * o;
            __m512i index = _mm512_srli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16 * o)),
                                              (unsigned)shift);
            __m512 distance = _mm512_sub_ps(x, _mm512_loadu_ps(weight[0] + s));
            distance = _mm512_mul_ps(distance, distance);
            if (values == 2) {
                __m512 second = _mm512_sub_ps(y, _mm512_loadu_ps(weight[1] + s));
                distance = _mm512_add_ps(distance, _mm512_mul_ps(second, second));
            }
            __m512 sum = _mm512_add_ps(_mm512_permutexvar_ps(index, least), distance);
            _mm512_storeu_ps(cost + s, sum);
        }
    }
}

#define LOWBIT_STEP lowbit_viterbi_avx512
#include "viterbi_step.h"

#else

void lowbit_viterbi_avx512(const lowbit_trellis *code, float *cost, float *best, uint8_t *choice,
                           const float *target, const float *const *weight, int first) {
    lowbit_viterbi_portable(code, cost, best, choice, target, weight, first);
}

#endif
