#include "engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace ferrum {
namespace {

[[noreturn]] void invalid(const std::string& message) { throw Error(ErrorKind::InvalidArgument, message); }

}  // namespace

Engine::Engine(std::unique_ptr<Model> model, std::unique_ptr<Backend> backend, const EngineOptions& options)
    : plan_(make_plan(*model, *backend, options)),
      backend_(std::move(backend)),
      model_(std::move(model)),
      pool_(plan_.kv_blocks, plan_.options.max_sequences, shape().context_length, plan_.options.prefix_cache) {
  const StepLimits limits = step_limits(plan_, shape());
  model_->load(*backend_, limits);
  kv_ = backend_->make_kv(kv_shape(plan_, shape()));
  logits_ = backend_->allocate(logits_bytes(plan_, shape()));
  backend_->reserve_scratch(limits);
  const auto T = static_cast<size_t>(limits.tokens), S = static_cast<size_t>(limits.sequences);
  batch_.token_ids.reserve(T);
  batch_.positions.reserve(T);
  batch_.kv_slots.reserve(T);
  batch_.query_start.reserve(S + 1);
  batch_.context_length.reserve(S);
  batch_.block_tables.reserve(block_table_entries(plan_));
  batch_.logit_rows.reserve(static_cast<size_t>(limits.logit_rows));
  batch_.rope_cos_sin.reserve(T * static_cast<size_t>(shape().rotary_dim));
  growth_.reserve(S);
  copies_.reserve(S);
  if (plan_.options.poison_freed_kv) pool_.track_freed();
}

Engine::~Engine() = default;

void Engine::check_tokens(const Chunk& chunk) const {
  if (chunk.tokens.empty()) invalid("sequence " + std::to_string(chunk.sequence) + " was given no tokens. A prompt needs at least one token.");
  for (int32_t token : chunk.tokens)
    if (token < 0 || token >= shape().vocab_size)
      invalid("token id " + std::to_string(token) + " of sequence " + std::to_string(chunk.sequence) + " is outside the vocabulary (0.." + std::to_string(shape().vocab_size - 1) + ").");
  const size_t rows = chunk.logits == LogitsWanted::All ? chunk.tokens.size() : 1;
  if (rows > static_cast<size_t>(plan_.options.max_logit_rows))
    throw Error(ErrorKind::LogitRowsExceeded, "logits of all " + std::to_string(rows) + " tokens were asked for, but max_logit_rows is " + std::to_string(plan_.options.max_logit_rows) + ". Ask in parts or raise max_logit_rows.");
}

void Engine::check(std::span<const Chunk> chunks) const {
  if (chunks.empty()) invalid("a step was given no sequences.");
  if (chunks.size() > static_cast<size_t>(plan_.options.max_sequences))
    invalid("a step was given " + std::to_string(chunks.size()) + " sequences, but max_sequences is " + std::to_string(plan_.options.max_sequences) + ".");
  size_t tokens = 0, rows = 0;
  std::vector<int64_t> ids;
  for (size_t i = 0; i < chunks.size(); ++i) {
    check_tokens(chunks[i]);
    tokens += chunks[i].tokens.size();
    rows += chunks[i].logits == LogitsWanted::All ? chunks[i].tokens.size() : chunks[i].logits == LogitsWanted::Last;
    ids.push_back(chunks[i].sequence);
  }
  std::sort(ids.begin(), ids.end());
  auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end()) invalid("sequence " + std::to_string(*twice) + " appears twice in one step. A step takes each sequence once.");
  const StepLimits limits = step_limits(plan_, shape());
  if (tokens > static_cast<size_t>(limits.tokens))
    invalid("a step was given " + std::to_string(tokens) + " tokens, but holds at most prefill_chunk + max_sequences = " + std::to_string(limits.tokens) + ". Split it, or use prefill.");
  if (rows > static_cast<size_t>(limits.logit_rows))
    throw Error(ErrorKind::LogitRowsExceeded, "a step was asked for " + std::to_string(rows) + " rows of logits, but max_logit_rows is " + std::to_string(limits.logit_rows) + ". Ask in parts or raise max_logit_rows.");
}

void Engine::step(std::span<const Chunk> chunks) {
  check(chunks);
  run(chunks, 0);
}

void Engine::prefill(const Chunk& prompt, const std::function<bool()>& should_stop) {
  check_tokens(prompt);
  if (prompt.tokens.size() > static_cast<size_t>(std::numeric_limits<int>::max() / 2)) invalid("a prompt of " + std::to_string(prompt.tokens.size()) + " tokens is beyond any model's context.");
  cancelled_ = false;
  const Savepoint before = pool_.save(prompt.sequence);
  try {
    reserve(prompt.sequence, static_cast<int>(prompt.tokens.size()));
    prefill_chunks(prompt, should_stop);
  } catch (...) {
    pool_.restore(before);
    poison_freed();
    throw;
  }
  pool_.forget(before);
  poison_freed();
}

