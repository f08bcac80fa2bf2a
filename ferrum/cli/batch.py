"""`batch`: a file of prompts in, a file of results out."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from ferrum.cli.arguments import Parser, add_settings, given_settings, utf8
from ferrum.cli.output import ProgressLine, json_line, note, printable, program, size, terminal_width
from ferrum.cli.running import log_to_stderr, rate, template_variables
from ferrum.errors import OptionError
from ferrum.options import EngineOptions
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.batch.dry_run import Check
    from ferrum.batch.job import Summary
    from ferrum.batch.progress import Progress
    from ferrum.llm import LLM

_USAGE = "INPUT -o OUTPUT [--resume] [-m MODEL.gguf] [options]"
_DESCRIPTION = """\
Run every row of a file, many at once, and write what became of each, in the
order of the input. A row is a JSON object on a line of its own:

  {"prompt": "Once upon a time"}
  {"custom_id": "q7", "messages": [{"role": "user", "content": "Hello"}]}
  {"prompt": "2 + 2 =", "continuations": [" 4", " 5"]}

A row may have "params" (fields such as temperature, over those of the flags),
and fields of its own, which are passed on. With "continuations" the result is
how likely each is. Requests in OpenAI's batch format are rows too. The result
has "text", "token_ids", "finish_reason" and "usage", or "error" for a row that
cannot be run: then the job goes on.

Until the job has finished its rows are in OUTPUT.journal, each on the disk as
soon as it ends (`tail -f` shows them): whatever happens, the same command with
--resume goes on where it was, and the output is the same to the byte (on the
CPU) as without the interruption. OUTPUT.manifest.json says what the job is. The
journal stays while there are error rows, for --retry-errors, or rows beyond
--limit.

Exit code: 0 all rows are done (error rows are counted in the last line;
--max-errors makes them matter), 1 error, 2 wrong usage, 130 Ctrl-C, 143
SIGTERM."""
_EXAMPLES = """\
  {program} batch prompts.jsonl -o results.jsonl
  {program} batch prompts.jsonl -o results.jsonl --resume
  {program} batch prompts.jsonl --dry-run
  {program} batch questions.jsonl -o answers.jsonl --prompt-field question --chat
  {program} batch table.parquet -o out.parquet --template prompt.jinja -n 50
  {program} batch openai.jsonl -o results.jsonl --format openai
  zcat rows.gz | {program} batch - -o results.jsonl --temperature 0

Every flag under "model and engine" can also be set by an environment variable
FERRUM_<NAME>, such as FERRUM_MODEL or FERRUM_KV_TOKENS; flags come first."""

_PERIOD = 1.0  # seconds between two lines of --json-progress
_BAR = 20


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends what Ctrl-C ends."""


