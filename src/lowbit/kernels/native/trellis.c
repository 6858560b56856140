/* Multiplies by a layer of trellis codes, on torch's threads; see trellis.h. */

#include "trellis.h"


#include <stdlib.h>
#include <string.h>

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_function, void *);

enum { STRIPS_FOR_A_THREAD = 4, TOKENS_FOR_THREADS = 8, STRIPS_AT_ONCE = 4 };

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
    const lowbit_set *set;
    const lowbit_trellis_set *codes;
    lowbit_inputs in;
    uint32_t *low, *high; /* of one token: each q repeated in four bytes; NULL where not read */
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
    const lowbit_part *part = &w->about->layer.part[0];
    w->set->round(&w->about->layer, part, call->x, call->stride, &w->in, begin, end);
    if (w->low) repeat(w->in.low, part->padded, w->codes->pairs, w->low);
    if (w->high) repeat(w->in.high, part->padded, w->codes->pairs, w->high);
}

static int64_t tiles_of(const lowbit_trellis_call *call) {
    return (call->inputs + LOWBIT_TILE - 1) / LOWBIT_TILE;
}

/* Where the tiles of a strip begin. */
static const uint8_t *strip_of(const lowbit_trellis_call *call, int64_t strip) {
    return call->packed + strip * tiles_of(call) * call->code.bytes;
}

/* The product of a token whose inputs cannot be summed as integers. */
static void multiply_unusual(const work *w, int64_t strip, int64_t token, float *y) {
    const lowbit_trellis_call *call = w->call;
    const float *x = call->x + token * call->stride;
    const uint8_t *tile = strip_of(call, strip);
    uint8_t codes[LOWBIT_TILE * LOWBIT_TILE];
    memset(y, 0, LOWBIT_TILE * sizeof(float));
    for (int64_t i = 0; i < call->inputs; i++) {
        int column = (int)(i % LOWBIT_TILE);
        if (column == 0)
            lowbit_decode_portable(&call->code, tile + i / LOWBIT_TILE * call->code.bytes, 1, codes);
        for (int row = 0; row < LOWBIT_TILE; row++) {
            int code = codes[(column / 4 * LOWBIT_TILE + row) * 4 + column % 4];
            y[row] += x[i] * (float)(code - LOWBIT_SUM6_MEAN);
        }
    }
}

/* Continues the sums of `rows` rows of a token by a piece. */
static void add_piece(const work *w, int64_t piece, int64_t token, const int32_t *sums, int64_t rows,
                      float *y) {
    int64_t number = token * w->in.pieces + piece;
    int32_t mean = LOWBIT_SUM6_MEAN * w->in.sum[number];
    float step = w->in.step[number];
    for (int64_t row = 0; row < rows; row++) y[row] += (float)(sums[row] - mean) * step;
}

/* y[row] of one token and a strip, without the scales. */
static void multiply_one(const work *w, int64_t strip, float *y) {
    const lowbit_trellis_call *call = w->call;
    const uint8_t *tile = strip_of(call, strip);
    for (int64_t p = 0; p < w->in.pieces; p++) {
        const lowbit_piece *piece = &w->about->piece[p];
        int64_t tiles = (piece->count + LOWBIT_TILE - 1) / LOWBIT_TILE;
        int32_t sums[LOWBIT_TILE] = {0};
        w->codes->add(&call->code, tile, tiles, w->low + piece->begin,
                      w->high ? w->high + piece->begin : NULL, sums);
        tile += tiles * call->code.bytes;
        add_piece(w, p, 0, sums, LOWBIT_TILE, y);
    }
}

/* Decodes a piece of some strips as the instruction set reads it, with zeros behind it. */
static void decode_piece(const work *w, int64_t strip, int strips, const lowbit_piece *piece,
                         uint8_t *codes) {
    uint8_t whole[LOWBIT_APART(LOWBIT_TILE)];
    const lowbit_code *code = &w->call->code;
    const int rows = w->set->rows, bytes = 4 * rows;
    const int64_t tiles = (piece->count + LOWBIT_TILE - 1) / LOWBIT_TILE;
    const int64_t vectors = (piece->length + LOWBIT_PADDING) / 4;
    for (int s = 0; s < strips; s++, codes += LOWBIT_APART(LOWBIT_TILE)) {
        const uint8_t *tile =
            strip_of(w->call, strip + s) + piece->begin / LOWBIT_TILE * code->bytes;
        uint8_t *to = rows == LOWBIT_TILE ? codes : whole;
        memset(to + tiles * LOWBIT_TILE * LOWBIT_TILE, 0,
               (size_t)(vectors * 4 - tiles * LOWBIT_TILE) * LOWBIT_TILE);
        w->codes->decode(code, tile, tiles, to);
        for (int part = 0; to == whole && part < LOWBIT_TILE / rows; part++)
            for (int64_t v = 0; v < vectors; v++)
                memcpy(codes + part * LOWBIT_APART(rows) + v * bytes,
                       whole + v * 4 * LOWBIT_TILE + part * bytes, (size_t)bytes);
    }
}

