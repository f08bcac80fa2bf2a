// Tests of the Metal stand-in in its own language; run by test_metal_compat.py with the path of a kernel library.
#import <Metal/Metal.h>

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "metal_compat.h"

namespace compat = ferrum::metal_compat;

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);    \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

struct Pool {
  NSAutoreleasePool* pool = [NSAutoreleasePool new];
  ~Pool() { [pool drain]; }
};
static bool contains(NSString* text, const char* part) { return strstr([text UTF8String], part) != nullptr; }

static const char* library_path;

struct Kernels {
  id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  id<MTLCommandQueue> queue = [device newCommandQueue];
  id<MTLLibrary> library;
  id<MTLComputePipelineState> plain;
  Kernels() {
    Pool pool;
    NSError* error = nil;
    library = [device newLibraryWithURL:[NSURL fileURLWithPath:[NSString stringWithUTF8String:library_path]] error:&error];
    CHECK(library && !error);
    id<MTLFunction> function = [[library newFunctionWithName:@"plain"] autorelease];
    plain = [device newComputePipelineStateWithFunction:function error:&error];
    CHECK(plain && [plain threadExecutionWidth] == 32 && [plain maxTotalThreadsPerThreadgroup] == 1024);
  }
  ~Kernels() {
    [plain release];
    [library release];
    [queue release];
    [device release];
  }
  void encode(id<MTLCommandBuffer> commands, id<MTLBuffer> buffer, int dispatches) const {
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    [encoder setComputePipelineState:plain];
    [encoder setBuffer:buffer offset:0 atIndex:0];
    for (int i = 0; i < dispatches; ++i) [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(32, 1, 1)];
    [encoder endEncoding];
  }
};

static void strings() {
  Pool pool;
  NSString* text = [NSString stringWithFormat:@"%@ %s %d %lu %.2f %% %x", @"a", "b", -3, 4ul, 0.5, 255];
  CHECK([text isEqualToString:@"a b -3 4 0.50 % ff"] && [text length] == 18);
  CHECK([[text copy] autorelease] == text && [@"x" isEqual:[NSString stringWithUTF8String:"x"]]);
  CHECK([@"x" hash] == [[NSString stringWithUTF8String:"x"] hash]);
}

static void exceptions() {
  const long before = compat::live_objects();
  bool caught = false;
  try {
    Pool pool;
    [[NSObject new] autorelease];
    [NSString stringWithFormat:@"%d", 1];
    throw std::runtime_error("through Objective-C++ frames");
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught && compat::live_objects() == before);
}

static void blocks() {
  Pool pool;
  NSObject* captured = [NSObject new];
  int (^block)(int) = ^(int x) { return x + (captured ? 1 : 0); };
  id copy = [(id)nil retain];
  CHECK(copy == nil && block(41) == 42);
  [captured release];
}

