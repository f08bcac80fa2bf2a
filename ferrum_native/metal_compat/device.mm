#include "device.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "metal_compat.h"
#include "queue.h"
#include "source_compiler.h"

using namespace ferrum::fibers;

NSErrorDomain const MTLCommandBufferErrorDomain = @"MTLCommandBufferErrorDomain";
NSErrorDomain const MTLLibraryErrorDomain = @"MTLLibraryErrorDomain";

namespace {

std::atomic<size_t> allocated{0};
constexpr size_t LARGEST_BUFFER = size_t(16) << 30;
constexpr size_t GUARD_BYTES = size_t(1) << 20;  // without access, on both sides of a buffer

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t memory_bytes() { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes(); }
size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

bool is_mapped(char* pages, size_t bytes) {
  std::vector<unsigned char> resident(rounded(bytes, page_bytes()) / page_bytes());
  return mincore(pages, bytes, resident.data()) == 0;
}

bool machine_runs_kernels() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // what mslc.py compiles for
#else
  return true;
#endif
}

}  // namespace
size_t ferrum::metal_compat::allocated_bytes() { return allocated; }

id<MTLDevice> MTLCreateSystemDefaultDevice(void) { return machine_runs_kernels() ? [CompatDevice new] : nil; }

@implementation CompatDevice
- (NSString*)name { return @"CPU fibers"; }
- (BOOL)hasUnifiedMemory { return YES; }
- (NSUInteger)maxThreadgroupMemoryLength { return 32 * 1024; }
- (NSUInteger)maxBufferLength { return LARGEST_BUFFER; }
- (uint64_t)recommendedMaxWorkingSetSize { return memory_bytes() / 4 * 3; }
- (NSUInteger)currentAllocatedSize { return allocated; }
- (id<MTLCommandQueue>)newCommandQueue { return [[CompatQueue alloc] initWithDevice:self]; }

- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  if (length == 0 || length > LARGEST_BUFFER) return nil;
  const size_t usable = rounded(length, page_bytes());
  void* mapping = mmap(nullptr, usable + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nil;
  char* pages = static_cast<char*>(mapping) + GUARD_BYTES;
  if (mprotect(pages, usable, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, usable + 2 * GUARD_BYTES);
    return nil;
  }
  CompatBuffer* buffer = [[CompatBuffer alloc] initWithDevice:self];
  buffer->_mapping = static_cast<char*>(mapping);
  buffer->_mapping_bytes = usable + 2 * GUARD_BYTES;
  buffer->_data = pages + usable - rounded(length, 16);
  buffer->_bytes = length;
  allocated += length;
  return buffer;
}
- (id<MTLBuffer>)newBufferWithBytes:(const void*)pointer length:(NSUInteger)length options:(MTLResourceOptions)options {
  CompatBuffer* buffer = [self newBufferWithLength:length options:options];
  if (buffer) memcpy(buffer->_data, pointer, length);
  return buffer;
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void* pointer, NSUInteger length))deallocator {
  char* pages = static_cast<char*>(pointer);
  const bool whole = reinterpret_cast<uintptr_t>(pages) % page_bytes() == 0 && length % page_bytes() == 0;
  if (!pages || !whole || length == 0 || length > LARGEST_BUFFER || !is_mapped(pages, length)) return nil;
  CompatBuffer* buffer = [[CompatBuffer alloc] initWithDevice:self];
  buffer->_data = pages;
  buffer->_bytes = length;
  buffer->_deallocator = reinterpret_cast<void (^)(void*, NSUInteger)>(_Block_copy(reinterpret_cast<const void*>(deallocator)));
  return buffer;
}

- (CompatLibrary*)open:(const std::string&)path folder:(const std::string&)folder error:(NSError**)error {
  try {
    auto opened = std::make_shared<KernelLibrary>(path);
    CompatLibrary* library = [[CompatLibrary alloc] initWithDevice:self];
    library->_library = new std::shared_ptr<KernelLibrary>(std::move(opened));
    library->_folder = new std::string(folder);
    return library;
  } catch (const std::runtime_error& failure) {
    return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorFileNotFound, failure.what());
  }
}
- (id<MTLLibrary>)newLibraryWithURL:(NSURL*)url error:(NSError**)error { return [self open:[[url path] UTF8String] folder:"" error:error]; }
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source options:(MTLCompileOptions*)options error:(NSError**)error {
  const ferrum::metal_compat::Compiled compiled = ferrum::metal_compat::compile_source([source UTF8String]);
  if (!compiled.error.empty()) return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, compiled.error);
  return [self open:compiled.library folder:compiled.folder error:error];
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)computeFunction error:(NSError**)error {
  CompatFunction* function = static_cast<CompatFunction*>(computeFunction);
  if (!function) return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorFunctionNotFound, "there is no function to make a pipeline of");
  const std::string missing = missing_constant(*function->_kernel, *function->_constants);
  if (!missing.empty()) return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, missing);
  CompatPipeline* pipeline = [[CompatPipeline alloc] initWithDevice:self];
  pipeline->_function = [function retain];
  return pipeline;
}
@end

