// read_bandwidth: every thread sums its share of a buffer, so that the time says how fast memory reads.
//
// kernel          buffers after args                                     grid (threadgroups)                          threads
// read_bandwidth  data uint4 [vectors]; sums uint32 [groups, threads]    (vectors / bandwidth_vectors_of_group)       bandwidth_threads
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { bandwidth_threads = 256, bandwidth_vectors_of_group = 64 * bandwidth_threads };

struct ReadBandwidthArgs { int32_t vectors_of_group; };
static_assert(sizeof(ReadBandwidthArgs) == 4, "ReadBandwidthArgs is packed");

}  // namespace shared
}  // namespace ferrum
