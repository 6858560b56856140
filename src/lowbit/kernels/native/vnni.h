/* One instruction of AVX-512 VNNI that reads its factors from memory. */
#ifndef LOWBIT_VNNI_H
#define LOWBIT_VNNI_H

#include "inline.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Adds to each of 16 sums the products of four codes, which are unsigned bytes, with the four signed
 * bytes at q. */
INLINE __m512i add_products(__m512i sums, __m512i codes, const void *q) {
#if defined(__GNUC__)
    /* From the intrinsic GCC makes up to four instructions, and products take up to 1.2 times as long. */
    __asm__("vpdpbusd %1%{1to16%}, %2, %0"
            : "+v"(sums)
            : "m"(*(const int32_t(*)[1])q), "v"(codes));
    return sums;
#else
    int32_t four;
    memcpy(&four, q, 4);
    return _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(four));
#endif
}

#endif
