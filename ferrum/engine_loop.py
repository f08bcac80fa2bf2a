"""The loop of an engine: schedule, step, sample, hand out.

One thread runs it, and owns all the state but the inbox. Other threads, finalizers and signal
handlers only put commands there, which are obeyed between two steps, and read what became of a request from the mailbox
that it has. Ctrl-C never comes to this thread, so no step is left half-done.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple, NoReturn, TypeVar

from ferrum.errors import EngineClosed, KVPoolExhausted, UnknownSequence
from ferrum.outputs import Logprob
from ferrum.request import PromptRead, Request, Scoring, Text
from ferrum.sampler import Drawn, Read, ReadToken, Sampler
from ferrum.scheduler import Chunk, Limits, Scheduler, Sequence
from ferrum_native._native import Engine

R = TypeVar("R", bound=Request | Scoring)
T = TypeVar("T")
Command = tuple[Callable[..., None], Any]


class StepReport(NamedTuple):
    """What a step held: prompt tokens, and texts that went on by one token; its seconds, and those since the end of the step before."""

    prompt_tokens: int
    decoded: int
    seconds: float
    seconds_between: float


class Retained:
    """The tokens of a session that stay in the KV cache from one text to the next."""

    def __init__(self) -> None:
        self.sequence: Sequence | None = None


class Submission(NamedTuple):
    """A request, and the session whose tokens it continues."""

    request: Request | Scoring
    session: Retained | None = None


class Flow:
    """Requests of one caller, which take turns with those of others: see `EngineLoop.submit`."""

    def __init__(self) -> None:
        self.turn = 0


class EngineLoop:
    """Runs requests on one engine.

    `on_step` is called in the loop's thread after each step, for measurements.
    """

    def __init__(self, engine: Engine, sampler: Sampler):
        self._engine = engine
        self._sampler = sampler
        self._room = min(engine.config["context_length"], engine.kv_capacity)  # tokens that one sequence can reach
        self._scheduler = Scheduler(_EnginePool(engine), Limits.of(engine.options))
        self._requests: dict[int, Request | Scoring] = {}  # unfinished ones, by id()
        self._sessions: dict[int, Retained] = {}  # of unfinished requests, by id()
        self._deadlines: dict[int, float] = {}  # of those unfinished requests that have one
        self._ended = perf_counter()  # the step before
        self.on_step: Callable[[StepReport], None] | None = None
        # What other threads touch. SimpleQueue.put may be called from finalizers and signal handlers, in the middle of anything.
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._closed = False
        self._process = os.getpid()
        self.queue = _Queue(max(64, engine.options["max_sequences"]))
        # Not at first use: a signal handler that came while it starts would find none, or wait for one that never starts.
        self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._inbox), name="ferrum", daemon=True)
        self._thread.start()
        _live_loops.add(self)

    # For any thread

    def run(self, requests: Iterable[R], prompt_read: Callable[[PromptRead], None] | None = None) -> Generator[R, None, None]:
        """Run requests, as many at once as the queue and the engine take, and give each when it has ended: `error` says whether it failed.

        The source is asked for one more whenever the queue has room. However it is left, no request is left behind.
        """
        self.check_caller()
        source, flow = iter(requests), Flow()
        mailbox: SimpleQueue[Any] = SimpleQueue()
        following = next(source, None)
        started: dict[int, R] = {}
        try:
            while following is not None or started:
                submissions: list[Submission] = []
                while following is not None:
                    started[id(following)] = following
                    if not self.queue.enter(following, wait=len(started) == 1):
                        del started[id(following)]
                        break
                    following.mailbox = mailbox
                    submissions.append(Submission(following))
                    following = next(source, None)
                self.submit(submissions, flow)
                news = mailbox.get()
                if isinstance(news, PromptRead):
                    if prompt_read is not None:
                        prompt_read(news)
                else:
                    yield started.pop(id(news))
        finally:
            for request in started.values():
                self.drop(request)

    @contextmanager
    def running(self, requests: Iterable[R], prompt_read: Callable[[PromptRead], None] | None = None) -> Iterator[Generator[R, None, None]]:
        """`run` in a `with` block: at its end nothing of the requests is left in the engine."""
        run = self.run(requests, prompt_read)
        try:
            yield run
        except BaseException:
            run.close()
            self.settle()
            raise

    def submit(self, submissions: list[Submission], flow: Flow) -> None:
        """Let requests that have entered the queue take part from the next step on, all from the same.

        Of those with one priority, callers take turns: the n-th waiting request of a flow comes after the first n - 1 of every other
        (start-time fair queuing, Goyal, Vin and Cheng 1996, with requests of equal cost).
        """
        if submissions:
            self._put((EngineLoop._add, (submissions, flow)))

    def check_caller(self) -> None:
        """RuntimeError where the loop cannot be waited for: in a forked process, which has no thread for it, and in its own thread."""
        if reason := self._no_waiting():
            raise RuntimeError(reason)

    def _no_waiting(self) -> str | None:
        if os.getpid() != self._process:
            return "This LLM was made in another process, and its threads did not come along with fork(). Make a new LLM in this process."
        if threading.current_thread() is self._thread:
            return ("The model was called from inside a step, by a logits processor or a finalizer: the step would wait for itself. "
                    "Call it from another thread, or afterwards.")
        return None

    def drop(self, item: Request | Scoring | Retained) -> None:
        """End a request or a session and give its KV blocks back, at the latest when the step that runs has ended. Never waits."""
        self._put((EngineLoop._drop, (item,)))

    def settle(self) -> None:
        """Wait until everything that was dropped before has given its KV blocks back; not where the loop cannot be waited for."""
        if self._no_waiting() is None:
            self.between_steps(lambda: None)

    def between_steps(self, call: Callable[[], T]) -> T:
        """The result of a call that is made between two steps, while nothing else touches the engine's sequences."""
        self.check_caller()
        done: SimpleQueue[Callable[[], T]] = SimpleQueue()

        def run(loop: EngineLoop) -> None:
            try:
                result = call()
                done.put(lambda: result)
            except Exception as error:
                done.put(partial(_throw, error))

        self._put((run, ()))
        return done.get()()

    def export_session(self, session: Retained) -> tuple[list[int], Any] | None:
        """Tokens of a session and what `Engine.export_kv` gives of them; None if it has none in the KV cache."""
        def export() -> tuple[list[int], Any] | None:
            sequence = session.sequence
            if sequence is None or sequence.engine_id is None:
                return None
            return sequence.tokens[: sequence.computed], self._engine.export_kv(sequence.engine_id)

        return self.between_steps(export)

    def import_session(self, session: Retained, tokens: list[int], kv: Any) -> None:
        """The reverse, for a session that has none. Raises KVPoolExhausted, ContextFull."""
        def place() -> None:
            sequence = Sequence(tokens, len(tokens))
            self._scheduler.place(sequence, kv.shape[2], lambda id: self._engine.import_kv(id, tokens[: kv.shape[2]], kv))
            session.sequence = sequence

        self.between_steps(place)

    def close(self) -> None:
        """End the thread; requests that have not ended fail with EngineClosed. Waits for the step that runs."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("The model cannot be closed from inside a step, by a logits processor or a finalizer. Close it from another thread.")
        self._inbox.put(None)
        if os.getpid() == self._process:
            self._thread.join()

    def __del__(self) -> None:
        if hasattr(self, "_inbox"):
            self._inbox.put(None)

    def _put(self, command: Command) -> None:
        self._inbox.put(command)
        if self._closed:  # nobody will read it
            self._refuse_rest()

    # The loop's thread

    def work(self, command: Command | None) -> bool:
        """Obey a command, and run steps until there is nothing left to do; False: the loop was closed."""
        while command is not None:
            function, arguments = command
            try:
                function(self, *arguments)
            except Exception as error:
                self._fail(None, error)
            while self._requests and self._inbox.empty():
                self._step()
            if self._inbox.empty():
                return True
            command = self._inbox.get()
        self._close()
        return False

    def _step(self) -> None:
        """One step for everybody. An error of the engine ends the requests that were in it, and only those."""
        chunks: list[Chunk] | None = None
        try:
            self._end_overdue()
            if not self._requests:
                return
            chunks = self._scheduler.schedule()
            if not chunks:
                raise RuntimeError("no request can go on: this is a fault of ferrum's scheduler. Please report it.")
            self.queue.leave(chunk.sequence.owner.request for chunk in chunks)
            self._run(chunks)
        except Exception as error:
            self._fail(chunks or None, error)

    def _run(self, chunks: list[Chunk]) -> None:
        started = perf_counter()
        draws, reads, readers = self._rows(chunks)
        with self._engine.held():
            logits = self._engine.step([
                (sequence.engine_id, sequence.tokens[sequence.computed : sequence.computed + tokens], chunk.logits, sequence.computed)
                for chunk in chunks for sequence, tokens, _ in (chunk,)
            ])
            drawn, read = self._sampler.sample(logits, draws, reads) if logits is not None else ([], [])
        ended = perf_counter()
        seconds = ended - started
        requests = {id(chunk.sequence.owner.request): chunk.sequence.owner.request for chunk in chunks}
        for request in requests.values():
            request.add_time(seconds)
        for (sequence, position), result in zip(readers, read):
            self._take_read(sequence, position, result)
        for each in drawn:
            self._accept(each, ended)
        self._scheduler.commit(chunks)
        for request in requests.values():
            self._after_step(request)
        if self.on_step is not None:
            decoded = sum(chunk.tokens == 1 for chunk in chunks)
            self.on_step(StepReport(sum(chunk.tokens for chunk in chunks) - decoded, decoded, seconds, ended - self._ended))
        self._ended = ended

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
                    top = None if isinstance(owner, Scoring) else owner.request.params.prompt_logprobs
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
        request = owner.request
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) == position + 1:
            request.prompt_logprobs.append(result.logprobs)
        sequence.wanted_from = max(sequence.wanted_from, position + 1)

    def _accept(self, drawn: Drawn, now: float) -> None:
        text = drawn.text
        if drawn.error is not None:
            text.request.fail(drawn.error)
        if text.finish_reason is not None:  # its own draw failed, or another of its request
            return
        text.accept(drawn.token, drawn.logprobs)
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
        request.after_step()
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
        """A request has ended: its blocks go back, but for those that its session keeps, and whoever waits for it is told."""
        if self._requests.pop(id(request), None) is None:
            return
        self._deadlines.pop(id(request), None)
        session = self._sessions.pop(id(request), None)
        for sequence in request.sequences():
            if session is not None and sequence is session.sequence:
                sequence.active = False
                sequence.tokens = sequence.tokens[: sequence.computed]
            else:
                self._scheduler.remove(sequence)
        self._tell(request)

    def _tell(self, request: Request | Scoring) -> None:
        self.queue.leave((request,))
        if request.mailbox is not None:
            request.mailbox.put(request)

    def _add(self, submissions: list[Submission], flow: Flow) -> None:
        if not self._requests:
            self._ended = perf_counter()
        for request, session in submissions:
            if request.finished:  # dropped in the meantime
                self._tell(request)
            elif session is not None and session in self._sessions.values():
                request.fail(RuntimeError("The session's last stream has not ended: two threads use it at once. Give each thread its own session."))
                self._tell(request)
            elif id(request) not in self._requests:  # Ctrl-C may have had it submitted twice
                self._add_one(request, flow, session)

    def _add_one(self, request: Request | Scoring, flow: Flow, session: Retained | None) -> None:
        self._requests[id(request)] = request
        if request.deadline is not None:
            self._deadlines[id(request)] = request.deadline
        flow.turn = max(self._scheduler.turns[next(request.sequences()).priority], flow.turn + 1)
        for sequence in request.sequences():
            sequence.turn = flow.turn
        if session is not None:
            self._continue(session, request)
        else:
            for sequence in request.first_sequences():
                self._scheduler.add(sequence)

    def _continue(self, session: Retained, request: Any) -> None:
        """Let a request's only text go on from what its session has in the KV cache, as far as the tokens are the same."""
        self._sessions[id(request)] = session
        (text,) = request.texts
        kept, fresh = session.sequence, text.sequence
        if kept is None:
            session.sequence = fresh
            self._scheduler.add(fresh)
            return
        same = next((i for i, (a, b) in enumerate(zip(kept.tokens, fresh.tokens)) if a != b), min(len(kept.tokens), len(fresh.tokens)))
        kept.owner, kept.active, kept.wanted_from, kept.turn, kept.priority = text, True, fresh.wanted_from, fresh.turn, fresh.priority
        self._scheduler.rewind(kept, fresh.tokens, min(same, fresh.wanted_from))
        text.sequence = kept

    def _drop(self, item: Request | Scoring | Retained) -> None:
        if isinstance(item, Retained):
            if item.sequence is not None:
                self._scheduler.remove(item.sequence)
                item.sequence = None
        elif id(item) in self._requests:
            item.cancel()
            self._forget(item)
        else:
            self._cancel_outside(item)

    def _cancel_outside(self, request: Request | Scoring) -> None:
        """End one that did not come here, if it has not ended: it may have a place in the queue, or somebody may wait for its place or its end."""
        if not request.finished:
            request.cancel()
            self._tell(request)
            self.queue.ring()

    def _end_overdue(self) -> None:
        if self._deadlines:
            now = perf_counter()
            for request in [self._requests[id] for id, deadline in self._deadlines.items() if deadline <= now]:
                request.end_overdue()
                self._forget(request)

    def _fail(self, chunks: list[Chunk] | None, error: Exception) -> None:
        """End the requests of a step that failed; without chunks, all."""
        failed = self._requests.values() if chunks is None else {id(chunk.sequence.owner.request): chunk.sequence.owner.request for chunk in chunks}.values()
        for request in tuple(failed):
            if isinstance(error, KVPoolExhausted) and isinstance(request, Request) and any(text.length for text in request.texts):
                for text in request.texts:
                    text.end("length", notice=_pool_notice(self._engine.kv_capacity))
            else:
                request.fail(error)
            if session := self._sessions.pop(id(request), None):
                session.sequence = None  # the engine may hold more of it than was counted
            self._forget(request)

    def _close(self) -> None:
        for request in tuple(self._requests.values()):
            request.fail(_closed_error())
            self._forget(request)
        self._closed = True  # from now on whoever puts a command into the inbox takes it out
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Nobody obeys what is left in the inbox of a closed loop: its texts fail, and whoever waits for it to settle goes on."""
        with suppress(Empty):
            while True:
                function, arguments = self._inbox.get_nowait() or (EngineLoop._drop, (None,))
                if function is EngineLoop._add:
                    for request, _ in arguments[0]:
                        request.fail(_closed_error())
                        self._tell(request)
                elif function is not EngineLoop._drop:
                    function(self, *arguments)
                elif isinstance(arguments[0], (Request, Scoring)):
                    self._cancel_outside(arguments[0])


class _Queue:
    """Requests that were submitted and have not started: at most `limit`. No locks: a signal handler may come in the middle of anything."""

    def __init__(self, limit: int):
        self._limit = limit
        self._waiting: set[int] = set()
        self._bells: deque[Callable[[], None]] = deque()

    def enter(self, request: Request | Scoring, *, wait: bool = True) -> bool:
        """Take a place; False if there is none and it is not to wait for one. A request that has ended, or is past its deadline, needs none."""
        while not self._take(request):
            left = None if request.deadline is None else request.deadline - perf_counter()
            if not wait:
                return False
            if left is not None and left <= 0:
                request.end_overdue()
            if request.finished:
                break
            bell: SimpleQueue[None] = SimpleQueue()
            self.on_room(lambda: bell.put(None))
            with suppress(Empty):
                bell.get(timeout=None if left is None else min(left, threading.TIMEOUT_MAX))
        return True

    def on_room(self, call: Callable[[], None]) -> None:
        """Call once, from any thread, when there may be a place."""
        self._bells.append(call)
        if len(self._waiting) < self._limit:
            self.ring()

    def leave(self, requests: Iterable[Request | Scoring]) -> None:
        before = len(self._waiting)
        if before:
            self._waiting.difference_update(map(id, requests))
            if len(self._waiting) < before:
                self.ring()

    def ring(self) -> None:
        """Have all who wait look again."""
        with suppress(IndexError):
            while True:
                self._bells.popleft()()

    def _take(self, request: Request | Scoring) -> bool:
        self._waiting.add(id(request))
        if len(self._waiting) <= self._limit:
            return True
        self._waiting.discard(id(request))
        return False


def _serve(reference: weakref.ref[EngineLoop], inbox: SimpleQueue[Command | None]) -> None:
    """What the thread runs. It has the loop only while there is something to do: one that nobody else has any more ends."""
    while True:
        command = inbox.get()
        loop = reference()
        if loop is None or not loop.work(command):
            return
        del loop, command


_live_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread must not be inside a step when the interpreter goes."""
    for loop in tuple(_live_loops):
        loop.close()


