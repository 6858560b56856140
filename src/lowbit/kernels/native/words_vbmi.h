/* The words of words.c with AVX-512 VBMI and GFNI; avx512.c has the rest of the product. */
#ifndef LOWBIT_WORDS_VBMI_H
#define LOWBIT_WORDS_VBMI_H

#include <immintrin.h>
#include <stdint.h>

/* The sum of code * (low + 128 high) over `length` inputs, for 16 rows. Moves the vector on.
 * high: NULL if inputs have one half. ahead: bytes that are prefetched ahead; 0: none. */
__m512i lowbit_words_product(const uint8_t *table, int32_t length, const uint8_t **vector,
                             const int8_t *low, const int8_t *high, int ahead);

/* Writes the codes of `length` inputs of 16 rows, 64 bytes for every four inputs. */
void lowbit_words_unpack(const uint8_t *table, int32_t length, const uint8_t *vector,
                         uint8_t *codes);

#endif
