"""Reads GGUF headers: metadata and the table of tensors, every count and offset checked before use.

The format is described in ggml's docs/gguf.md; little-endian files of versions 2 and 3 are read. All text in
a file must be UTF-8. Whatever is wrong with a file is one ModelFileError. The weights themselves are not read:
the native engine maps them, with the offsets given here.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
from array import array
from collections.abc import Sequence
from hashlib import sha256
from struct import Struct
from typing import NamedTuple, NoReturn

from ferrum.errors import ModelFileError

HEADER_LIMIT = 256 << 20  # bytes of metadata and tensor table; real headers stay below 20 MiB
ENTRY_LIMIT = 1 << 16  # metadata entries, arrays, and tensors of one file, each
ELEMENT_LIMIT = 1 << 24  # array elements of one file's metadata, nested ones included
DEPTH_LIMIT = 4  # arrays inside arrays
NAME_LIMIT = 65535  # bytes of a key or tensor name
MAX_DIMS = 4
_FINGERPRINT_BYTES = 4096  # of every tensor

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

_FETCH_AGAIN = "The file is incomplete or damaged: compare its size with its source and fetch it again."
_DAMAGED = "The file is damaged or was written by a faulty tool: fetch it again or convert the model anew."
_FETCH_SHARDS = "Fetch all shards of the same model into one directory, with their names unchanged."

# Starts of files that people hand over in place of a GGUF file.
_LOOKALIKES = (
    (b"version https://git-lfs", "It is a Git LFS pointer: fetch the file itself (git lfs pull)."),
    (b"<", "It looks like a web page: fetch the file itself, not its download page."),
    (b"PK", "It looks like a zip or PyTorch file: convert the model to GGUF with llama.cpp's convert_hf_to_gguf.py."),
    (b"FUGG", "Its byte order is reversed: convert the model anew as a little-endian file."),
)


class QuantType(NamedTuple):
    """A ggml tensor type: `block_size` consecutive weights of a row take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


# By type id, as in ggml.h; ids left out here were withdrawn from the format.
QUANT_TYPES: dict[int, QuantType] = {
    0: QuantType("F32", 1, 4),
    1: QuantType("F16", 1, 2),
    2: QuantType("Q4_0", 32, 18),
    3: QuantType("Q4_1", 32, 20),
    6: QuantType("Q5_0", 32, 22),
    7: QuantType("Q5_1", 32, 24),
    8: QuantType("Q8_0", 32, 34),
    9: QuantType("Q8_1", 32, 40),
    10: QuantType("Q2_K", 256, 84),
    11: QuantType("Q3_K", 256, 110),
    12: QuantType("Q4_K", 256, 144),
    13: QuantType("Q5_K", 256, 176),
    14: QuantType("Q6_K", 256, 210),
    15: QuantType("Q8_K", 256, 292),
    16: QuantType("IQ2_XXS", 256, 66),
    17: QuantType("IQ2_XS", 256, 74),
    18: QuantType("IQ3_XXS", 256, 98),
    19: QuantType("IQ1_S", 256, 50),
    20: QuantType("IQ4_NL", 32, 18),
    21: QuantType("IQ3_S", 256, 110),
    22: QuantType("IQ2_S", 256, 82),
    23: QuantType("IQ4_XS", 256, 136),
    24: QuantType("I8", 1, 1),
    25: QuantType("I16", 1, 2),
    26: QuantType("I32", 1, 4),
    27: QuantType("I64", 1, 8),
    28: QuantType("F64", 1, 8),
    29: QuantType("IQ1_M", 256, 56),
    30: QuantType("BF16", 1, 2),
    34: QuantType("TQ1_0", 256, 54),
    35: QuantType("TQ2_0", 256, 66),
    39: QuantType("MXFP4", 32, 17),
    40: QuantType("NVFP4", 64, 36),
    41: QuantType("Q1_0", 128, 18),
}

