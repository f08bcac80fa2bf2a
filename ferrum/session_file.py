"""A sequence of an engine in a file: its tokens and their keys and values, so that it goes on in another process without being computed anew.

The file is laid out as safetensors (https://huggingface.co/docs/safetensors): 8 bytes of the header's length, a JSON header, raw tensors. Its
`__metadata__` says what the engine must be for the numbers to be its own, and the SHA-256 of the tensors.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from contextlib import suppress
from hashlib import sha256
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ferrum.errors import SessionFileError
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine

VERSION = 1
_HEADER_LIMIT = 1 << 20  # bytes; a sound header has some hundred
_DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_AGAIN = "Save the session anew."


def save(path: str | os.PathLike, engine: Engine, file: GGUFFile, tokens: list[int], kv: np.ndarray) -> None:
    """Write tokens, and what `Engine.export_kv` gave of the first of them, to `path`, whole or not at all; `file` is the engine's model.

    Raises SessionFileError, or ValueError where the tokens are fewer than those of `kv`.
    """
    if len(tokens) < kv.shape[2]:
        raise ValueError(f"keys and values of {kv.shape[2]} tokens were given with {len(tokens)} tokens. Give those that they are of.")
    parts = [memoryview(np.array(tokens, "<i4")).cast("B"), memoryview(kv.reshape(-1).view(np.uint8))]
    header: dict[str, Any] = {"__metadata__": {**_made_by(engine, file), "sha256": _checksum(parts)}}
    offset = 0
    for name, dtype, shape, part in (("tokens", "I32", [len(tokens)], parts[0]), ("kv", _NAMES[kv.dtype], list(kv.shape), parts[1])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + part.nbytes]}
        offset += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        _write(os.path.abspath(path), [len(text).to_bytes(8, "little"), text, *parts])
    except OSError as error:
        _fail(path, f"cannot be written ({error.strerror or error})", "Check the folder, its permissions and the disk.")


def load(path: str | os.PathLike, engine: Engine, file: GGUFFile) -> tuple[list[int], np.ndarray]:
    """What `save` wrote: the tokens, and what `Engine.import_kv` takes of the first of them.

    Raises SessionFileError that names what is wrong, or different from this engine.
    """
    expected = _made_by(engine, file)
    try:
        with open(path, "rb", opener=_without_waiting) as source:
            header, tokens, kv = _read(path, source, expected)
    except OSError as error:
        _fail(path, f"cannot be read ({error.strerror or error})", "Check the path and its permissions.")
    if _checksum([memoryview(tokens).cast("B"), memoryview(kv.reshape(-1).view(np.uint8))]) != header.get("sha256"):
        _fail(path, "its contents do not match their checksum", "It is damaged. " + _AGAIN)
    if (kv.shape, kv.dtype) != engine.kv_layout(kv.shape[2]) or not (0 <= tokens.min() and tokens.max() < engine.config["vocab_size"]):
        _fail(path, "its contents do not fit this engine", _AGAIN)
    return tokens.tolist(), kv


def _made_by(engine: Engine, file: GGUFFile) -> dict[str, str]:
    """What must be the same where a session is saved and loaded, in words that errors show."""
    config, options = engine.config, engine.options
    shape = {name: config[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
    device = re.match(r"\w+", engine.device)
    return {
        "format": "ferrum session", "version": str(VERSION), "model": file.fingerprint(), "device": device.group() if device else engine.device,
        "kv_type": options["kv_type"], "activations": options["activations"], **{name: str(value) for name, value in shape.items()},
    }


def _read(path: str | os.PathLike, source: BinaryIO, expected: dict[str, str]) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """The metadata and both tensors, once the header is what this engine writes."""
    nbytes = os.fstat(source.fileno()).st_size
    length = int.from_bytes(source.read(8), "little")
    if nbytes < 8 or not 2 <= length <= min(nbytes - 8, _HEADER_LIMIT):
        _fail(path, "is not a saved session, or was cut short", _AGAIN)
    try:
        header = json.loads(source.read(length))
        metadata = {str(name): str(value) for name, value in header["__metadata__"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _fail(path, "is not a saved session: its header cannot be read", _AGAIN)
    _compare(path, metadata, expected)
    try:
        count, dtype = header["tokens"]["shape"][0], _DTYPES[header["kv"]["dtype"]]
        shape = tuple(header["kv"]["shape"])
        ends = [header[name]["data_offsets"] for name in ("tokens", "kv")]
        sizes = [4 * count, dtype.itemsize * int(np.prod(shape, dtype=object))]
        sound = (len(shape) == 5 and all(type(n) is int and n > 0 for n in (count, *shape)) and shape[2] <= count
                 and ends == [[0, sizes[0]], [sizes[0], sum(sizes)]])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        sound = False
    if not sound:
        _fail(path, "its header contradicts itself", "It is damaged. " + _AGAIN)
    if nbytes != 8 + length + sum(sizes):
        _fail(path, f"has {nbytes} bytes, but its header says {8 + length + sum(sizes)}", "It was cut short or added to. " + _AGAIN)
    tokens, kv = np.empty(count, "<i4"), np.empty(shape, dtype)
    for array in (tokens, kv):
        if source.readinto(memoryview(array.reshape(-1).view(np.uint8))) != array.nbytes:  # type: ignore[attr-defined]
            _fail(path, "became shorter while it was read", _AGAIN)
    return metadata, tokens, kv


def _compare(path: str | os.PathLike, metadata: dict[str, str], expected: dict[str, str]) -> None:
    if metadata.get("format") != expected["format"]:
        _fail(path, "is not a saved session of ferrum", "Check the path.")
    version = metadata.get("version", "")
    if version != expected["version"]:
        newer = version.isascii() and version.isdigit() and int(version[:9]) > VERSION
        _fail(path, f"has version {version or 'none'} of the format, this ferrum reads {VERSION}", "Update ferrum." if newer else _AGAIN)
    if metadata.get("model") != expected["model"]:
        _fail(path, "is of another model", "Load the model that it was saved with.")
    for name, value in expected.items():
        if metadata.get(name) != value:
            _fail(path, f"was saved with {name} {metadata.get(name)}, this engine has {value}", f"Use the same {name}, or save the session anew.")


def _checksum(parts: list[memoryview]) -> str:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _write(path: str, parts: list[bytes | memoryview]) -> None:
    """Write a file beside its place, see that it is on the disk, and put it there: whoever opens it finds the old one or all of the new."""
    folder = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".")
    try:
        with open(descriptor, "wb") as out:
            out.writelines(parts)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _without_waiting(path: str, flags: int) -> int:
    """For `open`: a pipe without a writer is read as empty, not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _fail(path: str | os.PathLike, what: str, advice: str) -> NoReturn:
    raise SessionFileError(f"{os.fsdecode(path)}: {what}. {advice}") from None
