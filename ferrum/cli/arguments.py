"""Command line flags, made from the settings of dataclasses."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from difflib import get_close_matches
from typing import Any, NoReturn

from ferrum.cli.output import program
from ferrum.options import EngineOptions, Setting, flag_name, settings_of


# What llama.cpp, mlx-lm and vLLM call flags of ours.
_ELSEWHERE = {
    "--temp": "--temperature", "-t": "--threads", "-c": "--kv-tokens", "--ctx-size": "--kv-tokens", "--max-model-len": "--kv-tokens",
    "--n-predict": "--max-tokens", "--repeat-penalty": "--repetition-penalty", "--typical": "--typical-p", "-s": "--seed",
    "-sys": "--system", "--system-prompt": "--system", "--cache-type-k": "--kv-type", "--max-num-seqs": "--max-sequences",
    "-b": "--prefill-chunk", "--batch-size": "--prefill-chunk", "-ctk": "--kv-type", "--ignore-eos-token": "--ignore-eos",
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **details: Any):
        width = min(shutil.get_terminal_size().columns, 80) - 1
        super().__init__(prog, max_help_position=26, width=width, **details)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-m, --model MODEL.gguf`: argparse of Python 3.12 and before writes the metavar after each name."""
        if not action.option_strings or action.metavar is None:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are two lines: what is wrong, where to read more."""

    def __init__(self, command: str, usage: str, description: str, examples: str):
        self.command = command
        super().__init__(
            prog=f"{program()} {command}",
            usage=f"{program()} {command} {usage}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        flags = [text for text in unknown if text.startswith("-")]
        if flags:
            self.error(f"there is no flag {flags[0]}{self._meant(flags[0])}")
        if unknown:
            self.error(self._unexpected(unknown[0]))
        return namespace

    def _meant(self, flag: str) -> str:
        """A flag of ours that looks like an unknown one, or has its meaning in other programs."""
        ours = [name for action in self._actions for name in action.option_strings]
        name = flag.split("=")[0].replace("_", "-")
        close = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in ours else get_close_matches(name, ours, n=1)
        return f". Did you mean {close[0]}?" if close else ""

    def _unexpected(self, text: str) -> str:
        if any(not action.option_strings for action in self._actions):
            return f"one text is expected, then came {text!r}: put quotes around a text of several words"
        return f"{self.command} takes no text, but {text!r} was given: name a model file with -m"

    def error(self, message: str) -> NoReturn:
        if valued := re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", message, re.DOTALL):
            message = f"{valued[1]} takes no value, but {valued[2]} was given"
        self.exit(2, f"error: {message[:1].upper()}{message[1:]}{'' if message.endswith('?') else '.'}\nMore: {self.prog} --help\n")

    @staticmethod
    def add_chat(group: argparse._ArgumentGroup, prompt: str = "PROMPT", without: str = "") -> None:
        """The flags about a conversation; `without`: what happens without --chat."""
        note = f" ({without})" if without else ""
        group.add_argument("--chat", action="store_true", help=f"answer {prompt} as a message, through the model's chat template{note}")
        group.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
        group.add_argument("--no-think", action="store_true", help="with --chat: ask a thinking model to answer at once")

    def add_engine(self, *, without: Collection[str] = (), defaults: Mapping[str, Any] = {}) -> None:
        """The flags about the model and the engine, but for some settings; `defaults` as of `add_settings`."""
        group = self.add_argument_group("model and engine")
        group.add_argument(
            "-m", "--model", metavar="MODEL.gguf",
            help="GGUF file to run; of a split model, any shard (default: FERRUM_MODEL, else the demo model)",
        )
        add_settings(group, EngineOptions, without=without, defaults=defaults)

    def add_output(self, json_help: str = "", verbose_help: str = "") -> argparse._ArgumentGroup:
        """The flags about what is shown; --json and --verbose where a command has them."""
        group = self.add_argument_group("output")
        if json_help:
            group.add_argument("--json", action="store_true", help=json_help)
        if verbose_help:
            group.add_argument("--verbose", action="store_true", help=verbose_help)
        group.add_argument("-h", "--help", action="help", help="show this page")
        return group


def add_settings(group: argparse._ArgumentGroup, cls: type, *, without: Collection[str] = (), defaults: Mapping[str, Any] = {}) -> None:
    """A flag for every setting of a dataclass that has one; `defaults` are shown where a command has its own."""
    for name, (field, rule) in settings_of(cls).items():
        if not rule.flag or name in without:
            continue
        names = filter(None, (rule.short_flag, flag_name(name, rule)))
        help = _help(rule, field.default, defaults.get(name)).replace("%", "%%")
        if rule.kind is bool:
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            group.add_argument(*names, dest=name, action=action, default=None, help=help)
        else:
            action = "append" if _repeated(rule) else "store"
            group.add_argument(*names, dest=name, metavar="|".join(rule.choices) or rule.metavar, action=action, help=help)


def given_settings(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of a dataclass that the command line gives, checked; OptionError names the flag."""
    values = {}
    for name, (_, rule) in settings_of(cls).items():
        given = getattr(arguments, name, None)
        if given is None:
            continue
        shown = f"{rule.short_flag} ({flag_name(name, rule)})" if rule.short_flag else flag_name(name, rule)
        if _repeated(rule):
            items = [rule.parse(text, shown) for text in given]
            values[name] = dict(items) if rule.mapping else tuple(items)
        else:
            values[name] = given if rule.kind is bool else rule.parse(given, shown)
    return values


def _repeated(rule: Setting) -> bool:
    return (rule.sequence and not rule.commas) or rule.mapping


def _help(rule: Setting, default: Any, of_command: str | None = None) -> str:
    shown = of_command or rule.default_text or ("" if default is MISSING or default is False else "on" if default is True else str(default))
    return f"{rule.help} (default: {shown})" if shown else rule.help


def utf8(text: str, what: str) -> str:
    """An argument as text; bytes that the locale could not decode are read as UTF-8 or refused."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError:
        from ferrum.errors import OptionError

        raise OptionError(f"{what} is not UTF-8 text. Check the encoding of your terminal or script.") from None
