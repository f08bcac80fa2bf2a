// The language's keywords: last, so that no system header sees them.
#pragma once
#define kernel
#define device
#define threadgroup
#define thread
#define constant const
#define is_function_constant_defined(name) msl_defined_##name
#define __METAL_VERSION__ 310
