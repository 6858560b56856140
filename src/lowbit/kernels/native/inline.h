/* INLINE: a function that is always part of its caller, which then has constants for arguments.
 * UNROLL(most): the loop that follows has so few passes that each is written out. */
#ifndef LOWBIT_INLINE_H
#define LOWBIT_INLINE_H

#if defined(_MSC_VER)
#define INLINE static __forceinline
#define UNROLL(most)
#else
#define LOWBIT_PRAGMA(text) _Pragma(#text)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL(most) LOWBIT_PRAGMA(GCC unroll most)
#endif

#endif
