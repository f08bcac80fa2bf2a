# cython: language_level=3, embedsignature=False
# distutils: language=c++
"""The native core of ferrum: an engine that owns the model's weights, the KV pool and the threads."""

import operator
import os
import threading
from collections import namedtuple
from contextlib import contextmanager

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.number cimport PyNumber_Index
from cython.operator cimport dereference
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector

from ferrum import errors

include "core.pxi"
include "gguf_strings.pxi"
include "ops.pxi"

for _kind, _class in (
    (ErrorKind.InvalidArgument, ValueError),
    (ErrorKind.UnknownSequence, errors.UnknownSequence),
    (ErrorKind.KvPoolExhausted, errors.KVPoolExhausted),
    (ErrorKind.ContextFull, errors.ContextFull),
    (ErrorKind.LogitRowsExceeded, errors.LogitRowsExceeded),
    (ErrorKind.BadModelFile, errors.ModelFileError),
    (ErrorKind.UnsupportedModel, errors.UnsupportedModelError),
    (ErrorKind.OutOfMemory, errors.OutOfMemory),
    (ErrorKind.Cancelled, errors.Cancelled),
    (ErrorKind.Closed, errors.EngineClosed),
    (ErrorKind.Device, errors.DeviceError),
):
    set_error_class(<int>_kind, _class)

Chunk = namedtuple("Chunk", "sequence tokens logits start", defaults=("last", None))
Edit = namedtuple("Edit", "row token penalty bias", defaults=(1.0, 0.0))
Candidates = namedtuple("Candidates", "ids logits log_sum_exp log_sum_exp_at_temperature target_logits")
CachedPrefix = namedtuple("CachedPrefix", "tokens blocks_in_use")

# A token type of GGUF: an entry that only pads the vocabulary.
cdef int UNUSED_TOKEN = 5
# What `populate` brings in before it looks at signals.
cdef uint64_t POPULATE_BYTES = 64 << 20


cdef string utf8(text):
    return str(text).encode("utf-8", "surrogateescape")


def __getattr__(name):
    if name != "EDIT_DTYPE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return edit_dtype()


cdef object _edit_dtype = None


cdef object edit_dtype():
    """EDIT_DTYPE: the fields of an Edit as they lie in memory. Made at first use, as it needs numpy."""
    global _edit_dtype
    if _edit_dtype is None:
        import numpy

        _edit_dtype = numpy.dtype([("row", "<i4"), ("token", "<i4"), ("penalty", "<f4"), ("bias", "<f4")])
    return _edit_dtype


cdef int32_t token_id(object token) except? -1:
    cdef int overflow = 0
    index = PyNumber_Index(token)
    cdef long long value = PyLong_AsLongLongAndOverflow(index, &overflow)
    if overflow or not -2147483648 <= value <= 2147483647:
        raise ValueError(f"token id {index} is outside every vocabulary.")
    return <int32_t>value


cdef int fill_tokens(object tokens, vector[int32_t]& out) except -1:
    if type(tokens) in (list, tuple):  # its length is known
        out.reserve(out.size() + <size_t>len(tokens))
    for token in tokens:
        out.push_back(token_id(token))
    return 0


cdef int64_t sequence_id(object sequence) except? -1:
    cdef int overflow = 0
    index = PyNumber_Index(sequence)
    cdef long long value = PyLong_AsLongLongAndOverflow(index, &overflow)
    if overflow:
        raise ValueError(f"sequence {index} does not fit 64 bits.")
    return value


