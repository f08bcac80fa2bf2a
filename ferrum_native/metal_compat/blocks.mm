// Blocks without libBlocksRuntime: literals that capture values, objects and other blocks. There is no __block.
#import <Foundation/Foundation.h>

#include <cstdlib>
#include <cstring>

namespace {

enum : int { HAS_COPY_DISPOSE = 1 << 25, IS_OBJECT = 3, IS_BLOCK = 7 };
struct Descriptor {
  unsigned long reserved, size;
  void (*copy)(void*, const void*);
  void (*dispose)(const void*);
};
struct Block {
  void* isa;
  int flags, references;
  void (*invoke)(void*, ...);
  Descriptor* descriptor;
};

}  // namespace

#define RUNTIME __attribute__((weak, visibility("hidden")))
extern "C" {
RUNTIME void* _NSConcreteStackBlock[32];
RUNTIME void* _NSConcreteGlobalBlock[32];
RUNTIME void* _NSConcreteMallocBlock[32];

RUNTIME void* _Block_copy(const void* literal) {
  Block* block = static_cast<Block*>(const_cast<void*>(literal));
  if (!block || block->isa == _NSConcreteGlobalBlock) return block;
  if (block->isa == _NSConcreteMallocBlock) {
    __atomic_fetch_add(&block->references, 1, __ATOMIC_RELAXED);
    return block;
  }
  Block* copy = static_cast<Block*>(malloc(block->descriptor->size));
  if (!copy) abort();
  memcpy(static_cast<void*>(copy), block, block->descriptor->size);
  copy->isa = _NSConcreteMallocBlock;
  copy->references = 1;
  if (copy->flags & HAS_COPY_DISPOSE) copy->descriptor->copy(copy, block);
  return copy;
}
RUNTIME void _Block_release(const void* literal) {
  Block* block = static_cast<Block*>(const_cast<void*>(literal));
  if (!block || block->isa != _NSConcreteMallocBlock || __atomic_fetch_sub(&block->references, 1, __ATOMIC_ACQ_REL) != 1) return;
  if (block->flags & HAS_COPY_DISPOSE) block->descriptor->dispose(block);
  free(block);
}
RUNTIME void _Block_object_assign(void* to, const void* object, const int flags) {
  if ((flags & 15) == IS_OBJECT) [static_cast<id>(const_cast<void*>(object)) retain];
  if ((flags & 15) == IS_BLOCK) object = _Block_copy(object);
  *static_cast<const void**>(to) = object;
}
RUNTIME void _Block_object_dispose(const void* object, const int flags) {
  if ((flags & 15) == IS_OBJECT) [static_cast<id>(const_cast<void*>(object)) release];
  if ((flags & 15) == IS_BLOCK) _Block_release(object);
}
}
