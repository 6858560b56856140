/* The transforms of transform.h with AVX-512: the first four steps stay in a register. */

#include "lowbit_kernels.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__))

#include "inline.h"

#include <immintrin.h>

/* A step within vectors: a + b in the lanes where a bit of the number is 0, else a - b. near: the
 * values with both exchanged. minus: the lanes with a - b. */
INLINE __m512 step(__m512 values, __m512 near, __mmask16 minus) {
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    __m512i bits = _mm512_castps_si512(values);
    return _mm512_add_ps(near, _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, minus, bits, sign)));
}

static int64_t short_steps(float *values, int64_t n, int64_t power) {
    if (power < 16) return 1;
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(values + i);
        v = step(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
        v = step(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
        v = step(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
        v = step(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
        _mm512_storeu_ps(values + i, v);
    }
    return 16;
}

#define LOWBIT_TRANSFORM lowbit_transform_avx512
#include "transform.h"

#else

#include "transform.h"

void lowbit_transform_avx512(const lowbit_transform_call *call, int64_t begin, int64_t end,
                             float *spare) {
    lowbit_transform_portable(call, begin, end, spare);
}

#endif