cdef void* values_of(object array) except? NULL:
    """First value of a C-contiguous array, which the caller keeps alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    PyBuffer_Release(&view)
    return view.buf


cdef int fill_edits(object edits, vector[LogitEdit]& out) except -1:
    """Copies edits, an array of EDIT_DTYPE or an iterable of Edit or its values: what is checked later is what is used."""
    import numpy

    cdef LogitEdit native_edit
    cdef const LogitEdit* first
    if isinstance(edits, numpy.ndarray) and edits.dtype == edit_dtype():
        edits = numpy.ascontiguousarray(edits)
        first = <const LogitEdit*>values_of(edits)
        out.assign(first, first + <size_t>edits.size)
        return 0
    for edit in edits:
        row, token, penalty, bias = edit if len(edit) == 4 else Edit(*edit)
        native_edit.row, native_edit.token = PyNumber_Index(row), PyNumber_Index(token)
        native_edit.penalty, native_edit.bias = penalty, bias
        out.push_back(native_edit)
    return 0


cdef int fill_temperatures(object temperatures, vector[float]& out) except -1:
    """Copies temperatures: a float32 array, or any iterable of numbers."""
    cdef Py_buffer view
    cdef const float* first
    if PyObject_CheckBuffer(temperatures):
        PyObject_GetBuffer(temperatures, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        try:
            if view.ndim == 1 and view.strides[0] == sizeof(float) and view.format == b"f":
                first = <const float*>view.buf
                out.assign(first, first + view.shape[0])
                return 0
        finally:
            PyBuffer_Release(&view)
    for temperature in temperatures:
        out.push_back(temperature)
    return 0


cdef int check_start(NativeEngine* native, int64_t sequence, int64_t start) except -1:
    cdef int64_t length = native.pool().at(sequence).length if native.pool().live(sequence) else 0
    if length != start:
        raise ValueError(f"sequence {sequence} has {length} tokens, not the {start} that its chunk starts after.")
    return 0


cdef LogitsWanted logits_wanted(object text) except *:
    if text == "last":
        return LogitsWanted.Last
    if text == "all":
        return LogitsWanted.All
    if text == "none":
        return LogitsWanted.Nothing
    raise ValueError(f"logits is {text!r}, not one of 'last', 'all', 'none'.")


cdef int describe(object model, ModelDescription& out) except -1:
    """The part of a GGUFFile that the core reads."""
    cdef TensorEntry entry
    out.architecture = utf8(model.metadata.get("general.architecture", "unknown"))
    for path in model.paths:
        out.paths.push_back(<string>os.fsencode(path))
    for key, value in model.metadata.items():
        if isinstance(value, bool):
            out.metadata.set(utf8(key), MetadataValue(<cbool>value))
        elif isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
            out.metadata.set(utf8(key), MetadataValue(<int64_t>value))
        elif isinstance(value, float):
            out.metadata.set(utf8(key), MetadataValue(<double>value))
        elif isinstance(value, str):
            out.metadata.set(utf8(key), MetadataValue(utf8(value)))
        else:
            out.metadata.set(utf8(key), MetadataValue())
    for tensor in model.tensors.values():
        if not 0 <= tensor.file_index < len(model.paths):
            raise ValueError(f"tensor {tensor.name} lies in file {tensor.file_index} of {len(model.paths)}.")
        entry.name = utf8(tensor.name)
        entry.type_id = tensor.type_id
        entry.type_name = utf8(tensor.type_name)
        entry.shape = tensor.shape
        entry.file = tensor.file_index
        entry.offset = tensor.offset
        entry.bytes = tensor.nbytes
        out.tensors[entry.name] = entry
    return 0


@contextmanager
def naming(model):
    """Puts the model file's path before the core's errors about its contents."""
    try:
        yield
    except errors.ModelFileError as error:
        path = "".join(model.paths[:1])
        raise error if str(error).startswith(path) else type(error)(f"{path}: {error}") from None


cdef object config_value(const MetadataValue& value):
    if holds_alternative[cbool](value):
        return <bint>get[cbool](value)
    if holds_alternative[int64_t](value):
        return get[int64_t](value)
    if holds_alternative[double](value):
        return get[double](value)
    return get[string](value).decode("utf-8", "replace")


cdef dict config_dict(object model, const ConfigList& items):
    config = {"architecture": model.metadata.get("general.architecture", "unknown")}
    cdef size_t i
    for i in range(items.size()):
        config[items[i].first.decode()] = config_value(items[i].second)
    return config


cdef dict profile_dict(Profile& profile):
    phases = {}
    cdef PhaseProfile* phase
    cdef OpProfile* op
    cdef size_t i, j
    for i in range(profile.phases.size()):
        phase = &profile.phases[i]
        ops = {}
        for j in range(phase.ops.size()):
            op = &phase.ops[j]
            ops[op.name.decode()] = {"calls": op.calls, "seconds": op.seconds, "bytes": op.cost.bytes, "macs": op.cost.macs}
        if ops:
            phases[phase.name.decode()] = {"steps": phase.steps, "tokens": phase.tokens, "seconds": phase.seconds, "ops": ops}
    return {"phases": phases}


cdef dict effective_options(object options, const EnginePlan& plan, bint float_activations):
    return {
        "device": options.device,
        "kv_tokens": plan.options.kv_tokens,
        "memory_budget": options.memory_budget,
        "kv_type": options.kv_type,
        "max_sequences": plan.options.max_sequences,
        "prefill_chunk": plan.options.prefill_chunk,
        "max_logit_rows": plan.options.max_logit_rows,
        "activations": "float32" if float_activations else options.activations,
        "threads": options.threads,
        "profile": options.profile,
        "prefix_cache": options.prefix_cache,
    }


cdef object checked_options(dict given):
    """EngineOptions with the threads decided."""
    from dataclasses import replace

    from ferrum.options import EngineOptions, available_cpus

    options = EngineOptions(**given)
    return options if options.threads is not None else replace(options, threads=available_cpus())


cdef KvType kv_type_of(object name):
    return KvType.F16 if name == "f16" else KvType.F32 if name == "f32" else KvType.Q8_0


cdef EngineOptions engine_options(object options):
    from ferrum.options import available_memory

    cdef EngineOptions out
    out.kv_tokens = options.kv_tokens or 0
    out.memory_budget = options.memory_budget or 0
    out.available_memory = available_memory() or 0
    out.kv_type = kv_type_of(options.kv_type)
    out.max_sequences = options.max_sequences
    out.prefill_chunk = options.prefill_chunk
    out.max_logit_rows = options.max_logit_rows or 0
    out.prefix_cache = options.prefix_cache
    return out


cdef int find_kernels(DeviceOptions& out, given=None) except -1:
    """The Metal kernels, given or beside this module: a compiled library, or else their source, which Metal compiles."""
    beside = os.path.dirname(os.path.abspath(__file__))
    for path in (given,) if given is not None else (os.path.join(beside, "kernels.metallib"), os.path.join(beside, "kernels.metal")):
        if not os.path.exists(path):
            continue
        if path.endswith(".metal"):
            with open(path, encoding="utf-8") as source:
                out.kernel_source = utf8(source.read())
        else:
            out.kernel_library = <string>os.fsencode(path)
        break
    return 0


cdef DeviceOptions device_options(object options, object instruction_set):
    cdef DeviceOptions out
    out.device = utf8(options.device)
    out.threads = options.threads
    out.float_activations = options.activations == "float32"
    out.profile = options.profile
    out.instruction_set = utf8(instruction_set or "")
    return out


def plan(model, **given):
    """What an Engine with these options would be and take, without loading anything; see `_native.pyi`."""
    cdef ModelDescription description
    cdef unique_ptr[Model] native_model
    cdef unique_ptr[Backend] backend
    cdef EnginePlan plan
    describe(model, description)
    options = checked_options(given)
    with naming(model):
        native_model = make_model(description)
        backend = make_backend(device_options(options, None))
        plan = make_plan(dereference(native_model), dereference(backend), engine_options(options))
    return {
        "config": config_dict(model, native_model.get().config()),
        "options": effective_options(options, plan, backend.get().float_activations()),
        "device": backend.get().name().decode(),
        "weights_bytes": plan.weights,
        "weights_extra_bytes": plan.weights_extra,
        "kv_bytes": plan.kv,
        "kv_bytes_per_token": plan.kv // plan.options.kv_tokens,
        "scratch_bytes": plan.scratch,
        "total_bytes": plan.total(),
    }


cdef class CallLock:
    """Serialises the calls of one engine. A call from inside another one, or in a forked process, is refused: it would wait for ever.

    A thread may hold it over several calls, which then run as one.
    """

    cdef object lock
    cdef object owner
    cdef bint held
    cdef bint inside
    cdef int process

    def __cinit__(self):
        self.lock = threading.Lock()
        self.process = os.getpid()

    cdef bint in_another_process(self):
        return os.getpid() != self.process

    def __enter__(self):
        if self.in_another_process():
            raise RuntimeError("this engine was made in another process, and its threads did not come along with fork(). Make a new Engine in this process.")
        thread = threading.get_ident()
        if self.owner == thread:
            if not self.held or self.inside:
                raise RuntimeError("an engine was called from inside a call of this engine, by a signal handler, a finalizer or an argument. Call it afterwards.")
        else:
            self.lock.acquire()
            self.owner = thread
        self.inside = True

    def __exit__(self, *exc):
        self.inside = False
        if not self.held:
            self.owner = None
            self.lock.release()

    def hold(self):
        if self.held and self.owner == threading.get_ident():
            raise RuntimeError("this thread holds the engine already. Use one `with engine.held()`.")
        self.__enter__()
        self.held = True
        self.inside = False

    def let_go(self):
        self.held = False
        self.__exit__()


cdef class _LogitsMemory:
    """Buffer protocol over the engine's logits; keeps the memory alive for the views on it. Made by the engine only."""

    def __init__(self):
        raise TypeError("logits are made by an engine's steps.")

    cdef shared_ptr[Buffer] buffer
    cdef Py_ssize_t size

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, <void*>self.buffer.get().host(), self.size, 1, flags)


