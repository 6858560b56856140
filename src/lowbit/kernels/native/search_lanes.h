/* The search for some vectors at once, for a file that defines LOWBIT_SEARCH, the name of the
 * function. Every loop over lanes becomes vector instructions of the file's instruction set. */

#include <math.h>

#include "inline.h"
#include "search.h"

#define EACH_LANE for (int l = 0; l < LOWBIT_LANES; l++)
#define SHAPES 7

typedef struct {
    float y[LOWBIT_WORD][LOWBIT_LANES];    /* the vectors less the shift */
    float size[LOWBIT_WORD][LOWBIT_LANES]; /* |y| */
    float score[LOWBIT_LANES];             /* of the best pattern */
    int32_t choice[LOWBIT_LANES];          /* its shape, or SHAPES + its triple */
    float triple[LOWBIT_LANES];            /* the score of a triple, less 2 |y| at each of three */
    float bound[LOWBIT_LANES];             /* the score of the best of all 56 triples */
} side;

/* A sorting network: sorts eight numbers, the largest first. */
static const int NETWORK[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                                   {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                                   {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};

INLINE void try_shape(side *s, const float *unflipped, const float *cost, int number) {
    EACH_LANE {
        float score = unflipped[l] - cost[l];
        int better = score > s->score[l];
        s->choice[l] = better ? number : s->choice[l];
        s->score[l] = better ? score : s->score[l];
    }
}

INLINE void try_shapes(side *s, const float *start, float ordered[LOWBIT_WORD][LOWBIT_LANES],
                       float cost[2][LOWBIT_LANES]) {
    float least[LOWBIT_LANES], scores[LOWBIT_LANES];
    EACH_LANE s->score[l] = -INFINITY, s->choice[l] = 0;
    EACH_LANE least[l] = scores[l] = start[l] - 2;
    try_shape(s, scores, cost[0], 0);
    for (int i = 0; i < 4; i++) {
        EACH_LANE scores[l] = scores[l] + 2 * ordered[i][l] - 2;
        try_shape(s, scores, cost[(i + 1) % 2], i + 1);
    }
    EACH_LANE scores[l] = least[l] + 4 * ordered[0][l] - 6;
    try_shape(s, scores, cost[0], 5);
    EACH_LANE scores[l] = scores[l] + 2 * ordered[1][l] - 2;
    try_shape(s, scores, cost[1], 6);
}

/* The best of the seven shapes for one shift. */
INLINE void begin(side *s, const float *x, float shift) {
    float ordered[LOWBIT_WORD][LOWBIT_LANES], cost[2][LOWBIT_LANES];
    float total[LOWBIT_LANES], base[LOWBIT_LANES], start[LOWBIT_LANES], flip[LOWBIT_LANES];
    int32_t odd[LOWBIT_LANES];
    EACH_LANE total[l] = 0, base[l] = 0, odd[l] = 0;
    for (int i = 0; i < LOWBIT_WORD; i++) {
        EACH_LANE {
            float value = x[i * LOWBIT_LANES + l], y = value - shift;
            s->y[i][l] = y;
            s->size[i][l] = ordered[i][l] = fabsf(y);
            total[l] += fabsf(y);
            base[l] += value;
            odd[l] ^= y < 0;
        }
    }
    for (int n = 0; n < 19; n++) {
        float *a = ordered[NETWORK[n][0]], *b = ordered[NETWORK[n][1]];
        EACH_LANE {
            float first = a[l], second = b[l];
            a[l] = first > second ? first : second;
            b[l] = first > second ? second : first;
        }
    }
    EACH_LANE {
        base[l] = 2 * shift * base[l];
        flip[l] = 2 * ordered[7][l];
        cost[0][l] = flip[l] * (float)odd[l];
        cost[1][l] = flip[l] - cost[0][l];
        start[l] = total[l] + base[l];
    }
    try_shapes(s, start, ordered, cost);
    EACH_LANE {
        s->triple[l] = 3 * total[l] + base[l] - 12 - cost[1][l];
        s->bound[l] = s->triple[l] - 2 * (ordered[5][l] + ordered[6][l] + ordered[7][l]);
    }
}

/* Chooses one of the 29 triples where it is better. best: the score that it has to exceed. */
INLINE void try_triples(const lowbit_search_tables *tables, side *s, const float *best) {
    int32_t any = 0;
    EACH_LANE any |= s->bound[l] > best[l];
    if (!any) return;
    for (int l = 0; l < LOWBIT_LANES; l++) {
        if (!(s->bound[l] > best[l])) continue;
        float most = -INFINITY;
        int32_t found = 0;
        for (int32_t t = 0; t < LOWBIT_TRIPLES; t++) {
            const int32_t *at = tables->triples + 3 * t;
            float score =
                s->triple[l] - 2 * (s->size[at[0]][l] + s->size[at[1]][l] + s->size[at[2]][l]);
            if (score > most) most = score, found = t;
        }
        if (most > s->score[l]) s->score[l] = most, s->choice[l] = SHAPES + found;
    }
}

/* The levels of the triples among the choices. */
INLINE void set_triples(const lowbit_search_tables *tables, const int32_t *choice,
                        int32_t level[LOWBIT_WORD][LOWBIT_LANES]) {
    int32_t any = 0;
    EACH_LANE any |= choice[l] >= SHAPES;
    if (!any) return;
    for (int l = 0; l < LOWBIT_LANES; l++) {
        if (choice[l] < SHAPES) continue;
        const int32_t *at = tables->triples + 3 * (choice[l] - SHAPES);
        for (int i = 0; i < LOWBIT_WORD; i++)
            level[i][l] = i != at[0] && i != at[1] && i != at[2];
    }
}

/* The codes of the chosen patterns. lower: 1 where 1/4 is subtracted. */
INLINE void write_codes(const lowbit_search_tables *tables,
                        float y[LOWBIT_WORD][LOWBIT_LANES], const int32_t *choice,
                        const int32_t *lower, int32_t *code) {
    static const int32_t RAISED[SHAPES] = {0, 1, 2, 3, 4, 1, 2}, TWICE[SHAPES] = {0, 0, 0, 0, 0, 1, 1};
    int32_t rank[LOWBIT_WORD][LOWBIT_LANES], level[LOWBIT_WORD][LOWBIT_LANES];
    int32_t minus[LOWBIT_WORD][LOWBIT_LANES], raised[LOWBIT_LANES], twice[LOWBIT_LANES];
    int32_t wrong[LOWBIT_LANES], key[LOWBIT_LANES];
    for (int i = 0; i < LOWBIT_WORD; i++) EACH_LANE rank[i][l] = i;
    for (int i = 0; i < LOWBIT_WORD; i++)
        for (int j = i + 1; j < LOWBIT_WORD; j++) {
            EACH_LANE {
                int32_t behind = fabsf(y[j][l]) > fabsf(y[i][l]);
                rank[i][l] += behind;
                rank[j][l] -= behind;
            }
        }
    for (int l = 0; l < LOWBIT_LANES; l++) {
        int32_t shape = choice[l] < SHAPES ? choice[l] : 0;
        raised[l] = RAISED[shape], twice[l] = TWICE[shape];
    }
    for (int i = 0; i < LOWBIT_WORD; i++)
        EACH_LANE level[i][l] = (rank[i][l] < raised[l]) + (rank[i][l] < twice[l]);
    set_triples(tables, choice, level);
    EACH_LANE wrong[l] = 0, key[l] = 0;
    for (int i = 0; i < LOWBIT_WORD; i++) {
        EACH_LANE {
            minus[i][l] = y[i][l] < 0;
            wrong[l] ^= minus[i][l] ^ (level[i][l] == 1);
            key[l] = 3 * key[l] + level[i][l];
        }
    }
    for (int l = 0; l < LOWBIT_LANES; l++)
        code[l] = tables->numbers[key[l]] << 8 | lower[l] << 7;
    for (int i = 0; i < LOWBIT_WORD - 1; i++)
        EACH_LANE code[l] |= (minus[i][l] ^ (wrong[l] & (rank[i][l] == LOWBIT_WORD - 1))) << i;
}

void LOWBIT_SEARCH(const lowbit_search_tables *tables, const float *x, int each_shift,
                   int32_t code[2][LOWBIT_LANES]) {
    side plus, minus;
    float best[LOWBIT_LANES], y[LOWBIT_WORD][LOWBIT_LANES];
    int32_t zeros[LOWBIT_LANES] = {0}, lower[LOWBIT_LANES], choice[LOWBIT_LANES];
    begin(&plus, x, 0.25f);
    begin(&minus, x, -0.25f);
    if (each_shift) {
        EACH_LANE lower[l] = 1;
        try_triples(tables, &plus, plus.score);
        try_triples(tables, &minus, minus.score);
        write_codes(tables, plus.y, plus.choice, zeros, code[0]);
        write_codes(tables, minus.y, minus.choice, lower, code[1]);
        return;
    }
    EACH_LANE best[l] = plus.score[l] > minus.score[l] ? plus.score[l] : minus.score[l];
    try_triples(tables, &plus, best);
    EACH_LANE best[l] = plus.score[l] > minus.score[l] ? plus.score[l] : minus.score[l];
    try_triples(tables, &minus, best);
    EACH_LANE {
        lower[l] = minus.score[l] > plus.score[l];
        choice[l] = lower[l] ? minus.choice[l] : plus.choice[l];
    }
    for (int i = 0; i < LOWBIT_WORD; i++)
        EACH_LANE y[i][l] = lower[l] ? minus.y[i][l] : plus.y[i][l];
    write_codes(tables, y, choice, lower, code[0]);
}
