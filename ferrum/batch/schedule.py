"""In which order rows run: those that begin alike together, so that what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

R = TypeVar("R")

WINDOW = 512  # rows that are looked at together
WINDOW_TOKENS = 1 << 18
_FIRST, _AHEAD = 16, 4
_END: Any = object()


def grouped(rows: Iterable[R], tokens_of: Callable[[R], Sequence[int] | None], *,
            window: int = WINDOW, window_tokens: int = WINDOW_TOKENS) -> Iterator[R]:
    """The rows, in windows that are each sorted by their tokens: of all orders, that with the longest common prefixes of neighbours.

    A row of no tokens (None) comes as soon as it is read. Windows grow from a few rows to `window`, and while one is handed out the
    next is read, a few rows at a time: neither the first row nor any later one waits for many others to be read.
    """
    source = iter(rows)
    size = _FIRST
    ahead: list[R] = []
    tokens_ahead = 0

    def read(count: int) -> Iterator[R]:
        nonlocal tokens_ahead
        while count > 0 and len(ahead) < size and tokens_ahead < window_tokens:
            row = next(source, _END)
            if row is _END:
                return
            tokens = tokens_of(row)
            if tokens is None:
                yield row
                continue
            ahead.append(row)
            tokens_ahead += len(tokens)
            count -= 1

    while True:
        yield from read(size)
        if not ahead:
            return
        now, ahead, tokens_ahead = ahead, [], 0
        now.sort(key=lambda row: tokens_of(row) or (), reverse=True)
        size = min(size * _AHEAD, window)
        while now:
            yield now.pop()
            yield from read(_AHEAD)