cdef class Logits:
    """Logits of a step, float32 [rows, vocab_size] ([vocab_size] for `prefill(logits="last")` and `decode`).

    `np.asarray(x)` is a read-only view without a copy, valid until the engine's next step; converting it later raises StaleLogits.
    `copy()` keeps the values.
    """

    cdef Engine engine
    cdef uint64_t version
    cdef readonly tuple shape
    cdef _LogitsMemory memory

    def __init__(self):
        raise TypeError("logits are made by an engine's steps.")

    def __array__(self, dtype=None, copy=None):
        import numpy

        if self.engine.native.get() == NULL:
            raise errors.EngineClosed("the engine of these logits is closed. Convert them before, or keep a copy().")
        if self.engine.logits_version() != self.version:
            raise errors.StaleLogits("these logits were overwritten by a later step of the engine. Convert them before it, or keep a copy().")
        view = numpy.frombuffer(self.memory, dtype=numpy.float32).reshape(self.shape)
        if dtype is not None and numpy.dtype(dtype) != view.dtype:
            if copy is False:
                raise ValueError(f"logits are float32; converting them to {numpy.dtype(dtype)} needs a copy.")
            return view.astype(dtype)
        return view.copy() if copy else view

    def copy(self):
        return self.__array__(copy=True)

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        state = "" if self.engine.logits_version() == self.version else ", overwritten by a later step"
        return f"Logits(shape={self.shape}{state})"


