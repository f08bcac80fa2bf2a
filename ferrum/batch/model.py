"""The model of a job: one that the caller has open, or one that is opened when rows are to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ferrum.batch.concurrency import sized
from ferrum.errors import OptionError
from ferrum.gguf_file import GGUFFile
from ferrum.options import DEFAULT, resolve

if TYPE_CHECKING:
    from ferrum.llm import LLM

# The options of the engine that change what is generated; threads, memory and the number of sequences do not.
TELLING_OPTIONS = ("device", "activations", "kv_type")

Opener = Callable[..., "LLM"]


def open_llm(model: str, options: Mapping[str, Any]) -> LLM:
    from ferrum.llm import LLM

    return LLM(model, **options)


def open_unread(model: str, options: Mapping[str, Any]) -> LLM:
    """A model to check rows with: its weights are not read ahead, for none of them are needed."""
    from ferrum.llm import LLM

    class Unread(LLM):
        def _read_ahead(self, planned: dict[str, Any], progress: Any) -> None:
            pass

    return Unread(model, **options)


class Model:
    """`llm`, or what `opener` opens of a path and options; of None, resuming takes what the job began with."""

    def __init__(self, llm: LLM | None, path: str | os.PathLike | None, options: Mapping[str, Any], concurrency: int | str | None,
                 opener: Opener = open_llm):
        if llm is not None and (path is not None or options or concurrency is not None):
            raise OptionError("llm is given, and so are model, concurrency or options of the engine: those are the llm's own. Give one or the other.")
        self._llm = llm
        self._options = dict(options)
        self._concurrency = concurrency
        self._opener = opener
        self._sources: dict[str, str] = {}
        if llm is not None:
            self._path = llm.model
        else:
            self._path, self._resolved, self._sources = resolve(path, options)

    @property
    def name(self) -> str:
        return os.path.basename(self._path).removesuffix(".gguf")

    def identity(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Path, size and fingerprint; of the model of a job before, where none is given."""
        if before is not None and self._sources.get("model") == DEFAULT:
            self._path = before["model"]["path"]
        file = self._llm.file if self._llm is not None else GGUFFile.open(self._path)
        return {"path": os.path.abspath(self._path), "bytes": file.file_bytes, "fingerprint": file.fingerprint()}

    def given_options(self) -> dict[str, Any]:
        """Of the telling options, those that the caller or the environment gives."""
        if self._llm is not None:
            return {**{name: self._llm.options[name] for name in TELLING_OPTIONS}, "device": self._llm.engine.device.split()[0]}
        values = {name: getattr(self._resolved, name) for name in TELLING_OPTIONS if self._sources[name] != DEFAULT}
        return {name: value for name, value in values.items() if value != "auto"}

    def telling_options(self) -> dict[str, Any]:
        """The telling options that will be in force."""
        if self._llm is not None:
            return self.given_options()
        from ferrum.memory_plan import plan

        planned = plan(self._path, **self._options)
        return {**{name: planned.options[name] for name in TELLING_OPTIONS}, "device": planned.device.split()[0]}

    @contextmanager
    def loaded(self, telling: Mapping[str, Any]) -> Iterator[LLM]:
        """The model, with the telling options of the job."""
        if self._llm is not None:
            yield self._llm
            return
        with self._opener(self._path, sized(self._path, {**self._options, **telling}, self._sources, self._concurrency)) as llm:
            yield llm
