// How kernels reach the machine of the thread they run on.
#pragma once
#include "kernel_library.h"

namespace ferrum::fibers {

class Machine;
extern thread_local Machine* machine;
const msl::Runtime* runtime();

}  // namespace ferrum::fibers