@implementation CompatBuffer
- (void*)contents { return _data; }
- (NSUInteger)length { return _bytes; }
- (MTLStorageMode)storageMode { return MTLStorageModeShared; }
- (void)dealloc {
  if (_mapping) {
    munmap(_mapping, _mapping_bytes);
    allocated -= _bytes;
  }
  if (_deallocator) {
    _deallocator(_data, _bytes);
    _Block_release(reinterpret_cast<const void*>(_deallocator));
  }
  [super dealloc];
}
@end

@implementation MTLCompileOptions
- (BOOL)fastMathEnabled { return _fastMathEnabled; }
- (void)setFastMathEnabled:(BOOL)enabled { _fastMathEnabled = enabled; }
- (MTLLanguageVersion)languageVersion { return _languageVersion; }
- (void)setLanguageVersion:(MTLLanguageVersion)version { _languageVersion = version; }
@end

struct ConstantTable {
  struct Entry {
    ConstantValue value;
    MTLDataType type;
  };
  std::vector<Entry> entries;
};
@interface MTLFunctionConstantValues ()
- (const ConstantTable&)table;
@end

@implementation MTLFunctionConstantValues
- (instancetype)init {
  _table = new ConstantTable;
  return self;
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  const size_t bytes = type == MTLDataTypeBool ? 1 : type == MTLDataTypeShort || type == MTLDataTypeUShort ? 2 : 4;
  ConstantTable::Entry entry{{static_cast<uint32_t>(index), {}}, type};
  memcpy(entry.value.value, value, bytes);
  for (ConstantTable::Entry& old : _table->entries)
    if (old.value.index == index) {
      old = entry;
      return;
    }
  _table->entries.push_back(entry);
}
- (void)reset { _table->entries.clear(); }
- (id)copyWithZone:(NSZone*)zone {
  MTLFunctionConstantValues* copy = [MTLFunctionConstantValues new];
  *copy->_table = *_table;
  return copy;
}
- (const ConstantTable&)table { return *_table; }
- (void)dealloc {
  delete _table;
  [super dealloc];
}
@end

namespace {

MTLDataType type_named(const std::string& name) {
  if (name == "bool") return MTLDataTypeBool;
  if (name == "short") return MTLDataTypeShort;
  if (name == "ushort") return MTLDataTypeUShort;
  if (name == "int") return MTLDataTypeInt;
  if (name == "uint") return MTLDataTypeUInt;
  return MTLDataTypeFloat;
}

/// What is wrong with the values for a kernel, or "".
std::string wrong_constants(const Kernel& kernel, const ConstantTable& table) {
  for (uint32_t i = 0; i < kernel.file->constant_count; ++i) {
    const msl::FunctionConstant& constant = kernel.file->constants[i];
    for (const ConstantTable::Entry& entry : table.entries)
      if (entry.value.index == constant.index && entry.type != type_named(constant.type) && (kernel.entry->constants >> i & 1))
        return std::string("function constant ") + constant.name + " of kernel " + kernel.entry->name + " is " + constant.type + "; its value was given another type";
  }
  return "";
}

}  // namespace

@implementation CompatLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)functionName { return [self newFunctionWithName:functionName constantValues:nil error:nullptr]; }
- (id<MTLFunction>)newFunctionWithName:(NSString*)name constantValues:(MTLFunctionConstantValues*)constantValues error:(NSError**)error {
  const Kernel* kernel = (*_library)->find([name UTF8String]);
  if (!kernel) return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorFunctionNotFound, std::string("the library has no kernel named ") + [name UTF8String]);
  auto constants = std::make_unique<std::vector<ConstantValue>>();
  if (constantValues) {
    const ConstantTable& table = [constantValues table];
    for (const ConstantTable::Entry& entry : table.entries) constants->push_back(entry.value);
    std::string wrong = wrong_constants(*kernel, table);
    if (wrong.empty()) wrong = missing_constant(*kernel, *constants);
    if (!wrong.empty()) return compat_fail(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, wrong);
  }
  CompatFunction* function = [[CompatFunction alloc] initWithDevice:[self device]];
  function->_library = [self retain];
  function->_kernel = kernel;
  function->_constants = constants.release();
  return function;
}
- (void)dealloc {
  delete _library;
  if (_folder && !_folder->empty()) ferrum::metal_compat::remove_folder(*_folder);
  delete _folder;
  [super dealloc];
}
@end

@implementation CompatFunction
- (NSString*)name { return compat_string(_kernel->entry->name); }
- (void)dealloc {
  delete _constants;
  [_library release];
  [super dealloc];
}
@end

@implementation CompatPipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup { return 1024; }
- (NSUInteger)threadExecutionWidth { return msl::SIMD_WIDTH; }
- (NSUInteger)staticThreadgroupMemoryLength { return 0; }
- (void)dealloc {
  [_function release];
  [super dealloc];
}
@end
