"""Rows through the engine, and what an error of the engine means for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from ferrum.batch.rows import Row, is_fatal
from ferrum.batch.schedule import grouped
from ferrum.errors import ContextFull, KVPoolExhausted
from ferrum.request import Request, Scoring
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import LLM

logger = logging.getLogger("ferrum")

_MOST_WAITING = 4096  # rows with errors that nobody has taken yet


class Runner:
    """Runs rows and gives each as it ends, with its request or its error.

    An error of the engine is not taken for the fault of the rows that were in its step: they run again, each alone. One that fails
    alone too is an error row if the engine still runs something else, namely one token; otherwise the engine is broken and its error is raised: rows
    that have not ended stay so. EngineClosed and OutOfMemory are raised at once.
    """

    def __init__(self, llm: LLM, prepare: Callable[[Row], None]):
        self._llm = llm
        self._prepare = prepare
        self._running: dict[int, Row] = {}
        self._bad: list[Row] = []
        self._suspects: list[Row] = []
        self._more = True

    def unfinished_tokens(self) -> int:
        """Tokens of texts under way; any thread may ask."""
        requests = [row.request for row in list(self._running.values())]
        return sum(text.length for request in requests if isinstance(request, Request) for text in request.texts)

    def run(self, rows: Iterable[Row]) -> Generator[Row, None, None]:
        ordered = grouped(self._prepared(rows), _tokens)
        while self._more:
            self._more = False
            with closing(self._llm.as_completed(self._requests(ordered))) as ended:
                for request in ended:
                    row = self._running.pop(id(request))
                    yield from self._take_bad()
                    if self._settled(row, request.error):
                        yield row
            yield from self._take_bad()
            yield from self._alone()

    def _prepared(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self._prepare(row)
            yield row

    def _requests(self, rows: Iterator[Row]) -> Iterator[Request | Scoring]:
        """What as_completed asks for one by one; it ends early where the engine has failed, or rows wait to be taken."""
        for row in rows:
            if row.request is None:
                self._bad.append(row)
            else:
                self._running[id(row.request)] = row
                yield row.request
            if self._suspects or len(self._bad) >= _MOST_WAITING:
                self._more = True
                return

    def _take_bad(self) -> Iterator[Row]:
        while self._bad:
            bad, self._bad = self._bad, []
            yield from bad

    def _settled(self, row: Row, error: BaseException | None) -> bool:
        """Whether a row has ended; else it runs again."""
        if error is not None:
            if is_fatal(error):
                raise error
            if not isinstance(error, (ContextFull, KVPoolExhausted)):
                logger.info("row of line %d: %s; it runs again", row.line, error)
                self._suspects.append(row)
                return False
            row.error = error
        return True

    def _alone(self) -> Iterator[Row]:
        while self._suspects:
            row = self._suspects.pop(0)
            row.request = None
            self._prepare(row)
            if row.request is not None and (error := self._error_of(row.request)) is not None:
                if is_fatal(error):
                    raise error
                self._llm.generate([self._llm.tokenizer.plain_ids[:1]], SamplingParams(max_tokens=1, temperature=0))
                row.error = error
            yield row

    def _error_of(self, request: Request | Scoring) -> BaseException | None:
        with closing(self._llm.as_completed([request])) as ended:
            return next(ended).error


def _tokens(row: Row) -> list[int] | None:
    request = row.request
    if isinstance(request, Scoring):
        return request.parts[0].tokens
    return None if request is None else request.prompt_token_ids
