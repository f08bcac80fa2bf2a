"""The public API: a loaded model that continues texts."""

from __future__ import annotations

import logging
import operator
import os
import random
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np

from ferrum.errors import (
    Cancelled,
    ContextFull,
    DeviceError,
    EngineClosed,
    KVPoolExhausted,
    ModelFileError,
    UnknownSequence,
)
from ferrum.gguf_file import GGUFFile
from ferrum.options import resolve
from ferrum.sampling import CandidateRow, SamplingParams, StopChecker, candidate_count, fresh_seed, full_row, sample
from ferrum.tokenizer import IncrementalDetokenizer, Tokenizer
from ferrum_native._native import Engine, plan

logger = logging.getLogger("ferrum")
logger.addHandler(logging.NullHandler())

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Piece(NamedTuple):
    """A token as it comes, and the text that it settles: "" while a character or a possible stop string is open.

    `token_id` is None for text that was held back until the end.
    """

    text: str
    token_id: int | None


@dataclass(frozen=True)
class Usage:
    """Tokens of a completion; `seed` repeats it (None where nothing was drawn: temperature 0)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second of a completion.

    `load_s`: opening the model; `first_token_s`: from the call of `stream` to the first token; `prefill_s`: the
    step that reads the prompt and gives the first token; `decode_s`: the steps of all further tokens.
    """

    load_s: float
    first_token_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    `text` ends before a stop string; `token_ids` are all tokens generated, those of a stop string or the end of text
    included. `finish_reason`: "stop" (end of text or stop string), "length" (max_tokens, or no room: `notice` says
    so), "cancelled" (the stream was closed early, or the engine's step was), "error" (an exception ended it, and was
    raised by the stream). `stop_reason`: the stop string, the id of a stop token other than the model's end of text,
    else None. `prompt` is None where token ids were given.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    notice: str | None
    usage: Usage
    timings: Timings


