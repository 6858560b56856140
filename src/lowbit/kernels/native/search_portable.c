/* The search for nearest words in plain C. */

#define LOWBIT_SEARCH lowbit_search_portable
#include "search_lanes.h"
