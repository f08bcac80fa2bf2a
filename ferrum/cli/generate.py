"""`generate`: continue one text or answer one message, streaming it as it comes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ferrum.cli.arguments import Parser, add_settings, given_settings, utf8
from ferrum.cli.output import BOLD, DIM, ProgressLine, json_line, note, program, shown, styled
from ferrum.cli.running import ending, first_token, load, log_to_stderr, note_profile, rate, reading, sampling_params, template_variables, tokens
from ferrum.errors import OptionError
from ferrum.options import EngineOptions
from ferrum.outputs import Usage
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import LLM, Stream
    from ferrum.outputs import CompletionOutput, RequestOutput

_USAGE = "[PROMPT|-] [--chat] [-m MODEL.gguf] [options]"
_DESCRIPTION = """\
Continue a text, or with --chat answer a message. What is generated streams to
stdout, then one line of statistics goes to stderr.

On a terminal the text to continue is shown first, in bold. In a pipe or a file
stdout is exactly the continuation and one newline; of several texts
(--num-samples) each stands under a line with its number and seed. Ctrl-C ends
the text and keeps it. Exit code: 0, 1 error, 2 wrong usage, 130 ended by
Ctrl-C, 141 the reader of a pipe went away."""
_EXAMPLES = """\
  {program} generate "Once upon a time"
  {program} generate "The little fox" -n 60 --temperature 0
  {program} generate --chat "Tell me a story about a fox."
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
    parser.add_chat(text)
    add_settings(parser.add_argument_group("sampling"), SamplingParams)
    parser.add_engine()
    parser.add_output(
        "print one line of JSON (ASCII) a text at the end in place of text and statistics",
        verbose_help="tell on stderr what is loaded, planned and drawn",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    options = given_settings(arguments, EngineOptions)
    _check(arguments, params)
    prompt = _read_prompt(arguments.prompt)
    log_to_stderr(arguments.verbose)
    with load(arguments.model, options) as llm:
        interrupted = False
        if params.n > 1:
            output, interrupted = _generate(llm, prompt, params, arguments)
            _show_all(output, arguments)
        else:
            interrupted = _show(_stream(llm, prompt, params, arguments), arguments, prompt)
        if not arguments.json:
            _hint(llm, arguments)
        note_profile(llm)
    return 130 if interrupted else 0


def _check(arguments: argparse.Namespace, params: SamplingParams) -> None:
    for name in ("system", "no_think"):
        if getattr(arguments, name) and not arguments.chat:
            raise OptionError(f"--{name.replace('_', '-')} goes with --chat: without it the text is continued as it is.")
    if not arguments.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise OptionError("--logprobs and --prompt-logprobs show in --json only. Add --json.")


def _messages(arguments: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    system = [] if arguments.system is None else [{"role": "system", "content": utf8(arguments.system, "--system")}]
    return [*system, {"role": "user", "content": prompt}]


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


def _generate(llm: LLM, prompt: str, params: SamplingParams, arguments: argparse.Namespace) -> tuple[RequestOutput, bool]:
    """Several texts of one prompt, and whether Ctrl-C ended them: then they are as far as they came."""
    if arguments.chat:
        request = llm.request_chat(_messages(arguments, prompt), params, template_variables(arguments))
    else:
        request = llm.request(prompt, params)
    try:
        with ProgressLine(lambda: f"{params.n} texts, {sum(text.length for text in request.texts)} tokens"):
            llm.run([request])
    except KeyboardInterrupt:
        return request.output(), True
    return request.output(), False


def _stream(llm: LLM, prompt: str, params: SamplingParams, arguments: argparse.Namespace) -> Stream:
    if arguments.chat:
        return llm.stream_chat(_messages(arguments, prompt), params, **template_variables(arguments))
    return llm.stream(prompt, params)


def _show(stream: Stream, arguments: argparse.Namespace, prompt: str) -> bool:
    """Show one text as it comes; whether Ctrl-C ended it."""
    with stream:
        interrupted = _consume(stream, "" if arguments.chat else prompt, silent=arguments.json)
        output = stream.output
    if arguments.json:
        print(_json_line(output, output.outputs[0]))
    else:
        note(styled(_statistics(output), DIM, sys.stderr))
    return interrupted


def _consume(stream: Stream, prompt: str, *, silent: bool) -> bool:
    """Run the stream to its end, or to Ctrl-C, and show the text; whether it was Ctrl-C."""
    out = sys.stdout
    length = 0
    interrupted = False
    def echo() -> None:
        """The prompt, once it was read: until then the line of progress stands where it will."""
        if not silent and out.isatty():
            out.write(styled(shown(prompt, out), BOLD, out))
            out.flush()

    try:
        try:
            with reading(stream):
                piece = next(stream, None)
        finally:
            echo()
        while piece is not None:
            if not silent:
                out.write(shown(piece.text, out))
                out.flush()
                length += len(piece.text)
            piece = next(stream, None)
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    if not silent:
        out.write(shown(stream.completion.text[length:], out) + "\n")
        out.flush()
    return interrupted


def _show_all(output: RequestOutput, arguments: argparse.Namespace) -> None:
    """Several texts of one prompt, each under a line that tells them apart."""
    for completion in output.outputs:
        if arguments.json:
            print(_json_line(output, completion))
        else:
            seed = "" if completion.seed is None else f", seed {completion.seed}"
            print(styled(f"[{completion.index + 1} of {len(output.outputs)}{seed}]", DIM, sys.stdout))
            print(shown(completion.text, sys.stdout))
    if not arguments.json:
        note(styled(_statistics(output), DIM, sys.stderr))


def _hint(llm: LLM, arguments: argparse.Namespace) -> None:
    if not arguments.chat and llm.tokenizer.chat_template:
        note(styled("[this model has a chat template: --chat makes the prompt a message to answer]", DIM, sys.stderr))


def _statistics(output: RequestOutput) -> str:
    usage, timings, texts = output.usage, output.timings, output.outputs
    decoded = max(usage.completion_tokens - len(texts), 0)  # the first token of each text comes from the prefill
    parts = [f"prefill {tokens(usage.prompt_tokens)}"]
    if usage.completion_tokens:
        parts[0] += f" {rate(timings.prefill_tokens_per_s)}"
        parts.append(f"decode {tokens(decoded)}" + (f" {rate(timings.decode_tokens_per_s)}" if decoded else ""))
        parts.append(first_token(timings))
    parts.append(ending(texts[0]) if len(texts) == 1 else f"{len(texts)} texts")
    return f"[{', '.join(parts)}]"


def _json_line(output: RequestOutput, completion: CompletionOutput) -> str:
    """prompt, the fields of the completion, its usage, the request's timings; log-probabilities where asked for."""
    fields = asdict(completion)
    if completion.logprobs is None:
        del fields["logprobs"], fields["cumulative_logprob"]
    asked: dict[str, Any] = {}
    if output.prompt_logprobs is not None:
        asked["prompt_logprobs"] = [place and {id: asdict(logprob) for id, logprob in place.items()} for place in output.prompt_logprobs]
    generated = len(completion.token_ids)
    usage = Usage(output.usage.prompt_tokens, generated, output.usage.prompt_tokens + generated)
    return json_line({"prompt": output.prompt, **fields, **asked, "usage": asdict(usage), "timings": asdict(output.timings)})