/* y[token][strip][row] of several tokens and some strips, without the scales. */
static void multiply_tokens(const work *w, int64_t strip, int strips, int64_t token, int tokens,
                            float *y) {
    _Alignas(64) uint8_t codes[STRIPS_AT_ONCE * LOWBIT_APART(LOWBIT_TILE)];
    _Alignas(64) int32_t sums[LOWBIT_AT_ONCE * STRIPS_AT_ONCE * LOWBIT_TILE];
    const int rows = strips * LOWBIT_TILE, tiles = rows / w->set->rows;
    for (int64_t p = 0; p < w->in.pieces; p++) {
        const lowbit_piece *piece = &w->about->piece[p];
        decode_piece(w, strip, strips, piece, codes);
        for (int m = 0; m < tokens; m += LOWBIT_AT_ONCE) {
            int count = tokens - m < LOWBIT_AT_ONCE ? tokens - m : LOWBIT_AT_ONCE;
            w->set->bytes(codes, tiles, &w->in, piece, token + m, count, sums);
            for (int i = 0; i < count; i++)
                add_piece(w, p, token + m + i, sums + i * rows, rows, y + (m + i) * rows);
        }
    }
}

/* Some tokens and strips: y[token][strip][row], and then the outputs. */
static void multiply_some(const work *w, int64_t strip, int strips, int64_t token, int tokens) {
    const lowbit_trellis_call *call = w->call;
    float y[LOWBIT_BLOCK * STRIPS_AT_ONCE * LOWBIT_TILE];
    const int64_t first = strip * LOWBIT_TILE;
    memset(y, 0, (size_t)(tokens * strips * LOWBIT_TILE) * sizeof(float));
    if (w->low)
        for (int s = 0; s < strips; s++) multiply_one(w, strip + s, y + s * LOWBIT_TILE);
    else
        multiply_tokens(w, strip, strips, token, tokens, y);
    for (int m = 0; m < tokens; m++) {
        float *from = y + m * strips * LOWBIT_TILE, *to = call->y + (token + m) * call->outputs;
        for (int s = 0; s < strips && w->in.state[token + m] != LOWBIT_FINE; s++)
            multiply_unusual(w, strip + s, token + m, from + s * LOWBIT_TILE);
        for (int64_t row = 0; row < strips * LOWBIT_TILE && first + row < call->outputs; row++)
            to[first + row] = from[row] * call->scale[first + row];
    }
}

/* The inputs of a block of tokens stay in the cache. */
static void multiply_strips(int64_t begin, int64_t end, void *context) {
    const work *w = context;
    int64_t all = w->call->tokens;
    for (int64_t token = 0; token < all; token += LOWBIT_BLOCK) {
        int tokens = all - token < LOWBIT_BLOCK ? (int)(all - token) : LOWBIT_BLOCK;
        int64_t strip = begin;
        for (int strips = STRIPS_AT_ONCE; strips; strips /= 2)
            for (; strip + strips <= end; strip += strips)
                multiply_some(w, strip, strips, token, tokens);
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

static const lowbit_trellis_set *codes_of(int32_t set) {
    if (set == LOWBIT_AVX512) return &lowbit_trellis_avx512;
    return set == LOWBIT_VBMI || set == LOWBIT_AMX ? &lowbit_trellis_vbmi : &lowbit_trellis_portable;
}

/* Multiplies. Returns 0, or 1 if there is not enough memory. */
LOWBIT_EXPORT int32_t lowbit_trellis_multiply(const lowbit_trellis_call *call) {
    description *about = describe(call);
    if (about == NULL) return 1;
    const lowbit_part *part = &about->layer.part[0];
    work w = {call, about, lowbit_set_of(call->set), codes_of(call->set), {0}, NULL, NULL};
    const int64_t m = call->tokens, pieces = part->pieces, apart = lowbit_token_bytes(part);
    const int two = part->spec.halves == 2, alone = m == 1 && w.codes->add;
    char *memory = malloc((size_t)(m * (4 * apart + 8 * pieces + 5) + 8 * apart + 11 * 64));
    if (memory == NULL) {
        free(about);
        return 1;
    }
    char *left = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    w.in.padded = apart, w.in.pieces = pieces;
    w.in.low = take(&left, m * apart);
    w.in.high = two ? take(&left, m * apart) : NULL;
    w.in.wide = w.set->wide ? take(&left, 2 * m * apart) : NULL;
    w.in.step = take(&left, 4 * m * pieces);
    w.in.sum = take(&left, 4 * m * pieces);
    w.in.total = take(&left, 4 * m);
    w.in.state = take(&left, m);
    w.low = alone ? take(&left, 4 * apart) : NULL;
    w.high = alone && two ? take(&left, 4 * apart) : NULL;
    run(call, m, TOKENS_FOR_THREADS, round_range, &w);
    run(call, (call->outputs + LOWBIT_TILE - 1) / LOWBIT_TILE, STRIPS_FOR_A_THREAD, multiply_strips,
        &w);
    free(memory);
    free(about);
    return 0;
}
