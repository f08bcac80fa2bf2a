"""What a model would take, before it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ferrum.gguf_file import GGUFFile
from ferrum.options import resolve


@dataclass(frozen=True)
class Plan:
    """The memory that an LLM with these options takes, in bytes, and what it would be.

    `weights_bytes` are mapped from the file, in place; `weights_extra_bytes` are copies that the device makes of
    weights; `kv_bytes` hold `options["kv_tokens"]` tokens of `kv_bytes_per_token`; `scratch_bytes` are fixed.
    """

    model: str
    device: str
    weights_bytes: int
    weights_extra_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    scratch_bytes: int
    total_bytes: int
    config: dict[str, Any]
    options: dict[str, Any]


def plan(
    model: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    kv_tokens: int | None = None,
    memory_budget: int | str | None = None,
    kv_type: str | None = None,
    activations: str | None = None,
    max_sequences: int | None = None,
    prefill_chunk: int | None = None,
    max_logit_rows: int | None = None,
    prefix_cache: bool | None = None,
    profile: bool | None = None,
) -> Plan:
    """The plan of an LLM with these options: only the file's header is read, nothing is allocated.

    With `memory_budget` the KV cache is fitted to it. Raises OutOfMemory with the figures where that cannot be, and
    otherwise what LLM raises.
    """
    from ferrum_native._native import plan as native_plan

    resolved = resolve(model, dict(
        device=device, threads=threads, kv_tokens=kv_tokens, memory_budget=memory_budget, kv_type=kv_type, activations=activations,
        max_sequences=max_sequences, prefill_chunk=prefill_chunk, max_logit_rows=max_logit_rows, prefix_cache=prefix_cache, profile=profile))
    return Plan(model=resolved.model, **native_plan(GGUFFile.open(resolved.model), **resolved.options.arguments()))
