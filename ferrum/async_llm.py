"""LLM for asyncio: every call is awaited or iterated, and the event loop never waits for a step."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from ferrum.engine_loop import EngineLoop, Flow, Submission
from ferrum.llm import LLM
from ferrum.outputs import Piece, RequestOutput, Score
from ferrum.prompts import Message, Prompt, checked_params, checked_terms, conversations, several
from ferrum.request import Request, Scoring
from ferrum.sampling import SamplingParams
from ferrum.stream import TextStream

T = TypeVar("T")
Progress = Callable[[int, int], None]

# What is longer is tokenized in a thread: a millisecond of work, for which other tasks need not wait.
_LONG = 4096  # characters, or tokens


class AsyncLLM:
    """A model for asyncio programs, around an LLM, which other threads may use at the same time.

    `AsyncLLM(...)` takes what LLM takes, or an LLM, and blocks while the model is opened; `await AsyncLLM.load(...)` opens it in
    a thread. Arguments, results and errors of the calls are those of LLM. A task that is cancelled ends its texts, when the step that
    runs has ended. There are no sessions: the prefix cache keeps what conversations have in common from turn to turn.
    """

    def __init__(self, model: LLM | str | os.PathLike | None = None, **options: Any):
        if isinstance(model, LLM) and options:
            raise TypeError(f"options ({', '.join(options)}) were given with an LLM, which has its own. Give them where it is made.")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._couriers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Courier] = WeakKeyDictionary()

    @classmethod
    async def load(cls, model: str | os.PathLike | None = None, **options: Any) -> AsyncLLM:
        """Open a model in a thread."""
        return cls(await asyncio.to_thread(LLM, model, **options))

    async def generate(
        self, prompts: Prompt | Iterable[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        progress: Progress | None = None, priority: int = 0, timeout: float | None = None,
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        terms = checked_terms(priority, timeout)
        given = several(prompts)
        prepared = await _prepare(given, lambda: self.llm._prepared_prompts(given, sampling_params))
        return await self._outputs([self.llm._request(each, terms) for each in prepared], progress)

    async def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, progress: Progress | None = None,
        priority: int = 0, timeout: float | None = None, **template_options: Any,
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        terms = checked_terms(priority, timeout)
        given = conversations(messages)
        prepared = await _prepare(given, lambda: self.llm._prepared_conversations(given, sampling_params, template_options))
        return await self._outputs([self.llm._request(each, terms) for each in prepared], progress)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None,
    ) -> AsyncStream:
        """As `LLM.stream`: iterate it by `async for`. A text is tokenized here, on the event loop; token ids are not."""
        prepared = self.llm._prepared(prompt, checked_params(sampling_params))
        return AsyncStream(self, self.llm._streamed(prepared, checked_terms(priority, timeout), prefill_progress), prefill_progress)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None, **template_options: Any,
    ) -> AsyncStream:
        """As `LLM.stream_chat`: iterate it by `async for`."""
        prepared = self.llm._prepared_chat(messages, checked_params(sampling_params), template_options)
        return AsyncStream(self, self.llm._streamed(prepared, checked_terms(priority, timeout), prefill_progress), prefill_progress)

    async def score(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, priority: int = 0, timeout: float | None = None,
    ) -> list[Score]:
        """As `LLM.score`."""
        scoring = await _prepare([prompt, *continuations], lambda: self.llm.scoring(prompt, continuations, priority=priority, timeout=timeout))
        async for _ in self._run([scoring]):
            pass
        return scoring.output()

    async def close(self) -> None:
        """As `LLM.close`."""
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _outputs(self, requests: list[Request], progress: Progress | None) -> list[RequestOutput]:
        done = 0
        async with aclosing(self._run(requests)) as ended:  # else what is raised here would keep the texts that go on
            async for _ in ended:
                done += 1
                if progress is not None:
                    progress(done, len(requests))
        return [request.output() for request in requests]

    async def _run(self, requests: Sequence[Request | Scoring]) -> AsyncGenerator[Request | Scoring, None]:
        """Give each request when it has ended. Raises the error of the first that failed; none is left behind."""
        loop, flow, mailbox = self.llm._loop, Flow(), self._mailbox()
        waiting = deque(requests)
        started: dict[int, Request | Scoring] = {}
        try:
            while waiting or started:
                if waiting and not started:
                    await _enter(loop, waiting[0])
                submissions: list[Submission] = []
                while waiting and (not started or loop.queue.enter(waiting[0], wait=False)):
                    request = waiting.popleft()
                    started[id(request)] = request
                    request.mailbox = mailbox
                    submissions.append(Submission(request))
                loop.submit(submissions, flow)
                ended = started.pop(id(await mailbox.get()))
                if ended.error is not None:
                    raise ended.error
                yield ended
        finally:
            for request in started.values():
                loop.drop(request)

    def _mailbox(self) -> _Mailbox:
        """A mailbox of the running event loop."""
        event_loop = asyncio.get_running_loop()
        courier = self._couriers.get(event_loop)
        if courier is None:
            courier = self._couriers[event_loop] = _Courier(event_loop)
        return _Mailbox(courier)


class AsyncStream(TextStream):
    """A running generation of one text: iterate it by `async for` for Pieces; afterwards `output` holds the whole.

    As Stream otherwise. Leaving its `async with` block, or a cancelled wait for a piece, ends the text.
    """

    def __init__(self, llm: AsyncLLM, request: Request, prefill_progress: Progress | None):
        self._mailbox = llm._mailbox()
        super().__init__(llm.llm._loop, request, self._mailbox, None, prefill_progress)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        try:
            if not self._submitted and not self._over:
                await _enter(self._loop, self._request)
                self._submit()
            while not self._over:
                if piece := self._take(await self._mailbox.get()):
                    return piece
        except asyncio.CancelledError:
            self._end()
            raise
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the text, if it has not ended, and wait until it has."""
        self._end()
        while not self._request.finished:
            await self._mailbox.more()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class _Courier:
    """Wakes the mailboxes of one event loop: once for all the news of a step that come before it looks."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop):
        self._event_loop = ref(event_loop)  # weak, as it is kept for the loop as a key
        self._ready: deque[_Mailbox] = deque()
        self._called = False

    def deliver(self, mailbox: _Mailbox) -> None:
        """From the engine loop's thread."""
        self._ready.append(mailbox)
        if not self._called:
            self._called = True
            event_loop = self._event_loop()
            with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                if event_loop is not None:
                    event_loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._called = False
        while self._ready:
            self._ready.popleft().wake()


