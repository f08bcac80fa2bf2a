"""Rows to JSON and back."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _plain(value: Any) -> Any:
    """What JSON has for a value that it does not know: numbers and lists of arrays and their scalars, else text."""
    if hasattr(value, "tolist"):  # numpy, torch
        return value.tolist()
    return bytes(value).decode("utf-8", "backslashreplace") if isinstance(value, (bytes, bytearray)) else str(value)


_readable = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain)
_ascii = json.JSONEncoder(allow_nan=False, default=_plain)
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def to_json(value: Any) -> bytes:
    """One line of UTF-8; infinities and NaN, which JSON has not, are null, arrays are lists, and what it cannot hold is its text."""
    try:
        return _readable.encode(value).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no UTF-8, but JSON can write it
        return _ascii.encode(value).encode()
    except ValueError:
        return to_json(_finite(value))


def from_json(line: bytes) -> Any:
    """ValueError, or RecursionError, for what is no JSON."""
    return _decoder.decode(line.decode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
