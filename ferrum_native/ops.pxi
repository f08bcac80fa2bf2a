# Single ops of a backend and the KV pool on its own, over numpy arrays: for tests and tools. Nothing of `ferrum` imports these.

cdef extern from "core/batch.h" namespace "ferrum" nogil:
    cdef cppclass Batch:
        int tokens, sequences, max_blocks
        vector[int32_t] token_ids, positions, kv_slots, query_start, context_length, block_tables, logit_rows
        vector[float] rope_cos_sin

cdef extern from "core/tensor.h" namespace "ferrum" nogil:
    cdef cppclass byte "std::byte":
        pass
    cdef cppclass WeightTensor:
        int experts, rows, cols
        const byte* data
        size_t bytes()
    cdef cppclass Weight:
        WeightTensor tensor
    cdef cppclass Activation:
        int rows, cols
    cdef cppclass Routing:
        pass
    cdef cppclass Kv:
        pass

cdef extern from "core/backend.h" namespace "ferrum" nogil:
    cdef cppclass HeadShape:
        int heads, kv_heads, head_dim
    cdef cppclass KvShape:
        int layers, blocks, heads, head_dim
        KvType type
    cdef cppclass RoutingContents:
        int32_t* ids
        float* weights
        int32_t* start
        int32_t* pairs
    cdef cppclass OpBackend "ferrum::Backend":
        string name()
        unique_ptr[Routing] make_routing(int, int, int) except +raise_current_error
        unique_ptr[Kv] make_kv(const KvShape&) except +raise_current_error
        void read_routing(const Routing&, const RoutingContents&) except +raise_current_error

cdef extern from "core/op_runner.h" namespace "ferrum" nogil:
    cdef cppclass OwnedWeight:
        unique_ptr[Weight] weight
    cdef cppclass HostNorm:
        float* residual
        const float* delta
        const Weight* weight
        float eps
        int rows
        Activation* out
    cdef cppclass HostQkv:
        const float* qkv
        const Weight* q_norm
        const Weight* k_norm
        float eps
        HeadShape shape
        int rotary_dim, layer
        Kv* kv
        float* q_out
    cdef cppclass HostAttention:
        const float* q
        const Kv* kv
        int layer
        HeadShape shape
        float scale
        Activation* out
    cdef cppclass HostRoute:
        const Activation* x
        int rows
        const Weight* router
        int top_k
        cbool normalize
        Routing* out
    cdef cppclass HostExperts:
        const Activation* x
        const Routing* routing
        int rows, top_k
        const Weight* first
        const Weight* second
    cdef cppclass NativeOpRunner "ferrum::OpRunner":
        NativeOpRunner(unique_ptr[Backend])
        OpBackend& backend()
        unique_ptr[OwnedWeight] place_weight(int, WeightTensor) except +raise_current_error
        unique_ptr[Activation] make_activation(int, int, const vector[int]&) except +raise_current_error
        void write_activation(Activation&, int, const float*) except +raise_current_error
        void read_activation(const Activation&, int, float*) except +raise_current_error
        void embed(const Batch&, const Weight&, float*) except +raise_current_error
        void norm(const HostNorm&) except +raise_current_error
        void linear(const Activation&, int, const vector[const Weight*]&, float*) except +raise_current_error
        void qk_norm_rope_cache(const Batch&, const HostQkv&) except +raise_current_error
        void attention(const Batch&, const HostAttention&) except +raise_current_error
        void route(const HostRoute&) except +raise_current_error
        void experts_gate_up(const HostExperts&, Activation&) except +raise_current_error
        void experts_down(const HostExperts&, float*) except +raise_current_error
        void gather_activation(const Batch&, const Activation&, Activation&) except +raise_current_error
        void gather_values(const Batch&, const float*, int, float*) except +raise_current_error
        void top_candidates(float*, int, int, TopCandidatesArgs) except +raise_current_error
        void copy_kv_blocks(Kv&, const vector[BlockCopy]&) except +raise_current_error
        void poison_kv_blocks(Kv&, const vector[int32_t]&) except +raise_current_error


