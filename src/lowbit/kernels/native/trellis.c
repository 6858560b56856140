/* Multiplies by a layer of trellis codes, on torch's threads; see trellis.h. */

#include "trellis.h"

#include "rounding.h"

#include <stdlib.h>

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function, void *);

enum { STRIPS_FOR_A_THREAD = 4, TOKENS_FOR_THREADS = 8 };

/* A layer and its inputs. The weight is scale[row] * value. */
typedef struct {
    const float *x;        /* [tokens][inputs], tokens lie `stride` apart */
    const uint8_t *packed; /* [strips][tiles][bytes] */
    const float *scale;    /* [outputs] */
    float *y;              /* [tokens][outputs] */
    int64_t tokens, stride, inputs, outputs;
    lowbit_code code;
    int32_t top; /* the largest |q| of rounded inputs */
    int32_t set;
    parallel_for parallel; /* torch_parallel_for, or NULL for one thread */
} lowbit_trellis_call;

/* The pieces of the inputs, described as rounding.h reads them. */
typedef struct {
    lowbit_layer layer;
    lowbit_piece piece[1];
} description;

typedef struct {
    const lowbit_trellis_call *call;
    const description *about;
    lowbit_trellis_piece add;
    int pairs; /* whether `add` multiplies columns in pairs */
    lowbit_inputs in;
    uint32_t *low, *high; /* [token][padded], each q repeated in four bytes */
} work;

static description *describe(const lowbit_trellis_call *call) {
    int64_t pieces = (call->inputs + LOWBIT_PIECE - 1) / LOWBIT_PIECE;
    description *about = calloc(1, sizeof(description) + (size_t)pieces * sizeof(lowbit_piece));
    if (about == NULL) return NULL;
    lowbit_part *part = &about->layer.part[0];
    part->spec.inputs = call->inputs;
    part->spec.rounding = LOWBIT_GROUPS;
    part->spec.top = call->top;
    part->spec.halves = call->top > 127 ? 2 : 1;
    part->pieces = pieces;
    part->piece_table = (int64_t)((char *)about->piece - (char *)about);
    for (int64_t p = 0; p < pieces; p++) {
        lowbit_piece *piece = &about->piece[p];
        int64_t left = call->inputs - p * LOWBIT_PIECE;
        piece->begin = piece->source = (int32_t)(p * LOWBIT_PIECE);
        piece->count = piece->span = (int32_t)(left < LOWBIT_PIECE ? left : LOWBIT_PIECE);
        piece->length = (piece->count + LOWBIT_PADDING - 1) / LOWBIT_PADDING * LOWBIT_PADDING;
        part->padded = piece->begin + piece->length;
    }
    return about;
}

static void repeat(const int8_t *from, int64_t count, int pairs, uint32_t *to) {
    if (pairs) {
        for (int64_t i = 0; i < count; i += 2)
            to[i] = 0x0101u * (uint8_t)from[i] | 0x01010000u * (uint8_t)from[i + 1];
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = 0x01010101u * (uint8_t)from[i];
    }
}

static void round_range(int64_t begin, int64_t end, void *context) {
    const work *w = context;
    const lowbit_trellis_call *call = w->call;
    int64_t padded = w->in.padded;
    round_inputs(&w->about->layer, &w->about->layer.part[0], call->x, call->stride, &w->in, begin,
                 end);
    int64_t first = begin * padded, count = (end - begin) * padded;
    repeat(w->in.low + first, count, w->pairs, w->low + first);
    if (w->high) repeat(w->in.high + first, count, w->pairs, w->high + first);
}

/* The product of a token whose inputs cannot be summed as integers. */
static void multiply_unusual(const work *w, int64_t strip, int64_t token, float *y) {
    const lowbit_trellis_call *call = w->call;
    const float *x = call->x + token * call->stride;
    int64_t tiles = (call->inputs + LOWBIT_TILE - 1) / LOWBIT_TILE;
    const uint8_t *tile = call->packed + strip * tiles * call->code.bytes;
    uint32_t ones[LOWBIT_TILE] = {0};
    memset(y, 0, LOWBIT_TILE * sizeof(float));
    for (int64_t i = 0; i < call->inputs; i++) {
        int32_t sums[LOWBIT_TILE] = {0};
        memset(ones, 0, sizeof(ones));
        ones[i % LOWBIT_TILE] = 0x01010101u;
        lowbit_trellis_portable(&call->code, tile + i / LOWBIT_TILE * call->code.bytes, 1, ones,
                                NULL, 0, 1, sums);
        for (int row = 0; row < LOWBIT_TILE; row++)
            y[row] += x[i] * (float)(sums[row] - LOWBIT_SUM6_MEAN);
    }
}

