"""The native core of ferrum: an engine that owns the model's weights, the KV pool and the threads."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

class _TensorInfo(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def type_id(self) -> int: ...
    @property
    def type_name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file_index(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class _Model(Protocol):
    """What the engine reads of a `ferrum.gguf_file.GGUFFile`."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, _TensorInfo]: ...

def split_strings(data: bytes | memoryview, offset: int, count: int) -> tuple[list[str], int]: ...
def skip_strings(data: bytes | memoryview, offset: int, count: int) -> int: ...
def split_merges(data: bytes | memoryview, offset: int, count: int) -> tuple[list[tuple[str, str]], int]: ...
def plan(
    model: _Model,
    *,
    device: str = "auto",
    kv_tokens: int | None = None,
    memory_budget: int | str | None = None,
    kv_type: str = "f16",
    max_sequences: int = 16,
    prefill_chunk: int = 512,
    max_logit_rows: int | None = None,
    activations: str = "int8",
    threads: int | None = None,
    profile: bool = False,
    prefix_cache: bool = True,
) -> dict[str, Any]:
    """What an Engine with these options would be and take, without loading anything.

    Returns a dict: `config` (name -> value: architecture, num_layers, hidden_size, num_heads, num_kv_heads, head_dim, num_experts, top_k,
    expert_ffn_size, vocab_size, context_length, rope_theta, rms_eps, norm_topk_prob, tied_embeddings...), `options` (every effective option),
    `device` (as people read it: "cpu (avx2, 2 threads)"),
    `weights_bytes` (mapped, in place), `weights_extra_bytes` (copies that the device makes of weights), `kv_bytes`, `kv_bytes_per_token`,
    `scratch_bytes` and `total_bytes`, all in bytes. Errors as of `Engine`.
    """

class Chunk(NamedTuple):
    """One sequence's part of a step: `tokens` are appended; logits are wanted of the "last" one, of "all" or of "none".

    `start`: how many tokens the caller believes the sequence has (0: it is new); ValueError or UnknownSequence where it has not.
    """

    sequence: int
    tokens: Sequence[int]
    logits: Literal["last", "all", "none"] = "last"
    start: int | None = None

class Edit(NamedTuple):
    """A change of one logit before candidates are chosen: logit' = (logit > 0 ? logit / penalty : logit * penalty) + bias."""

    row: int
    token: int
    penalty: float = 1.0
    bias: float = 0.0

EDIT_DTYPE: np.dtype[np.void]  # the fields of an Edit in an array: row and token int32, penalty and bias float32; made at first use

class Logits:
    """Logits of a step, float32 [rows, vocab_size] ([vocab_size] for `prefill(logits="last")` and `decode`).

    `np.asarray(x)` is a read-only view without a copy, valid until the engine's next step; converting it later raises StaleLogits.
    `copy()` keeps the values. `Engine.candidates` may change a view while it runs, and leaves it as it was.
    """

    shape: tuple[int, ...]
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.float32]: ...
    def __len__(self) -> int: ...
    def copy(self) -> npt.NDArray[np.float32]: ...

class Candidates(NamedTuple):
    """Per logit row of the last step, after edits, padding entries of the vocabulary excluded."""

    ids: npt.NDArray[np.int32]  # [rows, n], by falling logit, ties by rising id
    logits: npt.NDArray[np.float32]  # [rows, n]
    log_sum_exp: npt.NDArray[np.float64]  # [rows], of logits
    log_sum_exp_at_temperature: npt.NDArray[np.float64]  # [rows], of logits / temperature
    target_logits: npt.NDArray[np.float32]  # [rows, targets]

class CachedPrefix(NamedTuple):
    """A beginning of a prompt that the KV pool holds: its tokens, and how many of its blocks live sequences hold, so that they cost no free one."""

    tokens: int
    blocks_in_use: int

