"""Texts as they come: a stream, and a session of streams that keeps its KV cache."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ferrum.engine_loop import EngineLoop, Flow, Retained, Submission
from ferrum.outputs import CompletionOutput, Piece, RequestOutput
from ferrum.prompts import Message, Prompt, checked_terms
from ferrum.request import Mailbox, PromptRead, Request
from ferrum.sampling import SamplingParams
from ferrum.session_file import save

if TYPE_CHECKING:
    from ferrum.llm import LLM

Progress = Callable[[int, int], None]


class TextStream:
    """What streams have in common, whatever waits for their pieces: one text, its mailbox, and how it ends."""

    def __init__(self, loop: EngineLoop, request: Request, mailbox: Mailbox, session: Retained | None, prefill_progress: Progress | None):
        self._loop = loop
        self._request = request
        self._session = session
        self._prefill_progress = prefill_progress
        self._submitted = False
        self._over = False
        request.mailbox = mailbox
        self.prompt_token_ids: list[int] = request.prompt_token_ids

    @property
    def output(self) -> RequestOutput:
        """The result, once the stream has ended or was closed; RuntimeError before."""
        if not self._finished():
            raise RuntimeError("The stream has not ended. Iterate it to its end, or close it, before reading its output.")
        return self._request.output()

    @property
    def completion(self) -> CompletionOutput:
        """The text of `output`."""
        return self.output.outputs[0]

    @property
    def prompt_tokens_read(self) -> int:
        """How many tokens of the prompt are in the KV cache; any thread may ask."""
        return self._request.prompt_tokens_read

    def _submit(self) -> None:
        """Start the text, which has a place in the queue."""
        self._loop.submit([Submission(self._request, self._session)], Flow())
        self._submitted = True  # not before: after Ctrl-C in between nobody would submit it, but twice is as good as once

    def _take(self, news: Any) -> Piece | None:
        """The piece in the news, if there is one to be given; raises what ended the text."""
        if isinstance(news, Piece):
            return None if self._over else news  # closed by another thread
        if not isinstance(news, PromptRead):
            self._over = True
            if self._request.error is not None:
                raise self._request.error
        elif self._prefill_progress is not None:
            self._prefill_progress(news.tokens, len(self.prompt_token_ids))
        return None

    def _end(self) -> None:
        """End the text, if it has not ended: when the step that runs has. Never waits."""
        self._over = True
        self._loop.drop(self._request)

    def _finished(self) -> bool:
        """Whether the text has ended; waits for that where the stream was closed."""
        if self._over and not self._request.finished:
            self._loop.settle()
        return self._request.finished

    def __del__(self) -> None:
        if hasattr(self, "prompt_token_ids"):
            self._end()


class Stream(TextStream):
    """A running generation of one text: iterate it for Pieces; afterwards `output` holds the whole.

    The text begins with the first piece that is asked for, and then goes on whether or not somebody reads. Close the stream (or leave
    its `with` block, which waits for that, or drop it) to end early: its KV cache is released when the step that runs has ended, and
    `output` holds what was generated. One thread at a time may iterate a stream; any thread, and a signal handler, may close it.
    """

    def __init__(self, loop: EngineLoop, request: Request, session: Retained | None = None, prefill_progress: Progress | None = None):
        self._mailbox: SimpleQueue[Any] = SimpleQueue()
        self._of: Session | None = None  # a session is closed with the last that uses it
        super().__init__(loop, request, self._mailbox, session, prefill_progress)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        self._loop.check_caller()
        if not self._submitted and not self._over:
            self._loop.queue.enter(self._request)
            self._submit()
        while not self._over:
            if piece := self._take(self._mailbox.get()):
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the text, if it has not ended: when the step that runs has. Never waits."""
        self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._finished()


class Session:
    """A text that goes on turn by turn and keeps its KV cache, made by `LLM.session`.

    A prompt is always the whole text so far, not only what is new: a session remembers no text. As far as its tokens are those of the turn before (prompt and reply), they
    are not computed again. Between turns others may take the memory; then the next turn computes everything, with the same result.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._retained = Retained()
        self._closed = False
        self._last: weakref.ref[Stream] | None = None

    @property
    def tokens_kept(self) -> int:
        """Tokens that are in the KV cache now."""
        sequence = self._retained.sequence
        return 0 if sequence is None else sequence.computed

    @property
    def token_ids(self) -> list[int]:
        """Those tokens."""
        sequence = self._retained.sequence
        return [] if sequence is None else sequence.tokens[: sequence.computed]

    def save(self, path: str | os.PathLike) -> None:
        """Write what the session keeps to a file, whole or not at all, for `LLM.load_session`: tokens, keys and values, `kv_bytes_per_token` each.

        RuntimeError while its last stream has not ended, or where nothing is in the KV cache: before the first turn, or after others took
        the memory. SessionFileError where the file cannot be written.
        """
        self._check_free()
        kept = self._llm._loop.export_session(self._retained)
        if kept is None:
            raise RuntimeError("The session has nothing in the KV cache: it had no turn yet, or others needed the memory. Save it after its next turn.")
        save(path, self._llm.engine, self._llm.file, *kept)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None,
    ) -> Stream:
        """As `LLM.stream`; RuntimeError while the stream of the turn before has not ended, or after `close`."""
        self._check_free()
        terms = checked_terms(priority, timeout)
        return self._keep(self._llm._prompt_stream(prompt, sampling_params, terms, prefill_progress, self._retained))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None, **template_options: Any,
    ) -> Stream:
        """As `LLM.stream_chat` for the whole conversation so far: its earlier turns need not be computed again."""
        self._check_free()
        terms = checked_terms(priority, timeout)
        return self._keep(self._llm._chat_stream(messages, sampling_params, template_options, terms, prefill_progress, self._retained))

    def _check_free(self) -> None:
        last = self._stream()
        if self._closed:
            raise RuntimeError("The session was closed. Make a new one with llm.session().")
        if last is not None and not last._finished():
            raise RuntimeError("The session's last stream has not ended. Iterate it to its end, or close it, before the next turn.")

    def _keep(self, stream: Stream) -> Stream:
        stream._of, self._last = self, weakref.ref(stream)
        return stream

    def close(self) -> None:
        """Give the KV cache back, when the step that runs has ended; leaving the `with` block waits for that."""
        self._closed = True
        stream = self._stream()
        if stream is not None:
            stream.close()
        self._llm._loop.drop(self._retained)

    def _stream(self) -> Stream | None:
        """The stream of the last turn, if anybody has it."""
        return None if self._last is None else self._last()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._llm._loop.settle()

    def __del__(self) -> None:
        if hasattr(self, "_last"):
            self.close()