static void buffers() {
  Pool pool;
  id<MTLDevice> device = [MTLCreateSystemDefaultDevice() autorelease];
  CHECK([device hasUnifiedMemory] && [device maxThreadgroupMemoryLength] == 32768);
  id<MTLBuffer> buffer = [[device newBufferWithLength:1000 options:MTLResourceStorageModeShared] autorelease];
  CHECK([buffer length] == 1000 && compat::allocated_bytes() == 1000 && [device currentAllocatedSize] == 1000);
  for (int i = 0; i < 1000; ++i) CHECK(static_cast<char*>([buffer contents])[i] == 0);
  CHECK(![device newBufferWithLength:0 options:MTLResourceStorageModeShared]);
  CHECK(![device newBufferWithLength:[device maxBufferLength] + 1 options:MTLResourceStorageModeShared]);
  CHECK(memcmp([[[device newBufferWithBytes:"abc" length:3 options:MTLResourceStorageModeShared] autorelease] contents], "abc", 3) == 0);

  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* pages = static_cast<char*>(mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  id<MTLBuffer> whole = [device newBufferWithBytesNoCopy:pages length:2 * page options:MTLResourceStorageModeShared deallocator:nil];
  CHECK(whole && [whole contents] == pages);
  [whole release];
  CHECK(![device newBufferWithBytesNoCopy:pages + 16 length:page options:MTLResourceStorageModeShared deallocator:nil]);
  CHECK(![device newBufferWithBytesNoCopy:pages length:page + 1 options:MTLResourceStorageModeShared deallocator:nil]);
  munmap(pages + 2 * page, page);
  CHECK(![device newBufferWithBytesNoCopy:pages length:3 * page options:MTLResourceStorageModeShared deallocator:nil]);
  std::atomic<size_t> freed{0};
  std::atomic<size_t>* count = &freed;
  [[device newBufferWithBytesNoCopy:pages length:page options:MTLResourceStorageModeShared deallocator:^(void* p, NSUInteger n) { *count += n; }] release];
  CHECK(freed == page);
  munmap(pages, 2 * page);
}

static void libraries() {
  Pool pool;
  const Kernels k;
  NSError* error = nil;
  CHECK(![k.device newLibraryWithURL:[NSURL fileURLWithPath:@"/nowhere.metallib"] error:&error]);
  CHECK([error code] == MTLLibraryErrorFileNotFound && contains([error localizedDescription], "/nowhere.metallib"));
  CHECK(![k.library newFunctionWithName:@"absent" constantValues:nil error:&error]);
  CHECK([error code] == MTLLibraryErrorFunctionNotFound && contains([error localizedDescription], "absent") && ![k.library newFunctionWithName:@"absent"]);

  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
  const int kept = 3;
  const bool yes = true;
  [values setConstantValue:&kept type:MTLDataTypeInt atIndex:2];
  CHECK(![k.library newFunctionWithName:@"shift_f32" constantValues:values error:&error] && contains([error localizedDescription], "doubled"));
  [values setConstantValue:&kept type:MTLDataTypeInt atIndex:5];
  CHECK(![k.library newFunctionWithName:@"shift_f32" constantValues:values error:&error] && contains([error localizedDescription], "another type"));
  [values setConstantValue:&yes type:MTLDataTypeBool atIndex:5];
  id<MTLFunction> function = [[k.library newFunctionWithName:@"shift_f32" constantValues:values error:&error] autorelease];
  CHECK(function && [[function name] isEqualToString:@"shift_f32"]);
  id<MTLFunction> unset = [[k.library newFunctionWithName:@"shift_f32"] autorelease];
  CHECK(unset && ![k.device newComputePipelineStateWithFunction:unset error:&error] && contains([error localizedDescription], "kept"));
  CHECK(![k.device newComputePipelineStateWithFunction:nil error:nullptr]);
}

static void sources() {
  Pool pool;
  const Kernels k;
  NSError* error = nil;
  MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
  [options setFastMathEnabled:NO];
  NSString* good = @"#include <metal_stdlib>\nusing namespace metal;\nkernel void fill(device int* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = 7; }\n";
  id<MTLLibrary> library = [[k.device newLibraryWithSource:good options:options error:&error] autorelease];
  if (!library) printf("%s\n", [[error localizedDescription] UTF8String]);
  CHECK(library);
  CHECK([[library newFunctionWithName:@"fill"] autorelease]);
  CHECK(![k.device newLibraryWithSource:@"kernel void k(device float* x) {}" options:nil error:&error]);
  CHECK([error code] == MTLLibraryErrorCompileFailure && contains([error localizedDescription], "attribute"));
}

static void dispatches() {
  Pool pool;
  const Kernels k;
  id<MTLBuffer> buffer = [[k.device newBufferWithLength:128 options:MTLResourceStorageModeShared] autorelease];
  const float* values = static_cast<const float*>([buffer contents]);
  std::atomic<int> handled{0};
  std::atomic<int>* count = &handled;
  for (int round = 1; round <= 50; ++round) {
    Pool inner;
    id<MTLCommandBuffer> commands = [k.queue commandBuffer];
    k.encode(commands, buffer, 3);
    CHECK([commands status] == MTLCommandBufferStatusNotEnqueued);
    [commands addCompletedHandler:^(id<MTLCommandBuffer> done) { *count += [done status] == MTLCommandBufferStatusCompleted ? 1 : 1000; }];
    [commands commit];
    [commands waitUntilCompleted];
    CHECK([commands status] == MTLCommandBufferStatusCompleted && ![commands error] && handled == round);
    CHECK([commands GPUEndTime] >= [commands GPUStartTime]);
    for (int i = 0; i < 32; ++i) CHECK(values[i] == 3.0f * float(round));
  }
}

static void many_in_flight() {
  const Kernels k;
  Pool pool;
  id<MTLBuffer> buffer = [[k.device newBufferWithLength:128 options:MTLResourceStorageModeShared] autorelease];
  std::vector<id<MTLCommandBuffer>> all;
  for (int i = 0; i < 20; ++i) {
    all.push_back([k.queue commandBuffer]);
    k.encode(all.back(), buffer, 1);
    [all.back() commit];
  }
  [all.back() waitUntilCompleted];  // the queue runs them in order
  CHECK(static_cast<const float*>([buffer contents])[0] == 20.0f);
}

static void released_while_running() {
  Kernels k;
  Pool pool;
  id<MTLBuffer> buffer = [[k.device newBufferWithLength:128 options:MTLResourceStorageModeShared] autorelease];
  for (int i = 0; i < 5; ++i) {
    Pool inner;
    id<MTLCommandQueue> queue = [[k.device newCommandQueue] autorelease];
    id<MTLCommandBuffer> commands = [queue commandBuffer];
    k.encode(commands, buffer, 2);
    [commands commit];
  }
}

static void injected_failures() {
  Pool pool;
  const Kernels k;
  id<MTLBuffer> buffer = [[k.device newBufferWithLength:128 options:MTLResourceStorageModeShared] autorelease];
  compat::fail_command_buffer(2, MTLCommandBufferErrorOutOfMemory);
  for (int i = 0; i < 5; ++i) {
    id<MTLCommandBuffer> commands = [k.queue commandBuffer];
    k.encode(commands, buffer, 4);
    [commands commit];
    [commands waitUntilCompleted];
    CHECK(([commands status] == MTLCommandBufferStatusError) == (i == 2));
    if (i == 2) CHECK([[commands error] code] == MTLCommandBufferErrorOutOfMemory && [[[commands error] domain] isEqualToString:MTLCommandBufferErrorDomain]);
  }
  CHECK(static_cast<const float*>([buffer contents])[0] == 4 * 4 + 2);  // half of the failed one ran
}

/// The command buffer ends in an error that holds `part`.
static void misused(const Kernels& k, const char* part, const std::function<void(id<MTLCommandBuffer>, id<MTLComputeCommandEncoder>)>& use) {
  Pool pool;
  id<MTLCommandBuffer> commands = [k.queue commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:k.plain];
  use(commands, encoder);
  [commands commit];
  [commands waitUntilCompleted];
  CHECK([commands status] == MTLCommandBufferStatusError && [[commands error] code] == MTLCommandBufferErrorInvalidResource);
  if (!contains([[commands error] localizedDescription], part)) printf("%s\n", [[[commands error] localizedDescription] UTF8String]);
  CHECK(contains([[commands error] localizedDescription], part));
}

static void misuse() {
  Pool pool;
  const Kernels k;
  id<MTLBuffer> buffer = [[k.device newBufferWithLength:128 options:MTLResourceStorageModeShared] autorelease];
  const MTLSize one = MTLSizeMake(1, 1, 1), lanes = MTLSizeMake(32, 1, 1);
  misused(k, "before endEncoding", [&](auto, auto) {});
  misused(k, "buffer(0) is not bound", [&](auto, auto encoder) {
    [encoder dispatchThreadgroups:one threadsPerThreadgroup:lanes];
    [encoder endEncoding];
  });
  misused(k, "after endEncoding", [&](auto, auto encoder) {
    [encoder setBuffer:buffer offset:0 atIndex:0];
    [encoder endEncoding];
    [encoder dispatchThreadgroups:one threadsPerThreadgroup:lanes];
  });
  misused(k, "while another one encodes", [&](auto commands, auto encoder) {
    [[commands computeCommandEncoder] endEncoding];
    [encoder endEncoding];
  });
  misused(k, "is past its 128 bytes", [&](auto, auto encoder) {
    [encoder setBuffer:buffer offset:128 atIndex:0];
    [encoder endEncoding];
  });
  misused(k, "multiple of 32", [&](auto, auto encoder) {
    [encoder setBuffer:buffer offset:0 atIndex:0];
    [encoder dispatchThreadgroups:one threadsPerThreadgroup:MTLSizeMake(31, 1, 1)];
    [encoder endEncoding];
  });
  misused(k, "only serial encoders", [&](auto commands, auto encoder) {
    [encoder endEncoding];
    [[commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent] endEncoding];
  });
  misused(k, "1 to 4096 bytes", [&](auto, auto encoder) {
    const std::vector<char> bytes(5000);
    [encoder setBytes:bytes.data() length:bytes.size() atIndex:1];
    [encoder endEncoding];
  });
}

static void faults_of_kernels() {
  Pool pool;
  const Kernels k;
  id<MTLBuffer> shorter = [[k.device newBufferWithLength:64 options:MTLResourceStorageModeShared] autorelease];
  id<MTLCommandBuffer> commands = [k.queue commandBuffer];
  k.encode(commands, shorter, 1);
  [commands commit];
  [commands waitUntilCompleted];
  CHECK([commands status] == MTLCommandBufferStatusError && [[commands error] code] == MTLCommandBufferErrorPageFault);
  CHECK(contains([[commands error] localizedDescription], "past the end of buffer(0) of 64 bytes"));
}

int main(int, char** arguments) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  library_path = arguments[1];
  const struct { const char* name; void (*run)(); } tests[] = {
      {"strings", strings}, {"exceptions", exceptions}, {"blocks", blocks}, {"buffers", buffers}, {"libraries", libraries}, {"sources", sources},
      {"dispatches", dispatches}, {"many in flight", many_in_flight}, {"released while running", released_while_running},
      {"injected failures", injected_failures}, {"misuse", misuse}, {"faults of kernels", faults_of_kernels}};
  for (const auto& test : tests) {
    test.run();
    printf("%s\n", test.name);
  }
  for (int i = 0; i < 100 && compat::live_objects(); ++i) usleep(20000);  // a queue that was released while it ran
  printf("%ld objects left\n", compat::live_objects());
  return 0;
}
