// gather_rows: row i of out = row rows[i] of x. Serves float rows and packed forms alike: a row is `words` 4-byte words.
//
// kernel       buffers after args                                                        grid (threadgroups)                            threads
// gather_rows  x [any, words]; rows int32 [n] (logit_rows); count; out [n, words]        (ceil(words / gather_words_of_group), n)       gather_threads
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { gather_threads = 256, gather_words_of_group = 4 * gather_threads };

struct GatherRowsArgs { int32_t words; };
static_assert(sizeof(GatherRowsArgs) == 4, "GatherRowsArgs is packed");

}  // namespace shared
}  // namespace ferrum
