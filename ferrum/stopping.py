"""Where a stop string ends a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Collection


class StopChecker:
    """Cuts streamed text before the first stop string that is complete; where pieces are split makes no difference.

    Text that may be the start of a stop string is held back until it is decided. Of stop strings that are complete
    at the same character, the longest counts.
    """

    def __init__(self, stop: Collection[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take a piece; returns what may be shown. After a match, `matched` is the stop string and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = len(text) - max(overlap(text, stop) for stop in self._stop)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back, once no more follows."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest start of `stop`, short of the whole, that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
