"""The files of a job, and how they are written so that no moment of a crash leaves half of one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NamedTuple

from ferrum.errors import BatchError


class Places(NamedTuple):
    """Where a job's files are: all beside its output, which is there once the job has finished.

    `journal` holds the finished rows meanwhile, `manifest` what the job is, `lock` who works on it, `spool` the rows
    that came from a pipe or from Python; `part` is the output while it is put together.
    """

    output: str
    journal: str
    manifest: str
    lock: str
    spool: str
    part: str

    @classmethod
    def of(cls, output: str | os.PathLike) -> Places:
        path = os.path.realpath(os.fspath(output))
        return cls(path, *(path + end for end in (".journal", ".manifest.json", ".lock", ".input.jsonl", ".part")))

    def check(self) -> None:
        """BatchError where the output cannot be written at all: better now than after the job."""
        folder = os.path.dirname(self.output)
        if os.path.isdir(self.output):
            raise BatchError(f"{self.output} is a directory. Give the path of a file for the results.")
        if os.path.exists(self.output) and not os.path.isfile(self.output):
            raise BatchError(f"{self.output} is a device or a pipe: results are put together beside a file. Give the path of a file.")
        if not os.path.isdir(folder):
            raise BatchError(f"The directory {folder} does not exist. Make it, or give another place for the results.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BatchError(f"The directory {folder} cannot be written to. Change its permissions, or give another place for the results.")


class Lock:
    """One writer per output: the kernel lets go of it with the process, however that ends."""

    def __init__(self, path: str):
        self._path = path
        self._descriptor = self._take()

    def _take(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_the_file(descriptor):
                    os.ftruncate(descriptor, 0)
                    with suppress(OSError):  # a full disk: the lock holds without its holder's name
                        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n", 0)
                    return descriptor
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise BatchError(f"{holder} is working on this output ({self._path} is locked). Wait for its end, or end it first.") from None
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise BatchError(f"{self._path} cannot be locked ({error.strerror}): this file system has no locks. "
                                     "Give a place for the results on another one.") from None
                raise
            os.close(descriptor)  # its last holder has just removed it

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                os.unlink(self._path)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _holder(descriptor: int) -> str:
    try:
        held = json.loads(os.pread(descriptor, 4096, 0))
        return f"Process {int(held['pid'])} on {str(held['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "Another process"


def write_whole(part: str, path: str, write: Callable[[IO[bytes]], None]) -> None:
    """A file that appears under its name with everything in it, on the disk, or not at all."""
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_folder(path)


def sync_folder(path: str) -> None:
    """Make the name of a file last."""
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
