#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <string>

#include "../core/error.h"

namespace ferrum::cpu {
namespace {

std::byte* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED)
    throw Error(ErrorKind::OutOfMemory, "the system refused " + std::to_string(bytes >> 20) + " MiB of memory. Lower kv_tokens, max_sequences or prefill_chunk.");
  return static_cast<std::byte*>(pages);
}

}  // namespace

CpuBuffer::CpuBuffer(size_t bytes) : Buffer(map_pages(std::max<size_t>(bytes, 1)), bytes) {}
CpuBuffer::~CpuBuffer() { munmap(host_, std::max<size_t>(bytes_, 1)); }

}  // namespace ferrum::cpu