cdef class Engine:
    """A loaded model with its KV pool; see `_native.pyi` for the contract of each call."""

    cdef unique_ptr[NativeEngine] native
    cdef readonly dict config
    cdef readonly dict options
    cdef readonly str device
    cdef readonly int kv_capacity
    cdef readonly int kv_bytes_per_token
    cdef CallLock lock
    cdef int process

    def __init__(self, model, *, unused_tokens=None, instruction_set=None, poison_freed_kv=False, fail_at=-1, compare_with=None, compare_tolerance=1e-4,
                 kernels=None, **given):
        cdef ModelDescription description
        cdef unique_ptr[Model] native_model
        cdef unique_ptr[Backend] backend
        cdef EngineOptions native_options
        cdef DeviceOptions chosen_device
        cdef vector[int32_t] unused
        if self.lock is not None:
            raise RuntimeError("an Engine is made once; make another object.")
        self.lock = CallLock()
        self.process = os.getpid()
        options = checked_options(given)
        native_options = engine_options(options)
        native_options.poison_freed_kv = poison_freed_kv
        chosen_device = device_options(options, instruction_set)
        find_kernels(chosen_device, kernels)
        chosen_device.compare_with = utf8(compare_with or "")
        chosen_device.compare_tolerance = compare_tolerance
        chosen_device.fail_at = max(-1, min(operator.index(fail_at), (1 << 63) - 1))
        describe(model, description)
        if unused_tokens is None:
            types = model.metadata.get("tokenizer.ggml.token_type", ())
            unused_tokens = [token for token, kind in enumerate(types) if kind == UNUSED_TOKEN]
        fill_tokens(unused_tokens, unused)
        with naming(model):
            with nogil:
                native_model = make_model(description)
                backend = make_backend(chosen_device)
                self.native.reset(new NativeEngine(move(native_model), move(backend), native_options))
        self.native.get().exclude_tokens(move(unused))
        self.config = config_dict(model, self.native.get().config())
        self.options = effective_options(options, self.native.get().plan(), self.native.get().float_activations())
        self.device = self.native.get().device().decode()
        self.kv_capacity = self.native.get().plan().options.kv_tokens
        self.kv_bytes_per_token = self.native.get().plan().kv // self.kv_capacity

    @contextmanager
    def held(self):
        """Keep other threads out of the engine for a `with` block; see `_native.pyi`."""
        self.lock.hold()
        try:
            yield
        finally:
            self.lock.let_go()

    cdef NativeEngine* open(self) except NULL:
        """The native engine; call with the lock held."""
        if self.native.get() == NULL:
            raise errors.EngineClosed("this engine is closed. Make a new one.")
        return self.native.get()

    cdef uint64_t logits_version(self):
        """Version of the logits in memory; 0, which no Logits has, once the engine is closed."""
        return self.native.get().logits_version() if self.native.get() != NULL else 0

    cdef object logits_of_step(self, NativeEngine* native, bint single):
        cdef int rows = native.logit_rows()
        cdef int vocab = native.shape().vocab_size
        if rows == 0:
            return None
        cdef Logits logits = Logits.__new__(Logits)
        cdef _LogitsMemory memory = _LogitsMemory.__new__(_LogitsMemory)
        memory.buffer = native.logits()
        memory.size = <Py_ssize_t>rows * vocab * 4
        logits.memory = memory
        logits.engine = self
        logits.version = native.logits_version()
        if single:
            logits.shape = (vocab,)
        else:
            logits.shape = (rows, vocab)
        return logits

    def prefill(self, sequence, tokens, logits="last"):
        """Append a prompt of any length; see `_native.pyi`."""
        cdef vector[int32_t] ids
        cdef NativeChunk chunk
        cdef NativeEngine* native
        cdef cbool (*should_stop)() noexcept nogil
        cdef bint on_main_thread
        fill_tokens(tokens, ids)
        chunk.sequence = sequence_id(sequence)
        chunk.tokens = span(ids.data(), ids.size())
        chunk.logits = logits_wanted(logits)
        with self.lock:
            native = self.open()
            on_main_thread = threading.get_ident() == threading.main_thread().ident
            should_stop = python_wants_stop if on_main_thread else never_stop
            with nogil:
                native.prefill(chunk, should_stop)
            return self.logits_of_step(native, chunk.logits == LogitsWanted.Last)

    def decode(self, sequence, token):
        """One token of one live sequence; its logits [vocab_size]."""
        return self.run_step([(sequence, (token,), "last")], True, True)

    def decode_batch(self, sequences, tokens):
        """One token of each live sequence; logits [len(sequences), vocab_size] in call order."""
        sequences, tokens = list(sequences), list(tokens)
        if len(sequences) != len(tokens):
            raise ValueError(f"{len(sequences)} sequences were given {len(tokens)} tokens; each takes one.")
        return self.run_step([(sequence, (token,), "last") for sequence, token in zip(sequences, tokens)], False, True)

    def step(self, chunks):
        """One ragged step: every chunk advances, or none."""
        return self.run_step(chunks, False, False)

    cdef object run_step(self, chunks, bint single, bint must_live):
        cdef vector[int32_t] ids
        cdef vector[size_t] ends
        cdef vector[NativeChunk] native_chunks
        cdef vector[int64_t] starts
        cdef NativeChunk chunk
        cdef NativeEngine* native
        cdef size_t i, first = 0
        for given in chunks:
            sequence, tokens, logits, start = given if len(given) == 4 else Chunk(*given)
            starts.push_back(-1 if start is None else sequence_id(start))
            fill_tokens(tokens, ids)
            chunk.sequence = sequence_id(sequence)
            chunk.logits = logits_wanted(logits)
            native_chunks.push_back(chunk)
            ends.push_back(ids.size())
        for i in range(ends.size()):  # the ids no longer move
            native_chunks[i].tokens = span(ids.data() + first, ends[i] - first)
            first = ends[i]
        with self.lock:
            native = self.open()
            for i in range(native_chunks.size()):
                if must_live or starts[i] > 0:
                    native.pool().at(native_chunks[i].sequence)
                if starts[i] >= 0:
                    check_start(native, native_chunks[i].sequence, starts[i])
            with nogil:
                native.step(chunk_span(native_chunks.data(), native_chunks.size()))
            return self.logits_of_step(native, single)

    def candidates(self, n, edits=None, targets=None, temperatures=None):
        """The n largest logits of each row of the last step, after the edits; see `_native.pyi`."""
        import numpy

        cdef TopCandidatesArgs args
        cdef vector[LogitEdit] native_edits
        cdef vector[int32_t] native_targets, target_start
        cdef vector[float] native_temperatures
        cdef NativeEngine* native
        cdef int rows = 0
        if edits is not None:
            fill_edits(edits, native_edits)
        if targets is not None:
            targets = [list(row) for row in targets]
            for row in targets:
                target_start.push_back(<int32_t>native_targets.size())
                fill_tokens(row, native_targets)
            target_start.push_back(<int32_t>native_targets.size())
        if temperatures is not None:
            fill_temperatures(temperatures, native_temperatures)
        args.count = max(-1, min(operator.index(n), 1 << 30))
        with self.lock:
            native = self.open()
            rows = native.logit_rows()
            if temperatures is None:
                native_temperatures.assign(rows, 1.0)
            if targets is not None and len(targets) != rows:
                raise ValueError(f"targets has {len(targets)} rows for {rows} rows of logits.")
            if <int>native_temperatures.size() != rows:
                raise ValueError(f"temperatures has {native_temperatures.size()} entries for {rows} rows of logits.")
            if rows > 0 and not 1 <= args.count <= native.candidate_limit():
                raise ValueError(f"n is {n}, not from 1 to the {native.candidate_limit()} tokens of the vocabulary that can be sampled.")
            ids = numpy.empty((rows, max(args.count, 0)), numpy.int32)
            logits = numpy.empty((rows, max(args.count, 0)), numpy.float32)
            log_sum_exp = numpy.empty(rows, numpy.float64)
            at_temperature = numpy.empty(rows, numpy.float64)
            target_logits = numpy.empty(native_targets.size(), numpy.float32)
            args.edits = edit_span(native_edits.data(), native_edits.size())
            args.temperatures = float_span(native_temperatures.data(), native_temperatures.size())
            args.targets = span(native_targets.data(), native_targets.size())
            args.target_start = span(target_start.data(), target_start.size())
            args.ids = <int32_t*>values_of(ids)
            args.values = <float*>values_of(logits)
            args.log_sum_exp = <double*>values_of(log_sum_exp)
            args.log_sum_exp_at_temperature = <double*>values_of(at_temperature)
            args.target_logits = <float*>values_of(target_logits)
            with nogil:
                native.top_candidates(args)
        if targets is None:
            target_logits = target_logits.reshape(rows, 0)
        elif len({len(row) for row in targets}) == 1:
            target_logits = target_logits.reshape(rows, -1)
        else:
            target_logits = numpy.split(target_logits, [target_start[i] for i in range(1, rows)])
        return Candidates(ids, logits, log_sum_exp, at_temperature, target_logits)

    def fork(self, source, target):
        """Start `target` as a copy of `source`; their common blocks are shared until one of them writes."""
        cdef int64_t from_sequence = sequence_id(source), to_sequence = sequence_id(target)
        with self.lock:
            self.open().fork(from_sequence, to_sequence)

    def adopt(self, sequence, tokens):
        """Start a sequence with the longest cached beginning of `tokens`; its length, 0: there is none."""
        cdef int64_t id = sequence_id(sequence)
        cdef vector[int32_t] ids
        fill_tokens(tokens, ids)
        with self.lock:
            return self.open().adopt(id, span(ids.data(), ids.size()))

    def cached_prefix(self, tokens):
        """What `adopt` would find, and how many of its blocks live sequences hold."""
        cdef vector[int32_t] ids
        cdef CachedPrefixTokens found
        fill_tokens(tokens, ids)
        with self.lock:
            found = self.open().pool().cached_prefix(span(ids.data(), ids.size()))
            return CachedPrefix(found.tokens, found.blocks_in_use)

    def kv_layout(self, tokens):
        """(shape, dtype) of what `export_kv` gives of so many tokens."""
        import numpy

        config, kv_type = self.config, self.options["kv_type"]
        dtype = numpy.dtype({"f16": "<f2", "f32": "<f4", "q8_0": "u1"}[kv_type])
        return (config["num_layers"], 2, tokens, config["num_kv_heads"], kv_row_bytes(kv_type_of(kv_type), config["head_dim"]) // dtype.itemsize), dtype

    def export_kv(self, sequence):
        """Keys and values of a live sequence; see `_native.pyi`."""
        import numpy

        cdef int64_t id = sequence_id(sequence)
        cdef NativeEngine* native
        cdef byte* out
        with self.lock:
            native = self.open()
            shape, dtype = self.kv_layout(native.pool().at(id).length)
            kv = numpy.empty(shape, dtype)
            out = <byte*>values_of(kv)
            with nogil:
                native.export_kv(id, out)
            return kv

    def import_kv(self, sequence, tokens, kv):
        """Start a sequence with what `export_kv` gave; see `_native.pyi`."""
        import numpy

        cdef int64_t id = sequence_id(sequence)
        cdef vector[int32_t] ids
        cdef NativeEngine* native
        cdef const byte* data
        fill_tokens(tokens, ids)
        shape, dtype = self.kv_layout(ids.size())
        kv = numpy.asarray(kv)
        if kv.shape != shape or kv.dtype != dtype:
            raise ValueError(f"keys and values are {kv.dtype} {kv.shape}, but those of {ids.size()} tokens are {dtype} {shape} in this engine.")
        kv = numpy.ascontiguousarray(kv)
        data = <const byte*>values_of(kv)
        with self.lock:
            native = self.open()
            with nogil:
                native.import_kv(id, span(ids.data(), ids.size()), data)

    def release(self, sequence):
        """End a sequence; its blocks go back to the pool."""
        cdef int64_t id = sequence_id(sequence)
        with self.lock:
            self.open().release(id)

    def truncate(self, sequence, length):
        """Drop the tokens of a live sequence after the first `length`; whether its last block is shared."""
        cdef int64_t id = sequence_id(sequence)
        cdef int count = max(-1, min(operator.index(length), 0x7fffffff))
        with self.lock:
            return self.open().truncate(id, count)

    def reset(self):
        """End every sequence and forget what is cached."""
        with self.lock:
            self.open().reset()

    def reserve(self, sequence, tokens):
        """Hold KV blocks so that the sequence can grow by `tokens`; starts it if it is not live."""
        cdef int64_t id = sequence_id(sequence)
        cdef int count = max(-1, min(operator.index(tokens), 0x7fffffff))
        with self.lock:
            self.open().reserve(id, count)

    def warm_up(self):
        """Bring the weights into memory and run the shapes that will be used, so that the first request is as fast as the second."""
        cdef NativeEngine* native
        self.populate()
        with self.lock:
            native = self.open()
            with nogil:
                native.warm_up()

    def populate(self, progress=None):
        """Bring the weights into memory in file order, piece by piece; `progress(bytes_done, bytes_total)` is called after each."""
        cdef NativeEngine* native
        cdef uint64_t done = 0, total = 1, piece = 0
        while done < total:
            with self.lock:  # for one piece: other threads, and `progress`, may use the engine in between
                native = self.open()
                total = native.weights().mapped_bytes()
                piece = min(POPULATE_BYTES, total - done)
                with nogil:
                    native.weights().populate(done, piece)
            done += piece
            PyErr_CheckSignals()
            if progress is not None:
                progress(done, total)

    def resident_fraction(self):
        """Share of the mapped weights that is in the page cache, from a sample; 1.0 where the system does not say."""
        cdef NativeEngine* native
        cdef double fraction
        with self.lock:
            native = self.open()
            with nogil:
                fraction = native.weights().resident_fraction()
            return fraction

    def measure_bandwidth(self):
        """Bytes a second that the device reads from memory, measured now."""
        from ferrum.options import available_memory

        cdef NativeEngine* native
        cdef size_t most = (available_memory() or 1 << 30) // 4
        cdef double rate
        with self.lock:
            native = self.open()
            with nogil:
                rate = native.read_bandwidth(most)
            return rate

    def measure_product_rate(self):
        """Multiply-accumulates a second of products with Q4_K weights in the cache, measured now; None where that is not known."""
        cdef NativeEngine* native
        cdef double rate
        with self.lock:
            native = self.open()
            with nogil:
                rate = native.product_rate()
            return rate or None

    def profile(self):
        """What steps and ops cost since the engine was made or `reset_profile`; None without the option `profile`."""
        cdef Profile* profile
        with self.lock:
            profile = self.open().profile()
            return None if profile == NULL else profile_dict(dereference(profile))

    def reset_profile(self):
        """Start the profile anew; nothing without the option `profile`."""
        cdef Profile* profile
        with self.lock:
            profile = self.open().profile()
            if profile != NULL:
                profile[0] = Profile()

    def cancel(self):
        """End a prefill that another thread is running, at its next chunk; it raises Cancelled there."""
        cdef NativeEngine* native = self.native.get()
        if native != NULL:
            native.cancel()

    def length(self, sequence):
        """Tokens of a live sequence."""
        cdef int64_t id = sequence_id(sequence)
        with self.lock:
            return self.open().pool().at(id).length

    def stats(self):
        """Counters since the engine was made, of its device where that counts, and the state of the KV pool."""
        cdef NativeEngine* native
        cdef const DeviceCounters* device
        with self.lock:
            native = self.open()
            device = native.counters()
            stats = {
                "steps": native.stats().steps,
                "tokens": native.stats().tokens,
                "logit_rows": native.stats().logit_rows,
                "failed_steps": native.stats().failed_steps,
                "live_sequences": native.pool().live_sequences(),
                "kv_blocks": native.pool().total_blocks(),
                "kv_blocks_free": native.pool().free_blocks(),
                "kv_blocks_cached": native.pool().cached_blocks(),
                "prefix_hits": native.pool().prefix_stats().hits,
                "prefix_tokens": native.pool().prefix_stats().tokens,
                "prefix_tokens_asked": native.pool().prefix_stats().tokens_asked,
                "prefix_evictions": native.pool().prefix_stats().evictions,
            }
            if device != NULL:
                stats |= {"dispatches": device.dispatches, "command_buffers": device.command_buffers, "uploads": device.uploads, "pipelines": device.pipelines}
            return stats

    @property
    def kv_blocks_free(self):
        """Free blocks of the KV pool, of 16 tokens each."""
        with self.lock:
            return self.open().pool().free_blocks()

    @property
    def closed(self):
        return self.native.get() == NULL

    def close(self):
        """Give all memory back. Views of logits stay readable; everything else raises EngineClosed from now on."""
        if self.lock.in_another_process():
            self.native.release()  # its threads live in the parent; its memory ends with this process
            return
        with self.lock:
            self.native.reset()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        # Not through the lock: the garbage collector may have cleared it.
        if self.native.get() != NULL and self.process != os.getpid():
            self.native.release()
