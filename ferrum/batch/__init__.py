"""Batch jobs: a file of prompts in, a file of results out, whatever happens in between.

    import ferrum.batch

    summary = ferrum.batch.run("prompts.jsonl", "results.jsonl", params={"temperature": 0, "max_tokens": 200}, resume=True)

    for result in ferrum.batch.run({"prompt": text} for text in texts):
        print(result["text"])

`run` says what a row may hold and what becomes of it. `python -m ferrum batch` is the same on the command line.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False

_HOME = {"run": "ferrum.batch.api", "Summary": "ferrum.batch.job", "Progress": "ferrum.batch.progress"}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from ferrum.batch.api import run as run
    from ferrum.batch.job import Summary as Summary
    from ferrum.batch.progress import Progress as Progress


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'ferrum.batch' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