void Engine::prefill_chunks(const Chunk& prompt, const std::function<bool()>& should_stop) {
  const auto chunk = static_cast<size_t>(plan_.options.prefill_chunk);
  for (size_t done = 0; done < prompt.tokens.size();) {
    if (done > 0 && (cancelled_ || should_stop())) {
      logit_rows_ = 0;
      throw Error(ErrorKind::Cancelled, "the prefill of sequence " + std::to_string(prompt.sequence) + " was cancelled; the sequence is as it was before.");
    }
    const size_t count = std::min(chunk, prompt.tokens.size() - done);
    const bool last = done + count == prompt.tokens.size();
    const Chunk part{prompt.sequence, prompt.tokens.subspan(done, count), last || prompt.logits == LogitsWanted::All ? prompt.logits : LogitsWanted::Nothing};
    run({&part, 1}, prompt.logits == LogitsWanted::All ? static_cast<int>(done) : 0);
    done += count;
  }
}

void Engine::run(std::span<const Chunk> chunks, int first_logit_row) {
  growth_.clear();
  for (const Chunk& chunk : chunks) growth_.push_back({chunk.sequence, static_cast<int>(chunk.tokens.size()), chunk.tokens.data()});
  pool_.grow(growth_, copies_);
  poison_freed();  // cached blocks that were given up: before they are written
  ++logits_version_;
  try {
    build_batch(chunks);
    backend_->begin(batch_);
    if (!copies_.empty()) backend_->copy_kv_blocks(*kv_, copies_);
    const int vocab = shape().vocab_size;
    const Tensor logits{logits_.get(), static_cast<size_t>(first_logit_row) * static_cast<size_t>(vocab) * sizeof(float), batch_.logit_count(), vocab};
    model_->forward(*backend_, batch_, *kv_, logits);
    backend_->finish();
  } catch (...) {
    backend_->abandon();
    ++stats_.failed_steps;
    logit_rows_ = 0;
    pool_.rollback();
    poison_freed();
    throw;
  }
  pool_.commit();
  poison_freed();
  logit_rows_ = first_logit_row + batch_.logit_count();
  ++stats_.steps;
  stats_.tokens += batch_.tokens;
  stats_.logit_rows += batch_.logit_count();
}

void Engine::build_batch(std::span<const Chunk> chunks) {
  Batch& b = batch_;
  b.token_ids.clear();
  b.positions.clear();
  b.kv_slots.clear();
  b.context_length.clear();
  b.logit_rows.clear();
  b.query_start.assign(1, 0);
  b.max_blocks = 0;
  for (const Chunk& chunk : chunks) b.max_blocks = std::max(b.max_blocks, blocks_for(pool_.at(chunk.sequence).length + static_cast<int>(chunk.tokens.size())));
  b.block_tables.assign(chunks.size() * static_cast<size_t>(b.max_blocks), invalid_block);
  b.sequences = 0;
  for (const Chunk& chunk : chunks) append_to_batch(chunk, pool_.at(chunk.sequence));
  b.tokens = static_cast<int>(b.token_ids.size());
  b.rope_cos_sin.resize(b.token_ids.size() * static_cast<size_t>(shape().rotary_dim));
  model_->rope_cos_sin(b.positions.data(), b.tokens, b.rope_cos_sin.data());
}

void Engine::append_to_batch(const Chunk& chunk, const Sequence& sequence) {
  Batch& b = batch_;
  const int count = static_cast<int>(chunk.tokens.size()), first = static_cast<int>(b.token_ids.size());
  for (int i = 0; i < count; ++i) {
    const int position = sequence.length + i;
    b.token_ids.push_back(chunk.tokens[static_cast<size_t>(i)]);
    b.positions.push_back(position);
    b.kv_slots.push_back(sequence.blocks[static_cast<size_t>(position / kv_block_tokens)] * kv_block_tokens + position % kv_block_tokens);
    if (chunk.logits == LogitsWanted::All || (chunk.logits == LogitsWanted::Last && i + 1 == count)) b.logit_rows.push_back(first + i);
  }
  b.query_start.push_back(first + count);
  b.context_length.push_back(sequence.length + count);
  const int used = blocks_for(sequence.length + count);
  std::copy_n(sequence.blocks.begin(), used, b.block_tables.begin() + static_cast<std::ptrdiff_t>(b.sequences) * b.max_blocks);
  ++b.sequences;
}

