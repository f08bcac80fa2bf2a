"""A conversation: its messages, the prompt of its next turn, and replies told apart into thoughts and answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ferrum.stopping import overlap

THINK, END_THINK = "<think>", "</think>"

Render = Callable[[Sequence[Mapping[str, Any]]], str]


class Conversation:
    """What was said, in the shape that chat templates take; a message counts once its reply is there.

    `render` makes a prompt of messages: `LLM.render_chat` with the template's variables, if any.
    """

    def __init__(self, render: Render, system: str | None = None):
        self._render = render
        self.turns: list[dict[str, str]] = []
        self.system = system

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if any, and all turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def prompt(self, message: str) -> str:
        """The whole conversation with one message more, up to where its reply begins. Errors as of `LLM.render_chat`."""
        return self._render([*self.messages, _user(message)])

    def add(self, message: str, reply: Reply) -> None:
        """Take a message with its reply."""
        thoughts = {"reasoning_content": reply.thoughts} if reply.thoughts else {}
        self.turns += [_user(message), {"role": "assistant", **thoughts, "content": reply.answer}]

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []


class Reply(NamedTuple):
    """A reply, or a piece of one; `thoughts` are without their tags and the line breaks around them."""

    thoughts: str
    answer: str


class ReplySplitter:
    """Tells the thoughts at the start of a streamed reply from its answer; where pieces are split makes no difference.

    Thoughts stand between <think> and </think>. Some templates (Qwen3-Thinking-2507) end the prompt with the opening
    tag: the reply then has the closing one only. A reply that does not begin with thoughts is answer, to the letter.
    """

    def __init__(self, prompt: str):
        self._held = ""
        self._thinking: bool | None = True if prompt.rstrip().endswith(THINK) else None  # None: not known yet
        self._skipping = self._thinking is True  # line breaks, after a tag
        self._newlines = ""  # of thoughts: shown once more thoughts follow

    def push(self, text: str) -> Reply:
        """Take a piece; returns what it settles."""
        self._held += text
        if self._thinking is None:
            self._decide()
        thoughts = self._thoughts() if self._thinking else ""
        return Reply(thoughts, self._answer() if self._thinking is False else "")

    def flush(self) -> Reply:
        """What was held back, once no more follows."""
        rest, self._held = self._held, ""
        if self._thinking:
            return Reply(self._newlines + rest if rest else "", "")
        return Reply("", rest)

    def _decide(self) -> None:
        """Whether the reply begins with thoughts, as soon as its beginning shows it."""
        start = self._held.lstrip()
        if start.startswith(THINK):
            self._held = start[len(THINK):]
            self._thinking = self._skipping = True
        elif start and not THINK.startswith(start):
            self._thinking = False

    def _thoughts(self) -> str:
        text, closing, rest = self._held.partition(END_THINK)
        self._held = rest
        if not closing:
            keep = len(text) - overlap(text, END_THINK)
            text, self._held = text[:keep], text[keep:]
        if self._skipping:
            text = text.lstrip("\n")
            self._skipping = not text
        text, self._newlines = _without_last_newlines(self._newlines + text)
        if closing:
            self._thinking, self._skipping = False, True
        return text

    def _answer(self) -> str:
        text, self._held = self._held, ""
        if self._skipping:
            text = text.lstrip("\n")
            self._skipping = not text
        return text


def split_reply(prompt: str, text: str) -> Reply:
    """The thoughts and the answer of a whole reply to a prompt."""
    splitter = ReplySplitter(prompt)
    pieces = splitter.push(text), splitter.flush()
    return Reply(*map("".join, zip(*pieces)))


def _user(message: str) -> dict[str, str]:
    return {"role": "user", "content": message}


def _without_last_newlines(text: str) -> tuple[str, str]:
    kept = text.rstrip("\n")
    return kept, text[len(kept):]
