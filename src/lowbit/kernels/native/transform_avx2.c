/* The transforms of transform.h with AVX2: the first three steps stay in a register. */

#include "lowbit_kernels.h"

#if defined(__AVX2__)

#include "inline.h"

#include <immintrin.h>

/* A step within vectors: a + b, and a - b in the lanes of `minus`, whose bits are signs. near: the
 * values with both exchanged. */
INLINE __m256 step(__m256 values, __m256 near, __m256i minus) {
    return _mm256_add_ps(near, _mm256_xor_ps(values, _mm256_castsi256_ps(minus)));
}

static int64_t short_steps(float *values, int64_t n, int64_t power) {
    const int s = (int)0x80000000u;
    const __m256i first = _mm256_setr_epi32(0, s, 0, s, 0, s, 0, s);
    const __m256i second = _mm256_setr_epi32(0, 0, s, s, 0, 0, s, s);
    const __m256i third = _mm256_setr_epi32(0, 0, 0, 0, s, s, s, s);
    if (power < 8) return 1;
    for (int64_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(values + i);
        v = step(v, _mm256_permute_ps(v, 0xb1), first);
        v = step(v, _mm256_permute_ps(v, 0x4e), second);
        v = step(v, _mm256_permute2f128_ps(v, v, 1), third);
        _mm256_storeu_ps(values + i, v);
    }
    return 8;
}

#define LOWBIT_TRANSFORM lowbit_transform_avx2
#include "transform.h"

#else

#include "transform.h"

void lowbit_transform_avx2(const lowbit_transform_call *call, int64_t begin, int64_t end,
                           float *spare) {
    lowbit_transform_portable(call, begin, end, spare);
}

#endif
