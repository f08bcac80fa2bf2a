// The classes of the stand-in's device, buffers, libraries and pipelines, for each other.
#pragma once
#include <memory>
#include <vector>

#include "executor.h"
#include "objects.h"

@interface CompatDevice : NSObject <MTLDevice>
@end

/// Memory between stretches without access, flush with the end; or somebody else's, in whole pages.
@interface CompatBuffer : CompatObject <MTLBuffer> {
 @public
  char* _data;
  size_t _bytes;
  char* _mapping;          // null where it is no-copy
  size_t _mapping_bytes;
  void (^_deallocator)(void*, NSUInteger);
}
@end

@interface CompatLibrary : CompatObject <MTLLibrary> {
 @public
  std::shared_ptr<ferrum::fibers::KernelLibrary>* _library;
  std::string* _folder;    // to remove, where the library was compiled from source
}
@end

@interface CompatFunction : CompatObject <MTLFunction> {
 @public
  CompatLibrary* _library;
  const ferrum::fibers::Kernel* _kernel;
  std::vector<ferrum::fibers::ConstantValue>* _constants;
}
@end

@interface CompatPipeline : CompatObject <MTLComputePipelineState> {
 @public
  CompatFunction* _function;
}
@end
