// Finds races: remembers who touched each two bytes of threadgroup and buffer memory since the last barrier.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace ferrum::fibers {

enum class AccessKind : uint32_t { Read, Write, Atomic };

/// How many barriers ordered each memory so far.
struct Generations {
  uint32_t threadgroup = 0, device = 0;
};

struct Toucher {
  uint32_t dispatch = 0;      // 0: nobody
  uint32_t threadgroup;       // its number in the grid
  uint32_t by_threadgroup;    // barriers passed by the threadgroup
  uint32_t by_simdgroup;      // and by the simdgroup
  uint16_t thread;
  uint8_t bytes;              // which of the two
  AccessKind kind;
};

class Shadow {
 public:
  enum : uint32_t { GRANULE = 2, PAGE = 4096, KEPT_PAGES = 1024 };
  struct Cell {
    Toucher writer;              // the last write or atomic
    Toucher reader;              // the last read
    Toucher other_lane;          // before it, by another thread of that simdgroup
    Toucher other_simdgroup;     // before it, by another simdgroup
  };
  /// Before a dispatch, which has nothing to do with those before it: keeps memory within bounds.
  void begin() {
    if (pages_.size() <= KEPT_PAGES) return;
    pages_.clear();
    last_page_ = ~uintptr_t(0);
  }
  /// Notes an access; returns whoever raced with it, or null. `device`: other threadgroups see the memory.
  const Toucher* touch(const char* address, uint32_t bytes, const Toucher& by, bool device);

 private:
  const Toucher* touch(Cell&, const Toucher& by, bool device);
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages_;
  uintptr_t last_page_ = ~uintptr_t(0);
  Cell* last_cells_ = nullptr;
};

}  // namespace ferrum::fibers