def _throw(error: Exception) -> NoReturn:
    raise error


def _closed_error() -> EngineClosed:
    return EngineClosed("The model was closed while this text ran. Load it again to generate.")


def _pool_notice(capacity: int) -> str:
    return f"The KV cache of {capacity} tokens is full. Raise kv_tokens (--kv-tokens) to go on."


class _EnginePool:
    """The engine as the scheduler sees it. Sequences that others have released, or a closed engine, are no error here: steps say so."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._ids = count(1 << 48)  # far from the numbers of those who use the engine themselves

    @property
    def kv_blocks_free(self) -> int:
        return self._engine.kv_blocks_free

    def new_id(self) -> int:
        return next(self._ids)

    def adopt(self, id: int, tokens: list[int]) -> int:
        try:
            return self._engine.adopt(id, tokens)
        except KVPoolExhausted:  # no place among the engine's sequences
            return 0

    def cached_prefix(self, tokens: list[int]) -> tuple[int, int]:
        return self._engine.cached_prefix(tokens)

    def fork(self, source: int, target: int) -> None:
        self._engine.fork(source, target)

    def release(self, sequence: int) -> None:
        with suppress(UnknownSequence, EngineClosed):
            self._engine.release(sequence)

    def truncate(self, sequence: int, length: int) -> bool:
        with suppress(UnknownSequence, EngineClosed):
            return self._engine.truncate(sequence, length)
        return False
