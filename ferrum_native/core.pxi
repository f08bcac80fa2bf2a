# The C++ core as the extension sees it.

cdef extern from "<cstddef>" namespace "std" nogil:
    cdef cppclass byte:
        pass

cdef extern from "<span>" namespace "std" nogil:
    cdef cppclass token_span "std::span<const int32_t>":
        token_span()
    cdef cppclass edits_span "std::span<const ferrum::LogitEdit>":
        edits_span()
    cdef cppclass temperatures_span "std::span<const float>":
        temperatures_span()
    cdef cppclass chunks_span "std::span<const ferrum::Chunk>":
        chunks_span()
    token_span span "std::span<const int32_t>"(const int32_t*, size_t)
    edits_span edit_span "std::span<const ferrum::LogitEdit>"(const LogitEdit*, size_t)
    temperatures_span float_span "std::span<const float>"(const float*, size_t)
    chunks_span chunk_span "std::span<const ferrum::Chunk>"(const NativeChunk*, size_t)

cdef extern from "python_errors.h" namespace "ferrum" nogil:
    void raise_current_error()
    void set_error_class(int kind, object cls)
    cbool python_wants_stop()
    cbool never_stop()

cdef extern from "core/error.h" namespace "ferrum" nogil:
    cpdef enum class ErrorKind:
        InvalidArgument
        UnknownSequence
        KvPoolExhausted
        ContextFull
        LogitRowsExceeded
        BadModelFile
        UnsupportedModel
        OutOfMemory
        Cancelled
        Closed
        Device

cdef extern from "core/tensor.h" namespace "ferrum" nogil:
    cdef cppclass Buffer:
        void* host()

cdef extern from "<variant>" namespace "std" nogil:
    cbool holds_alternative[T](const MetadataValue&)
    const T& get[T](const MetadataValue&)

cdef extern from "core/model_description.h" namespace "ferrum" nogil:
    cdef cppclass MetadataValue:
        MetadataValue()
        MetadataValue(cbool)
        MetadataValue(int64_t)
        MetadataValue(double)
        MetadataValue(string)
    cdef cppclass Metadata:
        void set(const string&, MetadataValue) except +raise_current_error
    cdef cppclass TensorEntry:
        string name, type_name
        int type_id, file
        vector[int64_t] shape
        uint64_t offset, bytes
    cdef cppclass TensorMap "std::map<std::string, ferrum::TensorEntry>":
        TensorEntry& operator[](const string&)
    cdef cppclass ModelDescription:
        string architecture
        Metadata metadata
        vector[string] paths
        TensorMap tensors

cdef extern from "core/kv_type.h" namespace "ferrum" nogil:
    cdef enum class KvType:
        F16
        F32
        Q8_0
    size_t kv_row_bytes(KvType, int)

cdef extern from "core/backend.h" namespace "ferrum" nogil:
    cdef cppclass Backend:
        string name()
        cbool float_activations()
    cdef cppclass DeviceCounters:
        int64_t dispatches, command_buffers, uploads, pipelines
    cdef cppclass LogitEdit:
        int32_t row, token
        float penalty, bias
    cdef cppclass TopCandidatesArgs:
        int count
        edits_span edits
        temperatures_span temperatures
        token_span excluded
        token_span target_start, targets
        int32_t* ids
        float* values
        double* log_sum_exp
        double* log_sum_exp_at_temperature
        float* target_logits

cdef extern from "devices.h" namespace "ferrum" nogil:
    cdef cppclass DeviceOptions:
        string device, instruction_set, kernel_library, kernel_source, compare_with
        double compare_tolerance
        int threads
        cbool float_activations, profile
        int64_t fail_at
    unique_ptr[Backend] make_backend(const DeviceOptions&) except +raise_current_error

cdef extern from "models/model.h" namespace "ferrum" nogil:
    cdef cppclass ConfigItem "std::pair<std::string, ferrum::MetadataValue>":
        string first
        MetadataValue second
    cdef cppclass ConfigList:
        size_t size()
        ConfigItem& operator[](size_t)
    cdef cppclass ModelShape:
        int vocab_size, rotary_dim
    cdef cppclass Model:
        ConfigList config()
        const ModelShape& shape()
        void rope_cos_sin(const int32_t*, int, float*)
    unique_ptr[Model] make_model(const ModelDescription&) except +raise_current_error

