"""Where the messages of a chat come from: a terminal with line editing, a plain terminal, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from ferrum.cli.output import DIM, note, say
from ferrum.errors import OptionError
from ferrum.options import color_wanted, cursor_moves, state_directory

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "


class Input(Protocol):
    def read(self) -> str:
        """The next message or command; EOFError at the end of input, KeyboardInterrupt if the user leaves by Ctrl-C."""


def open_input(commands: Mapping[str, str]) -> Input:
    """The best that stdin and stdout allow; `commands` and what they do are offered as completions."""
    if sys.stdin is None or not sys.stdin.isatty():
        return Pipe()
    return Editor(commands) if sys.stdout.isatty() and cursor_moves() else PlainTerminal()


class Pipe:
    """Each line of stdin is a message."""

    def __init__(self) -> None:
        self._line = 0

    def read(self) -> str:
        self._line += 1
        data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not data:
            raise EOFError
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise OptionError(f"Line {self._line} of stdin is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}). "
                              "Convert it first, for example with iconv.") from None


class PlainTerminal:
    """Lines as the terminal itself edits them; a backslash at the end of one joins the next to it."""

    def __init__(self) -> None:
        self._leaving = Leaving()

    def read(self) -> str:
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            if lines:
                lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("  " if lines else PROMPT))
            except KeyboardInterrupt:
                note("")
                self._leaving.interrupted()
                lines = []
        self._leaving.refused()
        return "\n".join(lines)

    @staticmethod
    def _line(prompt: str) -> str:
        with suppress(OSError):
            print(prompt, end="", file=sys.stderr, flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            note("")
            raise EOFError
        return data.decode("utf-8", "replace").rstrip("\r\n")


class Editor:
    """A terminal with line editing, history from run to run, and completion of commands."""

    def __init__(self, commands: Mapping[str, str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.output import ColorDepth

        self._leaving = Leaving()
        self._session: PromptSession[str] = PromptSession(
            [("bold" if color_wanted() else "", PROMPT)],
            multiline=True,  # so that pasted lines stay together; the keys below send
            prompt_continuation="  ",
            key_bindings=self._keys(),
            history=_history(),
            completer=WordCompleter(list(commands), meta_dict=dict(commands), sentence=True),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            color_depth=None if color_wanted() else ColorDepth.DEPTH_1_BIT,
            enable_suspend=True,
        )

    def read(self) -> str:
        while True:
            try:
                text = self._session.prompt()
            except KeyboardInterrupt:
                self._leaving.interrupted()
                continue
            self._leaving.refused()
            # Bytes that are not UTF-8 come as lone surrogates.
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip("\n")

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)  # not in a search of the history

        @keys.add("enter", filter=typing)
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def add_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=typing)
        @keys.add("<sigint>", filter=typing)
        def clear_or_leave(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                self._leaving.refused()
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys


class Leaving:
    """Ctrl-C where nothing is typed leaves, but only twice in a row: the first one may have been meant for a reply that just ended."""

    def __init__(self) -> None:
        self._asked = False

    def interrupted(self) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        say("[Ctrl-C again leaves, and so does Ctrl-D or /exit]", DIM)

    def refused(self) -> None:
        """Something else was typed."""
        self._asked = False


def _history() -> History:
    """What was typed in earlier chats, where there is a place to keep it; readable by the user only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Remembered(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):  # a full disk is no reason to end a conversation
                super().store_string(string)

    directory = state_directory()
    path = os.path.join(directory, "chat_history")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return Remembered(path)