void Engine::top_candidates(TopCandidatesArgs args) {
  const int vocab = shape().vocab_size;
  if (logit_rows_ == 0) invalid("the last step made no logits; candidates need a step with logits.");
  if (args.count < 1 || args.count > candidate_limit()) invalid("n is " + std::to_string(args.count) + ", not from 1 to the " + std::to_string(candidate_limit()) + " tokens of the vocabulary that can be sampled.");
  for (float temperature : args.temperatures)
    if (!(temperature > 0) || temperature > std::numeric_limits<float>::max()) invalid("a temperature of candidates is not a positive number.");
  for (const LogitEdit& edit : args.edits) {
    if (edit.row < 0 || edit.row >= logit_rows_ || edit.token < 0 || edit.token >= vocab) invalid("an edit names row " + std::to_string(edit.row) + ", token " + std::to_string(edit.token) + ", outside the last step's logits.");
    if (!(edit.penalty > 0) || std::isinf(edit.penalty) || !(edit.bias < std::numeric_limits<float>::infinity())) invalid("an edit of token " + std::to_string(edit.token) + " has a penalty that is not a number above 0, or a bias that is not a number or -inf.");
  }
  for (int32_t target : args.targets)
    if (target < 0 || target >= vocab) invalid("target token id " + std::to_string(target) + " is outside the vocabulary (0.." + std::to_string(vocab - 1) + ").");
  args.logits = {logits_.get(), 0, logit_rows_, vocab};
  args.excluded = excluded_;
  try {
    backend_->top_candidates(args);
    backend_->finish();
  } catch (...) {
    backend_->abandon();
    throw;
  }
}

void Engine::exclude_tokens(std::vector<int32_t> ids) {
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  if (!ids.empty() && (ids.front() < 0 || ids.back() >= shape().vocab_size))
    invalid("unused token id " + std::to_string(ids.front() < 0 ? ids.front() : ids.back()) + " is outside the vocabulary (0.." + std::to_string(shape().vocab_size - 1) + ").");
  excluded_ = std::move(ids);
}

void Engine::export_kv(int64_t sequence, std::byte* out) {
  const Sequence& found = pool_.at(sequence);
  backend_->read_kv(*kv_, found.blocks, found.length, out);
}

void Engine::import_kv(int64_t sequence, std::span<const int32_t> tokens, const std::byte* data) {
  check_tokens({sequence, tokens, LogitsWanted::Nothing});
  if (pool_.live(sequence)) invalid("sequence " + std::to_string(sequence) + " is live already and cannot be imported. Release it first or choose another number.");
  const Growth growth[] = {{sequence, static_cast<int>(tokens.size()), tokens.data()}};
  pool_.grow(growth, copies_);
  poison_freed();
  try {
    backend_->write_kv(*kv_, pool_.at(sequence).blocks, static_cast<int>(tokens.size()), data);
  } catch (...) {
    pool_.rollback();
    poison_freed();
    throw;
  }
  pool_.commit();
}

void Engine::release(int64_t sequence) {
  pool_.release(sequence);
  poison_freed();
}

void Engine::discard(int64_t sequence) {
  pool_.discard(sequence);
  poison_freed();
}

bool Engine::truncate(int64_t sequence, int length) {
  const bool shared = pool_.truncate(sequence, length);
  poison_freed();
  return shared;
}

void Engine::reset() {
  pool_.reset();
  poison_freed();
}

void Engine::reserve(int64_t sequence, int tokens) {
  if (tokens < 0) invalid("a negative number of tokens cannot be reserved.");
  pool_.hold(sequence, tokens, copies_);
  poison_freed();
  try {
    if (!copies_.empty()) {
      backend_->copy_kv_blocks(*kv_, copies_);
      backend_->finish();
    }
  } catch (...) {
    backend_->abandon();
    pool_.rollback();
    poison_freed();
    throw;
  }
  pool_.commit();
  poison_freed();
}

void Engine::poison_freed() {
  if (!plan_.options.poison_freed_kv) return;
  backend_->poison_kv_blocks(*kv_, pool_.take_freed());
}

void Engine::warm_up() {
  int64_t sequence = std::numeric_limits<int64_t>::min();
  while (pool_.live(sequence)) ++sequence;
  const int room = std::min({plan_.options.prefill_chunk, plan_.context - 1, pool_.free_blocks() * kv_block_tokens - 1});
  if (room < 1 || pool_.live_sequences() == plan_.options.max_sequences) return;
  const std::vector<int32_t> tokens(static_cast<size_t>(room), 0);
  const EngineStats before = stats_;
  Profile* profile = backend_->profile();
  const Profile profile_before = profile ? *profile : Profile{};
  prefill({sequence, tokens, LogitsWanted::Last}, [] { return false; });
  const Chunk decode{sequence, std::span(tokens).first(1), LogitsWanted::Last};
  try {
    step({&decode, 1});
  } catch (...) {
    discard(sequence);
    throw;
  }
  discard(sequence);
  logit_rows_ = 0;
  stats_ = before;
  if (profile) *profile = profile_before;
}

}  // namespace ferrum