def parser() -> Parser:
    parser = Parser("batch", _USAGE, _DESCRIPTION, _EXAMPLES.format(program=program()))
    rows = parser.add_argument_group("rows")
    rows.add_argument("input", metavar="INPUT", nargs="?", help="""JSON lines, in a file that may end in .gz or .zst; a .parquet file; or "-":
        stdin, which is kept in OUTPUT.input.jsonl until the job has finished""")
    rows.add_argument("-o", "--output", metavar="OUTPUT", help="file for the results: JSON lines (.gz, .zst: compressed) or .parquet")
    rows.add_argument("--format", choices=("ferrum", "openai"), metavar="ferrum|openai",
                      help="of the results: ferrum's, or OpenAI's batch output (default: ferrum)")
    rows.add_argument("--prompt-field", metavar="NAME", help="the field of a row that holds the prompt")
    rows.add_argument("--template", metavar="FILE", help="a Jinja file that makes the prompt of a row's fields")
    parser.add_chat(rows, prompt="every prompt", without="rows with messages are answered anyway")
    rows.add_argument("--limit", type=_count, metavar="N", help="run only the first N rows; a later --resume may go on with more")
    job = parser.add_argument_group("job")
    job.add_argument("--resume", action="store_true", help="""go on with the job of OUTPUT, or begin it if it was not begun. Flags
        that are not given are as it began, those that are given must be""")
    job.add_argument("--retry-errors", action="store_true", help="with --resume: run error rows anew")
    job.add_argument("--max-errors", type=_count, metavar="N", help="stop after more than N error rows (default: never)")
    job.add_argument("--concurrency", type=_concurrency, metavar="auto|N", help="""rows that run at once: the engine's max_sequences.
        auto: 64 (32 or 16 in little memory), with a KV cache of 512 tokens for each where a quarter of the memory that is
        available holds it (default: auto)""")
    job.add_argument("--dry-run", action="store_true", help="""read, check and count the tokens of all rows, show what memory the job
        would take, and run nothing""")
    add_settings(parser.add_argument_group("sampling, of rows that do not say otherwise"), SamplingParams)
    parser.add_engine(without=("max_sequences", "profile"), defaults={"kv_tokens": "see --concurrency"})
    shown = parser.add_output()
    shown.add_argument("--json-progress", action="store_true", help="tell on stderr how far the job is as one line of JSON a second")
    shown.add_argument("--quiet", action="store_true", help="tell nothing but errors")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of rows")
    return int(text)


