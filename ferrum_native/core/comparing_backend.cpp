#include "comparing_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace ferrum {
namespace {

// What either backend made, side by side; the first is the reference's.

struct PairedBuffer final : Buffer {
  PairedBuffer(std::shared_ptr<Buffer> a, std::shared_ptr<Buffer> b) : Buffer(a->host(), a->bytes()), reference(std::move(a)), subject(std::move(b)) {}
  std::shared_ptr<Buffer> reference, subject;
};
struct PairedWeight final : Weight {
  PairedWeight(std::unique_ptr<Weight> a, std::unique_ptr<Weight> b) : Weight(a->tensor), reference(std::move(a)), subject(std::move(b)) {}
  std::unique_ptr<Weight> reference, subject;
};
struct PairedActivation final : Activation {
  PairedActivation(std::unique_ptr<Activation> a, std::unique_ptr<Activation> b) : Activation(a->rows, a->cols), reference(std::move(a)), subject(std::move(b)) {}
  std::unique_ptr<Activation> reference, subject;
};
struct PairedRouting final : Routing {
  PairedRouting(std::unique_ptr<Routing> a, std::unique_ptr<Routing> b, int k, int e) : reference(std::move(a)), subject(std::move(b)), top_k(k), experts(e) {}
  std::unique_ptr<Routing> reference, subject;
  const int top_k, experts;
  int rows = 0;
};
struct PairedKv final : Kv {
  PairedKv(std::unique_ptr<Kv> a, std::unique_ptr<Kv> b) : reference(std::move(a)), subject(std::move(b)) {}
  std::unique_ptr<Kv> reference, subject;
};

template <class Pair, class T> auto& side(T& object, bool subject) {
  auto& pair = static_cast<std::conditional_t<std::is_const_v<T>, const Pair, Pair>&>(object);
  return subject ? *pair.subject : *pair.reference;
}
const Weight& of(const Weight& weight, bool subject) { return side<PairedWeight>(weight, subject); }
const Activation& of(const Activation& x, bool subject) { return side<PairedActivation>(x, subject); }
Activation& of(Activation& x, bool subject) { return side<PairedActivation>(x, subject); }
const Routing& of(const Routing& routing, bool subject) { return side<PairedRouting>(routing, subject); }
Routing& of(Routing& routing, bool subject) { return side<PairedRouting>(routing, subject); }
const Kv& of(const Kv& kv, bool subject) { return side<PairedKv>(kv, subject); }
Kv& of(Kv& kv, bool subject) { return side<PairedKv>(kv, subject); }
Tensor of(const Tensor& tensor, bool subject) { return {&side<PairedBuffer>(*tensor.buffer, subject), tensor.offset, tensor.rows, tensor.cols}; }

float* values(const Tensor& tensor, bool subject) { return reinterpret_cast<float*>(of(tensor, subject).buffer->host() + tensor.offset); }
size_t count(int rows, int cols) { return static_cast<size_t>(rows) * static_cast<size_t>(cols); }
std::string text(float value) {
  char written[32];
  std::snprintf(written, sizeof written, "%.9g", static_cast<double>(value));
  return written;
}
Tensor first_rows(Tensor tensor, int rows) {
  tensor.rows = rows;
  return tensor;
}

}  // namespace

std::unique_ptr<Weight> ComparingBackend::place_weight(const WeightTensor& t) { return std::make_unique<PairedWeight>(reference_->place_weight(t), subject_->place_weight(t)); }

std::shared_ptr<Buffer> ComparingBackend::allocate(size_t bytes) { return std::make_shared<PairedBuffer>(reference_->allocate(bytes), subject_->allocate(bytes)); }

std::unique_ptr<Activation> ComparingBackend::make_activation(int rows, int cols, std::span<const WeightType> consumers) {
  return std::make_unique<PairedActivation>(reference_->make_activation(rows, cols, consumers), subject_->make_activation(rows, cols, consumers));
}

std::unique_ptr<Routing> ComparingBackend::make_routing(int rows, int top_k, int experts) {
  return std::make_unique<PairedRouting>(reference_->make_routing(rows, top_k, experts), subject_->make_routing(rows, top_k, experts), top_k, experts);
}

