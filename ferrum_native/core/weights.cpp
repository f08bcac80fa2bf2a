#include "weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"

namespace ferrum {

MappedFile::MappedFile(const std::string& path) {
  auto failed = [&](const char* what) -> Error { return {ErrorKind::BadModelFile, path + ": cannot " + what + ": " + std::strerror(errno) + "."}; };
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw failed("open the model file");
  struct stat status;
  void* data = MAP_FAILED;
  if (fstat(fd, &status) == 0 && status.st_size > 0) {
    bytes_ = static_cast<uint64_t>(status.st_size);
    data = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, fd, 0);
  }
  int error = errno;
  close(fd);
  errno = error;
  if (data == MAP_FAILED) throw failed("map the model file into memory");
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), bytes_);
}

namespace {

uint64_t page_bytes() { return static_cast<uint64_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void MappedFile::advise_huge_pages() const {
#if defined(__linux__)
  madvise(const_cast<std::byte*>(data_), bytes_, MADV_HUGEPAGE);  // where the kernel has no such pages of files, nothing changes
#endif
}

void MappedFile::populate(uint64_t offset, uint64_t bytes) const {
  const uint64_t page = page_bytes(), first = offset / page * page;
  auto* start = const_cast<std::byte*>(data_ + first);
  const uint64_t size = offset + bytes - first;
#if defined(__linux__)
  constexpr int populate_read = 22;  // MADV_POPULATE_READ, Linux 5.14
  if (madvise(start, size, populate_read) == 0 || errno != EINVAL) return;  // other errors are of the file: touching it would end in SIGBUS
#endif
  madvise(start, size, MADV_WILLNEED);
  for (uint64_t at = 0; at < size; at += page) static_cast<void>(*static_cast<const volatile std::byte*>(start + at));
}

double MappedFile::resident_bytes() const {
#if defined(__linux__)
  constexpr uint64_t window_pages = 16, most_windows = 2048;  // a few milliseconds for a file of any size, and all of one up to 128 MiB
  const uint64_t page = page_bytes(), pages = (bytes_ + page - 1) / page;
  const uint64_t windows = std::min(most_windows, (pages + window_pages - 1) / window_pages);
  uint64_t asked = 0, resident = 0;
  for (uint64_t i = 0; i < windows; ++i) {
    unsigned char here[window_pages];
    const uint64_t first = pages * i / windows, count = std::min(window_pages, pages * (i + 1) / windows - first);
    if (mincore(const_cast<std::byte*>(data_ + first * page), count * page, here) != 0) return static_cast<double>(bytes_);
    asked += count;
    for (uint64_t p = 0; p < count; ++p) resident += here[p] & 1;
  }
  return static_cast<double>(bytes_) * static_cast<double>(resident) / static_cast<double>(asked);
#else
  return static_cast<double>(bytes_);
#endif
}

namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void refuse_unsupported_types(const ModelDescription& description) {
  struct Found { int count = 0; std::string name, example; };
  std::map<int, Found> unsupported;
  for (const auto& [name, tensor] : description.tensors) {
    if (weight_type_index(tensor.type_id) >= 0) continue;
    Found& found = unsupported[tensor.type_id];
    if (found.count++ == 0) found.name = tensor.type_name, found.example = name;
  }
  if (unsupported.empty()) return;
  std::string text = "the file has tensors of types that ferrum does not compute with: ", separator;
  for (const auto& [id, found] : unsupported) {
    text += separator + found.name + " (" + std::to_string(found.count) + (found.count == 1 ? " tensor: " : " tensors, such as ") + found.example + ")";
    separator = ", ";
  }
  text += ".\nSupported are";
  separator = " ";
  for (const WeightTypeInfo& type : weight_types) text += separator + type.name, separator = ", ";
  throw Error(ErrorKind::UnsupportedModel, text + ". Quantize the model to one of these, for example Q4_K_M or Q8_0.");
}

}  // namespace

Weights::Weights(ModelDescription description) : description_(std::move(description)) {
  refuse_unsupported_types(description_);
  for (const auto& [name, tensor] : description_.tensors) bytes_ += tensor.bytes;
}

void Weights::map() {
  for (const std::string& path : description_.paths) files_.push_back(std::make_unique<MappedFile>(path));
  for (const auto& [name, tensor] : description_.tensors) {
    uint64_t size = files_.at(static_cast<size_t>(tensor.file))->bytes();
    if (tensor.offset > size || tensor.bytes > size - tensor.offset)
      throw Error(ErrorKind::BadModelFile, description_.paths[static_cast<size_t>(tensor.file)] + ": tensor " + name +
                                               " reaches past the end of the file, which changed since it was opened. Copy it again.");
  }
  // Of files that do not stay in memory, huge pages would read more again and again than is used.
  const uint64_t memory = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes();
  if (mapped_bytes() > memory / 4 * 3) return;
  for (const auto& file : files_) file->advise_huge_pages();
}

uint64_t Weights::mapped_bytes() const {
  uint64_t bytes = 0;
  for (const auto& file : files_) bytes += file->bytes();
  return bytes;
}

void Weights::populate(uint64_t offset, uint64_t bytes) const {
  uint64_t start = 0;
  for (const auto& file : files_) {
    const uint64_t from = std::max(offset, start), to = std::min(offset + bytes, start + file->bytes());
    if (from < to) file->populate(from - start, to - from);
    start += file->bytes();
  }
}

double Weights::resident_fraction() const {
  double resident = 0;
  for (const auto& file : files_) resident += file->resident_bytes();
  return resident / static_cast<double>(mapped_bytes());
}

WeightTensor Weights::vector(const std::string& name, int size) {
  WeightTensor tensor = take(name, {size});
  if (tensor.type != WeightType::F32)
    throw Error(ErrorKind::UnsupportedModel, "tensor " + name + " has type " + info(tensor.type).name + ", but norm weights must be F32. Convert the model again with a current tool.");
  return tensor;
}

WeightTensor Weights::take(const std::string& name, const std::vector<int64_t>& shape) {
  auto found = description_.tensors.find(name);
  if (found == description_.tensors.end())
    throw Error(ErrorKind::BadModelFile, "tensor " + name + " is missing; the model needs it with shape " + shape_text(shape) + ". The file is incomplete or of another architecture.");
  const TensorEntry& entry = found->second;
  if (entry.shape != shape)
    throw Error(ErrorKind::BadModelFile, "tensor " + name + " has shape " + shape_text(entry.shape) + ", but the file's own metadata asks for " + shape_text(shape) + ".");
  WeightTensor tensor;
  tensor.type = weight_types[weight_type_index(entry.type_id)].type;
  tensor.cols = static_cast<int>(shape.back());
  tensor.rows = shape.size() > 1 ? static_cast<int>(shape[shape.size() - 2]) : 1;
  tensor.experts = shape.size() > 2 ? static_cast<int>(shape[0]) : 1;
  if (tensor.cols % info(tensor.type).block_weights != 0 || tensor.bytes() != entry.bytes)
    throw Error(ErrorKind::BadModelFile, "tensor " + name + " of type " + entry.type_name + " and shape " + shape_text(shape) + " takes " + std::to_string(entry.bytes) + " bytes, not the " +
                                             std::to_string(tensor.bytes()) + " that its type asks for.");
  if (!files_.empty()) tensor.data = files_[static_cast<size_t>(entry.file)]->data() + entry.offset;
  used_.insert(name);
  return tensor;
}

void Weights::check_all_used() const {
  int count = 0;
  std::string example;
  for (const auto& [name, tensor] : description_.tensors)
    if (!used_.count(name) && count++ == 0) example = name;
  if (count == 0) return;
  throw Error(ErrorKind::UnsupportedModel, "the file has " + std::to_string(count) + (count == 1 ? " tensor" : " tensors") + " that architecture " + description_.architecture + " does not use, such as " + example +
                                               ".\nferrum refuses to ignore weights: its output would not be the model's.");
}

}  // namespace ferrum
