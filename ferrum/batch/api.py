"""`run`: a batch job from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import IO, TYPE_CHECKING, Any, Literal, overload

from ferrum.batch.job import Job, Run, Summary
from ferrum.batch.model import Model
from ferrum.batch.progress import Progress
from ferrum.batch.rows import Keys, Preparer, Row, custom_id_of, digest_of, parsed
from ferrum.batch.runner import Runner
from ferrum.batch.settle import Given, key_job, manifest_of, settled
from ferrum.batch.sources import Line, check_source, is_path, lines_of, lines_of_rows
from ferrum.errors import BatchError, OptionError
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import LLM

Rows = str | os.PathLike | Iterable[Mapping[str, Any]]


@overload
def run(
    rows: Rows, output: None = None, *, llm: LLM | None = ..., model: str | os.PathLike | None = ...,
    params: SamplingParams | Mapping[str, Any] | None = ..., format: Literal["ferrum", "openai"] | None = ..., chat: bool | None = ...,
    system: str | None = ..., template_options: Mapping[str, Any] | None = ..., prompt_field: str | None = ..., template: str | None = ...,
    concurrency: int | Literal["auto"] | None = ..., in_order: bool = ..., limit: int | None = ..., max_errors: int | None = ...,
    progress: Callable[[Progress], None] | None = ..., **engine_options: Any,
) -> Generator[dict[str, Any], None, None]: ...
@overload
def run(
    rows: Rows | IO[bytes], output: str | os.PathLike, *, llm: LLM | None = ..., model: str | os.PathLike | None = ...,
    params: SamplingParams | Mapping[str, Any] | None = ..., format: Literal["ferrum", "openai"] | None = ..., chat: bool | None = ...,
    system: str | None = ..., template_options: Mapping[str, Any] | None = ..., prompt_field: str | None = ..., template: str | None = ...,
    concurrency: int | Literal["auto"] | None = ..., resume: bool = ..., retry_errors: bool = ..., limit: int | None = ...,
    max_errors: int | None = ..., progress: Callable[[Progress], None] | None = ..., **engine_options: Any,
) -> Summary: ...


def run(
    rows: Rows | IO[bytes],
    output: str | os.PathLike | None = None,
    *,
    llm: LLM | None = None,
    model: str | os.PathLike | None = None,
    params: SamplingParams | Mapping[str, Any] | None = None,
    format: Literal["ferrum", "openai"] | None = None,
    chat: bool | None = None,
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    prompt_field: str | None = None,
    template: str | None = None,
    concurrency: int | Literal["auto"] | None = None,
    in_order: bool = True,
    resume: bool = False,
    retry_errors: bool = False,
    limit: int | None = None,
    max_errors: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    **engine_options: Any,
) -> Summary | Generator[dict[str, Any], None, None]:
    """Run every row of a file, or of an iterable of dicts, and give what became of each.

    A row has a `prompt` (text or token ids) or `messages`, and may have: a `custom_id`, text or a whole number that no other row
    has; `params`, fields of SamplingParams that override those of the job; `continuations`, whose log-likelihoods are then
    computed in place of a text; and for messages `tools`, `documents`, `chat_template_kwargs`, `add_generation_prompt` and
    `continue_final_message`. Requests of OpenAI's batch format are rows too. A path may end in .gz, .zst or .parquet; otherwise a
    file holds a JSON object per line.

    The result of a row has its `custom_id` (else a key made of the row, the params and the model), the other fields of the row,
    and `text`, `token_ids`, `finish_reason`, `seed` where it was sampled, and `usage`. With n > 1 `outputs` is a list of those,
    with continuations `scores` is one of theirs. A row that could not be run has `error` with `type` and `message`. A field of
    the row with a name of these is passed on as `input_<name>`.

    With `output`, the results are there in the order of the rows once all are done, and a Summary is returned. Until then
    finished rows are in OUTPUT.journal, each on the disk before it counts, and OUTPUT.manifest.json says what the job is: after a
    crash, `resume` goes on with it, and the output is byte for byte what it would have been (on the CPU). `resume` of what was
    not begun begins it; of what has finished it does nothing, unless `retry_errors` runs error rows anew. With `resume`, what is
    not given is as the job began; what is given must be so too. Rows of an iterable are kept in OUTPUT.input.jsonl meanwhile, and
    must come again to resume.

    Without `output`, results are yielded as dicts: in the order of the rows (those that end early are held back), or with
    `in_order` False as they end. Rows are taken from the iterable as there is room for them.

    params: SamplingParams, or a dict of fields, of rows that do not say otherwise; its seed is the job's, from which with a row's
        key each row's own is made.
    format: "ferrum" or "openai", of the results.
    chat: prompts are messages to answer, after `system`; `template_options` are those of `LLM.chat`.
    prompt_field: the field that holds the prompt. template: Jinja source that makes it, or the message, of a row's fields.
    llm: a model that is open; else `model` and options as of LLM, and how many rows run at once: see `concurrency.sized`.
    limit: run only the first rows. max_errors: stop after more error rows than that.
    progress: called with a Progress as the input is read, and each time a row has ended.

    Raises BatchError where the job cannot begin or go on (a repeated custom_id, an output that exists, another job's manifest, a
    full disk, too many error rows), OptionError, errors of LLM, and DeviceError where the engine fails whatever it is given.
    """
    given = dict(params=params, format=format, chat=chat, system=system, template_options=template_options,
                 prompt_field=prompt_field, template=template)
    return run_with(rows, output, Model(llm, model, engine_options, concurrency), given, in_order=in_order, resume=resume, retry_errors=retry_errors,
                    limit=limit, max_errors=max_errors, progress=progress)


def run_with(rows: Any, output: Any, model: Model, given: Mapping[str, Any], *, in_order: bool = True, **call: Any) -> Any:
    """`run` with a model that is opened in its own way."""
    asked = Given.of(**given)
    how = Run.of(**call)
    if output is not None:
        return Job(rows, output, model, asked, how).run()
    if how.resume:
        raise OptionError("resume goes with output: without it nothing is kept that could be gone on with.")
    return _stream(rows, model, asked, in_order, how)


def _stream(rows: Any, model: Model, given: Given, in_order: bool, run: Run) -> Generator[dict[str, Any], None, None]:
    """Results as rows end, with nothing kept."""
    if is_path(rows):
        check_source(os.fspath(rows))
        lines = lines_of(os.fspath(rows))
    else:
        lines = lines_of_rows(rows)
    asked = settled(given)
    manifest = {"model": model.identity(None), "options": model.telling_options(), **manifest_of(asked)}
    keys = Keys(key_job(manifest))
    with model.loaded(manifest["options"]) as llm:
        preparer = Preparer(llm, asked, model.name)
        runner = Runner(llm, preparer.prepare)
        progress = Progress(None, unfinished_tokens=runner.unfinished_tokens)
        held: dict[int, dict[str, Any]] = {}
        following = 0
        with closing(runner.run(_rows(lines, keys, run.limit))) as ended:
            for row in ended:
                result, prompt_tokens, completion_tokens = preparer.result(row)
                progress.count(row.error is not None, prompt_tokens, completion_tokens)
                run.progress(progress)
                held[row.index if in_order else following] = result
                while following in held:
                    yield held.pop(following)
                    following += 1
                if run.max_errors is not None and progress.errors > run.max_errors:
                    raise BatchError(f"{progress.errors} rows are error rows, more than max_errors {run.max_errors} allows.")


def _rows(lines: Iterable[Line], keys: Keys, limit: int | None) -> Iterator[Row]:
    """Rows with their keys, in one reading; BatchError where a custom_id comes a second time."""
    seen: dict[bytes, int] = {}
    first: dict[bytes, int] = {}
    for index, line in enumerate(lines):
        if limit is not None and index >= limit:
            return
        fields, error = parsed(line)
        id = custom_id_of(fields)
        digest = digest_of(line, id)
        occurrence = seen.get(digest, 0)
        if occurrence and id is not None:
            raise BatchError(f"custom_id {id!r} is there twice (rows {first[digest]} and {line.number}). Give every row one of its own, or none.")
        seen[digest] = occurrence + 1
        if id is not None:
            first[digest] = line.number
        yield keys.row(index, line, digest, occurrence, fields, error)