cdef float* floats_at(object array) except? NULL:
    """First value of a C-contiguous float32 array, which the caller keeps alive."""
    if array.dtype != "float32" or not array.flags.c_contiguous:
        raise TypeError("ops take C-contiguous float32 arrays")
    return <float*><size_t>array.ctypes.data


cdef object float_rows(object values):
    """`values` as a fresh C-contiguous float32 matrix."""
    import numpy

    array = numpy.array(values, dtype=numpy.float32, order="C")
    if array.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {array.shape}")
    return array


cdef list block_copies(const vector[BlockCopy]& copies):
    cdef size_t i
    return [(copies[i].source, copies[i].target) for i in range(copies.size())]


cdef class OpBatch:
    """A ragged batch as `core/batch.h` describes it; fields that an op does not read may be left out."""

    cdef Batch native

    def __init__(self, *, token_ids=(), positions=(), kv_slots=(), query_start=(0,), context_length=(), block_tables=None, logit_rows=(), rope_cos_sin=None):
        fill_tokens(token_ids, self.native.token_ids)
        fill_tokens(positions, self.native.positions)
        fill_tokens(kv_slots, self.native.kv_slots)
        fill_tokens(query_start, self.native.query_start)
        fill_tokens(context_length, self.native.context_length)
        fill_tokens(logit_rows, self.native.logit_rows)
        self.native.tokens = max(len(token_ids), len(positions), self.native.query_start.back())
        self.native.sequences = len(context_length)
        if block_tables is not None:
            self.native.max_blocks = max(len(table) for table in block_tables)
            for table in block_tables:
                fill_tokens([*table, *[-1] * (self.native.max_blocks - len(table))], self.native.block_tables)
        if rope_cos_sin is not None:
            for value in rope_cos_sin.ravel():
                self.native.rope_cos_sin.push_back(value)


cdef class OpWeight:
    """A placed weight [experts, rows, cols]."""

    cdef OpRunner runner
    cdef unique_ptr[OwnedWeight] owned
    cdef readonly int type_id
    cdef readonly tuple shape
    cdef readonly int outputs
    cdef readonly int inputs

    cdef const Weight* native(self):
        return dereference(self.owned).weight.get()


cdef class OpActivation:
    """Activation rows with the packed forms of its consumers; `values()` reads the floats."""

    cdef OpRunner runner
    cdef unique_ptr[Activation] native
    cdef readonly int rows
    cdef readonly int cols

    def values(self):
        import numpy

        out = numpy.empty((self.rows, self.cols), numpy.float32)
        self.runner.native.get().read_activation(dereference(self.native), self.rows, floats_at(out))
        return out


cdef class OpRouting:
    """ids and weights [n, K]; `pairs` [n K] lists token * K + k grouped by expert, expert e's from start[e] to start[e + 1]."""

    cdef OpRunner runner
    cdef unique_ptr[Routing] native
    cdef readonly int rows
    cdef readonly int top_k
    cdef readonly int experts

    def contents(self):
        """(ids, weights, start, pairs)"""
        import numpy

        cdef RoutingContents out
        ids, pairs = numpy.empty((self.rows, self.top_k), numpy.int32), numpy.empty(self.rows * self.top_k, numpy.int32)
        weights, start = numpy.empty((self.rows, self.top_k), numpy.float32), numpy.empty(self.experts + 1, numpy.int32)
        out.ids = <int32_t*><size_t>ids.ctypes.data
        out.weights = <float*><size_t>weights.ctypes.data
        out.start = <int32_t*><size_t>start.ctypes.data
        out.pairs = <int32_t*><size_t>pairs.ctypes.data
        self.runner.native.get().backend().read_routing(dereference(self.native), out)
        return ids, weights, start, pairs


cdef class OpKv:
    """Paged keys and values."""

    cdef OpRunner runner
    cdef unique_ptr[Kv] native
    cdef readonly int blocks