class Stream:
    """A running generation: iterate it for Pieces; afterwards `completion` holds the whole.

    Close it (or leave its `with` block, or drop it) to end early: the sequence is released, where a step is running by
    the next one, and `completion` holds what was generated. One thread at a time may iterate a stream.
    """

    def __init__(self, pieces: Generator[Piece, None, None], progress: _Progress):
        self._pieces = pieces
        self._progress = progress
        self.prompt_token_ids: list[int] = progress.prompt_token_ids

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The result, once the stream has ended or was closed; RuntimeError before."""
        return self._progress.completion()

    def close(self) -> None:
        self._pieces.close()
        self._progress.finish()  # a generator that never started has not done so

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LLM:
    """A model in memory: its file, tokenizer and engine.

    `model`: path of a GGUF file (any shard of a split one); None: FERRUM_MODEL, else the demo model of this package.
    Options of None come from FERRUM_<OPTION>, else their default: see `ferrum.options.EngineOptions`, which gives
    units and allowed values, and `options` for what is in force. Any thread may call; steps wait for each other. A
    process made by fork() cannot use its parent's LLM: RuntimeError.

    Raises ModelFileError, UnsupportedModelError, OptionError, OutOfMemory.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        device: str | None = None,
        threads: int | None = None,
        kv_tokens: int | None = None,
        kv_type: str | None = None,
        activations: str | None = None,
        max_sequences: int | None = None,
        prefill_chunk: int | None = None,
        max_logit_rows: int | None = None,
    ):
        started = perf_counter()
        given = dict(device=device, threads=threads, kv_tokens=kv_tokens, kv_type=kv_type, activations=activations,
                     max_sequences=max_sequences, prefill_chunk=prefill_chunk, max_logit_rows=max_logit_rows)
        self.model, options, self.sources = resolve(model, given)
        self.file = GGUFFile.open(self.model)
        planned = plan(self.file, **options.arguments())  # refuses what cannot run before anything is taken
        _log_plan(planned)
        self.tokenizer = Tokenizer.from_gguf(self.file)
        vocab_size = planned["config"]["vocab_size"]
        if self.tokenizer.vocab_size > vocab_size:
            raise ModelFileError(f"{self.model}: the tokenizer has {self.tokenizer.vocab_size} tokens, the embedding table "
                                 f"{vocab_size} rows. Convert the model anew.")
        self._unused_ids = (*self.tokenizer.unused_ids, *range(self.tokenizer.vocab_size, vocab_size))
        self._usable_tokens = vocab_size - len(self._unused_ids)
        self.engine = Engine(self.file, unused_tokens=self._unused_ids, **options.arguments())
        self.load_s = perf_counter() - started
        self._sequences = count()
        self._process = os.getpid()
        self._lock = threading.Lock()  # a step and the reading of its logits belong together
        self._ended: deque[int] = deque()  # sequences to release; see _release
        logger.info("model %s loaded in %.2f s", self.model, self.load_s)
        for name, value in self.options.items():
            logger.info("option %s = %s (%s)", name, value, self.sources.get(name, "default"))

    @property
    def options(self) -> dict[str, Any]:
        """Every option in force, with its value."""
        return self.engine.options

    def stream(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> Stream:
        """Continue a text (control tokens in it are recognised) or token ids, piece by piece.

        Raises at once: ValueError for an empty prompt, TypeError for ids that are not whole numbers, ContextFull or
        KVPoolExhausted for a prompt that is too long, EngineClosed. A sequence that runs out of room later ends with
        finish_reason "length" and a notice.
        """
        started = perf_counter()
        params = SamplingParams() if sampling_params is None else sampling_params
        self._check_process()
        if self.engine.closed:
            raise EngineClosed("The model was closed. Load it again to generate.")
        self._release_ended()
        ids = self._prompt_ids(prompt, params)
        greedy = params.temperature == 0
        seed = None if greedy else fresh_seed() if params.seed is None else params.seed
        progress = _Progress(prompt if isinstance(prompt, str) else None, ids, seed, self.load_s, started)
        logger.debug("prompt token ids: %s", ids)
        if seed is not None:
            logger.info("seed %d", seed)
        return Stream(self._generate(params, progress), progress)

    def close(self) -> None:
        """Give the model's memory back. Streams that have not ended raise EngineClosed when they are continued."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_process(self) -> None:
        """Before the lock is taken: a thread of the parent may have held it when fork() copied it."""
        if os.getpid() != self._process:
            raise RuntimeError("This LLM was made in another process, and its threads did not come along with fork(). "
                               "Make a new LLM in this process.")

    def _prompt_ids(self, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        """The ids of a prompt that has room; text that is far too long is refused before the cost of encoding it."""
        if isinstance(prompt, str):
            fewest = self.tokenizer.fewest_tokens(prompt)
            self._check_length(fewest, f"at least {fewest}", params)
            ids = self.tokenizer.encode(prompt)
        else:
            ids = _checked_ids(prompt)
        if not ids:
            raise ValueError("The prompt is empty. Give at least one token to continue.")
        self._check_length(len(ids), str(len(ids)), params)
        return ids

    def _check_length(self, tokens: int, shown: str, params: SamplingParams) -> None:
        context = self.engine.config["context_length"]
        capacity = self.engine.kv_capacity
        if tokens > context:
            raise ContextFull(f"The prompt has {shown} tokens, the model's context holds {context}. Shorten the prompt.")
        if tokens > capacity:
            wanted = min(tokens + params.max_tokens, context)
            raise KVPoolExhausted(f"The prompt has {shown} tokens, the KV cache holds {capacity}. "
                                  f"Shorten the prompt or raise kv_tokens (--kv-tokens {wanted}).")

    def _generate(self, params: SamplingParams, progress: _Progress) -> Generator[Piece, None, None]:
        """One piece per token, and one for text held back at the end; the sequence is released on every way out."""
        sequence = next(self._sequences)
        uniform = random.Random(progress.seed).random
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        checker = StopChecker(params.stop)
        try:
            token = self._first_token(sequence, params, uniform, progress)
            while True:
                progress.token_ids.append(token)
                ended = token in self.tokenizer.stop_ids
                text = "" if ended else checker.push(detokenizer.push(token))
                progress.texts.append(text)
                if ended:
                    progress.end("stop", None if token == self.tokenizer.eos_id else token)
                elif checker.matched is not None:
                    progress.end("stop", checker.matched)
                elif len(progress.token_ids) == params.max_tokens:
                    progress.end("length")
                yield Piece(text, token)
                if progress.finish_reason is not None:
                    break
                following = self._next_token(sequence, token, params, uniform, progress)
                if following is None:
                    break
                token = following
            if rest := self._rest(detokenizer, checker, progress):
                yield Piece(rest, None)
        except Cancelled:
            raise
        except Exception:
            progress.end("error")
            raise
        finally:
            self._rest(detokenizer, checker, progress)
            progress.finish()
            self._ended.append(sequence)
            self._release_ended()

    def _release_ended(self) -> None:
        """Release the sequences of ended streams, unless the engine is busy: then the next step does it.

        Never waits: the garbage collector may end a stream on a thread that is inside a step and holds the lock.
        """
        if self._process == os.getpid() and self._lock.acquire(blocking=False):
            try:
                self._release_ended_locked()
            finally:
                self._lock.release()

    def _release_ended_locked(self) -> None:
        while self._ended:
            try:
                with suppress(UnknownSequence, EngineClosed):
                    self.engine.release(self._ended[0])
            except RuntimeError:  # this thread is inside a call of the engine
                return
            self._ended.popleft()

    def _first_token(self, sequence: int, params: SamplingParams, uniform, progress: _Progress) -> int:
        started = perf_counter()
        self._check_process()
        with self._lock:
            self._release_ended_locked()
            logits = self.engine.prefill(sequence, progress.prompt_token_ids)
            token = self._draw(logits, params, uniform())
        ended = perf_counter()
        progress.prefill_s, progress.first_token_s = ended - started, ended - progress.started
        return token

    def _next_token(self, sequence: int, token: int, params: SamplingParams, uniform, progress: _Progress) -> int | None:
        """The token after `token`, or None where there is no room to continue."""
        started = perf_counter()
        self._check_process()
        try:
            with self._lock:
                self._release_ended_locked()
                token = self._draw(self.engine.decode(sequence, token), params, uniform())
        except ContextFull:
            context = self.engine.config["context_length"]
            progress.end("length", notice=f"The model's context of {context} tokens is full.")
            return None
        except KVPoolExhausted:
            capacity = self.engine.kv_capacity
            progress.end("length", notice=f"The KV cache of {capacity} tokens is full. Raise kv_tokens (--kv-tokens) to go on.")
            return None
        progress.decode_s += perf_counter() - started
        return token

    def _draw(self, logits: Any, params: SamplingParams, u: float) -> int:
        """A token from the last step's only row of logits."""
        temperatures = [params.temperature] if params.temperature else None
        candidates = self.engine.candidates(min(candidate_count(params), self._usable_tokens), temperatures=temperatures)
        if not np.isfinite(candidates.log_sum_exp[0]):
            raise DeviceError("The model's logits are not finite: its weights or its device are faulty.")
        ids = candidates.ids[0]
        row = CandidateRow(ids, candidates.logits[0], self._usable_tokens - len(ids),
                           float(candidates.log_sum_exp_at_temperature[0]))
        token = sample(row, params, u)
        if token is None:
            token = sample(full_row(np.asarray(logits), self._unused_ids), params, u)
        assert token is not None  # a full row decides every draw
        return token

    @staticmethod
    def _rest(detokenizer: IncrementalDetokenizer, checker: StopChecker, progress: _Progress) -> str:
        """Text still held back; added to the completion, once."""
        rest = checker.push(detokenizer.flush()) + checker.flush()
        progress.texts.append(rest)
        return rest


@dataclass
class _Progress:
    """What a stream has made so far. Stream and generator share it, so that dropping the stream ends the generator."""

    prompt: str | None
    prompt_token_ids: list[int]
    seed: int | None
    load_s: float
    started: float
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    notice: str | None = None
    finished: bool = False
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def end(self, reason: FinishReason, stop_reason: str | int | None = None, notice: str | None = None) -> None:
        """Note why the stream ends; the first reason stands."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason, self.notice = reason, stop_reason, notice
            if notice:
                logger.info("%s", notice)

    def finish(self) -> None:
        """Nothing more comes; without an end noted before, it was cancelled."""
        self.end("cancelled")
        self.finished = True

    def completion(self) -> Completion:
        if not self.finished or self.finish_reason is None:
            raise RuntimeError("The stream has not ended. Iterate it to its end, or close it, before reading its completion.")
        prompt_tokens, tokens = len(self.prompt_token_ids), len(self.token_ids)
        return Completion(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            text="".join(self.texts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            notice=self.notice,
            usage=Usage(prompt_tokens, tokens, prompt_tokens + tokens, self.seed),
            timings=Timings(
                load_s=self.load_s,
                first_token_s=self.first_token_s,
                prefill_s=self.prefill_s,
                decode_s=self.decode_s,
                prefill_tokens_per_s=_rate(prompt_tokens, self.prefill_s),
                decode_tokens_per_s=_rate(tokens - 1, self.decode_s),
            ),
        )


def _checked_ids(prompt: Any) -> list[int]:
    """Token ids as ints; bytes and truth values, which Python takes for whole numbers, are refused."""
    advice = "Give a str, or token ids as whole numbers."
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(f"The prompt is {type(prompt).__name__}, not text: decode it first. {advice}")
    try:
        given = list(prompt)
    except TypeError:
        raise TypeError(f"The prompt is {type(prompt).__name__}. {advice}") from None
    for id in given:
        if isinstance(id, (bool, np.bool_)) or not hasattr(id, "__index__"):
            raise TypeError(f"The prompt has the token id {repr(id)[:40]}. {advice}")
    return [operator.index(id) for id in given]


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


def _log_plan(planned: dict[str, Any]) -> None:
    config = planned["config"]
    logger.info("%s, %s layers, hidden size %s, context %s tokens", config["architecture"], config["num_layers"],
                config["hidden_size"], config["context_length"])
    for part in ("weights_bytes", "weights_extra_bytes", "kv_bytes", "scratch_bytes", "total_bytes"):
        logger.info("plan %s = %d (%.1f MiB)", part, planned[part], planned[part] / 2**20)