/* y[token][row] for some tokens of a strip, without the scales. */
static void multiply_tokens(const work *w, int64_t strip, int64_t token, int tokens, float *y) {
    const lowbit_trellis_call *call = w->call;
    const lowbit_part *part = &w->about->layer.part[0];
    int64_t tiles = (call->inputs + LOWBIT_TILE - 1) / LOWBIT_TILE, padded = w->in.padded;
    const uint8_t *tile = call->packed + strip * tiles * call->code.bytes;
    memset(y, 0, (size_t)(tokens * LOWBIT_TILE) * sizeof(float));
    for (int64_t p = 0; p < part->pieces; p++) {
        const lowbit_piece *piece = &w->about->piece[p];
        int64_t here = (piece->count + LOWBIT_TILE - 1) / LOWBIT_TILE;
        int64_t at = token * padded + piece->begin;
        int32_t sums[LOWBIT_TILE_TOKENS * LOWBIT_TILE] = {0};
        w->add(&call->code, tile + piece->begin / LOWBIT_TILE * call->code.bytes, here, w->low + at,
               w->high ? w->high + at : NULL, padded, tokens, sums);
        for (int m = 0; m < tokens; m++) {
            int64_t number = (token + m) * part->pieces + p;
            int32_t mean = LOWBIT_SUM6_MEAN * w->in.sum[number];
            for (int row = 0; row < LOWBIT_TILE; row++)
                y[m * LOWBIT_TILE + row] +=
                    (float)(sums[m * LOWBIT_TILE + row] - mean) * w->in.step[number];
        }
    }
}

static void multiply_strips(int64_t begin, int64_t end, void *context) {
    const work *w = context;
    const lowbit_trellis_call *call = w->call;
    float y[LOWBIT_TILE_TOKENS * LOWBIT_TILE];
    for (int64_t strip = begin; strip < end; strip++) {
        int64_t first = strip * LOWBIT_TILE, rows = call->outputs - first;
        if (rows > LOWBIT_TILE) rows = LOWBIT_TILE;
        for (int64_t token = 0; token < call->tokens;) {
            int tokens = call->tokens - token >= LOWBIT_TILE_TOKENS ? LOWBIT_TILE_TOKENS : 1;
            multiply_tokens(w, strip, token, tokens, y);
            for (int m = 0; m < tokens; m++, token++) {
                if (w->in.state[token] != LOWBIT_FINE)
                    multiply_unusual(w, strip, token, y + m * LOWBIT_TILE);
                float *to = call->y + token * call->outputs + first;
                for (int64_t row = 0; row < rows; row++)
                    to[row] = y[m * LOWBIT_TILE + row] * call->scale[first + row];
            }
        }
    }
}

static void *take(char **memory, int64_t bytes) {
    void *taken = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return taken;
}

static void run(const lowbit_trellis_call *call, int64_t count, int64_t grain, range_function each,
                work *w) {
    if (call->parallel == NULL || count <= grain)
        each(0, count, w);
    else
        call->parallel(0, count, grain, each, w);
}

/* Multiplies. Returns 0, or 1 if there is not enough memory. */
LOWBIT_EXPORT int32_t lowbit_trellis_multiply(const lowbit_trellis_call *call) {
    description *about = describe(call);
    if (about == NULL) return 1;
    const lowbit_part *part = &about->layer.part[0];
    int64_t m = call->tokens, padded = part->padded, pieces = part->pieces;
    int two = part->spec.halves == 2;
    char *memory = malloc((size_t)(m * (10 * padded + 8 * pieces + 5) + 10 * 64));
    if (memory == NULL) {
        free(about);
        return 1;
    }
    char *left = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    work w = {call, about, lowbit_trellis_portable, 0, {0}, NULL, NULL};
    if (call->set == LOWBIT_VBMI || call->set == LOWBIT_AMX)
        w.add = lowbit_trellis_vbmi, w.pairs = 1;
    else if (call->set == LOWBIT_AVX512)
        w.add = lowbit_trellis_avx512;
    w.in.padded = padded, w.in.pieces = pieces;
    w.in.low = take(&left, m * padded);
    w.in.high = two ? take(&left, m * padded) : NULL;
    w.in.step = take(&left, 4 * m * pieces);
    w.in.sum = take(&left, 4 * m * pieces);
    w.in.total = take(&left, 4 * m);
    w.in.state = take(&left, m);
    w.low = take(&left, 4 * m * padded);
    w.high = two ? take(&left, 4 * m * padded) : NULL;
    run(call, m, TOKENS_FOR_THREADS, round_range, &w);
    run(call, (call->outputs + LOWBIT_TILE - 1) / LOWBIT_TILE, STRIPS_FOR_A_THREAD, multiply_strips,
        &w);
    free(memory);
    free(about);
    return 0;
}
