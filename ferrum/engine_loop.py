"""The loop of an engine: schedule, step, sample, hand out.

Requests of all threads run together. Whoever waits for a request drives: one thread at a time runs a step for all,
the others wait for its end. The state below is the driver's; other threads only put requests into queues that the next
step empties, so a caller may come from a finalizer or a signal handler and never waits for a step to be asked.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from ferrum.errors import EngineClosed, KVPoolExhausted, UnknownSequence
from ferrum.outputs import Logprob
from ferrum.request import Request, Scoring, Text
from ferrum.sampler import Read, ReadToken, Sampler
from ferrum.scheduler import Chunk, Limits, Scheduler, Sequence
from ferrum_native._native import Engine


R = TypeVar("R", Request, Scoring)


class StepReport(NamedTuple):
    """What the last step held: prompt tokens, texts that went on by one token, and its seconds."""

    prompt_tokens: int
    decoded: int
    seconds: float


class Retained:
    """The tokens of a session that stay in the KV cache from one text to the next."""

    def __init__(self) -> None:
        self.sequence: Sequence | None = None


class EngineLoop:
    """Runs requests on one engine."""

    def __init__(self, engine: Engine, sampler: Sampler):
        self._engine = engine
        self._sampler = sampler
        self._room = min(engine.config["context_length"], engine.kv_capacity)  # tokens that one sequence can reach
        options = engine.options
        self._pool = _EnginePool(engine)
        self._scheduler = Scheduler(self._pool, Limits.of(options))
        self._requests: dict[int, Request | Scoring] = {}  # unfinished ones, by id()
        self._sessions: dict[int, Retained] = {}  # of unfinished requests, by id()
        self._submitted: deque[tuple[Request | Scoring, Retained | None]] = deque()
        self._dropped: deque[Request | Scoring | Retained] = deque()
        self._interrupted = False  # a step was left by an exception that is nobody's in particular, such as Ctrl-C
        self._activity: deque[tuple[Request, bool]] = deque()
        # Entered by itself, not by the condition, whose Python code Ctrl-C could leave with the lock taken; a signal handler may enter again.
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._driver: object | None = None
        self._driving_thread = 0
        self._endings = 0  # requests that have ended
        self._process = os.getpid()
        self.last_step = StepReport(0, 0, 0.0)

    def run(self, requests: Iterable[R]) -> Generator[R, None, None]:
        """Run requests, as many at once as the queue and the engine take, and give each when it has ended: `error` says whether it failed.

        The source is asked for one more whenever the queue has room. However it is left, no request is left behind.
        """
        source = iter(requests)
        following = next(source, None)
        started: list[R] = []
        try:
            while following is not None or started:
                while following is not None and self._room_to_submit() > 0:
                    started.append(following)
                    self.submit(following)
                    following = next(source, None)
                seen = self._endings
                if not any(request.finished for request in started):
                    self.drive(lambda: self._endings != seen or (following is not None and self._room_to_submit() > 0))
                ended = [request for request in started if request.finished]
                started = [request for request in started if not request.finished]
                yield from ended
        finally:
            for request in started:
                self.drop(request)

    def check_process(self) -> None:
        """RuntimeError in a forked process, before the lock is taken: a thread of the parent may have held it when fork() copied it."""
        if os.getpid() != self._process:
            raise RuntimeError("This LLM was made in another process, and its threads did not come along with fork(). "
                               "Make a new LLM in this process.")

    def submit(self, request: Request | Scoring, retained: Retained | None = None) -> None:
        """Let a request take part from the next step on; one of a session continues its retained tokens."""
        self._submitted.append((request, retained))

    def set_active(self, request: Request, active: bool) -> None:
        """Whether a request takes part in steps, from the next one on: never in the middle of one that another thread runs."""
        self._activity.append((request, active))

    def drop(self, item: Request | Scoring | Retained) -> None:
        """End a request or a session and give its KV blocks back: at once, or where a step is running by its end."""
        self._dropped.append(item)
        self.settle()

    def settle(self) -> None:
        """Release what was dropped, unless the engine is busy: then its next step does. Never waits."""
        me = object()
        if not (self._dropped or self._interrupted) or not self._lock.acquire(blocking=False):
            return
        try:
            if self._driver is not None:
                return
            self._driver, self._driving_thread = me, threading.get_ident()
        finally:
            self._lock.release()
        try:
            with suppress(RuntimeError):  # this thread is inside a call of the engine: a later step releases the rest
                self._release_dropped()
        finally:
            self._end_turn(me)

    def drive(self, done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until `done`, which is asked before each step and after the last."""
        me = object()
        while True:
            try:
                try:
                    with self._lock:
                        while self._driver is not None and not done():
                            if self._driving_thread == threading.get_ident():
                                raise RuntimeError("This thread is inside a step: a signal handler or a finalizer cannot wait for a text. "
                                                   "Call from another thread, or after the step.")
                            self._turn.wait()
                        if done():
                            return
                        self._driver, self._driving_thread = me, threading.get_ident()
                    if not self._step() and not done():
                        raise RuntimeError("no request can go on: this is a fault of ferrum's scheduler. Please report it.")
                finally:
                    self._end_turn(me)
            finally:
                self._end_turn(me)  # Ctrl-C may have come before the first did anything

    def _end_turn(self, me: object) -> None:
        with self._lock:
            if self._driver is me:
                self._driver = None
                self._turn.notify_all()

    def _room_to_submit(self) -> int:
        return self._scheduler.room - len(self._submitted)

    def _step(self) -> bool:
        """One step for everybody; False: nothing could run. An error of the engine ends the requests that were in it, and only those."""
        self._release_dropped()
        self._interrupted = True
        chunks: list[Chunk] | None = None
        try:
            self._take_submitted()
            self._take_activity()
            chunks = self._scheduler.schedule()
            if chunks:
                self._run(chunks)
        except Exception as error:
            self._fail(chunks, error)
        self._interrupted = False
        self._release_dropped()
        return chunks is None or bool(chunks)

    def _run(self, chunks: list[Chunk]) -> None:
        started = perf_counter()
        logits = self._engine.step([
            (sequence.engine_id, sequence.tokens[sequence.computed : sequence.computed + tokens], chunk.logits, sequence.computed)
            for chunk in chunks for sequence, tokens, _ in (chunk,)
        ])
        draws, reads, readers = self._rows(chunks)
        drawn, read = self._sampler.sample(logits, draws, reads) if logits is not None else ([], [])
        ended = perf_counter()
        seconds = ended - started
        requests = {id(request): request for request in (_request_of(chunk.sequence) for chunk in chunks)}
        for request in requests.values():
            request.add_time(seconds)
        for (sequence, position), result in zip(readers, read):
            self._take_read(sequence, position, result)
        for text, token, logprobs in drawn:
            self._accept(text, token, logprobs, ended)
        self._scheduler.commit(chunks)
        for request in requests.values():
            self._after_step(request)
        prompt_tokens = sum(chunk.tokens for chunk in chunks if chunk.tokens > 1)
        self.last_step = StepReport(prompt_tokens, sum(chunk.tokens == 1 for chunk in chunks), seconds)

    @staticmethod
    def _rows(chunks: list[Chunk]) -> tuple[list[tuple[int, Text]], list[Read], list[tuple[Sequence, int]]]:
        """What each row of logits is for: a draw of one or more texts, or a known token to read, with its place."""
        draws: list[tuple[int, Text]] = []
        reads: list[Read] = []
        readers: list[tuple[Sequence, int]] = []
        row = 0
        for sequence, tokens, rows in chunks:
            owner = sequence.owner
            end = sequence.computed + tokens
            for position in range(end - rows, end):
                if position + 1 < len(sequence.tokens):
                    top = None if isinstance(owner, Scoring) else _request_of(sequence).params.prompt_logprobs
                    reads.append(Read(row, sequence.tokens[position + 1], top))
                    readers.append((sequence, position))
                elif isinstance(owner, Text):
                    draws.append((row, owner))
                else:
                    draws.extend((row, text) for text in owner.texts if not text.length)
                row += 1
        return draws, reads, readers

    @staticmethod
    def _take_read(sequence: Sequence, position: int, result: ReadToken) -> None:
        owner = sequence.owner
        if isinstance(owner, Scoring):
            owner.take(sequence, position, result.logprob, result.likeliest)
            return
        request = _request_of(sequence)
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) == position + 1:
            request.prompt_logprobs.append(result.logprobs)
        sequence.wanted_from = max(sequence.wanted_from, position + 1)

    def _accept(self, text: Text, token: int, logprobs: dict[int, Logprob] | None, now: float) -> None:
        text.accept(token, logprobs)
        if not text.request.first_token_s:
            text.request.first_token_s = now - text.request.started
        if text.finish_reason is None and len(text.sequence.tokens) > self._room:
            text.end("length", notice=self._full_notice())

    def _full_notice(self) -> str:
        context, capacity = self._engine.config["context_length"], self._engine.kv_capacity
        return f"The model's context of {context} tokens is full." if context <= capacity else _pool_notice(capacity)

    def _after_step(self, request: Request | Scoring) -> None:
        """Fork what was read whole, and release what has ended."""
        prompt = request.prompt_sequence
        if request.finished:
            self._forget(request)
        elif prompt is not None and prompt.active:
            if not prompt.pending:
                prompt.active = False
                for part in request.unfinished():
                    part.source = prompt
                    self._scheduler.add(part)
        else:
            for sequence in request.ended():
                self._scheduler.remove(sequence)

    def _forget(self, request: Request | Scoring) -> None:
        """A request has ended: its blocks go back, but for those that its session keeps."""
        session = self._sessions.pop(id(request), None)
        for sequence in request.sequences():
            if session is not None and sequence is session.sequence:
                sequence.active = False
                sequence.tokens = sequence.tokens[: sequence.computed]
            else:
                self._scheduler.remove(sequence)
        self._requests.pop(id(request), None)
        self._endings += 1

    def _take_submitted(self) -> None:
        while self._submitted:
            request, session = self._submitted[0]
            known = id(request) in self._requests  # this call was interrupted here
            if not request.finished:
                self._requests[id(request)] = request
            self._submitted.popleft()
            if known or request.finished:
                continue
            if session is not None:
                self._continue(session, request)
            else:
                for sequence in request.first_sequences():
                    self._scheduler.add(sequence)

    def _take_activity(self) -> None:
        while self._activity:
            request, active = self._activity[0]
            if not request.finished:
                request.set_active(active)
            self._activity.popleft()

    def _continue(self, session: Retained, request: Any) -> None:
        """Let a request's only text go on from what its session has in the KV cache, as far as the tokens are the same."""
        self._sessions[id(request)] = session
        (text,) = request.texts
        kept = session.sequence
        if kept is None:
            session.sequence = text.sequence
            self._scheduler.add(text.sequence)
            return
        tokens, wanted_from = text.sequence.tokens, text.sequence.wanted_from
        same = next((i for i, (a, b) in enumerate(zip(kept.tokens, tokens)) if a != b), min(len(kept.tokens), len(tokens)))
        kept.owner, kept.active, kept.wanted_from = text, True, wanted_from
        self._scheduler.rewind(kept, tokens, min(same, wanted_from))
        text.sequence = kept  # last: until then an interrupted call leaves the text its own
        request.num_cached_tokens = kept.computed

    def _release_dropped(self) -> None:
        """RuntimeError where this thread is inside a call of the engine."""
        if self._interrupted:
            self._recover()
        while self._dropped:
            item = self._dropped[0]
            if isinstance(item, Retained):
                if item.sequence is not None:
                    self._scheduler.remove(item.sequence)
                    item.sequence = None
            else:
                item.cancel()
                if id(item) in self._requests:  # else it never ran, or the step that it was dropped in has forgotten it
                    self._forget(item)
            self._dropped.popleft()

    def _fail(self, chunks: list[Chunk] | None, error: Exception) -> None:
        """End the requests of a step that failed; without chunks, all."""
        failed = self._requests if chunks is None else {id(request): request for request in (_request_of(chunk.sequence) for chunk in chunks)}
        for request in tuple(failed.values()):
            if isinstance(error, KVPoolExhausted) and isinstance(request, Request) and any(text.length for text in request.texts):
                for text in request.texts:
                    text.end("length", notice=_pool_notice(self._engine.kv_capacity))
            else:
                request.fail(error)
            if session := self._sessions.pop(id(request), None):
                session.sequence = None  # the engine may hold more of it than was counted
            self._forget(request)

    def _recover(self) -> None:
        """After an interrupted step nothing in the KV cache is trusted: every unfinished sequence is computed anew."""
        self._pool.release_all()
        unfinished: list[Sequence] = []
        for request in self._requests.values():
            if isinstance(request, Request) and any(text.torn for text in request.texts):
                request.fail(RuntimeError("Ctrl-C came while this text took a token: it cannot go on. Ask for it again."))
            if not request.finished:
                prompt = request.prompt_sequence
                unfinished += [prompt] if prompt is not None and prompt.active else request.unfinished()
        self._scheduler.start_over(unfinished)
        for request in tuple(self._requests.values()):
            if request.finished:
                self._forget(request)
        self._interrupted = False


def _pool_notice(capacity: int) -> str:
    return f"The KV cache of {capacity} tokens is full. Raise kv_tokens (--kv-tokens) to go on."


def _request_of(sequence: Sequence) -> Any:
    """The Request or Scoring that a sequence is of."""
    return sequence.owner.request if isinstance(sequence.owner, Text) else sequence.owner


class _EnginePool:
    """The engine as the scheduler sees it. Sequences that others have released, or a closed engine, are no error here: steps say so."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._ids = count(1 << 48)  # far from the numbers of those who use the engine themselves
        self._live: set[int] = set()

    @property
    def kv_blocks_free(self) -> int:
        return self._engine.kv_blocks_free

    def new_id(self) -> int:
        id = next(self._ids)
        self._live.add(id)
        return id

    def fork(self, source: int, target: int) -> None:
        self._engine.fork(source, target)

    def release(self, sequence: int) -> None:
        with suppress(UnknownSequence, EngineClosed):
            self._engine.release(sequence)
        self._live.discard(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        with suppress(UnknownSequence, EngineClosed):
            self._engine.truncate(sequence, length)

    def release_all(self) -> None:
        for id in tuple(self._live):
            self.release(id)
