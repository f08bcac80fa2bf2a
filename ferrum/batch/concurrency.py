"""How many rows run at once, and the KV cache for them.

A job has always a next row, so the more run together the better: every step reads the weights once for all of them. What limits it is
memory, and past some number nothing is gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferrum.errors import OptionError, OutOfMemory
from ferrum.memory_plan import Plan, plan
from ferrum.options import DEFAULT, GIVEN, available_memory

AUTO = "auto"
SEQUENCES = (64, 32, 16)  # the first that the memory holds
TOKENS_EACH = 512  # of prompt and text, on average; longer rows wait for each other
_SHARE = 4  # the KV cache takes at most one part in so many of the memory that is available


def sized(path: str, options: Mapping[str, Any], sources: Mapping[str, str], concurrency: int | str | None) -> dict[str, Any]:
    """Options of the engine for a job.

    `concurrency` rows, or as "auto" (None: unless max_sequences is set) 64, or half or a quarter where the memory holds no more. Where
    kv_tokens and memory_budget are not set: 512 tokens of KV cache for each, within a quarter of the memory that is available, and not
    less than the engine's default.
    """
    options = dict(options)
    if concurrency not in (None, AUTO):
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= 65536:
            raise OptionError(f"concurrency is {concurrency!r}: expected auto, or a whole number of rows from 1 to 65536.")
        if sources["max_sequences"] == GIVEN and options["max_sequences"] != concurrency:
            raise OptionError(f"concurrency is {concurrency} and max_sequences is {options['max_sequences']}: they are the same. Give one of them.")
        options["max_sequences"] = concurrency
        planned = plan(path, **options)
    elif concurrency == AUTO or sources["max_sequences"] == DEFAULT:
        for sequences in SEQUENCES:
            options["max_sequences"] = sequences
            try:
                planned = plan(path, **options)
                break
            except OutOfMemory:
                if sequences == SEQUENCES[-1]:
                    raise
    else:
        planned = plan(path, **options)
    if sources["kv_tokens"] == DEFAULT and sources["memory_budget"] == DEFAULT:
        options["kv_tokens"] = _kv_tokens(planned)
    return options


def _kv_tokens(planned: Plan) -> int | None:
    """Tokens of KV cache; None leaves them to the engine."""
    memory = available_memory()
    if memory is None:
        return None
    each = min(TOKENS_EACH, planned.config["context_length"])
    fitting = (memory - planned.total_bytes) // _SHARE // planned.kv_bytes_per_token
    wanted = min(planned.options["max_sequences"] * each, fitting)
    return wanted if wanted > planned.options["kv_tokens"] else None