cdef class OpRunner:
    """Runs each op of `core/backend.h` by itself. Activations may be given as matrices, consumers are the types of the weights they meet."""

    cdef unique_ptr[NativeOpRunner] native

    def __init__(self, device="cpu", *, threads=1, activations="int8", instruction_set=None, kernels=None):
        cdef DeviceOptions options
        options.device = utf8(device)
        find_kernels(options, kernels)
        options.threads = threads
        options.float_activations = activations == "float32"
        options.instruction_set = utf8(instruction_set or "")
        cdef unique_ptr[Backend] backend = make_backend(options)
        self.native.reset(new NativeOpRunner(move(backend)))

    @property
    def name(self):
        return self.native.get().backend().name().decode()

    def place_weight(self, data, type_id, shape):
        """A weight of `shape` [rows, cols] or [experts, rows, cols] over the raw bytes of GGUF blocks."""
        import numpy

        cdef WeightTensor tensor
        raw = numpy.ascontiguousarray(data).view(numpy.uint8).ravel()
        tensor.experts, tensor.rows, tensor.cols = (1,) * (3 - len(shape)) + tuple(shape)
        tensor.data = <const byte*><size_t>raw.ctypes.data
        cdef OpWeight weight = OpWeight()
        weight.runner, weight.type_id, weight.shape, weight.outputs, weight.inputs = self, type_id, tuple(shape), tensor.rows, tensor.cols
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[type_id]
        if tensor.cols % block or raw.size != tensor.experts * tensor.rows * (tensor.cols // block) * size:
            raise ValueError(f"{raw.size} bytes are not a weight of shape {tuple(shape)} and type {type_id}")
        weight.owned = self.native.get().place_weight(type_id, tensor)
        return weight

    def activation(self, values, consumers=()):
        """Rows of floats, packed for products with the given weights."""
        values = float_rows(values)
        cdef OpActivation out = self.make_activation(values.shape[0], values.shape[1], consumers)
        self.native.get().write_activation(dereference(out.native), out.rows, floats_at(values))
        return out

    cdef OpActivation make_activation(self, int rows, int cols, consumers):
        cdef OpActivation out = OpActivation()
        cdef vector[int] types
        for consumer in consumers:
            types.push_back((<OpWeight?>consumer).type_id)
        out.runner, out.rows, out.cols = self, rows, cols
        out.native = self.native.get().make_activation(rows, cols, types)
        return out

    cdef OpActivation as_activation(self, x, consumers):
        return x if isinstance(x, OpActivation) else self.activation(x, consumers)

    def embed(self, OpWeight table, token_ids):
        import numpy

        cdef OpBatch batch = OpBatch(token_ids=token_ids)
        out = numpy.empty((len(token_ids), table.inputs), numpy.float32)
        self.native.get().embed(batch.native, dereference(table.native()), floats_at(out))
        return out

    def norm(self, residual, OpWeight weight, float eps, delta=None, consumers=()):
        """(new residual, normalised Activation)"""
        cdef HostNorm args
        residual = float_rows(residual)
        cdef OpActivation out = self.make_activation(residual.shape[0], residual.shape[1], consumers)
        args.residual = floats_at(residual)
        args.delta = NULL
        if delta is not None:
            delta = float_rows(delta)
            args.delta = floats_at(delta)
        args.weight, args.eps, args.rows, args.out = weight.native(), eps, residual.shape[0], out.native.get()
        self.native.get().norm(args)
        return residual, out

    def linear(self, x, weights):
        """x by one to three weights, side by side: [n, R_1 + R_2 + ...]"""
        import numpy

        cdef OpActivation activation = self.as_activation(x, weights)
        cdef vector[const Weight*] native_weights
        for weight in weights:
            native_weights.push_back((<OpWeight?>weight).native())
        out = numpy.empty((activation.rows, sum((<OpWeight>weight).outputs for weight in weights)), numpy.float32)
        self.native.get().linear(dereference(activation.native), activation.rows, native_weights, floats_at(out))
        return out

    def make_kv(self, *, layers=1, blocks, kv_heads, head_dim, kv_type="f16"):
        cdef OpKv kv = OpKv()
        cdef KvShape shape
        shape.layers, shape.blocks, shape.heads, shape.head_dim = layers, blocks, kv_heads, head_dim
        shape.type = kv_type_of(kv_type)
        kv.runner, kv.blocks = self, blocks
        kv.native = self.native.get().backend().make_kv(shape)
        return kv

    def qk_norm_rope_cache(self, OpBatch batch, qkv, OpKv kv, *, heads, kv_heads, head_dim, rotary_dim, layer=0, q_norm=None, k_norm=None, eps=1e-6):
        """Queries [T, heads D]; keys and values go to the batch's slots."""
        import numpy

        cdef HostQkv args
        qkv = float_rows(qkv)
        out = numpy.empty((qkv.shape[0], heads * head_dim), numpy.float32)
        args.qkv = floats_at(qkv)
        args.q_norm = NULL
        args.k_norm = NULL
        args.eps = eps
        if q_norm is not None:
            args.q_norm = (<OpWeight?>q_norm).native()
        if k_norm is not None:
            args.k_norm = (<OpWeight?>k_norm).native()
        args.shape.heads, args.shape.kv_heads, args.shape.head_dim = heads, kv_heads, head_dim
        args.rotary_dim, args.layer, args.kv, args.q_out = rotary_dim, layer, kv.native.get(), floats_at(out)
        self.native.get().qk_norm_rope_cache(batch.native, args)
        return out

    def attention(self, OpBatch batch, q, OpKv kv, *, heads, kv_heads, head_dim, layer=0, scale=None, consumers=()):
        cdef HostAttention args
        q = float_rows(q)
        cdef OpActivation out = self.make_activation(q.shape[0], q.shape[1], consumers)
        args.q, args.kv, args.layer = floats_at(q), kv.native.get(), layer
        args.shape.heads, args.shape.kv_heads, args.shape.head_dim = heads, kv_heads, head_dim
        args.scale, args.out = head_dim ** -0.5 if scale is None else scale, out.native.get()
        self.native.get().attention(batch.native, args)
        return out

    def route(self, x, OpWeight router, top_k, normalize=True):
        cdef HostRoute args
        cdef OpActivation activation = self.as_activation(x, (router,))
        cdef OpRouting out = OpRouting()
        out.runner, out.rows, out.top_k, out.experts = self, activation.rows, top_k, router.outputs
        out.native = self.native.get().backend().make_routing(out.rows, out.top_k, out.experts)
        args.x, args.rows, args.router = activation.native.get(), activation.rows, router.native()
        args.top_k, args.normalize, args.out = top_k, normalize, out.native.get()
        self.native.get().route(args)
        return out

    def experts_gate_up(self, x, OpRouting routing, OpWeight gate, OpWeight up, consumers=()):
        """Activation [n K, F]"""
        cdef HostExperts args
        cdef OpActivation activation = self.as_activation(x, (gate, up))
        cdef OpActivation out = self.make_activation(routing.rows * routing.top_k, gate.outputs, consumers)
        args.x, args.routing, args.rows, args.top_k = activation.native.get(), routing.native.get(), routing.rows, routing.top_k
        args.first, args.second = gate.native(), up.native()
        self.native.get().experts_gate_up(args, dereference(out.native))
        return out

    def experts_down(self, x, OpRouting routing, OpWeight down):
        """[n, H]"""
        import numpy

        cdef HostExperts args
        cdef OpActivation activation = self.as_activation(x, (down,))
        out = numpy.empty((routing.rows, down.outputs), numpy.float32)
        args.x, args.routing, args.rows, args.top_k = activation.native.get(), routing.native.get(), routing.rows, routing.top_k
        args.first = down.native()
        args.second = NULL
        self.native.get().experts_down(args, floats_at(out))
        return out

    def gather_rows(self, x, rows, consumers=()):
        """Rows of a matrix as a matrix, or of an Activation as an Activation."""
        import numpy

        cdef OpBatch batch
        cdef OpActivation activation, out
        if isinstance(x, OpActivation):
            activation = x
            batch = OpBatch(token_ids=(0,) * activation.rows, logit_rows=rows)
            out = self.make_activation(len(rows), activation.cols, consumers)
            self.native.get().gather_activation(batch.native, dereference(activation.native), dereference(out.native))
            return out
        x = float_rows(x)
        batch = OpBatch(token_ids=(0,) * x.shape[0], logit_rows=rows)
        values = numpy.empty((len(rows), x.shape[1]), numpy.float32)
        self.native.get().gather_values(batch.native, floats_at(x), x.shape[1], floats_at(values))
        return values

    def top_candidates(self, logits, n, *, temperatures=None, targets=None, edits=(), excluded=()):
        """(Candidates, the logits as they are afterwards)"""
        import numpy

        cdef TopCandidatesArgs args
        cdef vector[LogitEdit] native_edits
        cdef vector[int32_t] native_targets, target_start, native_excluded
        cdef vector[float] native_temperatures
        cdef LogitEdit edit
        logits = float_rows(logits)
        rows, vocab = logits.shape
        for edit.row, edit.token, edit.penalty, edit.bias in edits:
            native_edits.push_back(edit)
        for row in targets if targets is not None else ():
            target_start.push_back(<int32_t>native_targets.size())
            fill_tokens(row, native_targets)
        if targets is not None:
            target_start.push_back(<int32_t>native_targets.size())
        for temperature in temperatures if temperatures is not None else (1.0,) * rows:
            native_temperatures.push_back(temperature)
        fill_tokens(excluded, native_excluded)
        ids, values = numpy.empty((rows, n), numpy.int32), numpy.empty((rows, n), numpy.float32)
        sums, scaled = numpy.empty(rows, numpy.float64), numpy.empty(rows, numpy.float64)
        target_logits = numpy.empty(native_targets.size(), numpy.float32)
        args.count = n
        args.edits = edit_span(native_edits.data(), native_edits.size())
        args.excluded = span(native_excluded.data(), native_excluded.size())
        args.temperatures = float_span(native_temperatures.data(), native_temperatures.size())
        args.target_start = span(target_start.data(), target_start.size())
        args.targets = span(native_targets.data(), native_targets.size())
        args.ids = <int32_t*><size_t>ids.ctypes.data
        args.values = <float*><size_t>values.ctypes.data
        args.log_sum_exp = <double*><size_t>sums.ctypes.data
        args.log_sum_exp_at_temperature = <double*><size_t>scaled.ctypes.data
        args.target_logits = <float*><size_t>target_logits.ctypes.data
        self.native.get().top_candidates(floats_at(logits), rows, vocab, args)
        return Candidates(ids, values, sums, scaled, target_logits), logits

    def copy_kv_blocks(self, OpKv kv, copies):
        cdef vector[BlockCopy] native_copies
        cdef BlockCopy copy
        for copy.source, copy.target in copies:
            native_copies.push_back(copy)
        self.native.get().copy_kv_blocks(dereference(kv.native), native_copies)

    def poison_kv_blocks(self, OpKv kv, blocks):
        cdef vector[int32_t] native_blocks
        fill_tokens(blocks, native_blocks)
        self.native.get().poison_kv_blocks(dereference(kv.native), native_blocks)


def model_rope_cos_sin(model, positions):
    """Cosines and sines [T, rotary_dim] that a model file's steps use at these positions: of each pair, cosines first."""
    import numpy

    cdef ModelDescription description
    cdef vector[int32_t] native_positions
    describe(model, description)
    fill_tokens(positions, native_positions)
    cdef unique_ptr[Model] native_model = make_model(description)
    out = numpy.empty((len(positions), native_model.get().shape().rotary_dim), numpy.float32)
    native_model.get().rope_cos_sin(native_positions.data(), native_positions.size(), floats_at(out))
    return out


cdef class KvPool:
    """The block bookkeeping of an engine, without a backend. `grow` and `hold` return the block copies to make: [(from, to)]."""

    cdef unique_ptr[NativeKvPool] native
    cdef vector[vector[int32_t]] ids  # of the step that is under way

    def __init__(self, blocks, max_sequences, context, prefix_cache=True):
        self.native.reset(new NativeKvPool(blocks, max_sequences, context, prefix_cache))
        self.native.get().track_freed()

    def grow(self, step):
        """One step: [(sequence, tokens)], a list of ids or how many unknown ones; ends with `commit` or `rollback`."""
        cdef vector[Growth] growths
        cdef Growth growth
        cdef vector[BlockCopy] copies
        cdef size_t i
        self.ids.assign(len(step), vector[int32_t]())
        for i, (sequence, tokens) in enumerate(step):
            growth.sequence = sequence
            if isinstance(tokens, int):
                growth.tokens, growth.ids = tokens, <const int32_t*>NULL
            else:
                fill_tokens(tokens, self.ids[i])
                growth.tokens, growth.ids = self.ids[i].size(), self.ids[i].data()
            growths.push_back(growth)
        self.native.get().grow(growth_span(growths.data(), growths.size()), copies)
        return block_copies(copies)

    def commit(self):
        self.native.get().commit()

    def rollback(self):
        self.native.get().rollback()

    def hold(self, sequence, tokens):
        cdef vector[BlockCopy] copies
        self.native.get().hold(sequence, tokens, copies)
        self.native.get().commit()
        return block_copies(copies)

    def fork(self, source, target):
        self.native.get().fork(source, target)

    def adopt(self, sequence, tokens):
        cdef vector[int32_t] ids
        fill_tokens(tokens, ids)
        return self.native.get().adopt(sequence, span(ids.data(), ids.size()))

    def cached_prefix(self, tokens):
        """(tokens, blocks in use) that `adopt` would find."""
        cdef vector[int32_t] ids
        fill_tokens(tokens, ids)
        found = self.native.get().cached_prefix(span(ids.data(), ids.size()))
        return found.tokens, found.blocks_in_use

    def release(self, sequence):
        self.native.get().release(sequence)

    def discard(self, sequence):
        self.native.get().discard(sequence)

    def truncate(self, sequence, length):
        return self.native.get().truncate(sequence, length)

    def reset(self):
        self.native.get().reset()

    def save(self, sequence):
        """A savepoint for `restore` or `forget`."""
        cdef Savepoint point = self.native.get().save(sequence)
        return point.sequence, point.live, point.length, point.blocks, point.shared

    def restore(self, savepoint):
        cdef Savepoint point
        point.sequence, point.live, point.length, point.blocks, point.shared = savepoint
        self.native.get().restore(point)

    def forget(self, savepoint):
        cdef Savepoint point
        point.sequence, point.live, point.length, point.blocks, point.shared = savepoint
        self.native.get().forget(point)

    def live(self, sequence):
        return self.native.get().live(sequence)

    def sequence(self, sequence):
        """(length, [blocks]) of a live sequence."""
        found = &self.native.get().at(sequence)
        return found.length, [found.blocks[i] for i in range(found.blocks.size())]

    def references(self):
        """Per block, the tables that hold it."""
        return [self.native.get().references(block) for block in range(self.native.get().total_blocks())]

    def take_freed(self):
        """Blocks whose content was dropped since the last call."""
        return list(self.native.get().take_freed())

    @property
    def live_sequences(self):
        return self.native.get().live_sequences()

    @property
    def total_blocks(self):
        return self.native.get().total_blocks()

    @property
    def free_blocks(self):
        return self.native.get().free_blocks()

    @property
    def cached_blocks(self):
        return self.native.get().cached_blocks()

    @property
    def prefix_stats(self):
        """(hits, tokens, tokens asked, evictions)"""
        stats = &self.native.get().prefix_stats()
        return stats.hits, stats.tokens, stats.tokens_asked, stats.evictions
