"""The manifest: what a job is, so that whoever resumes it resumes the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from ferrum.batch.files import Places, write_whole
from ferrum.errors import BatchError

_VERSION = 1


def save(places: Places, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({"manifest_version": _VERSION, **manifest}, indent=2)

    def write(file: IO[bytes]) -> None:
        file.write(text.encode() + b"\n")

    write_whole(places.manifest + ".part", places.manifest, write)


def load(places: Places) -> dict[str, Any] | None:
    """The manifest of an output; None if there is none. BatchError where it cannot be understood."""
    try:
        with open(places.manifest, "rb") as file:
            manifest = json.loads(file.read())
        version = manifest.pop("manifest_version")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
        raise BatchError(f"{places.manifest} is damaged: it does not say what job this was. "
                         "Give another place for the results, or remove it with the journal to start anew.") from None
    if version != _VERSION:
        raise BatchError(f"{places.manifest} is of version {version!r}, this ferrum writes {_VERSION}. Resume with the ferrum that began the job "
                         f"({manifest.get('ferrum', 'unknown')}).")
    return manifest


def differences(manifest: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where what is given is not what the manifest has, a line each; what is not given is no difference."""
    had = dict(_leaves(manifest))
    lines = []
    for name, value in _leaves(given):
        if name not in had:
            lines.append(f"{name}: the manifest has nothing, given is {_shown(value)}")
        elif had[name] != value:
            lines.append(f"{name}: the manifest has {_shown(had[name])}, given is {_shown(value)}")
    return lines


def _leaves(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and name not in ("logit_bias", "template_options"):
            yield from _leaves(item, f"{above}{name}.")
        else:
            yield f"{above}{name}", item


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
