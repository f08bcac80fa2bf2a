"""What runs: a prompt with the texts that continue it, and a prompt whose continuations are scored.

A request belongs to its caller until it is submitted and again once it has ended; in between it belongs to the loop's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from ferrum.logit_edits import LogitEdits
from ferrum.outputs import CompletionOutput, FinishReason, Logprob, Piece, RequestOutput, Score, Timings, Usage
from ferrum.sampling import SamplingParams, candidate_count, draw_rule, fresh_seed
from ferrum.scheduler import Sequence
from ferrum.stopping import StopChecker
from ferrum.tokenizer import IncrementalDetokenizer, Tokenizer

_request_ids = count()


class Terms(NamedTuple):
    """How a request is served: lower priorities come first; what has not ended when perf_counter() reaches the deadline ends then."""

    priority: int = 0
    deadline: float | None = None


class PromptRead(NamedTuple):
    """How far the prompt of a request was read."""

    request: Any
    tokens: int


class Mailbox(Protocol):
    """Where the loop's thread puts the news of a request: its Pieces if it is streamed, PromptRead if it asks for that, and last the request itself."""

    def put(self, news: Any) -> None: ...


class Text:
    """One text that continues a prompt, token by token."""

    def __init__(self, request: Request, index: int):
        params = request.params
        prompt_ids = request.prompt_token_ids
        self.request = request
        self.index = index
        self.params = params
        self.seed = (request.seed + index) % (1 << 64)
        self.rule = draw_rule(params)
        self.candidates = max(candidate_count(params), params.logprobs or 0)
        wanted_from = 0 if params.prompt_logprobs is not None and params.n == 1 else len(prompt_ids) - 1
        self.sequence = Sequence(list(prompt_ids), wanted_from, owner=self, priority=request.priority)
        self.edits = LogitEdits(params, prompt_ids, request.ending_ids) if LogitEdits.needed(params) else None
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.notice: str | None = None
        self._first = len(prompt_ids)
        self._token_ids: list[int] | None = None
        self._detokenizer = IncrementalDetokenizer(request.tokenizer)
        self._checker = StopChecker(params.stop)

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.sequence.tokens[self._first :] if self._token_ids is None else self._token_ids

    @property
    def length(self) -> int:
        """How many tokens were generated so far."""
        return len(self.sequence.tokens) - self._first if self._token_ids is None else len(self._token_ids)

    def accept(self, token: int, logprob: dict[int, Logprob] | None) -> None:
        """Take the next token: what it settles of the text, and whether the text ends with it."""
        self.sequence.append(token)
        if self.edits is not None:
            self.edits.add(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        length = self.length
        ended = token in self.request.ending_ids
        text = "" if ended else self._detokenizer.push(token)
        if length > self.params.min_tokens:
            text = self._checker.push(text)
        self._show(text, token)
        if ended:
            self.end("stop", None if token == self.request.tokenizer.eos_id else token)
        elif self._checker.matched is not None:
            self.end("stop", self._checker.matched)
        elif length == self.params.max_tokens:
            self.end("length")

    def end(self, reason: FinishReason, stop_reason: str | int | None = None, notice: str | None = None) -> None:
        """Note why the text ends and settle what was held back; the first reason stands."""
        if self.finish_reason is not None:
            return
        self._token_ids = self.token_ids
        rest = self._checker.push(self._detokenizer.flush()) + self._checker.flush()
        if rest:
            self._show(rest, None)
        self.finish_reason, self.stop_reason, self.notice = reason, stop_reason, notice

    def output(self) -> CompletionOutput:
        token_ids = list(self.token_ids)
        total = None
        if self.logprobs is not None:
            total = float(sum(places[token].logprob for places, token in zip(self.logprobs, token_ids)))
        return CompletionOutput(
            index=self.index, text="".join(self.pieces), token_ids=token_ids, finish_reason=self.finish_reason or "cancelled",
            stop_reason=self.stop_reason, notice=self.notice, seed=None if self.params.greedy else self.seed,
            cumulative_logprob=total, logprobs=self.logprobs,
        )

    def _show(self, text: str, token: int | None) -> None:
        self.pieces.append(text)
        if self.request.streamed and self.request.mailbox is not None:
            self.request.mailbox.put(Piece(text, token))


class Request:
    """A prompt and its texts."""

    def __init__(
        self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer, *,
        load_s: float = 0.0, terms: Terms = Terms(), streamed: bool = False, reports_prompt: bool = False,
    ):
        self.mailbox: Mailbox | None = None
        self.started = perf_counter()
        self.deadline = terms.deadline
        self.id = str(next(_request_ids))
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer
        self.priority = terms.priority
        self.streamed = streamed
        self.seed = 0 if params.greedy else fresh_seed() if params.seed is None else params.seed
        ends = frozenset() if params.ignore_eos else tokenizer.stop_ids
        self.ending_ids = ends | set(params.stop_token_ids)
        self.texts = [Text(self, index) for index in range(params.n)]
        # Several texts are forked from the prompt once it is read.
        self.prompt_sequence: Sequence | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        if params.n > 1:
            wanted_from = len(prompt_token_ids) - 1 if self.prompt_logprobs is None else 0
            self.prompt_sequence = Sequence(list(prompt_token_ids), wanted_from, owner=self, priority=self.priority)
        self._prompt_reported = 0 if reports_prompt else len(prompt_token_ids)
        self.error: BaseException | None = None
        self.num_cached_tokens: int | None = None
        self.load_s = load_s
        self.first_token_s = 0.0
        self.prefill_s = 0.0
        self.decode_s = 0.0

    @property
    def request(self) -> Request:
        """As of a Text."""
        return self

    @property
    def finished(self) -> bool:
        return self.error is not None or all(text.finish_reason is not None for text in self.texts)

    def first_sequences(self) -> list[Sequence]:
        """What is computed at first."""
        return [self.texts[0].sequence if self.prompt_sequence is None else self.prompt_sequence]

    def sequences(self) -> Iterator[Sequence]:
        """Everything that may hold KV blocks."""
        if self.prompt_sequence is not None:
            yield self.prompt_sequence
        for text in self.texts:
            yield text.sequence

    def unfinished(self) -> list[Sequence]:
        """Of the texts, those that go on."""
        return [text.sequence for text in self.texts if text.finish_reason is None]

    def ended(self) -> list[Sequence]:
        """Of the texts, those that may still hold KV blocks though they have ended."""
        return [text.sequence for text in self.texts if text.finish_reason is not None and text.sequence.engine_id is not None]

    def fail(self, error: BaseException) -> None:
        """End every text with an exception, which the caller will raise."""
        if not self.finished:
            self.error = error
            self._end("error")

    def cancel(self) -> None:
        self._end("cancelled")

    def end_overdue(self) -> None:
        self._end("timeout")

    def _end(self, reason: FinishReason) -> None:
        for text in self.texts:
            text.end(reason)

    @property
    def prompt_tokens_read(self) -> int:
        """How many tokens of the prompt are in the KV cache, or were at the end of the text."""
        if self.first_token_s:
            return len(self.prompt_token_ids)
        return min(self.first_sequences()[0].computed, len(self.prompt_token_ids))

    def after_step(self) -> None:
        """Note what the first step found cached; tell how far the prompt was read, if that is asked for and it goes on."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = self.first_sequences()[0].cached
        total = len(self.prompt_token_ids)
        if self._prompt_reported < total and self.prompt_tokens_read > self._prompt_reported and self.mailbox is not None:
            self._prompt_reported = self.prompt_tokens_read
            self.mailbox.put(PromptRead(self, self._prompt_reported))

    def add_time(self, seconds: float) -> None:
        """Count a step in which the request took part."""
        if self.first_token_s:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    def output(self) -> RequestOutput:
        prompt_tokens, tokens = len(self.prompt_token_ids), sum(text.length for text in self.texts)
        cached = self.num_cached_tokens or 0
        return RequestOutput(
            request_id=self.id, prompt=self.prompt, prompt_token_ids=self.prompt_token_ids, prompt_logprobs=self.prompt_logprobs,
            outputs=[text.output() for text in self.texts], finished=self.finished,
            usage=Usage(prompt_tokens, tokens, prompt_tokens + tokens),
            timings=Timings(
                load_s=self.load_s, first_token_s=self.first_token_s, prefill_s=self.prefill_s, decode_s=self.decode_s,
                prefill_tokens_per_s=_rate(prompt_tokens - cached, self.prefill_s),
                decode_tokens_per_s=_rate(tokens - len(self.texts), self.decode_s),
            ),
            num_cached_tokens=cached,
        )


class Scoring:
    """A prompt and the continuations whose probability is asked; the prompt is read once and forked.

    Every token but the last of a continuation is computed, for the logits of the one after it.
    """

    def __init__(self, prompt_token_ids: list[int], continuations: SequenceOf[tuple[str | None, list[int]]], terms: Terms = Terms()):
        self.mailbox: Mailbox | None = None
        self.deadline = terms.deadline
        self.continuations = continuations
        self.logprobs: list[list[float]] = [[] for _ in continuations]
        self.greedy = [True] * len(continuations)
        self.error: BaseException | None = None
        self.cancelled = False
        self._first = first = len(prompt_token_ids) - 1
        self.parts = [Sequence(prompt_token_ids + ids, first, owner=self, excess=1, priority=terms.priority) for _, ids in continuations]
        self._part_of = {id(part): index for index, part in enumerate(self.parts)}
        self.prompt_sequence: Sequence | None = None
        if len(continuations) > 1 and first > 0:
            self.prompt_sequence = Sequence(prompt_token_ids[:-1], first, owner=self, priority=terms.priority)

    @property
    def request(self) -> Scoring:
        """As of a Text."""
        return self

    @property
    def finished(self) -> bool:
        return self.error is not None or self.cancelled or not self.unfinished()

    def first_sequences(self) -> list[Sequence]:
        return self.parts if self.prompt_sequence is None else [self.prompt_sequence]

    def sequences(self) -> Iterator[Sequence]:
        if self.prompt_sequence is not None:
            yield self.prompt_sequence
        yield from self.parts

    def unfinished(self) -> list[Sequence]:
        return [part for part, found, (_, ids) in zip(self.parts, self.logprobs, self.continuations) if len(found) < len(ids)]

    def ended(self) -> list[Sequence]:
        return [part for part in self.parts if part.engine_id is not None and not part.pending]

    def take(self, part: Sequence, position: int, logprob: float, likeliest: bool) -> None:
        """The log-probability of the token after a position."""
        index = self._part_of[id(part)]
        self.greedy[index] &= likeliest
        if len(self.logprobs[index]) == position - self._first:
            self.logprobs[index].append(logprob)
        part.wanted_from = max(part.wanted_from, position + 1)

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def cancel(self) -> None:
        self.cancelled = True

    def end_overdue(self) -> None:
        self.fail(TimeoutError("The scores were not ready in time. Raise timeout."))

    def after_step(self) -> None:
        """Scores report nothing on their way."""

    def add_time(self, seconds: float) -> None:
        """Scores have no timings."""

    def output(self) -> list[Score]:
        return [Score(text, ids, logprobs, float(sum(logprobs)), greedy)
                for (text, ids), logprobs, greedy in zip(self.continuations, self.logprobs, self.greedy)]


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
