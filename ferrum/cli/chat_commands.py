"""What can be typed in a chat besides messages: lines that begin with a slash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from ferrum.cli.output import printable, say
from ferrum.cli.running import first_token, rate, tokens
from ferrum.errors import OptionError

if TYPE_CHECKING:
    from ferrum.cli.chat import Chat


def run_command(chat: Chat, text: str) -> None:
    """Run a command with its slash; OptionError if there is none of its name or it fails, EOFError if the user leaves."""
    name, argument = (*text.split(None, 1), "")[:2]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else "/help lists them."
        raise OptionError(f"There is no command {name}.\n{hint} To send a message that begins with a slash, type two.")
    command, argument = COMMANDS[name], argument.rstrip()
    if argument and not command.argument:
        raise OptionError(f"{name} takes nothing after it, but {argument!r} was given.")
    command.run(chat, argument)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    chat.last = None
    say("The conversation is forgotten." + ("" if chat.conversation.system is None else " The system message stays."))


def _system(chat: Chat, text: str) -> None:
    if not text:
        system = chat.conversation.system
        say("There is no system message. /system TEXT sets one." if system is None else f"The system message: {printable(system)}")
        return
    chat.conversation.system = text
    chat.conversation.clear()
    chat.last = None
    say("The system message is set, and the conversation starts anew.")


def _save(chat: Chat, argument: str) -> None:
    path, overwrite = (argument[:-2].rstrip(), True) if argument.endswith(" !") else (argument, False)
    if not path:
        raise OptionError("/save needs the name of a file, such as /save talk.json.")
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.exists(path) and not overwrite:
        raise OptionError(f"{path} exists. Choose another name, or replace it with /save {argument} !")
    talk = {"model": chat.llm.model, "sampling_params": asdict(chat.params), "messages": chat.conversation.messages}
    try:
        _write_whole(path, json.dumps(talk, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OptionError(f"{path} was not written: {error.strerror}. Choose another place.") from None
    count = len(chat.conversation.messages)
    say(f"Saved {'1 message' if count == 1 else f'{count} messages'} to {printable(path)}")


def _write_whole(path: str, text: str) -> None:
    """Write a file such that it is either as before or complete."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


def _stats(chat: Chat, _: str) -> None:
    kept, capacity = chat.session.tokens_kept, chat.llm.engine.kv_capacity
    context = chat.llm.engine.config["context_length"]
    rows = [
        ("messages", str(len(chat.conversation.messages))),
        ("KV cache", f"{kept} of {capacity} tokens ({share(kept, capacity)})"),
    ]
    if chat.last is None:
        used = 0
    else:
        usage, timings, reused = chat.last.usage, chat.last.timings, chat.last.num_cached_tokens
        used = min(usage.total_tokens, context)  # the last token of a full context has no place in it
        rows += [
            ("last prompt", f"{tokens(usage.prompt_tokens)}: {reused} reused from the KV cache, {usage.prompt_tokens - reused} read"
             f" at {rate(timings.prefill_tokens_per_s)}"),
            ("last reply", f"{tokens(usage.completion_tokens)} at {rate(timings.decode_tokens_per_s)}, {first_token(timings)}"),
        ]
    rows.insert(1, ("context", f"{used} of {context} tokens ({share(used, context)})"))
    say("\n".join(f"{name:<13}{value}" for name, value in rows))


def _help(chat: Chat, _: str) -> None:
    rows = [(f"{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    rows += [
        ("//...", "a message that begins with one slash"),
        ("Alt-Enter", "begins a new line; so does a backslash at the end of one"),
        ("Ctrl-C", "stops a reply, or clears what is typed; twice leaves"),
        ("arrow up", "brings back what was typed before; Ctrl-R searches it"),
    ]
    say("\n".join(f"{name:<16}{about}" for name, about in rows))


def _exit(chat: Chat, _: str) -> None:
    raise EOFError


class Command(NamedTuple):
    run: Callable[[Chat, str], None]
    argument: str
    help: str


COMMANDS = {
    "/clear": Command(_clear, "", "forget the conversation, keep the system message"),
    "/system": Command(_system, "[TEXT]", "show the system message, or set it and start anew"),
    "/save": Command(_save, "FILE [!]", "write the conversation as JSON; ! replaces a file"),
    "/stats": Command(_stats, "", "show the use of the KV cache and the context, and speeds"),
    "/help": Command(_help, "", "show this list"),
    "/exit": Command(_exit, "", "leave; so does Ctrl-D"),
}