std::unique_ptr<Kv> ComparingBackend::make_kv(const KvShape& shape) { return std::make_unique<PairedKv>(reference_->make_kv(shape), subject_->make_kv(shape)); }

void ComparingBackend::reserve_scratch(const StepLimits& limits) {
  reference_->reserve_scratch(limits);
  subject_->reserve_scratch(limits);
}

void ComparingBackend::differ(const std::string& what) const {
  throw Error(ErrorKind::Device, subject_->name() + " differs from " + reference_->name() + " in " + op_ + ", call " + std::to_string(call_) + " of step " + std::to_string(step_) +
                                     (layer_ < 0 ? "" : ", last layer begun " + std::to_string(layer_)) + ": " + what);
}

void ComparingBackend::both(const char* op, const std::function<void(Backend&, bool)>& run) {
  op_ = op;
  ++call_;
  run(*reference_, false);
  reference_->finish();
  run(*subject_, true);
  subject_->finish();
}

void ComparingBackend::share(const Tensor& tensor) { std::memcpy(values(tensor, true), values(tensor, false), count(tensor.rows, tensor.cols) * sizeof(float)); }

void ComparingBackend::share(const Activation& x, int rows) {
  expected_.resize(count(rows, x.cols));
  reference_->read_activation(of(x, false), rows, expected_.data());
  subject_->write_activation(const_cast<Activation&>(of(x, true)), rows, expected_.data());
}

void ComparingBackend::compare(const char* what, const float* expected, const float* got, int rows, int cols) {
  for (int r = 0; r < rows; ++r, expected += cols, got += cols) {
    float largest = 0;
    for (int i = 0; i < cols; ++i) largest = std::max(largest, std::abs(expected[i]));
    const double allowed = tolerance_ * static_cast<double>(largest) + 1e-30;
    for (int i = 0; i < cols; ++i) {
      const bool alike = std::isnan(expected[i]) ? std::isnan(got[i]) : expected[i] == got[i] || std::abs(static_cast<double>(expected[i]) - static_cast<double>(got[i])) <= allowed;
      if (!alike)
        differ(std::string(what) + " at row " + std::to_string(r) + ", column " + std::to_string(i) + " of " + std::to_string(rows) + " x " + std::to_string(cols) + ": " + text(got[i]) +
               " instead of " + text(expected[i]) + " (largest of the row " + text(largest) + ").");
    }
  }
}

void ComparingBackend::compare(const char* what, const Tensor& tensor) { compare(what, values(tensor, false), values(tensor, true), tensor.rows, tensor.cols); }

void ComparingBackend::compare(const char* what, const Activation& x, int rows) {
  expected_.resize(count(rows, x.cols));
  got_.resize(expected_.size());
  reference_->read_activation(of(x, false), rows, expected_.data());
  subject_->read_activation(of(x, true), rows, got_.data());
  compare(what, expected_.data(), got_.data(), rows, x.cols);
}

void ComparingBackend::begin(const Batch& batch) {
  ++step_;
  call_ = 0;
  layer_ = -1;
  reference_->begin(batch);
  subject_->begin(batch);
  tokens_ = batch.tokens;
  logit_rows_ = batch.logit_count();
}

void ComparingBackend::embed(const EmbedArgs& a) {
  both("embed", [&](Backend& b, bool s) { b.embed({.table = of(a.table, s), .out = of(a.out, s)}); });
  compare("out", first_rows(a.out, tokens_));
}

void ComparingBackend::norm(const NormArgs& a) {
  share(first_rows(a.residual, a.rows));
  if (a.delta) share(first_rows(*a.delta, a.rows));
  both("norm", [&](Backend& b, bool s) {
    const Tensor delta = a.delta ? of(*a.delta, s) : Tensor{};
    b.norm({.residual = of(a.residual, s), .delta = a.delta ? &delta : nullptr, .weight = of(a.weight, s), .eps = a.eps, .rows = a.rows, .out = of(a.out, s)});
  });
  compare("residual", first_rows(a.residual, a.rows));
  compare("out", a.out, a.rows);
}

