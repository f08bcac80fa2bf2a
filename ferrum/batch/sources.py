"""Where rows come from: files of JSON lines, plain or compressed, Parquet, pipes, and Python."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, TypeGuard

from ferrum.batch.encoding import to_json
from ferrum.batch.files import write_whole
from ferrum.errors import BatchError, OptionError

LONGEST_LINE = 64 << 20  # bytes; a longer one is an error row, and is never in memory as a whole
TOO_LONG = b"\0 too long"  # stands for such a line, by identity, which bytes of length 1 have not: all equal ones are the same
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A row as it was given: `number` counts the lines of the file from 1 (the rows, where there are no lines)."""

    number: int
    text: bytes


def check_source(path: str) -> None:
    """Refuse now what could not be opened later."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise BatchError(f"{path} cannot be read ({error.strerror}). Check the path of the input.") from None
    if path.endswith(".zst"):
        _zstd()
    if path.endswith(".parquet"):
        from ferrum.batch.parquet import require

        require()


def lines_of(path: str) -> Iterator[Line]:
    """The rows of a file; lines of nothing but white space are none. BatchError where it is damaged."""
    if path.endswith(".parquet"):
        from ferrum.batch.parquet import rows

        yield from (Line(number, to_json(row)) for number, row in enumerate(rows(path), 1))
        return
    with open_compressed(path, "rb") as file:
        number = 0
        try:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while len(rest := file.readline(LONGEST_LINE)) == LONGEST_LINE and not rest.endswith(b"\n"):
                        pass
                    line = TOO_LONG
                elif number == 1:
                    line = line.removeprefix(_BOM)
                if line := line.strip():
                    yield Line(number, line)
        except (EOFError, OSError, *_damage(path)) as error:
            raise BatchError(f"{path} cannot be read past line {number}: {error}. It is incomplete or damaged, or not what its name says.") from error


def spool(rows: Iterable[Mapping[str, Any]] | IO[bytes], path: str) -> None:
    """Keep what comes from a pipe or from Python in a file, so that it can be read twice and resumed."""

    def write(file: IO[bytes]) -> None:
        if is_pipe(rows):
            while chunk := rows.read(1 << 20):
                file.write(chunk)
            return
        for line in lines_of_rows(rows):
            file.write(line.text + b"\n")

    write_whole(path + ".part", path, write)


def lines_of_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    """Rows of Python as lines. TypeError for what is no row."""
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"rows is {type(rows).__name__}: give a path, or rows such as {{'prompt': 'Once upon a time'}}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is {type(row).__name__}: a row is a dict such as {{'prompt': 'Once upon a time'}}.")
        yield Line(number, to_json(dict(row)))


@contextmanager
def open_compressed(path: str, mode: str) -> Iterator[IO[bytes]]:
    """A file, compressed if its name says so; the same content gives the same bytes."""
    if path.endswith(".gz"):
        import gzip

        with open(path, mode) as file, gzip.GzipFile("", mode, fileobj=file, mtime=0) as packed:
            yield packed
    elif path.endswith(".zst"):
        with _zstd()(path, mode) as packed:
            yield packed
    else:
        with open(path, mode) as file:
            yield file


def compressed(file: IO[bytes], path: str):
    """A writer into an open file, by the name that the file will have; closing it leaves the file open."""
    if path.endswith(".gz"):
        import gzip

        return gzip.GzipFile("", "wb", fileobj=file, mtime=0)
    if path.endswith(".zst"):
        return _zstd()(file, "wb")
    return _Plain(file)


class _Plain:
    """A writer that closes nothing."""

    def __init__(self, file: IO[bytes]):
        self.write = file.write

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _zstd():
    """`open` for .zst, of the standard library (3.14) or of the package `zstandard`."""
    try:
        from compression.zstd import open as opened

        return opened
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise OptionError('.zst files need the package zstandard: pip install "ferrum-engine[zstd]"') from None

    def opened(file: Any, mode: str) -> IO[bytes]:
        if mode == "rb":
            return io.BufferedReader(_ZstdReader(file, zstandard), 1 << 20)
        return zstandard.open(file, mode, closefd=isinstance(file, str))

    return opened


class _ZstdReader(io.RawIOBase):
    """What the frames of a file hold; EOFError where the last one is incomplete, which `zstandard`'s own reader takes for its end."""

    def __init__(self, path: str, zstandard: Any):
        self._file = open(path, "rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._fresh = True  # nothing of the frame was read
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fresh = self._decompressor.decompressobj(), True
            data = data or self._file.read(1 << 16)
            if not data:
                if self._fresh:
                    return 0
                raise EOFError("its last frame ends too early")
            self._fresh = False
            self._left = memoryview(self._frame.decompress(data))
        taken = min(len(buffer), len(self._left))
        buffer[:taken] = self._left[:taken]
        self._left = self._left[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()


def _damage(path: str) -> tuple[type[Exception], ...]:
    """What damaged compressed data raises."""
    if path.endswith(".gz"):
        import zlib

        return (zlib.error,)
    if path.endswith(".zst"):
        try:
            from compression.zstd import ZstdError

            return (ZstdError,)
        except ImportError:
            from zstandard import ZstdError

            return (ZstdError,)
    return ()


def is_pipe(rows: Any) -> TypeGuard[IO[bytes]]:
    """Whether rows come as the bytes of lines."""
    return hasattr(rows, "read")


def is_path(rows: Any) -> TypeGuard[str | os.PathLike]:
    return isinstance(rows, (str, os.PathLike))
