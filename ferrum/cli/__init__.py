"""The command line: `python -m ferrum COMMAND`, also installed as `ferrum`.

A command is a module with `parser()` and `run(arguments) -> exit code`, and a row in COMMANDS.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from ferrum.cli.output import close_quietly, note, note_error, prepare_streams, program

# name: (module, what it does)
COMMANDS = {
    "generate": ("ferrum.cli.generate", "continue a text"),
    "chat": ("ferrum.cli.chat", "talk with the model, turn by turn"),
    "batch": ("ferrum.cli.batch", "run a file of prompts, with results in a file"),
    "bench": ("ferrum.cli.bench", "measure how fast a model runs on this machine"),
    "inspect": ("ferrum.cli.inspect", "show what is in a model file and what memory it would take"),
}

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 error, 2 usage, 130 Ctrl-C, 141 broken pipe, 143 SIGTERM (batch)."""
    from ferrum.errors import FerrumError, OptionError

    prepare_streams()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            note("")  # the shell's prompt starts on its own line
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        close_quietly()
        return EXIT_BROKEN_PIPE
    except OptionError as error:
        note_error(error)
        return EXIT_USAGE
    except FerrumError as error:
        note_error(error)
    except OSError as error:
        close_quietly()
        note_error(error)
    except ImportError as error:
        if not (error.name or "").startswith("ferrum_native"):
            raise
        note(f"error: The native engine is not built for this Python ({sys.executable}).\n"
             "Run `pip install .` in ferrum's directory.")
    return EXIT_ERROR


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return EXIT_OK if argv else EXIT_USAGE
    if argv[0] in ("-V", "--version"):
        from ferrum import __version__

        print(f"ferrum {__version__}")
        return EXIT_OK
    if argv[0] not in COMMANDS:
        note(_unknown(argv[0]))
        return EXIT_USAGE
    command = import_module(COMMANDS[argv[0]][0])
    return command.run(command.parser().parse_args(argv[1:]))


def _help() -> str:
    rows = "\n".join(f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items())
    return f"""\
usage: {program()} COMMAND [options]

Runs Qwen3-MoE language models. A small demo model is built in.

commands:
{rows}

  {program()} COMMAND --help shows a command's options with examples.
  {program()} --version shows the version.

start here:
  {program()} generate "Once upon a time"
  {program()} chat"""


def _unknown(name: str) -> str:
    if close := get_close_matches(name, COMMANDS, n=1):
        hint = f"Did you mean {close[0]}?"
    elif name.startswith("-") or not name.isidentifier():
        hint = f'To continue a text: {program()} generate "Once upon a time"'
    else:
        hint = f"Commands: {', '.join(COMMANDS)}."
    return f"error: There is no command {name!r}. {hint}\nMore: {program()} --help"
