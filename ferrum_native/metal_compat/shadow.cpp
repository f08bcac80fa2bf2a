#include "shadow.h"

#include <algorithm>

namespace ferrum::fibers {

namespace {

/// Whether a barrier, or being the same thread, puts `earlier` before `later`. Threadgroup memory is poisoned anew for each threadgroup.
bool ordered(const Toucher& earlier, const Toucher& later, bool device) {
  if (earlier.dispatch != later.dispatch || !(earlier.bytes & later.bytes)) return true;
  if (earlier.kind == AccessKind::Atomic && later.kind == AccessKind::Atomic) return true;
  if (earlier.threadgroup != later.threadgroup) return !device;
  if (earlier.thread == later.thread || earlier.by_threadgroup != later.by_threadgroup) return true;
  return earlier.thread / 32 == later.thread / 32 && earlier.by_simdgroup != later.by_simdgroup;
}
bool same_thread(const Toucher& a, const Toucher& b) { return a.dispatch == b.dispatch && a.threadgroup == b.threadgroup && a.thread == b.thread; }
bool same_simdgroup(const Toucher& a, const Toucher& b) { return a.dispatch == b.dispatch && a.threadgroup == b.threadgroup && a.thread / 32 == b.thread / 32; }

}  // namespace

const Toucher* Shadow::touch(Cell& cell, const Toucher& by, bool device) {
  if (!ordered(cell.writer, by, device)) return &cell.writer;
  if (by.kind == AccessKind::Read) {
    if (!same_thread(cell.reader, by)) {
      if (same_simdgroup(cell.reader, by)) cell.other_lane = cell.reader;
      else cell.other_simdgroup = cell.reader;
    }
    cell.reader = by;
    return nullptr;
  }
  for (const Toucher* reader : {&cell.reader, &cell.other_lane, &cell.other_simdgroup})
    if (!ordered(*reader, by, device)) return reader;
  cell.writer = by;
  return nullptr;
}

const Toucher* Shadow::touch(const char* address, uint32_t bytes, const Toucher& by, bool device) {
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = at + bytes;
  while (at < end) {
    const uintptr_t page = at / PAGE;
    if (page != last_page_) {
      std::unique_ptr<Cell[]>& cells = pages_[page];
      if (!cells) cells = std::make_unique<Cell[]>(PAGE / GRANULE);
      last_page_ = page;
      last_cells_ = cells.get();
    }
    const uintptr_t granule_end = std::min(end, at / GRANULE * GRANULE + GRANULE);
    Toucher part = by;
    part.bytes = uint8_t(at % GRANULE == 0 ? (granule_end - at == GRANULE ? 3 : 1) : 2);
    if (const Toucher* other = touch(last_cells_[at % PAGE / GRANULE], part, device)) return other;
    at = granule_end;
  }
  return nullptr;
}

}  // namespace ferrum::fibers
