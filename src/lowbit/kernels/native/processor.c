/* Which instruction sets the processor, the system and this library have. */

#include "lowbit_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__linux__) && defined(X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#ifdef X86
static void cpuid(int leaf, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
#if defined(_MSC_VER)
    int r[4];
    __cpuidex(r, leaf, 0);
    *a = r[0], *b = r[1], *c = r[2], *d = r[3];
#else
    *a = *b = *c = *d = 0;
    __get_cpuid_count(leaf, 0, a, b, c, d);
#endif
}

/* The registers that the operating system saves. */
static uint64_t saved_registers(void) {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}

static int has_avx2(void) {
    unsigned a, b, c, d;
    cpuid(1, &a, &b, &c, &d);
    int osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx || !f16c || (saved_registers() & 0x6) != 0x6) return 0;
    cpuid(7, &a, &b, &c, &d);
    return b >> 5 & 1;
}

static int has_avx512(void) {
    unsigned a, b, c, d;
    if (!has_avx2() || (saved_registers() & 0xe6) != 0xe6) return 0;
    cpuid(7, &a, &b, &c, &d);
    int foundation = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    return foundation && dq && bw && vl && c >> 11 & 1; /* the last is VNNI */
}

static int has_vbmi(void) {
    unsigned a, b, c, d;
    if (!has_avx512()) return 0;
    cpuid(7, &a, &b, &c, &d);
    return (c >> 1 & 1) && (c >> 8 & 1); /* VBMI and GFNI */
}

/* Linux asks to be told before a process uses the registers of AMX, which are large. */
static int has_amx(void) {
#if defined(__linux__)
    enum { PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!has_vbmi() || (saved_registers() & 0x60000) != 0x60000) return 0;
    cpuid(7, &a, &b, &c, &d);
    int tiles = d >> 24 & 1, bytes = d >> 25 & 1;
    return tiles && bytes && !syscall(SYS_arch_prctl, PERMISSION, TILE_DATA);
#else
    return 0;
#endif
}

static int is_amd(void) {
    static int known; /* 1: no, 2: yes; asking takes a microsecond and more in a virtual machine */
    if (!known) {
        unsigned a, b, c, d;
        cpuid(0, &a, &b, &c, &d);
        known = 1 + (b == 0x68747541 && d == 0x69746e65 && c == 0x444d4163); /* AuthenticAMD */
    }
    return known == 2;
}
#else
static int is_amd(void) { return 0; }
#endif

static int has_dot_products(void) {
#if defined(__APPLE__) && defined(__aarch64__)
    return 1; /* every processor of Apple's for macOS */
#elif defined(__linux__) && defined(__aarch64__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 0;
#endif
}

const lowbit_set *lowbit_set_of(int32_t number) {
    switch (number) {
    case LOWBIT_AVX2: return &lowbit_avx2;
    case LOWBIT_AVX512:
    case LOWBIT_VBMI: return is_amd() ? &lowbit_avx512_amd : &lowbit_avx512; /* words too */
    case LOWBIT_NEON: return &lowbit_neon;
    case LOWBIT_AMX: return &lowbit_amx;
    default: return &lowbit_portable;
    }
}

/* Whether the processor, the system and this library have an instruction set. */
LOWBIT_EXPORT int32_t lowbit_has(int32_t set) {
    if (!lowbit_set_of(set)->rows) return 0;
    if (set == LOWBIT_NEON) return has_dot_products();
#ifdef X86
    if (set == LOWBIT_AVX2) return has_avx2();
    if (set == LOWBIT_AVX512) return has_avx512();
    if (set == LOWBIT_VBMI) return has_vbmi();
    if (set == LOWBIT_AMX) return has_amx();
#endif
    return set == LOWBIT_PORTABLE;
}
