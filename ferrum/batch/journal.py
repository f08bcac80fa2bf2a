"""The journal: every finished row as one line, on the disk before it counts.

    {"row": 17, "key": "0f3a...", "error": false, "in": 12, "out": 30, "output": {...}, "crc": "5d41402a"}

`row` is the row's number from 0, `key` the digest that its input must have, `in` and `out` its tokens, `crc` the CRC-32 of all
bytes of the line before it. Of a row with several lines the last one counts: an error row that was run anew. Lines stand in the
order in which the rows ended.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import sleep
from typing import NamedTuple
from zlib import crc32

_OUTPUT, _CRC, _END = b', "output": ', b', "crc": "', b'"}\n'
_CRC_BYTES = len(_CRC) + 8 + len(_END)
_GROUP = 1024  # lines that one write takes at most
_MOST_WAITING = 16384

NOT_DONE = (1 << 64) - 1


class Entry(NamedTuple):
    """A finished row; `output` is its line of the output, without a newline."""

    row: int
    key: str
    error: bool
    prompt_tokens: int
    completion_tokens: int
    output: bytes

    def line(self) -> bytes:
        head = (f'{{"row": {self.row}, "key": "{self.key}", "error": {"true" if self.error else "false"}, '
                f'"in": {self.prompt_tokens}, "out": {self.completion_tokens}').encode()
        line = head + _OUTPUT + self.output
        return b"%s%s%08x%s" % (line, _CRC, crc32(line), _END)

    @classmethod
    def read(cls, line: bytes) -> Entry | None:
        """The entry of a line; None where it is torn or damaged."""
        body = line[:-_CRC_BYTES]
        if line[-_CRC_BYTES:] != b"%s%08x%s" % (_CRC, crc32(body), _END):
            return None
        head, _, output = body.partition(_OUTPUT)
        try:
            fields = json.loads(head + b"}")
            return cls(fields["row"], fields["key"], fields["error"], fields["in"], fields["out"], output)
        except (ValueError, KeyError, TypeError):
            return None


class Finished:
    """What a journal holds of a job of `rows` rows: where each row's line is, which are errors, and their tokens."""

    def __init__(self, rows: int):
        self.offsets = array("Q", [NOT_DONE]) * rows
        self.is_error = bytearray(rows)
        self.done = self.errors = self.prompt_tokens = self.completion_tokens = 0
        self.damaged = 0  # lines in the middle that cannot be read: their rows are not done
        self.end = 0  # bytes that hold whole lines

    def __contains__(self, row: int) -> bool:
        return self.offsets[row] != NOT_DONE

    def forget_errors(self) -> None:
        """Let error rows count as not done; their lines stay until others take their place."""
        for row, is_error in enumerate(self.is_error):
            if is_error:
                self.offsets[row] = NOT_DONE
        self.done -= self.errors
        self.errors = 0
        self.is_error = bytearray(len(self.is_error))

    def read(self, path: str, keys) -> None:
        """Read a journal; `keys(row)` is the key that a row's input has. KeyError with the number of a row that has another."""
        with open(path, "rb") as file:
            offset = torn = 0
            for line in file:
                entry = Entry.read(line)
                if entry is None:
                    torn += 1
                else:
                    if not 0 <= entry.row < len(self.offsets) or entry.key != keys(entry.row):
                        raise KeyError(entry.row)
                    self.damaged += torn
                    torn = 0
                    self._take(entry, offset)
                    self.end = offset + len(line)
                offset += len(line)

    def _take(self, entry: Entry, offset: int) -> None:
        row = entry.row
        if row not in self:
            self.done += 1
        self.errors += entry.error - self.is_error[row]
        self.is_error[row] = entry.error
        self.offsets[row] = offset
        self.prompt_tokens += entry.prompt_tokens  # of an error row they are 0, so nothing counts twice
        self.completion_tokens += entry.completion_tokens


class Journal:
    """Appends entries, from a thread of its own, so that the disk never holds up the engine.

    Rows that end while a write is under way share the next one and its fsync. After an error of the disk nothing more is
    written, what was torn is cut off, and the next call raises it.
    """

    def __init__(self, path: str, end: int):
        """`end`: bytes of the file that hold whole lines; what is behind them is cut off."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = end
        self.error: OSError | None = None
        self.written = 0  # entries that are on the disk
        try:
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
            os.fsync(self._file)
        except BaseException:
            os.close(self._file)
            raise
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()  # put() is whole or not at all, also beside Ctrl-C
        self._thread = threading.Thread(target=self._write_all, name="ferrum batch journal", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        while self._entries.qsize() > _MOST_WAITING and self.error is None:
            sleep(0.01)  # a disk that stands still must not fill the memory
        if self.error is not None:
            raise self.error
        self._entries.put(entry)

    def close(self) -> None:
        """Wait until everything is on the disk; raises what the disk had against it."""
        if self._file < 0:
            return
        self._entries.put(None)
        self._thread.join()
        file, self._file = self._file, -1
        os.close(file)
        if self.error is not None:
            raise self.error

    def _write_all(self) -> None:
        open = True
        while open:
            group = [self._entries.get()]
            with suppress(Empty):
                while len(group) < _GROUP:
                    group.append(self._entries.get_nowait())
            open = group[-1] is not None
            if self.error is None:
                self._write([entry.line() for entry in group if entry is not None])

    def _write(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        if not data:
            return
        left = data
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            self.error = error
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            return
        self._end += len(data)
        self.written += len(lines)


class Outputs:
    """The output lines of a whole journal, by row."""

    def __init__(self, path: str, offsets: array):
        self._path = path
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self):
        """Each row's line without its newline, in the order of the input."""
        if not len(self._offsets):
            return
        with open(self._path, "rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                entry = Entry.read(file.readline())
                if entry is None:
                    raise OSError(f"{self._path} was changed or damaged at byte {offset} while the job ran. Run it again with resume.")
                yield entry.output
