"""What a job would be: every row read, checked and tokenized, nothing run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ferrum.batch.index import Index
from ferrum.batch.model import Model
from ferrum.batch.rows import Keys, Preparer, error_type
from ferrum.batch.settle import Given, key_job, manifest_of, settled
from ferrum.batch.sources import check_source
from ferrum.memory_plan import Plan, plan
from ferrum.request import Scoring

_SHOWN = 10  # error rows that are described


@dataclass(frozen=True)
class Check:
    """Figures of a job: `errors` are the first error rows, as (line, type, message); `most_completion_tokens` if no text ends early."""

    rows: int
    error_rows: int
    errors: list[tuple[int, str, str]]
    prompt_tokens: int
    longest_prompt: int
    longest_line: int
    most_completion_tokens: int
    plan: Plan


def checked(path: str | os.PathLike, model: Model, given: Given, limit: int | None, progress: Callable[[int, int], None]) -> Check:
    """Read and check every row. Raises what a job would before it begins."""
    path = os.fspath(path)
    check_source(path)
    index = Index(path, limit)
    asked = settled(given)
    manifest = {"model": model.identity(None), "options": model.telling_options(), **manifest_of(asked)}
    keys = Keys(key_job(manifest))
    errors: list[tuple[int, str, str]] = []
    error_rows = prompt_tokens = longest = longest_line = most = 0
    with model.loaded(manifest["options"]) as llm:
        preparer = Preparer(llm, asked, model.name)
        context = min(llm.config["context_length"], llm.engine.kv_capacity)
        for row in index.rows(keys, lambda row: False):
            preparer.prepare(row)
            progress(row.index, len(index))
            if row.error is not None:
                error_rows += 1
                if len(errors) < _SHOWN:
                    errors.append((row.line, error_type(row.error), str(row.error)))
                continue
            request = row.request
            if isinstance(request, Scoring):
                tokens = max(len(part.tokens) for part in request.parts)
                prompt_tokens += sum(len(ids) for _, ids in request.continuations) + tokens - max(len(ids) for _, ids in request.continuations)
            elif request is not None:
                tokens = len(request.prompt_token_ids)
                prompt_tokens += tokens
                room = context - tokens + 1
                most += request.params.n * (room if request.params.max_tokens is None else min(request.params.max_tokens, room))
            if tokens > longest:
                longest, longest_line = tokens, row.line
        planned = plan(llm.model, **llm.options)
    return Check(len(index), error_rows, errors, prompt_tokens, longest, longest_line, most, planned)
