#include <array>

#include "qwen3_moe.h"

namespace ferrum {
namespace {

struct Family {
  const char* architecture;
  std::unique_ptr<Model> (*make)(const ModelDescription&);
};

constexpr std::array families{
    Family{"qwen3moe", [](const ModelDescription& d) -> std::unique_ptr<Model> { return std::make_unique<Qwen3Moe>(d); }},
};

}  // namespace

std::unique_ptr<Model> make_model(const ModelDescription& description) {
  std::string known, separator;
  for (const Family& family : families) {
    if (description.architecture == family.architecture) return family.make(description);
    known += separator + family.architecture;
    separator = ", ";
  }
  throw Error(ErrorKind::UnsupportedModel, "the file's architecture is " + description.architecture + ", which ferrum does not run. Supported: " + known + ".");
}

}  // namespace ferrum