# Metadata value types by id: numbers as (layout, array.array typecode); bool, string and array apart.
_NUMBERS = {
    0: (Struct("<B"), "B"),
    1: (Struct("<b"), "b"),
    2: (Struct("<H"), "H"),
    3: (Struct("<h"), "h"),
    4: (Struct("<I"), "I"),
    5: (Struct("<i"), "i"),
    6: (Struct("<f"), "f"),
    10: (Struct("<Q"), "Q"),
    11: (Struct("<q"), "q"),
    12: (Struct("<d"), "d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = _NUMBERS[4][0], _NUMBERS[10][0]

_MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dims, one dim, type, offset
_MIN_ARRAY_BYTES = 4 + 8  # item type, count


class TensorInfo(NamedTuple):
    """Where a tensor lies: `shape` is row-major (slowest dimension first), `offset` in bytes from the file's start."""

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    file_index: int
    offset: int
    nbytes: int


class StringArray(Sequence):
    """A metadata array of str; its bounds are checked when the file is opened, its text is decoded at first use.

    Behaves as a list of str that cannot be changed. Text that is not UTF-8 is a ModelFileError at first use.
    """

    __slots__ = ("_raw", "_count", "_where", "_strings")

    def __init__(self, raw: bytes, count: int, where: str):
        self._raw = raw
        self._count = count
        self._where = where
        self._strings: list[str] | None = None

    def tolist(self) -> list[str]:
        """The strings; the same list each time, so do not change it."""
        if self._strings is None:
            self._strings = self._split("split_strings")
        return self._strings

    def merges(self) -> list[tuple[str, str]]:
        """Each string "left right" as the pair (left, right); ModelFileError where one is not of that form."""
        return self._split("split_merges")

    def _split(self, function: str) -> list:
        try:
            return getattr(_native(), function)(self._raw, 0, self._count)[0]
        except ValueError as error:
            raise ModelFileError(f"{self._where}: {error}. {_DAMAGED}") from None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        return self.tolist()[index]

    def __iter__(self):
        return iter(self.tolist())

    def __eq__(self, other) -> bool:
        if isinstance(other, StringArray):
            return self._count == other._count and self._raw == other._raw
        return self.tolist() == other if isinstance(other, list) else NotImplemented

    __hash__ = None

    def __repr__(self) -> str:
        return f"<StringArray of {self._count} strings>"


class GGUFFile:
    """The header of a GGUF model, all shards of it: metadata and tensors by name.

    `paths` are the shards in order, `metadata` is the first shard's: int, float, bool, str, and for arrays
    array.array (numbers), list (bools, nested arrays) or StringArray. `file_bytes` is the size of all shards.
    """

    def __init__(self, shards: Sequence[_Shard]):
        self.paths: tuple[str, ...] = tuple(shard.path for shard in shards)
        self.version: int = shards[0].version
        self.metadata: dict = shards[0].metadata
        self.file_bytes: int = sum(shard.nbytes for shard in shards)
        self._header_bytes = [shard.header_bytes for shard in shards]
        self.tensors: dict[str, TensorInfo] = {}
        for index, shard in enumerate(shards):
            for name, tensor in shard.tensors.items():
                if name in self.tensors:
                    first = self.paths[self.tensors[name].file_index]
                    _fail(shard.path, f"tensor {_quote(name)} is also in {os.path.basename(first)}", _FETCH_SHARDS)
                self.tensors[name] = tensor._replace(file_index=index)

    @classmethod
    def open(cls, path) -> GGUFFile:
        """Read the header of the model at `path`; any shard of a split model finds the others.

        Raises ModelFileError, naming the file, what is wrong, and what to do.
        """
        path = os.fsdecode(path)
        _check_path(path)
        shard = _read_shard(path)
        count = shard.split_value("split.count", default=1)
        if count <= 1:
            return cls([shard])
        shards = [shard if name == path else _read_shard(name) for name in _shard_paths(shard, count)]
        _check_split(shards)
        return cls(shards)

    def fingerprint(self) -> str:
        """What tells this model from others, in hex: SHA-256 of the shards' sizes and headers, and of the first 4 KiB of every tensor.

        It reads some MiB of a file of any size, so a change deep inside a tensor goes unseen. ModelFileError if a file has changed or gone.
        """
        digest = sha256()
        for index, (path, header_bytes) in enumerate(zip(self.paths, self._header_bytes)):
            tensors = sorted((tensor.offset, tensor.nbytes) for tensor in self.tensors.values() if tensor.file_index == index)
            try:
                with open(path, "rb", opener=_open_regular) as file:
                    digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
                    digest.update(file.read(header_bytes))
                    for offset, size in tensors:
                        digest.update(os.pread(file.fileno(), min(size, _FINGERPRINT_BYTES), offset))
            except OSError as error:
                _fail(path, f"cannot be read ({error.strerror or error})", "Check its permissions and the disk.")
        return digest.hexdigest()

    @property
    def architecture(self) -> str:
        """general.architecture, such as "qwen3moe"; ModelFileError if the file does not say."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            _fail(self.paths[0], "general.architecture is missing or not a string", "Convert the model anew.")
        return name


class _Shard(NamedTuple):
    """What one file holds; `header_bytes` are before the first tensor."""

    path: str
    nbytes: int
    version: int
    metadata: dict
    tensors: dict[str, TensorInfo]
    header_bytes: int

    def split_value(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if type(value) is not int:
            _fail(self.path, f"{key} is {'missing' if value is None else 'not an integer'}", _FETCH_SHARDS)
        return value


def _shard_paths(shard: _Shard, count: int) -> list[str]:
    """The paths of all shards, from the name of one."""
    directory, name = os.path.split(shard.path)
    match = _SHARD_NAME.fullmatch(name)
    if match is None or int(match["count"]) != count:
        _fail(shard.path, f"it is one of {count} shards, but is not named like NAME-00001-of-{count:05d}.gguf",
              "Give all shards of the model their original names.")
    number = shard.split_value("split.no") + 1
    if number != int(match["number"]):
        _fail(shard.path, f"it is shard {number} of {count} by its metadata, which its name contradicts",
              "Give all shards of the model their original names.")
    return [os.path.join(directory, f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def _check_split(shards: list[_Shard]) -> None:
    """Shards that agree on their number, their order and the number of tensors."""
    for index, shard in enumerate(shards):
        found = shard.split_value("split.no"), shard.split_value("split.count")
        if found != (index, len(shards)):
            _fail(shard.path, f"expected shard {index + 1} of {len(shards)}, its metadata says {found[0] + 1} of "
                  f"{found[1]}", _FETCH_SHARDS)
    expected = shards[0].split_value("split.tensors.count")
    total = sum(len(shard.tensors) for shard in shards)
    if total != expected:
        _fail(shards[0].path, f"the {len(shards)} shards hold {total} tensors, {expected} were split", _FETCH_SHARDS)


def _check_path(path: str) -> None:
    try:
        sound = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        sound = False
    if not sound:
        _fail(repr(path), "no file can have this path", "Check the path.")


def _read_shard(path: str) -> _Shard:
    """Map one file, parse its header, and unmap it."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            nbytes = os.fstat(file.fileno()).st_size
            start = file.read(32)
            if not start.startswith(_MAGIC):
                _refuse_magic(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view, \
                    view[:HEADER_LIMIT] as header:
                return _Header(path, nbytes, header).parse()
    except FileNotFoundError:
        shard = _SHARD_NAME.fullmatch(os.path.basename(path))
        advice = _FETCH_SHARDS if shard else "Check the path."
        _fail(path, f"{'shard' if shard else 'file'} not found", advice)
    except OSError as error:
        _fail(path, f"cannot be read ({error.strerror or error})", "Check its permissions and the disk.")


def _open_regular(path: str, flags: int) -> int:
    """Open without waiting on pipes, and refuse what is not a regular file."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    what = "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
    _fail(path, what, "Give the path of a .gguf file (of a split model: of any shard).")


def _refuse_magic(path: str, start: bytes) -> NoReturn:
    if not start:
        _fail(path, "the file is empty", _FETCH_AGAIN)
    for prefix, advice in _LOOKALIKES:
        if start.startswith(prefix):
            _fail(path, f"not a GGUF file (it starts with {start[:4]!r})", advice)
    _fail(path, f"not a GGUF file (it starts with {start[:4]!r}, not {_MAGIC!r})",
          "Give a GGUF file; models in other formats are converted with llama.cpp's convert_hf_to_gguf.py.")


class _Header:
    """A cursor over the header of one file; `part` names what is being read, for errors."""

    def __init__(self, path: str, nbytes: int, view: memoryview):
        self.path = path
        self.nbytes = nbytes
        self.view = view
        self.at = 0
        self.part = "the header"
        self.elements_left = ELEMENT_LIMIT
        self.arrays_left = ENTRY_LIMIT

    def fail(self, what: str, advice: str = _DAMAGED) -> NoReturn:
        _fail(self.path, what, advice)

    def parse(self) -> _Shard:
        self.at = len(_MAGIC)
        version = self.read_version()
        num_tensors = self.read(_U64)
        num_entries = self.read(_U64)
        self.check_count(num_entries, _MIN_ENTRY_BYTES, "metadata entries")
        self.check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        metadata = self.read_metadata(num_entries)
        alignment = self.alignment(metadata)
        tensors = self.read_tensors(num_tensors, alignment)
        _check_layout(self.path, self.nbytes, tensors)
        return _Shard(self.path, self.nbytes, version, metadata, {tensor.name: tensor for tensor in tensors}, self.at)

    def read_version(self) -> int:
        version = self.read(_U32)
        if version in (2, 3):
            return version
        if version == 1:
            self.fail("GGUF version 1 is not supported (2 and 3 are)", "Convert the model anew.")
        if version and version & 0xFFFF == 0:
            self.fail("it is a big-endian GGUF file", "Convert the model anew as a little-endian file.")
        self.fail(f"GGUF version {version} is unknown (2 and 3 are supported)",
                  "If the file is sound, it is newer than this reader: update ferrum.")

    def take(self, nbytes: int) -> int:
        """Start of the next `nbytes` bytes, which are then behind the cursor."""
        left = len(self.view) - self.at
        if nbytes > left:
            if len(self.view) < self.nbytes:
                self.fail(f"{self.part} lies past the first {HEADER_LIMIT >> 20} MiB, the limit for a header")
            self.fail(f"the file ends inside {self.part} ({nbytes} bytes needed, {left} left)", _FETCH_AGAIN)
        start = self.at
        self.at += nbytes
        return start

    def read(self, layout: Struct):
        return layout.unpack_from(self.view, self.take(layout.size))[0]

    def read_string(self) -> str:
        start = self.take(self.read(_U64))
        try:
            return str(self.view[start:self.at], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{self.part} is not UTF-8 ({error.reason} at its byte {error.start})")

    def read_name(self) -> str:
        name = self.read_string()
        if not name or len(name) > NAME_LIMIT:
            self.fail(f"{self.part} is {len(name)} characters long (1 to {NAME_LIMIT} expected)")
        return name

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        """A count that the bytes left can hold and that is not absurd, before anything is sized by it."""
        left = self.nbytes - self.at
        if count > left // min_bytes:
            self.fail(f"{self.part} claims {count} {what}, which {left} bytes cannot hold", _FETCH_AGAIN)
        if count > ENTRY_LIMIT:
            self.fail(f"{self.part} claims {count} {what} (at most {ENTRY_LIMIT} are accepted)")

    def read_metadata(self, count: int) -> dict:
        metadata: dict = {}
        for index in range(count):
            self.part = f"the key of metadata entry {index + 1} of {count}"
            key = self.read_name()
            self.part = f"the value of {_quote(key)}"
            if key in metadata:
                self.fail(f"the metadata key {_quote(key)} appears twice")
            metadata[key] = self.read_value(self.read(_U32))
        return metadata

    def read_value(self, type_id: int):
        if type_id in _NUMBERS:
            return self.read(_NUMBERS[type_id][0])
        if type_id == _STRING:
            return self.read_string()
        if type_id == _ARRAY:
            return self.read_array(depth=1)
        if type_id == _BOOL:
            return self.read_bools(1)[0]
        self.fail_value_type(type_id)

    def read_array(self, depth: int):
        if depth > DEPTH_LIMIT:
            self.fail(f"{self.part} nests arrays deeper than {DEPTH_LIMIT}")
        self.arrays_left -= 1
        if self.arrays_left < 0:
            self.fail(f"{self.part} is past the {ENTRY_LIMIT} arrays that are accepted per file")
        item_type = self.read(_U32)
        count = self.read(_U64)
        if count > self.elements_left:
            self.fail(f"{self.part} is an array of {count} elements (at most {ELEMENT_LIMIT} are accepted per file)")
        self.elements_left -= count
        if item_type in _NUMBERS:
            return self.read_numbers(item_type, count)
        if item_type == _STRING:
            return self.read_strings(count)
        if item_type == _BOOL:
            return self.read_bools(count)
        if item_type == _ARRAY:
            self.check_count(count, _MIN_ARRAY_BYTES, "nested arrays")
            return [self.read_array(depth + 1) for _ in range(count)]
        self.fail_value_type(item_type)

    def read_numbers(self, type_id: int, count: int) -> array:
        layout, typecode = _NUMBERS[type_id]
        start = self.take(count * layout.size)
        numbers = array(typecode)
        numbers.frombytes(self.view[start:self.at])
        return numbers

    def read_bools(self, count: int) -> list[bool]:
        start = self.take(count)
        values = bytes(self.view[start:self.at])
        if values.strip(b"\0\1"):
            self.fail(f"{self.part} holds a bool that is neither 0 nor 1")
        return [value == 1 for value in values]

    def read_strings(self, count: int) -> StringArray:
        start = self.at
        try:
            self.at = _native().skip_strings(self.view, start, count)
        except ValueError as error:
            self.fail(f"{self.part} is an array of {count} strings that runs out of bytes: {error}", _FETCH_AGAIN)
        return StringArray(bytes(self.view[start:self.at]), count, f"{self.path}: {self.part}")

    def fail_value_type(self, type_id: int) -> NoReturn:
        self.fail(f"{self.part} has the unknown metadata type {type_id} (0 to 12 are known)")

    def alignment(self, metadata: dict) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            shown = alignment if isinstance(alignment, int) else f"a {type(alignment).__name__}"
            self.fail(f"general.alignment is {shown} (a power of two, 8 or more, expected)")
        return alignment

    def read_tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        tensors = [self.read_tensor(f"entry {index + 1} of {count} of the tensor table", alignment)
                   for index in range(count)]
        data_start = -(-self.at // alignment) * alignment
        return [tensor._replace(offset=data_start + tensor.offset) for tensor in tensors]

    def read_tensor(self, entry: str, alignment: int) -> TensorInfo:
        """A row of the table; its offset is still relative to the start of the tensor data."""
        self.part = entry
        name = self.read_name()
        self.part = f"tensor {_quote(name)}"
        num_dims = self.read(_U32)
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"{self.part} has {num_dims} dimensions (1 to {MAX_DIMS} expected)")
        dims = [self.read(_U64) for _ in range(num_dims)]
        type_id = self.read(_U32)
        offset = self.read(_U64)
        if 0 in dims:
            self.fail(f"{self.part} has a dimension of zero")
        if offset % alignment:
            self.fail(f"{self.part} starts at offset {offset}, which is not a multiple of the alignment {alignment}")
        quant = QUANT_TYPES.get(type_id)
        if quant is None:
            self.fail(f"{self.part} has the unknown type id {type_id} (0 to {max(QUANT_TYPES)}, some withdrawn)",
                      "Quantize the model anew with a current llama.cpp, or update ferrum if the file is newer.")
        # GGUF lists the fastest dimension first: dims[0] is the length of a row.
        if dims[0] % quant.block_size:
            self.fail(f"{self.part} has rows of {dims[0]} values, not a multiple of {quant.name}'s block of "
                      f"{quant.block_size}")
        nbytes = math.prod(dims) // quant.block_size * quant.block_bytes
        return TensorInfo(name, type_id, quant.name, tuple(reversed(dims)), 0, offset, nbytes)


def _check_layout(path: str, file_bytes: int, tensors: list[TensorInfo]) -> None:
    """Tensors with names of their own, inside the file, that do not overlap."""
    names = set()
    previous = None
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            _fail(path, f"the tensor name {_quote(tensor.name)} appears twice", _DAMAGED)
        names.add(tensor.name)
        if tensor.offset + tensor.nbytes > file_bytes:
            _fail(path, f"tensor {_quote(tensor.name)} (bytes {tensor.offset} to {tensor.offset + tensor.nbytes}) "
                  f"lies outside the file of {file_bytes} bytes", _FETCH_AGAIN)
        if previous and previous.offset + previous.nbytes > tensor.offset:
            _fail(path, f"tensors {_quote(previous.name)} and {_quote(tensor.name)} overlap", _DAMAGED)
        previous = tensor


def _native():
    """The native extension, imported where it is used: importing this module costs nothing."""
    from ferrum_native import _native

    return _native


def _quote(name: str) -> str:
    """A name from a file, fit to be shown in one line."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _fail(path: str, what: str, advice: str) -> NoReturn:
    raise ModelFileError(f"{path}: {what}. {advice}") from None
