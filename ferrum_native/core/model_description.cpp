#include "model_description.h"

#include <cmath>
#include <limits>

#include "error.h"

namespace ferrum {
namespace {

[[noreturn]] void wrong_kind(const std::string& key, const char* wanted) {
  throw Error(ErrorKind::BadModelFile, "metadata key " + key + " is not " + wanted + ". The file is damaged or written by an incompatible tool; convert the model again.");
}

}  // namespace

const MetadataValue& Metadata::required(const std::string& key) const {
  auto found = values_.find(key);
  if (found == values_.end())
    throw Error(ErrorKind::BadModelFile, "metadata key " + key + " is missing, and the model cannot be run without it. Convert the model again with a current tool.");
  return found->second;
}

int Metadata::integer(const std::string& key) const {
  const auto* value = std::get_if<int64_t>(&required(key));
  if (!value || *value < 0 || *value > std::numeric_limits<int32_t>::max()) wrong_kind(key, "an integer from 0 to 2147483647");
  return static_cast<int>(*value);
}

int Metadata::integer(const std::string& key, int otherwise) const { return has(key) ? integer(key) : otherwise; }

double Metadata::real(const std::string& key) const {
  const MetadataValue& value = required(key);
  if (const auto* integer = std::get_if<int64_t>(&value)) return static_cast<double>(*integer);
  const auto* real = std::get_if<double>(&value);
  if (!real || !std::isfinite(*real)) wrong_kind(key, "a finite number");
  return *real;
}

double Metadata::real(const std::string& key, double otherwise) const { return has(key) ? real(key) : otherwise; }

bool Metadata::boolean(const std::string& key, bool otherwise) const {
  if (!has(key)) return otherwise;
  const auto* value = std::get_if<bool>(&required(key));
  if (!value) wrong_kind(key, "a boolean");
  return *value;
}

std::string Metadata::text(const std::string& key, const std::string& otherwise) const {
  if (!has(key)) return otherwise;
  const auto* value = std::get_if<std::string>(&required(key));
  if (!value) wrong_kind(key, "a string");
  return *value;
}

}  // namespace ferrum