class _Mailbox:
    """Takes news from the engine loop's thread; one task at a time may get them, and others wait for more to come."""

    def __init__(self, courier: _Courier):
        self._courier = courier
        self._news: deque[Any] = deque()
        self._event = asyncio.Event()

    def put(self, news: Any) -> None:
        self._news.append(news)
        self._courier.deliver(self)

    def wake(self) -> None:
        self._event.set()

    async def get(self) -> Any:
        while not self._news:
            await self.more()
        return self._news.popleft()

    async def more(self) -> None:
        """Wait until something comes that has not come yet."""
        self._event.clear()
        await self._event.wait()


async def _enter(loop: EngineLoop, request: Request | Scoring) -> None:
    """Wait for a place in the queue, unless the request ends before."""
    event_loop, room = asyncio.get_running_loop(), asyncio.Event()

    def ring() -> None:
        with suppress(RuntimeError):  # the event loop was closed
            event_loop.call_soon_threadsafe(room.set)

    while not loop.queue.enter(request, wait=False):
        left = None if request.deadline is None else request.deadline - perf_counter()
        if left is not None and left <= 0:
            request.end_overdue()
        if request.finished:
            return
        room.clear()
        loop.queue.on_room(ring)
        timer = None if left is None else event_loop.call_later(left, room.set)  # wait_for may lose a cancellation before Python 3.12
        try:
            await room.wait()
        finally:
            if timer is not None:
                timer.cancel()


async def _prepare(given: Sequence[Any], make: Callable[[], T]) -> T:
    """Check and tokenize what was given: in a thread, if that takes long."""
    if sum(_length(each) for each in given) <= _LONG:
        return make()
    return await asyncio.to_thread(make)


def _length(given: Any) -> int:
    """About how much there is to tokenize in a prompt or a conversation."""
    if isinstance(given, Mapping):
        return sum(_length(value) for value in given.values())
    if isinstance(given, Sequence) and not isinstance(given, str) and given and isinstance(given[0], Mapping):
        return sum(_length(message) for message in given)
    return len(given) if hasattr(given, "__len__") else 1
