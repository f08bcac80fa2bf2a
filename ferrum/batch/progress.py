"""How far a job is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Progress:
    """A job that runs, as it is now; `progress` of `run` is called with it each time a row ends.

    `rows` in all, `done` of them (error rows included, and those of runs before), of which `errors` are error rows;
    `prompt_tokens` and `completion_tokens` of the rows that this run has finished.
    """

    rows: int | None  # None: nobody knows
    done: int = 0
    errors: int = 0
    done_before: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=perf_counter)
    unfinished_tokens: Callable[[], int] = field(default=lambda: 0, repr=False)  # of the texts that run now

    def count(self, error: bool, prompt_tokens: int, completion_tokens: int) -> None:
        """A row has ended."""
        self.done += 1
        self.errors += error
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    @property
    def seconds(self) -> float:
        """Of this run."""
        return perf_counter() - self.started

    @property
    def rows_per_s(self) -> float:
        return (self.done - self.done_before) / max(self.seconds, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that this run has generated, those of rows under way too, per second."""
        return (self.completion_tokens + self.unfinished_tokens()) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """If the rows to come are as those of this run; None before the first of them."""
        if self.rows is None or self.done <= self.done_before:
            return None
        return (self.rows - self.done) / self.rows_per_s
