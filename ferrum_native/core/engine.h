// The engine: one model on one backend, its KV pool and its steps. Not thread-safe; the caller serialises.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kv_pool.h"
#include "plan.h"

namespace ferrum {

enum class LogitsWanted : uint8_t { Nothing, Last, All };

struct Chunk {
  int64_t sequence;
  std::span<const int32_t> tokens;
  LogitsWanted logits;
};

struct EngineStats {
  int64_t steps = 0, tokens = 0, logit_rows = 0, failed_steps = 0;
};

class Engine {
 public:
  /// Checks everything against the plan, then maps the weights and takes all memory that steps will use.
  Engine(std::unique_ptr<Model> model, std::unique_ptr<Backend> backend, const EngineOptions& options);
  ~Engine();

  /// Runs one ragged step of at most prefill_chunk + max_sequences tokens: every chunk advances, or none. Rows of logits in call order.
  void step(std::span<const Chunk> chunks);
  /// Appends a prompt of any length in steps of prefill_chunk. `should_stop` is asked between steps; a stopped or failed prefill leaves
  /// the sequence as it was.
  void prefill(const Chunk& prompt, const std::function<bool()>& should_stop);
  /// Ends a running prefill at its next step.
  void cancel() { cancelled_ = true; }

  /// Logits of the last step: [rows, vocab_size] at the start of the buffer.
  int logit_rows() const { return logit_rows_; }
  const std::shared_ptr<Buffer>& logits() const { return logits_; }
  /// Rises whenever logits() is about to be overwritten; any thread may ask.
  uint64_t logits_version() const { return logits_version_; }
  /// `args.logits`, `excluded` and the outputs of `args` sized for logit_rows(); the rest is the caller's. Validated here.
  void top_candidates(TopCandidatesArgs args);
  int candidate_limit() const { return shape().vocab_size - static_cast<int>(excluded_.size()); }
  /// Ids that are never candidates.
  void exclude_tokens(std::vector<int32_t> ids);

  void fork(int64_t source, int64_t target) { pool_.fork(source, target); }
  /// Starts a sequence with the longest cached beginning of `tokens`, whole blocks, and returns its length: of 0 it is not started.
  int adopt(int64_t sequence, std::span<const int32_t> tokens) { return pool_.adopt(sequence, tokens); }
  /// Keys and values of a sequence's tokens, kv_bytes_per_token() each, as `Backend::read_kv` gives them.
  void export_kv(int64_t sequence, std::byte* out);
  /// Starts a sequence with tokens that were computed before, and what `export_kv` gave of them.
  void import_kv(int64_t sequence, std::span<const int32_t> tokens, const std::byte* data);
  void release(int64_t sequence);
  /// Drops the tokens after the first `length`; the next ones are written behind them, and take one block more if it is true.
  bool truncate(int64_t sequence, int length);
  void reset();
  void reserve(int64_t sequence, int tokens);
  /// Runs the shapes that will be used, and gives every block back, with nothing cached; counts nowhere.
  void warm_up();

  const ModelShape& shape() const { return model_->shape(); }
  ConfigList config() const { return model_->config(); }
  const EnginePlan& plan() const { return plan_; }
  const KvPool& pool() const { return pool_; }
  std::string device() const { return backend_->name(); }
  bool float_activations() const { return backend_->float_activations(); }
  const EngineStats& stats() const { return stats_; }
  const Weights& weights() const { return model_->weights(); }
  /// Null where the device was not asked to profile.
  Profile* profile() { return backend_->profile(); }
  /// Null where the device counts nothing.
  const DeviceCounters* counters() const { return backend_->counters(); }
  double read_bandwidth(size_t most_bytes) { return backend_->read_bandwidth(most_bytes); }
  double product_rate() { return backend_->product_rate(); }

 private:
  void check(std::span<const Chunk> chunks) const;
  void check_tokens(const Chunk& chunk) const;
  void prefill_chunks(const Chunk& prompt, const std::function<bool()>& should_stop);
  void run(std::span<const Chunk> chunks, int first_logit_row);
  void build_batch(std::span<const Chunk> chunks);
  void append_to_batch(const Chunk& chunk, const Sequence& sequence);
  void discard(int64_t sequence);
  void poison_freed();

  EnginePlan plan_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  KvPool pool_;
  std::unique_ptr<Kv> kv_;
  std::shared_ptr<Buffer> logits_;
  Batch batch_;
  std::vector<Growth> growth_;
  std::vector<BlockCopy> copies_;
  std::vector<int32_t> excluded_;
  int logit_rows_ = 0;
  std::atomic<uint64_t> logits_version_ = 1;
  std::atomic<bool> cancelled_ = false;
  EngineStats stats_;
};

}  // namespace ferrum