void ComparingBackend::linear(const LinearArgs& a) {
  share(a.x, a.rows);
  both(a.name, [&](Backend& b, bool s) {
    std::vector<const Weight*> weights;
    for (const Weight* weight : a.weights) weights.push_back(&of(*weight, s));
    b.linear({.name = a.name, .x = of(a.x, s), .rows = a.rows, .weights = weights, .out = of(a.out, s)});
  });
  compare("out", first_rows(a.out, a.rows));
}

void ComparingBackend::qk_norm_rope_cache(const QkNormRopeCacheArgs& a) {
  layer_ = a.layer;
  share(first_rows(a.qkv, tokens_));
  both("qk_norm_rope_cache", [&](Backend& b, bool s) {
    b.qk_norm_rope_cache({.qkv = of(a.qkv, s), .q_norm = a.q_norm ? &of(*a.q_norm, s) : nullptr, .k_norm = a.k_norm ? &of(*a.k_norm, s) : nullptr, .eps = a.eps, .shape = a.shape,
                          .rotary_dim = a.rotary_dim, .layer = a.layer, .kv = of(a.kv, s), .q_out = of(a.q_out, s)});
  });
  compare("q_out", first_rows(a.q_out, tokens_));
}

void ComparingBackend::attention(const AttentionArgs& a) {
  share(first_rows(a.q, tokens_));
  both("attention", [&](Backend& b, bool s) {
    b.attention({.q = of(a.q, s), .kv = of(a.kv, s), .layer = a.layer, .shape = a.shape, .scale = a.scale, .out = of(a.out, s)});
  });
  compare("out", a.out, tokens_);
}

void ComparingBackend::route(const RouteArgs& a) {
  PairedRouting& routing = static_cast<PairedRouting&>(a.out);
  share(a.x, a.rows);
  both("route", [&](Backend& b, bool s) {
    b.route({.x = of(a.x, s), .rows = a.rows, .router = of(a.router, s), .top_k = a.top_k, .normalize = a.normalize, .out = of(a.out, s)});
  });
  routing.rows = a.rows;
  const size_t pairs = count(a.rows, a.top_k), E = static_cast<size_t>(routing.experts);
  struct Contents {
    std::vector<int32_t> ids, start, pairs;
    std::vector<float> weights;
  } contents[2];
  for (int s = 0; s < 2; ++s) {
    Contents& c = contents[s];
    c.ids.resize(pairs), c.pairs.resize(pairs), c.weights.resize(pairs), c.start.resize(E + 1);
    (s ? subject_ : reference_)->read_routing(of(routing, s), {c.ids.data(), c.weights.data(), c.start.data(), c.pairs.data()});
  }
  for (size_t p = 0; p < pairs; ++p)
    if (contents[0].ids[p] != contents[1].ids[p])
      differ("expert " + std::to_string(contents[1].ids[p]) + " instead of " + std::to_string(contents[0].ids[p]) + " for row " + std::to_string(p / static_cast<size_t>(a.top_k)) + ", choice " +
             std::to_string(p % static_cast<size_t>(a.top_k)) + ", whose weight is " + text(contents[0].weights[p]) + ". (Of two nearly equal experts either may come first.)");
  if (contents[0].start != contents[1].start || contents[0].pairs != contents[1].pairs) differ("the grouping of pairs by expert.");
  compare("weights", contents[0].weights.data(), contents[1].weights.data(), a.rows, a.top_k);
}

void ComparingBackend::experts_gate_up(const ExpertsGateUpArgs& a) {
  const PairedRouting& routing = static_cast<const PairedRouting&>(a.routing);
  share(a.x, routing.rows);
  both("experts_gate_up", [&](Backend& b, bool s) {
    b.experts_gate_up({.x = of(a.x, s), .routing = of(a.routing, s), .gate = of(a.gate, s), .up = of(a.up, s), .out = of(a.out, s)});
  });
  compare("out", a.out, routing.rows * routing.top_k);
}

