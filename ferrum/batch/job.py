"""A job with an output file: begun, gone on with, ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from ferrum import __version__
from ferrum.batch import manifest as manifests
from ferrum.batch.encoding import to_json
from ferrum.batch.files import Lock, Places, remove, write_whole
from ferrum.batch.index import Index
from ferrum.batch.journal import Entry, Finished, Journal, Outputs
from ferrum.batch.model import Model
from ferrum.batch.progress import Progress
from ferrum.batch.rows import Keys, Preparer
from ferrum.batch.runner import Runner
from ferrum.batch.settle import Given, asked_of, key_job, manifest_of, settled
from ferrum.batch.sources import check_source, compressed, is_path, is_pipe, spool
from ferrum.errors import BatchError, OptionError

if TYPE_CHECKING:
    from ferrum.llm import LLM


@dataclass(frozen=True)
class Summary:
    """What a run of a job came to: `rows` of the job, all of them done, and of those `errors`.

    `rows_before` were done by runs before; tokens and `seconds` are of this run. Where all of them were, nothing was run.
    """

    output: str
    rows: int
    errors: int
    rows_before: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """What of a call changes no result: `again` is how to go on, in words for errors."""

    resume: bool = False
    retry_errors: bool = False
    max_errors: int | None = None
    limit: int | None = None
    progress: Callable[[Progress], None] = field(default=lambda progress: None)
    again: str = "run(..., resume=True)"

    @classmethod
    def of(cls, **call: Any) -> Run:
        """Checked; what is None is the default. Raises OptionError."""
        self = cls(**{name: value for name, value in call.items() if value is not None})
        for name in ("limit", "max_errors"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise OptionError(f"{name} is {value!r}: expected a whole number of rows, 0 or more.")
        if self.retry_errors and not self.resume:
            raise OptionError("retry_errors goes with resume: it runs the error rows of a job before anew.")
        return self


class Job:
    """A job, of `rows` (a path, an open pipe of lines, or dicts) into `output`."""

    def __init__(self, rows: str | os.PathLike | IO[bytes] | Iterable[Mapping[str, Any]], output: str | os.PathLike, model: Model,
                 given: Given, run: Run):
        self._rows = rows
        self._places = Places.of(output)
        self._model = model
        self._given = given
        self._run = run
        self._progress = Progress(None)

    def run(self) -> Summary:
        """Run what is not done. Whatever ends it early leaves the finished rows in the journal."""
        self._places.check()
        try:
            with Lock(self._places.lock):
                return self._run_locked()
        except OSError as error:
            raise self._disk_error(error.filename or self._places.output, error) from error

    def _run_locked(self) -> Summary:
        before = manifests.load(self._places)
        self._check_existing(before)
        index = self._index(before)
        manifest = self._manifest(before, index)
        if before is not None and self._has_ended(before, index):
            return self._nothing_to_do(before)
        return self._run_all(manifest, index)

    def _check_existing(self, before: dict[str, Any] | None) -> None:
        places, run = self._places, self._run
        if before is None:
            for path in (places.output, places.journal):
                if os.path.lexists(path):
                    raise BatchError(f"{path} exists, and is not of a job that could go on here (there is no {os.path.basename(places.manifest)}). "
                                     "It is not overwritten: give another place for the results, or remove it.")
        elif not run.resume:
            if before["finished"]:
                raise BatchError(f"{places.output} is of a job that has finished. It is not overwritten: give another place for the results, or remove "
                                 f"it and {os.path.basename(places.manifest)}.")
            raise BatchError(f"{places.manifest} is of a job that has not finished. To begin anew, remove it and {os.path.basename(places.journal)}. "
                             f"To go on: {run.again}")

    def _index(self, before: dict[str, Any] | None) -> Index:
        """The input, from a file of ours where it was a pipe or rows of Python."""
        if is_path(self._rows):
            path = os.fspath(self._rows)
            check_source(path)
            if os.path.realpath(path) == self._places.output:
                raise BatchError(f"{path} is both the input and the output. Give another place for the results.")
        else:
            path = self._places.spool
            if before is None or not is_pipe(self._rows):
                spool(self._rows, path)
            elif not os.path.exists(path):
                raise BatchError(f"{path}, where the job kept what it read from the pipe, is gone. Begin anew with another place for the results.")
        self._progress = Progress(None)
        prefix = 0 if before is None else before["input"]["rows"]
        return Index(path, self._run.limit, prefix=prefix, progress=self._reading)

    def _reading(self, rows: int) -> None:
        self._progress.done = rows
        self._run.progress(self._progress)

    def _manifest(self, before: dict[str, Any] | None, index: Index) -> dict[str, Any]:
        """What the job is; BatchError with every difference where another one was begun."""
        given = {"ferrum": __version__, "model": self._model.identity(before), "options": self._model.given_options(), **self._given.manifest()}
        name = os.fspath(self._rows) if is_path(self._rows) else "-"
        input = {"path": name, "rows": len(index), "sha256": index.sha256, "complete": index.complete}
        if before is None:
            return {**given, "options": self._model.telling_options(), **manifest_of(settled(self._given)), "input": input, "finished": False,
                    "counts": {"rows": len(index), "done": 0, "errors": 0}}
        compared = {**given, "model": {name: given["model"][name] for name in ("bytes", "fingerprint")}, "input": _same_input(before["input"], index)}
        if lines := manifests.differences(before, compared):
            raise BatchError(f"{self._places.manifest} is of another job.\n" + "\n".join(f"  {line}." for line in lines) +
                             "\nGive what it began with, or leave out what need not be given; for another job, give another place for the results.")
        return {**before, "model": given["model"], "input": input}

    def _has_ended(self, before: dict[str, Any], index: Index) -> bool:
        if not before["finished"] or len(index) > before["input"]["rows"]:
            return False
        if self._run.retry_errors and before["counts"]["errors"]:
            return False
        if os.path.exists(self._places.output):
            return True
        if os.path.exists(self._places.journal):
            return False
        raise BatchError(f"{self._places.manifest} is of a job that has finished, but its output is gone. To run it anew, remove the manifest.")

    def _nothing_to_do(self, before: dict[str, Any]) -> Summary:
        self._clear(before)
        counts = before["counts"]
        return Summary(self._places.output, counts["rows"], counts["errors"], counts["rows"], 0, 0, 0.0)

    def _run_all(self, manifest: dict[str, Any], index: Index) -> Summary:
        places, run = self._places, self._run
        keys = Keys(key_job(manifest))
        finished = self._finished(index, keys)
        if run.retry_errors:
            finished.forget_errors()
        manifest = {**manifest, "finished": False, "counts": _counts(finished, len(index))}
        if finished.done < len(index):
            with self._model.loaded(manifest["options"]) as llm:
                manifests.save(places, manifest)
                try:
                    self._run_rows(llm, Preparer(llm, asked_of(manifest), self._model.name), index, keys, finished)
                except BaseException:
                    self._note_counts(manifest)
                    raise
        else:
            manifests.save(places, manifest)
        return self._finish(manifest, index, keys)

    def _finished(self, index: Index, keys: Keys) -> Finished:
        finished = Finished(len(index))
        if os.path.exists(self._places.journal):
            try:
                finished.read(self._places.journal, lambda row: index.key(row, keys))
            except KeyError as error:
                raise BatchError(f"{self._places.journal} is of another job: its row {error.args[0]} has another key than in the input. "
                                 "Put back the journal of this job, or give another place for the results.") from None
        return finished

    def _run_rows(self, llm: LLM, preparer: Preparer, index: Index, keys: Keys, finished: Finished) -> None:
        """Run the rows that are not done."""
        places, run = self._places, self._run
        runner = Runner(llm, preparer.prepare)
        progress = self._progress = Progress(len(index), finished.done, finished.errors, finished.done, unfinished_tokens=runner.unfinished_tokens)
        journal = Journal(places.journal, finished.end)
        try:
            run.progress(progress)
            self._check_errors(progress)
            for row in runner.run(index.rows(keys, finished.__contains__)):
                result, prompt_tokens, completion_tokens = preparer.result(row)
                journal.add(Entry(row.index, row.key.hex(), row.error is not None, prompt_tokens, completion_tokens, to_json(result)))
                progress.count(row.error is not None, prompt_tokens, completion_tokens)
                run.progress(progress)
                self._check_errors(progress)
        except OSError as error:
            raise self._disk_error(places.journal, error) from error
        finally:
            self._close(journal)

    def _note_counts(self, manifest: dict[str, Any]) -> None:
        """For people who look at the manifest of a job that has stopped: what counts is the journal."""
        progress = self._progress
        with suppress(OSError):
            manifests.save(self._places, {**manifest, "counts": {"rows": progress.rows, "done": progress.done, "errors": progress.errors}})

    def _close(self, journal: Journal) -> None:
        try:
            journal.close()
        except OSError as error:
            raise self._disk_error(self._places.journal, error) from error

    def _check_errors(self, progress: Progress) -> None:
        if self._run.max_errors is not None and progress.errors > self._run.max_errors:
            raise BatchError(f"{progress.errors} rows are error rows, more than max_errors {self._run.max_errors} allows: the job stops. "
                             f"{progress.done} of {progress.rows} rows are done and kept in {self._places.journal}. "
                             f"See its lines with \"error\": true; to go on, raise max_errors, or run them anew with retry_errors: {self._run.again}")

    def _disk_error(self, path: str, error: OSError) -> BatchError:
        return BatchError(f"{path} cannot be written ({error.strerror or error}). Every row that was finished is kept in {self._places.journal}. "
                          f"Make room, or mend the disk, and go on with: {self._run.again}")

    def _finish(self, manifest: dict[str, Any], index: Index, keys: Keys) -> Summary:
        """Put the output together, in the order of the input, and clear away what nobody needs any more."""
        places = self._places
        finished = self._finished(index, keys)
        outputs = Outputs(places.journal, finished.offsets)
        if places.output.endswith(".parquet"):
            from ferrum.batch.parquet import write

            write_whole(places.part, places.output, lambda file: write(file, outputs))
        else:
            write_whole(places.part, places.output, lambda file: _write_lines(file, places.output, outputs))
        manifest = {**manifest, "finished": True, "counts": _counts(finished, len(index))}
        manifests.save(places, manifest)
        self._clear(manifest)
        progress = self._progress
        return Summary(places.output, len(index), finished.errors, progress.done_before if progress.rows is not None else len(index),
                       progress.prompt_tokens, progress.completion_tokens, progress.seconds)

    def _clear(self, manifest: dict[str, Any]) -> None:
        """The journal stays where somebody may want to go on: with error rows, or with more rows of the input."""
        if manifest["input"]["complete"] and not manifest["counts"]["errors"]:
            remove(self._places.journal)
            remove(self._places.spool)


def _write_lines(file: IO[bytes], path: str, outputs: Outputs) -> None:
    with compressed(file, path) as packed:
        for line in outputs:
            packed.write(line + b"\n")


def _counts(finished: Finished, rows: int) -> dict[str, int]:
    return {"rows": rows, "done": finished.done, "errors": finished.errors}


def _same_input(before: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """What must be as it was: all rows, or where the job was limited its first ones, and then at least those."""
    if not before["complete"] and len(index) >= before["rows"]:
        return {"rows": before["rows"], "sha256": index.prefix_sha256}
    return {"rows": len(index), "sha256": index.sha256}
