#include "weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

void MappedFile::populate() const {
#if defined(__linux__)
  constexpr int populate_read = 22;  // MADV_POPULATE_READ, Linux 5.14; older kernels refuse it and pages come at first use
  madvise(const_cast<std::byte*>(data_), bytes_, populate_read);
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
}

void Weights::populate() const {
  for (const auto& file : files_) file->populate();
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