def _concurrency(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    params = given_settings(arguments, SamplingParams)
    if "stop" in params:
        params["stop"] = tuple(utf8(text, "--stop") for text in params["stop"])
    given = dict(
        params=params, format=arguments.format, chat=arguments.chat or None,
        system=None if arguments.system is None else utf8(arguments.system, "--system"),
        template_options=template_variables(arguments) or None, prompt_field=arguments.prompt_field, template=_template(arguments.template),
    )
    options = given_settings(arguments, EngineOptions)
    log_to_stderr()
    if arguments.dry_run:
        return _dry_run(arguments, given, options)
    return _run(arguments, given, options)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.input is None:
        raise OptionError(f"The input is missing: give a file of rows, or - for stdin.\nFor example: {program()} batch prompts.jsonl -o results.jsonl")
    if arguments.output is None and not arguments.dry_run:
        raise OptionError("The output is missing: say with -o where the results shall be.")
    if arguments.output == "-":
        raise OptionError("-o - is no file: a job keeps what it needs to go on beside its output. Give the path of a file (./- for one of that name).")
    for name in ("system", "no_think"):
        if getattr(arguments, name) and not arguments.chat:
            raise OptionError(f"--{name.replace('_', '-')} goes with --chat: without it prompts are continued as they are.")
    if arguments.prompt_field is not None and arguments.template is not None:
        raise OptionError("--template makes the prompt of all fields of a row, --prompt-field takes one: give one of them.")
    if arguments.retry_errors and not arguments.resume:
        raise OptionError("--retry-errors goes with --resume: it runs the error rows of a job before anew.")
    if arguments.input == "-" and arguments.dry_run:
        raise OptionError("--dry-run reads a file: give one in place of -.")


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise OptionError(f"--template {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise OptionError(f"--template {path} is not UTF-8 text.") from None


def _run(arguments: argparse.Namespace, given: dict[str, Any], options: dict[str, Any]) -> int:
    from ferrum.batch.api import run_with
    from ferrum.batch.model import Model

    again = _resume_command()
    watch = _Watch(arguments)
    rows = sys.stdin.buffer if arguments.input == "-" else arguments.input
    signals = _Signals()
    try:
        with watch, signals:
            model = Model(None, arguments.model, options, arguments.concurrency, watch.open_llm)
            summary = run_with(rows, arguments.output, model, given, resume=arguments.resume, retry_errors=arguments.retry_errors,
                               max_errors=arguments.max_errors, limit=arguments.limit, progress=watch.take, again=again)
    except KeyboardInterrupt as stopped:
        by, code = ("SIGTERM", 143) if isinstance(stopped, Terminated) else ("Ctrl-C", 130)
        progress = watch.progress
        if progress is None or progress.rows is None:
            note(f"Stopped by {by} before any row was run. Begin again with: {again}")
        else:
            note(f"Stopped by {by}: {_rows(progress.done)} of {progress.rows:,} are done and kept.\nGo on with: {again}")
        return code
    watch.tell_end(summary, arguments)
    return 0


def _resume_command() -> str:
    given = sys.argv[1:]
    words = program().split() + given + ([] if "--resume" in given else ["--resume"])
    return shlex.join(words)


class _Signals:
    """SIGTERM ends the job as Ctrl-C does; a second of either ends the process at once, which loses no row."""

    _CODES = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> _Signals:
        self._before = {code: signal.signal(code, self._stop) for code in self._CODES}
        return self

    def _stop(self, code: int, frame: object) -> None:
        for each in self._CODES:
            signal.signal(each, signal.SIG_DFL)
        raise Terminated if code == signal.SIGTERM else KeyboardInterrupt

    def __exit__(self, *exc: object) -> None:
        for code, handler in self._before.items():
            if signal.getsignal(code) == self._stop:  # else one has come, and the next ends the process
                signal.signal(code, handler)


class _Watch:
    """Tells the person at the terminal, or a program, how far the job is."""

    def __init__(self, arguments: argparse.Namespace):
        self.progress: Progress | None = None
        self._json, self._quiet = arguments.json_progress, arguments.quiet
        self._line: ProgressLine | None = None
        self._loading = ""
        self._told = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Watch:
        if self._json:
            self._thread = threading.Thread(target=self._tell_json, daemon=True)
            self._thread.start()
        elif not self._quiet:
            self._line = ProgressLine(self._text)
            self._line.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            if self.progress is not None and self.progress.rows is not None:
                self._write_json(self.progress, "finished" if exc[0] is None else "stopped")
        if self._line is not None:
            self._line.__exit__(*exc)

    def open_llm(self, model: str, options: dict[str, Any]) -> LLM:
        from ferrum.llm import LLM

        def loading(done: int, total: int) -> None:
            self._loading = f"loading {done / total:.0%} of {size(total)}"

        llm = LLM(model, **options, progress=loading)
        self._loading = ""
        self._engine = f"{_rows(llm.options['max_sequences'])} at once, KV cache of {llm.engine.kv_capacity:,} tokens"
        return llm

    def take(self, progress: Progress) -> None:
        self.progress = progress
        if progress.rows is not None and not self._told:
            self._told = True
            if not self._json and not self._quiet:
                self._begin(progress)

    def _begin(self, progress: Progress) -> None:
        before = f", {progress.done_before:,} of them done before" if progress.done_before else ""
        note(f"[{_rows(progress.rows)}{before}; {self._engine}]")

    def tell_end(self, summary: Summary, arguments: argparse.Namespace) -> None:
        from ferrum.batch.progress import Progress

        if self._json and (self.progress is None or self.progress.rows is None):  # nothing was run
            self._write_json(Progress(summary.rows, summary.rows, summary.errors, summary.rows), "finished")
        if self._json or self._quiet:
            return
        errors = _errors(summary.errors)
        if not summary.rows:
            note(f"[no rows to run; the output is empty: {printable(summary.output)}]")
        elif summary.rows_before == summary.rows:
            note(f"[nothing to do: all {_rows(summary.rows)} were done before, {errors}; results in {printable(summary.output)}]")
        else:
            ran = summary.rows - summary.rows_before
            before = f" ({ran:,} in this run)" if summary.rows_before else ""
            seconds = max(summary.seconds, 1e-9)
            note(f"[{_rows(summary.rows)}{before}, {errors}; {summary.prompt_tokens:,} tokens in, {summary.completion_tokens:,} out, {_time(seconds)}, "
                 f"{rate(summary.completion_tokens / seconds)}; results in {printable(summary.output)}]")
        if summary.errors:
            retry = "" if arguments.retry_errors else " --retry-errors"
            note(f'[error rows have a field "error"; to run them anew: {_resume_command()}{retry}]')

    def _text(self) -> str:
        progress = self.progress
        if self._loading:
            return self._loading
        if progress is None:
            return "reading the input"
        if progress.rows is None:
            return f"reading the input: {_rows(progress.done)}"
        if progress.done >= progress.rows:
            return "writing the output"
        share = progress.done / progress.rows
        filled = int(share * _BAR)
        bar = "#" * filled + "." * (_BAR - filled)
        left = progress.seconds_left
        parts = [f"{bar} {progress.done:,}/{progress.rows:,} rows {share:.0%}"]
        if progress.errors:
            parts.append(_errors(progress.errors))
        parts.append(f"{rate(progress.tokens_per_s).replace('/s', ' tok/s')}" if progress.tokens_per_s else f"{progress.rows_per_s:.1f} rows/s")
        if left is not None:
            parts.append(f"{_time(left)} left")
        while len(text := ", ".join(parts)) > terminal_width() - 3 and len(parts) > 1:
            parts.pop(-2 if len(parts) > 2 else -1)  # the time left stays longest
        return text

    def _tell_json(self) -> None:
        while not self._done.wait(_PERIOD if self.progress is not None else 0.05):
            if self.progress is not None:
                self._write_json(self.progress, "reading" if self.progress.rows is None else "running")

    def _write_json(self, progress: Progress, state: str) -> None:
        left = progress.seconds_left
        note(json_line({
            "state": state, "rows": progress.rows, "done": progress.done, "errors": progress.errors, "done_before": progress.done_before,
            "prompt_tokens": progress.prompt_tokens, "completion_tokens": progress.completion_tokens, "tokens_per_s": round(progress.tokens_per_s, 2),
            "rows_per_s": round(progress.rows_per_s, 3), "seconds": round(progress.seconds, 3),
            "seconds_left": None if left is None else round(left, 1),
        }))


def _dry_run(arguments: argparse.Namespace, given: dict[str, Any], options: dict[str, Any]) -> int:
    from ferrum.batch.dry_run import checked
    from ferrum.batch.model import Model, open_unread
    from ferrum.batch.settle import Given

    with ProgressLine() as line:
        model = Model(None, arguments.model, options, arguments.concurrency, open_unread)
        check = checked(arguments.input, model, Given.of(**given), arguments.limit, lambda done, rows: line.show(f"checking row {done:,} of {rows:,}"))
    _show_check(check)
    return 0


def _show_check(check: Check) -> None:
    plan = check.plan
    print(f"rows           {check.rows:,}, of them {_errors(check.error_rows)}")
    for line, kind, message in check.errors:
        print(f"  line {line}: {kind}: {printable(message)}")
    if check.error_rows > len(check.errors):
        print(f"  and {check.error_rows - len(check.errors):,} more")
    where = f" (line {check.longest_line})" if check.longest_line else ""
    print(f"tokens in      {check.prompt_tokens:,}, at most {check.longest_prompt:,} in a row{where}")
    print(f"tokens out     at most {check.most_completion_tokens:,}")
    print(f"model          {plan.model} on {plan.device}")
    print(f"memory         {size(plan.total_bytes)}: weights {size(plan.weights_bytes + plan.weights_extra_bytes)}, KV cache {size(plan.kv_bytes)} for "
          f"{plan.options['kv_tokens']:,} tokens, scratch {size(plan.scratch_bytes)}")
    print(f"concurrency    {_rows(plan.options['max_sequences'])} at once")


def _rows(count: int | None) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _errors(count: int) -> str:
    return "no errors" if count == 0 else "1 error" if count == 1 else f"{count:,} errors"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
