"""The first reading of an input: who its rows are, in some thirty bytes each, before anything runs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice

import numpy as np
import numpy.typing as npt

from ferrum.batch.rows import Keys, Row, custom_id_of, digest_of, parsed
from ferrum.batch.sources import Line, lines_of
from ferrum.errors import BatchError

_EVERY = 1000  # rows from one call of `progress` to the next
_SHOWN = 3  # repeated ids in an error


class Index:
    """The rows of an input, the first `limit` of them.

    `sha256` is of their lines, `prefix_sha256` of the first `prefix` of them; `complete` says whether there are no others.
    BatchError where a custom_id is there twice, and where no line is a JSON object: the file is of another kind.
    """

    def __init__(self, path: str, limit: int | None = None, *, prefix: int = 0, progress: Callable[[int], None] = lambda rows: None):
        self.path = path
        self.complete = True
        self.prefix_sha256: str | None = None  # of the first `prefix` rows; None: there are fewer
        self._digests = bytearray()
        self._has_id = bytearray()
        self._lines = array("Q")
        digest = sha256()
        first_line: Line | None = None
        any_object = False
        for line in lines_of(path):
            if limit is not None and len(self._lines) >= limit:
                self.complete = False
                break
            first_line = first_line or line
            fields, error = parsed(line)
            any_object |= error is None
            id = custom_id_of(fields)
            self._digests += digest_of(line, id)
            self._has_id.append(id is not None)
            self._lines.append(line.number)
            digest.update(line.text + b"\n")
            if len(self._lines) == prefix:
                self.prefix_sha256 = digest.hexdigest()
            if len(self._lines) % _EVERY == 0:
                progress(len(self._lines))
        if first_line and not any_object:
            raise BatchError(f"{path} has no row: none of {len(self):,} lines is a JSON object (line {first_line.number}: {str(parsed(first_line)[1]).rstrip('.')}). "
                             f"{_instead(first_line.text)}")
        self.sha256 = digest.hexdigest()
        self._occurrences = self._counted()

    def __len__(self) -> int:
        return len(self._lines)

    def _counted(self) -> npt.NDArray[np.uint32]:
        """Which occurrence of its line each row is, from 0."""
        count = len(self)
        occurrences = np.zeros(count, np.uint32)
        if count < 2:
            return occurrences
        digests = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in order
        same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
        del digests  # the bytes can grow again
        place = np.arange(count)
        first = np.where(np.concatenate(([False], same)), 0, place)
        occurrences[order] = place - np.maximum.accumulate(first)
        repeated = np.flatnonzero(same & (np.frombuffer(bytes(self._has_id), np.uint8)[order[1:]] == 1))
        if len(repeated):
            raise BatchError(self._repeated([(int(order[i + 1]), int(order[i])) for i in repeated.tolist()]))
        return occurrences

    def _repeated(self, pairs: list[tuple[int, int]]) -> str:
        repeated = {row: before for row, before in sorted(pairs)[:_SHOWN]}
        names = {}
        for row, line in enumerate(islice(lines_of(self.path), max(repeated) + 1)):
            if row in repeated:
                names[row] = custom_id_of(parsed(line)[0])
        shown = ", ".join(f"{names[row]!r} (lines {self._lines[before]} and {self._lines[row]})" for row, before in repeated.items())
        more = f", and {len(pairs) - len(repeated)} more" if len(pairs) > len(repeated) else ""
        return f"{self.path} has a custom_id twice: {shown}{more}. Give every row one of its own, or none."

    def key(self, row: int, keys: Keys) -> str:
        """In hex."""
        digest = bytes(self._digests[16 * row : 16 * row + 16])
        return keys.key(digest, int(self._occurrences[row]), "" if self._has_id[row] else None).hex()

    def rows(self, keys: Keys, done: Callable[[int], bool]) -> Iterator[Row]:
        """The rows that are not done, read anew."""
        index = -1
        for index, line in enumerate(islice(lines_of(self.path), len(self))):
            if done(index):
                continue
            fields, error = parsed(line)
            digest = digest_of(line, custom_id_of(fields))
            if digest != self._digests[16 * index : 16 * index + 16]:
                raise BatchError(f"{self.path} has changed while the job ran (line {line.number}). Put back the input that it began with.")
            yield keys.row(index, line, digest, int(self._occurrences[index]), fields, error)
        if index + 1 < len(self):
            raise BatchError(f"{self.path} has become shorter while the job ran: {index + 1} of {len(self)} rows are left. "
                             "Put back the input that it began with.")


def _instead(text: bytes) -> str:
    """What to do about a file that begins with a line of `text`."""
    if text.startswith(b"\x1f\x8b"):
        return "It is compressed: give it a name that ends in .gz."
    if text.startswith(b"\x28\xb5\x2f\xfd"):
        return "It is compressed: give it a name that ends in .zst."
    if text.startswith(b"PAR1"):
        return "It is a Parquet file: give it a name that ends in .parquet."
    if text.startswith(b"["):
        return "It begins as a JSON array: write each of its elements on a line of its own (jq -c '.[]' does)."
    return 'Write every row as a JSON object on a line of its own, such as {"prompt": "Once upon a time"}.'
