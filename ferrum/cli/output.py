"""What the command line shows: streams, styles, sizes."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TextIO

from ferrum.options import color_wanted, cursor_moves

BOLD, DIM = "1", "2"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_IN_ERROR = re.compile(r"(?!(?<=\.)\n)[\x00-\x1f\x7f-\x9f]")


def program() -> str:
    """How the user called this program."""
    return "python -m ferrum" if os.path.basename(sys.argv[0]) in ("__main__.py", "-m") else "ferrum"


def prepare_streams() -> None:
    """Make text writable everywhere: ASCII locales (C, POSIX) get UTF-8, others a "?" for what they lack."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            errors = "replace" if name == "stdout" else "backslashreplace"
            stream.reconfigure(encoding="utf-8" if ascii_only else stream.encoding, errors=errors)


def close_quietly() -> None:
    """Send what is still buffered for stdout nowhere, so that the interpreter's last flush cannot fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


def styled(text: str, style: str, stream: TextIO) -> str:
    """The text in a style, where the stream is a terminal and the user lets it."""
    if not text or not stream.isatty() or not color_wanted():
        return text
    return f"\033[{style}m{text}\033[0m"


def printable(text: str) -> str:
    """Text from a file in one line, with control characters written as \\n or \\x1b: it must not steer a terminal."""
    return _CONTROL.sub(_escape, text)


def shown(text: str, stream: TextIO) -> str:
    """A text of several lines as it may be written: on a terminal as `printable`, but for its newlines and tabs; elsewhere exact."""
    return _STEERING.sub(_escape, text) if stream.isatty() else text


def note_error(error: object) -> None:
    """An error on stderr, as `printable`; a line may end after a full stop, as those of ferrum's own do."""
    note("error: " + _CONTROL_IN_ERROR.sub(_escape, str(error)))


def _escape(control: re.Match[str]) -> str:
    return repr(control[0])[1:-1]


def json_line(value: Any) -> str:
    """One line of ASCII JSON; NaN and infinities, which JSON has not, are null, and what it cannot hold is its repr."""
    return json.dumps(_finite(value), allow_nan=False, default=repr)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """A line for the person at the terminal; nobody listening is no error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def say(text: str, style: str = "") -> None:
    """A line of a conversation that is not of the model: on stdout where that is a terminal, else for the person on stderr."""
    if sys.stdout.isatty():
        print(styled(text, style, sys.stdout) if style else text, flush=True)
    else:
        note(styled(text, style, sys.stderr) if style else text)


class ProgressLine:
    """A line on a terminal's stderr that is overwritten, and gone at the end of its `with` block; nothing elsewhere.

    `text` is asked some times a second, from a thread of its own; without it, `show` is called. The line first appears after a
    second, so that what is quick stays quiet.
    """

    _DELAY, _PERIOD = 1.0, 0.2  # seconds

    def __init__(self, text: Callable[[], str] | None = None):
        self._text = text
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = monotonic()
        self._shown = 0

    def show(self, text: str) -> None:
        if monotonic() - self._started >= self._DELAY and sys.stderr.isatty():
            self._write(f"[{text}]")

    def __enter__(self) -> ProgressLine:
        if self._text is not None and sys.stderr.isatty():
            self._thread = threading.Thread(target=self._watch, args=(self._text,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._shown:
            self._write("")

    def _watch(self, text: Callable[[], str]) -> None:
        wait = self._DELAY
        while not self._done.wait(wait):
            self._write(f"[{text()}]")
            wait = self._PERIOD

    def _write(self, line: str) -> None:
        try:
            end = "" if line else "\r\033[K" if cursor_moves() else "\r"  # Ctrl-C has written ^C behind the line
            sys.stderr.write("\r" + styled(line.ljust(self._shown), DIM, sys.stderr) + end)
            sys.stderr.flush()
        except OSError:
            pass
        self._shown = len(line)


def terminal_width() -> int:
    """Columns of the terminal that stderr is."""
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80


def size(nbytes: int) -> str:
    """Bytes for people: 13,388,000 is "12.8 MiB"."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"
