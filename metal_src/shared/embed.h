// embed: rows of a table of any type as floats.
//
// kernel   buffers after args                                                                grid (threadgroups)                   threads
// embed    table [vocab, H]; ids int32 [T]; count; out float [T, H]                          (ceil(H / embed_block), T)             embed_threads
#pragma once
#include "weight_types.h"

namespace ferrum {
namespace shared {

enum { embed_threads = 64, embed_block = 4 * embed_threads };  // a thread takes one unit of 4 to 32 values; blocks without units do nothing

struct EmbedArgs {
  int32_t cols;        // H
  uint32_t row_bytes;  // of the table
};
static_assert(sizeof(EmbedArgs) == 8, "EmbedArgs is packed");

}  // namespace shared
}  // namespace ferrum