cdef extern from "core/kv_pool.h" namespace "ferrum" nogil:
    cdef cppclass BlockCopy:
        int32_t source "from"
        int32_t target "to"
    cdef cppclass Growth:
        int64_t sequence
        int tokens
        const int32_t* ids
    cdef cppclass CachedPrefixTokens "ferrum::CachedPrefix":
        int tokens, blocks_in_use
    cdef cppclass PrefixStats:
        int64_t hits, tokens, tokens_asked, evictions
    cdef cppclass growth_span "std::span<const ferrum::Growth>":
        growth_span(const Growth*, size_t)
    cdef cppclass Sequence:
        int length
        vector[int32_t] blocks
    cdef cppclass Savepoint:
        int64_t sequence
        cbool live
        int length, blocks
        int32_t shared
    cdef cppclass NativeKvPool "ferrum::KvPool":
        NativeKvPool(int, int, int, cbool) except +raise_current_error
        void grow(growth_span, vector[BlockCopy]&) except +raise_current_error
        void commit() except +raise_current_error
        void rollback() except +raise_current_error
        void hold(int64_t, int, vector[BlockCopy]&) except +raise_current_error
        void fork(int64_t, int64_t) except +raise_current_error
        int adopt(int64_t, token_span) except +raise_current_error
        CachedPrefixTokens cached_prefix(token_span)
        void release(int64_t) except +raise_current_error
        void discard(int64_t) except +raise_current_error
        cbool truncate(int64_t, int) except +raise_current_error
        void reset() except +raise_current_error
        Savepoint save(int64_t) except +raise_current_error
        void restore(const Savepoint&) except +raise_current_error
        void forget(const Savepoint&)
        cbool live(int64_t)
        int references(int32_t)
        vector[int32_t] take_freed()
        void track_freed()
        const Sequence& at(int64_t) except +raise_current_error
        int live_sequences()
        int total_blocks()
        int free_blocks()
        int cached_blocks()
        const PrefixStats& prefix_stats()

cdef extern from "core/weights.h" namespace "ferrum" nogil:
    cdef cppclass Weights:
        uint64_t mapped_bytes()
        void populate(uint64_t, uint64_t)
        double resident_fraction()

cdef extern from "core/profile.h" namespace "ferrum" nogil:
    cdef cppclass OpCost:
        int64_t bytes, macs
    cdef cppclass OpProfile:
        string name
        int64_t calls
        double seconds
        OpCost cost
    cdef cppclass PhaseProfile:
        const char* name
        int64_t steps, tokens
        double seconds
        vector[OpProfile] ops
    cdef cppclass PhaseProfiles "std::array<ferrum::PhaseProfile, 3>":
        size_t size()
        PhaseProfile& operator[](size_t)
    cdef cppclass Profile:
        Profile()
        PhaseProfiles phases

cdef extern from "core/plan.h" namespace "ferrum" nogil:
    cdef cppclass EngineOptions:
        int kv_tokens, max_sequences, prefill_chunk, max_logit_rows
        KvType kv_type
        uint64_t memory_budget, available_memory
        cbool prefix_cache, poison_freed_kv
    cdef cppclass EnginePlan:
        EngineOptions options
        uint64_t weights, weights_extra, kv, scratch
        uint64_t total()
    EnginePlan make_plan(Model&, const Backend&, const EngineOptions&) except +raise_current_error

cdef extern from "core/engine.h" namespace "ferrum" nogil:
    cdef enum class LogitsWanted:
        Nothing
        Last
        All
    cdef cppclass EngineStats:
        int64_t steps, tokens, logit_rows, failed_steps
    cdef cppclass NativeChunk "ferrum::Chunk":
        int64_t sequence
        token_span tokens
        LogitsWanted logits
    cdef cppclass NativeEngine "ferrum::Engine":
        NativeEngine(unique_ptr[Model], unique_ptr[Backend], const EngineOptions&) except +raise_current_error
        void step(chunks_span) except +raise_current_error
        void prefill(const NativeChunk&, cbool (*)()) except +raise_current_error
        void cancel()
        int logit_rows()
        shared_ptr[Buffer] logits()
        uint64_t logits_version()
        void top_candidates(TopCandidatesArgs) except +raise_current_error
        int candidate_limit()
        void exclude_tokens(vector[int32_t]) except +raise_current_error
        void fork(int64_t, int64_t) except +raise_current_error
        int adopt(int64_t, token_span) except +raise_current_error
        void export_kv(int64_t, byte*) except +raise_current_error
        void import_kv(int64_t, token_span, const byte*) except +raise_current_error
        void release(int64_t) except +raise_current_error
        cbool truncate(int64_t, int) except +raise_current_error
        void reset() except +raise_current_error
        void reserve(int64_t, int) except +raise_current_error
        void warm_up() except +raise_current_error
        const ModelShape& shape()
        ConfigList config()
        const EnginePlan& plan()
        const NativeKvPool& pool()
        string device()
        cbool float_activations()
        const EngineStats& stats()
        const Weights& weights()
        Profile* profile()
        const DeviceCounters* counters()
        double read_bandwidth(size_t) except +raise_current_error
        double product_rate() except +raise_current_error