class Engine:
    """A loaded model with its KV pool. Sequences are ints chosen by the caller.

    Any thread may call; calls wait for each other on one lock, and the GIL is free during a step. A call from inside another call (by a signal
    handler or a finalizer) and any call in a forked process are a RuntimeError. After an exception the engine is as before and usable.

    `kv_tokens`: capacity of the KV pool in tokens (rounded up to blocks of 16); default min(context length, 8192), less where the plan would
    not fit, and at least min(context length, 512). `memory_budget`: bytes (or "12GiB") that weights, KV pool and scratch together must fit,
    else OutOfMemory says what would. Without one the default kv_tokens fits the memory that the system would give (only KV pool and scratch,
    where the mapped weights are larger than that), if it gives that much.
    `max_sequences`: live sequences at once. `prefill_chunk`: prompt tokens of one step. `max_logit_rows`: most rows of one call's logits,
    default max(max_sequences, 16). `activations`: "int8", or "float32" for proof. `threads`: default: the CPUs that this process may use.
    `profile`: count what every op costs, for `profile()`; the device is then waited for after each. `prefix_cache`: what the KV pool holds is
    found again by its tokens, for `adopt`, also after its sequence ended, until the room is needed.

    `unused_tokens`: ids that are never candidates; None: the file's entries of type UNUSED. For tests: `instruction_set` ("avx512", "avx2", "scalar";
    None: the best of this machine), `poison_freed_kv` (KV blocks whose content is dropped are filled with NaN) and `fail_at` (that call to the device raises
    DeviceError, once). For tools: `compare_with` names a device that computes every op first; where `device` then gives another value, by more
    than `compare_tolerance` of the largest of the row, a DeviceError says in which op and where. `kernels` is a file of Metal kernels, compiled or
    (.metal) as source; None: those that were installed.

    Raises ModelFileError, UnsupportedModelError, OptionError, OutOfMemory.
    """

    config: dict[str, Any]
    options: dict[str, Any]
    device: str  # as people read it
    kv_capacity: int  # tokens
    kv_bytes_per_token: int

    def __init__(
        self,
        model: _Model,
        *,
        device: str = "auto",
        kv_tokens: int | None = None,
        memory_budget: int | str | None = None,
        kv_type: str = "f16",
        max_sequences: int = 16,
        prefill_chunk: int = 512,
        max_logit_rows: int | None = None,
        activations: str = "int8",
        threads: int | None = None,
        profile: bool = False,
        prefix_cache: bool = True,
        unused_tokens: Sequence[int] | None = None,
        instruction_set: str | None = None,
        poison_freed_kv: bool = False,
        fail_at: int = -1,
        compare_with: str | None = None,
        compare_tolerance: float = 1e-4,
        kernels: str | None = None,
    ) -> None: ...
    def prefill(self, sequence: int, tokens: Sequence[int], logits: Literal["last", "none", "all"] = "last") -> Logits | None:
        """Append `tokens` to a live sequence or start one. None for logits="none". Ctrl-C or `cancel()` stop it between two chunks: the
        sequence is then as before the call."""
    def decode(self, sequence: int, token: int) -> Logits: ...
    def decode_batch(self, sequences: Sequence[int], tokens: Sequence[int]) -> Logits: ...
    def step(self, chunks: Sequence[Chunk | tuple]) -> Logits | None:
        """One ragged step of at most prefill_chunk + max_sequences tokens: all chunks advance, or none."""
    def held(self) -> AbstractContextManager[None]:
        """Keep other threads out of the engine for a `with` block, so that `candidates` and logits are of this thread's own step."""
    def candidates(
        self,
        n: int,
        edits: npt.NDArray[np.void] | Sequence[Edit | tuple] | None = None,
        targets: Sequence[Sequence[int]] | None = None,
        temperatures: npt.NDArray[np.float32] | Sequence[float] | None = None,
    ) -> Candidates:
        """The n largest logits of each row of the last step, after the edits, in their order. An array of EDIT_DTYPE and float32 temperatures
        are taken whole, without a Python step per item. `targets`: per row, ids whose logits are wanted as well."""
    def fork(self, source: int, target: int) -> None: ...
    def adopt(self, sequence: int, tokens: Sequence[int]) -> int:
        """Start `sequence` with the longest beginning of `tokens`, whole blocks of 16, that the KV pool holds, and return its length in tokens: a
        prompt is then computed from there on. 0: nothing was found, or the option `prefix_cache` is off, and the sequence is not started."""
    def cached_prefix(self, tokens: Sequence[int]) -> CachedPrefix:
        """What `adopt` would find now. Changes nothing, not even which blocks are given up first."""
    def kv_layout(self, tokens: int) -> tuple[tuple[int, int, int, int, int], np.dtype]:
        """(shape, dtype) of what `export_kv` gives of so many tokens."""
    def export_kv(self, sequence: int) -> npt.NDArray[np.float16] | npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """Keys and values of a live sequence, a copy: [num_layers, 2, tokens, num_kv_heads, head_dim] in the type of `kv_type`, keys (rotated) first.
        Of q8_0 the last dimension is the bytes of GGUF's Q8_0 blocks, 34 for each 32 values: a float16 scale, then int8."""
    def import_kv(self, sequence: int, tokens: Sequence[int], kv: npt.NDArray[np.float16] | npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> None:
        """Start `sequence`, which is not live, with tokens that were computed before and what `export_kv` gave of them. The caller answers for both
        belonging together and to this model. ValueError for another shape or type, KVPoolExhausted, ContextFull."""
    def release(self, sequence: int) -> None: ...
    def truncate(self, sequence: int, length: int) -> bool:
        """Drop the tokens of a live sequence after the first `length` (from 1 to what it has); blocks that it no longer needs, and room that
        `reserve` held, go back to the pool. Forks keep what they have. True: others hold the last block as well, so that the next token takes
        a block more than its own."""
    def reset(self) -> None:
        """End every sequence and forget what is cached."""
    def reserve(self, sequence: int, tokens: int) -> None:
        """Hold KV blocks so that the sequence can grow by `tokens` without KVPoolExhausted."""
    def warm_up(self) -> None:
        """`populate`, then one prompt and one token, which count nowhere."""
    def populate(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Bring the weights into memory, in file order and pieces of 64 MiB; `progress(bytes_done, bytes_total)` is called after each. Ctrl-C
        ends it, and other calls, also of `progress`, come in between two pieces."""
    def resident_fraction(self) -> float:
        """Share of the mapped weights that is in the page cache, from a sample; 1.0 where the system does not say."""
    def measure_product_rate(self) -> float | None:
        """Multiply-accumulates a second of products of many activations with Q4_K weights that lie in the cache, with all threads, measured now in
        a tenth of a second: what bounds the products of a step that memory does not. None where it is not known: only the CPU measures it."""
    def measure_bandwidth(self) -> float:
        """Bytes a second that the device reads from memory with all its threads, measured now, in about half a second, over a buffer of at
        most 512 MiB and a quarter of the available memory."""
    def profile(self) -> dict[str, Any] | None:
        """What steps cost since the engine was made or `reset_profile`; None without the option `profile`.

        {"phases": {phase: {"steps", "tokens", "seconds", "ops": {op: {"calls", "seconds", "bytes", "macs"}}}}} with the phases that ran of
        "prefill" (a step with more than one token of a sequence), "decode" (one token of one) and "batched decode" (one each of several).
        Seconds of a phase are of its steps, from begin to end, and hold what was spent around the ops. Ops are "qkv", "attn_output", "head" and
        those of `core/backend.h`; "top_candidates" and copies for `reserve` follow a step, are counted to its phase and not part of its
        seconds. `bytes` are what an op must move once: weights as stored (of expert stacks the experts that got tokens), keys, values and
        logits, no activations. `macs` are multiply-accumulates of products. Failed calls do not count.
        """
    def reset_profile(self) -> None: ...
    def cancel(self) -> None: ...
    def length(self, sequence: int) -> int:
        """Tokens of a live sequence."""
    def stats(self) -> dict[str, int]:
        """Counters since the engine was made: `steps`, `tokens`, `logit_rows`, `failed_steps`; of `adopt`, `prefix_hits` (calls that
        found something), `prefix_tokens` (found) and `prefix_tokens_asked`, and `prefix_evictions` (cached blocks whose room was needed); the
        KV pool now: `live_sequences`, `kv_blocks`, `kv_blocks_free`, and `kv_blocks_cached` (those of the free ones that `adopt` finds); on a GPU `dispatches`, `command_buffers`, `uploads`, and `pipelines` (kernels compiled)."""
    @property
    def kv_blocks_free(self) -> int:
        """Free blocks of the KV pool, of 16 tokens each, the cached ones too."""
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(self, *exc: object) -> None: ...
