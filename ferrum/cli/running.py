"""What the commands that run a model share: loading it, the parameters of a text, and how it went in words."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from ferrum.cli.arguments import given_settings, utf8
from ferrum.cli.output import ProgressLine, note, size
from ferrum.cli.profile_table import profile_lines
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import LLM, Stream
    from ferrum.outputs import CompletionOutput, Timings


def sampling_params(arguments: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """What the flags say; `defaults` are a command's own."""
    given = given_settings(arguments, SamplingParams)
    if "stop" in given:
        given["stop"] = tuple(utf8(text, "--stop") for text in given["stop"])
    return SamplingParams(**{**defaults, **given})


def template_variables(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"enable_thinking": False} if arguments.no_think else {}


def load(model: str | None, options: dict[str, Any]) -> LLM:
    """The model, with a line of progress on a terminal while a large file is read."""
    from ferrum.llm import LLM

    with ProgressLine() as line:
        return LLM(model, **options, progress=lambda done, total: line.show(f"loading {done / total:.0%} of {size(total)}"))


def reading(stream: Stream) -> ProgressLine:
    """A line of progress on a terminal while a long prompt is read."""
    total = len(stream.prompt_token_ids)
    return ProgressLine(lambda: f"reading the prompt: {stream.prompt_tokens_read} of {total} tokens")


def tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}/s" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}/s"


def first_token(timings: Timings) -> str:
    seconds = timings.first_token_s
    return f"first token {seconds * 1000:.0f} ms" if seconds < 1 else f"first token {seconds:.1f} s"


def ending(completion: CompletionOutput) -> str:
    """Why the text ended."""
    if completion.finish_reason == "cancelled":
        return "Ctrl-C"
    if completion.notice:
        return completion.notice.rstrip(".")
    if completion.finish_reason == "length":
        return f"limit of {tokens(len(completion.token_ids))} (-n)"
    if isinstance(completion.stop_reason, str):
        return f"stop string {completion.stop_reason!r}"
    return "end of text"


def note_profile(llm: LLM) -> None:
    """What the ops of all steps cost, where that was asked for."""
    if profile := llm.profile():
        note("\n".join(profile_lines(profile, llm.engine.measure_bandwidth(), llm.engine.measure_product_rate())))


def log_to_stderr(verbose: bool = False) -> None:
    """Warnings of the logger, or everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ferrum: %(message)s"))
    logger = logging.getLogger("ferrum")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
