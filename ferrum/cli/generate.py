"""`generate`: continue one text, streaming it as it comes."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from ferrum.cli.arguments import Parser, add_settings, given_settings, utf8
from ferrum.cli.output import BOLD, DIM, json_line, note, program, styled
from ferrum.errors import OptionError
from ferrum.options import EngineOptions
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import Completion, Stream

_USAGE = "[PROMPT|-] [-m MODEL.gguf] [-n N] [options]"
_DESCRIPTION = """\
Continue a text. The continuation streams to stdout, then one line of
statistics goes to stderr.

On a terminal the prompt is shown first, in bold. In a pipe or a file stdout is
exactly the continuation and one newline. Ctrl-C ends the text and keeps it.
Exit code: 0, 1 error, 2 wrong usage, 130 ended by Ctrl-C, 141 the reader
of a pipe went away."""
_EXAMPLES = """\
  {program} generate "Once upon a time"
  {program} generate "The little fox" -n 60 --temperature 0
  {program} generate "Tom said:" --stop $'\\n' --seed 7
  cat story.txt | {program} generate --json | jq -r .text
  {program} generate "Hello" -m Qwen3-30B-A3B-Q4_K_M.gguf -n 40

Every flag under "model and engine" can also be set by an environment variable
FERRUM_<NAME>, such as FERRUM_MODEL or FERRUM_KV_TOKENS; flags come first."""


def parser() -> Parser:
    parser = Parser("generate", _USAGE, _DESCRIPTION, _EXAMPLES.format(program=program()))
    text = parser.add_argument_group("text")
    text.add_argument("prompt", metavar="PROMPT", nargs="?", help="""the text to continue, UTF-8. "-" (or none, in a pipe)
        reads stdin to its end and drops one trailing newline. Control tokens such as <|im_start|> are recognised""")
    add_settings(parser.add_argument_group("sampling"), SamplingParams)
    parser.add_engine()
    parser.add_output(
        "print one line of JSON (ASCII) at the end in place of text and statistics",
        verbose_help="tell on stderr what is loaded, planned and drawn",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    given = given_settings(arguments, SamplingParams)
    if "stop" in given:
        given["stop"] = tuple(utf8(text, "--stop") for text in given["stop"])
    params = SamplingParams(**given)
    options = given_settings(arguments, EngineOptions)
    prompt = _read_prompt(arguments.prompt)
    if arguments.verbose:
        _log_to_stderr()

    from ferrum.llm import LLM

    with LLM(arguments.model, **options) as llm, closing(llm.stream(prompt, params)) as stream:
        interrupted = _consume(stream, prompt, silent=arguments.json)
        completion = stream.completion
    if arguments.json:
        print(_json_line(completion))
    else:
        note(styled(_statistics(completion), DIM, sys.stderr))
    return 130 if interrupted else 0


def _read_prompt(argument: str | None) -> str:
    example = f'For example: {program()} generate "Once upon a time"'
    if argument is not None and argument != "-":
        if not argument:
            raise OptionError(f"The prompt is empty: there is nothing to continue.\n{example}")
        return utf8(argument, "The prompt")
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise OptionError(f"A prompt is missing: give a text to continue, or pipe one in.\n{example}")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"The prompt on stdin is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}). "
                          "Convert it first, for example with iconv.") from None
    text = text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith("\n") else text
    if not text:
        raise OptionError(f"The prompt on stdin is empty: there is nothing to continue.\n{example}")
    return text


def _consume(stream: Stream, prompt: str, *, silent: bool) -> bool:
    """Run the stream to its end, or to Ctrl-C, and show the text; whether it was Ctrl-C."""
    out = sys.stdout
    shown = 0
    interrupted = False
    if not silent and out.isatty():
        out.write(styled(prompt, BOLD, out))
        out.flush()
    try:
        for piece in stream:
            if not silent:
                out.write(piece.text)
                out.flush()
                shown += len(piece.text)
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    if not silent:
        out.write(stream.completion.text[shown:] + "\n")
        out.flush()
    return interrupted


def _statistics(completion: Completion) -> str:
    usage, timings = completion.usage, completion.timings
    decoded = max(usage.completion_tokens - 1, 0)  # the first token comes from the prefill
    parts = [f"prefill {_tokens(usage.prompt_tokens)}"]
    if usage.completion_tokens:
        parts[0] += f" {_rate(timings.prefill_tokens_per_s)}"
        parts.append(f"decode {_tokens(decoded)}" + (f" {_rate(timings.decode_tokens_per_s)}" if decoded else ""))
        first = timings.first_token_s
        parts.append(f"first token {first * 1000:.0f} ms" if first < 1 else f"first token {first:.1f} s")
    return f"[{', '.join(parts)}, {_ending(completion)}]"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}/s" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}/s"


def _ending(completion: Completion) -> str:
    """Why the text ended."""
    if completion.finish_reason == "cancelled":
        return "Ctrl-C"
    if completion.notice:
        return completion.notice.rstrip(".")
    if completion.finish_reason == "length":
        return f"limit of {_tokens(completion.usage.completion_tokens)} (-n)"
    if isinstance(completion.stop_reason, str):
        return f"stop string {completion.stop_reason!r}"
    return "end of text"


def _json_line(completion: Completion) -> str:
    """prompt, text, token_ids, finish_reason, stop_reason, notice, usage, timings."""
    return json_line({name: value for name, value in asdict(completion).items() if name != "prompt_token_ids"})


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ferrum: %(message)s"))
    logger = logging.getLogger("ferrum")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