void ComparingBackend::experts_down(const ExpertsDownArgs& a) {
  const PairedRouting& routing = static_cast<const PairedRouting&>(a.routing);
  share(a.x, routing.rows * routing.top_k);
  both("experts_down", [&](Backend& b, bool s) { b.experts_down({.x = of(a.x, s), .routing = of(a.routing, s), .down = of(a.down, s), .out = of(a.out, s)}); });
  compare("out", first_rows(a.out, routing.rows));
}

void ComparingBackend::gather_rows(const Activation& x, Activation& out) {
  share(x, tokens_);
  both("gather_rows", [&](Backend& b, bool s) { b.gather_rows(of(x, s), of(out, s)); });
  compare("out", out, logit_rows_);
}

void ComparingBackend::gather_rows(const Tensor& x, const Tensor& out) {
  share(first_rows(x, tokens_));
  both("gather_rows", [&](Backend& b, bool s) { b.gather_rows(of(x, s), of(out, s)); });
  compare("out", first_rows(out, logit_rows_));
}

void ComparingBackend::top_candidates(const TopCandidatesArgs& a) {
  const size_t rows = static_cast<size_t>(a.logits.rows), n = rows * static_cast<size_t>(a.count);
  std::vector<int32_t> ids(n);
  std::vector<float> values(n), targets(a.targets.size());
  std::vector<double> sums(rows), scaled(rows);
  share(a.logits);
  both("top_candidates", [&](Backend& b, bool s) {
    TopCandidatesArgs args = a;
    args.logits = of(a.logits, s);
    if (s) args.ids = ids.data(), args.values = values.data(), args.log_sum_exp = sums.data(), args.log_sum_exp_at_temperature = scaled.data(), args.target_logits = targets.data();
    b.top_candidates(args);
    b.finish();  // the arguments live in this scope
  });
  compare("values", a.values, values.data(), a.logits.rows, a.count);
  compare("target logits", a.target_logits, targets.data(), 1, static_cast<int>(targets.size()));
  for (size_t i = 0; i < n; ++i)
    if (ids[i] != a.ids[i]) differ("candidate " + std::to_string(i % static_cast<size_t>(a.count)) + " of row " + std::to_string(i / static_cast<size_t>(a.count)) + " is token " + std::to_string(ids[i]) + " instead of " + std::to_string(a.ids[i]) + ".");
  for (size_t r = 0; r < rows; ++r) {
    const float expected[] = {static_cast<float>(a.log_sum_exp[r]), static_cast<float>(a.log_sum_exp_at_temperature[r])}, got[] = {static_cast<float>(sums[r]), static_cast<float>(scaled[r])};
    compare("sums", expected, got, 1, 2);
  }
}

void ComparingBackend::copy_kv_blocks(Kv& kv, std::span<const BlockCopy> copies) {
  both("copy_kv_blocks", [&](Backend& b, bool s) { b.copy_kv_blocks(of(kv, s), copies); });
}

void ComparingBackend::read_kv(const Kv& kv, std::span<const int32_t> blocks, int tokens, std::byte* out) { subject_->read_kv(of(kv, true), blocks, tokens, out); }

void ComparingBackend::write_kv(Kv& kv, std::span<const int32_t> blocks, int tokens, const std::byte* data) {
  reference_->write_kv(of(kv, false), blocks, tokens, data);
  subject_->write_kv(of(kv, true), blocks, tokens, data);
}

void ComparingBackend::poison_kv_blocks(Kv& kv, std::span<const int32_t> blocks) {
  reference_->poison_kv_blocks(of(kv, false), blocks);
  subject_->poison_kv_blocks(of(kv, true), blocks);
}

void ComparingBackend::finish() {
  reference_->finish();
  subject_->finish();
}

void ComparingBackend::abandon() {
  reference_->abandon();
  subject_->abandon();
}

void ComparingBackend::write_activation(Activation& x, int rows, const float* values) {
  reference_->write_activation(of(x, false), rows, values);
  subject_->write_activation(of(x, true), rows, values);
}

void ComparingBackend::read_activation(const Activation& x, int rows, float* out) { reference_->read_activation(of(x, false), rows, out); }

void ComparingBackend::read_routing(const Routing& routing, const RoutingContents& out) { reference_->read_routing(of(routing, false), out); }

}  // namespace ferrum
