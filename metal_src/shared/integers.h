// Names of fixed-size integers, which MSL has built in.
#pragma once
#ifndef __METAL_VERSION__
#include <cstddef>
#include <cstdint>
#endif
