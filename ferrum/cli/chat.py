"""`chat`: a conversation whose KV cache stays from turn to turn."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ferrum.cli.arguments import Parser, add_settings, given_settings, utf8
from ferrum.cli.chat_commands import COMMANDS, run_command, share
from ferrum.cli.chat_input import open_input
from ferrum.cli.output import DIM, note, note_error, printable, program, say, shown, styled
from ferrum.cli.running import ending, first_token, load, log_to_stderr, note_profile, rate, reading, sampling_params, template_variables, tokens
from ferrum.conversation import END_THINK, THINK, Conversation, Reply, ReplySplitter, split_reply
from ferrum.errors import ContextFull, FerrumError, KVPoolExhausted
from ferrum.options import DEFAULT_MODEL, EngineOptions, color_wanted
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.llm import LLM, Session, Stream
    from ferrum.outputs import CompletionOutput, RequestOutput

REPLY_TOKENS = 2048  # of a chat most replies end by themselves; of one that does not, this is enough

_USAGE = "[-m MODEL.gguf] [--system TEXT] [options]"
_DESCRIPTION = """\
Talk with a model. Each message is answered knowing all before it; what was read
and written stays in the KV cache, so only what is new is computed.

Enter sends a message. Alt-Enter, or a backslash at the end of a line, begins a
new line; pasted lines stay together. Ctrl-C stops a reply and keeps what was
written; Ctrl-D leaves. /help in the chat shows its commands. The thoughts of
thinking models are shown dim; their chat templates leave them out of the
history. What you type is remembered for the arrow keys in chat_history under
$XDG_STATE_HOME/ferrum (~/.local/state/ferrum; on macOS
~/Library/Application Support/ferrum).

In a pipe each line of stdin is a message or a command, and stdout is exactly
the replies, without thoughts. Exit code: 0, 1 error (in a pipe: of any
message), 2 wrong usage, 130 left by Ctrl-C, 141 the reader of a pipe went away."""
_EXAMPLES = """\
  {program} chat
  {program} chat -m Qwen3-30B-A3B-Q4_K_M.gguf --kv-tokens 16384
  {program} chat --system "You answer in one sentence." --no-think
  printf '%s\\n' "Tell me a story." "And then?" | {program} chat --seed 7
  printf '%s\\n' "Tell me a story." "/save talk.json" | {program} chat

Every flag under "model and engine" can also be set by an environment variable
FERRUM_<NAME>, such as FERRUM_MODEL or FERRUM_KV_TOKENS; flags come first."""


def parser() -> Parser:
    parser = Parser("chat", _USAGE, _DESCRIPTION, _EXAMPLES.format(program=program()))
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="the system message: what the model shall be or heed throughout")
    talk.add_argument("--no-think", action="store_true", help="ask a thinking model to answer at once")
    add_settings(parser.add_argument_group("sampling"), SamplingParams,
                 without=("n", "logprobs", "prompt_logprobs"), defaults={"max_tokens": f"{REPLY_TOKENS} a reply"})
    parser.add_engine()
    parser.add_output(verbose_help="tell on stderr what is loaded, planned and drawn")
    return parser


def run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments, max_tokens=REPLY_TOKENS)
    options = given_settings(arguments, EngineOptions)
    system = None if arguments.system is None else utf8(arguments.system, "--system")
    log_to_stderr(arguments.verbose)
    with load(arguments.model, options) as llm, llm.session() as session:
        template = llm.chat_template  # without one there is nothing to talk with
        conversation = Conversation(lambda messages: template.render(list(messages), **template_variables(arguments)), system)
        chat = Chat(llm, session, conversation, params)
        code = chat.talk() if sys.stdin is not None and sys.stdin.isatty() else chat.answer_lines()
        note_profile(llm)
        return code


class Chat:
    """A conversation on the command line: reads messages and commands, writes replies."""

    def __init__(self, llm: LLM, session: Session, conversation: Conversation, params: SamplingParams):
        self.llm = llm
        self.session = session
        self.conversation = conversation
        self.params = params
        self.last: RequestOutput | None = None  # the last turn since the conversation began

    def talk(self) -> int:
        """With a person at a terminal, until they leave; the exit code."""
        source = open_input({name: command.help for name, command in COMMANDS.items()})
        say(_welcome(self.llm))
        with suppress(EOFError):
            while True:
                text = source.read()
                try:
                    self._take(text)
                except FerrumError as error:
                    note_error(error)
                except KeyboardInterrupt:  # between a reply and the prompt
                    note("")
                if text.strip() and sys.stdout.isatty():
                    print(flush=True)
        return 0

    def answer_lines(self) -> int:
        """Every line of a pipe, to its end; the exit code."""
        source = open_input({})
        code = 0
        with suppress(EOFError):
            while True:
                text = source.read()
                try:
                    if self._take(text):
                        return 130
                except FerrumError as error:
                    note_error(error)
                    code = 1
        return code

    def _take(self, text: str) -> bool:
        """Do what was typed; whether a reply was stopped by Ctrl-C. EOFError: the user leaves."""
        if not text.strip():
            return False
        if text.startswith("/") and not text.startswith("//"):
            run_command(self, text)
            return False
        return self._answer(text[1:] if text.startswith("//") else text)

    def _answer(self, message: str) -> bool:
        """Answer a message and show the reply; whether Ctrl-C stopped it. After an error the conversation is as before."""
        prompt = self.conversation.prompt(message)
        ids = self.llm.tokenize(prompt, add_bos=False)
        try:
            stream = self.session.stream(ids, self.params)
        except (ContextFull, KVPoolExhausted) as error:
            raise type(error)(self._no_room(len(ids))) from None
        view = ReplyView(prompt)
        with stream:
            _consume(stream, view)
            output = stream.output
        completion = output.outputs[0]
        reply = split_reply(prompt, completion.text)
        view.end(completion.text)
        stopped = completion.finish_reason == "cancelled"
        if stopped and not completion.text:
            say("[stopped before the first word: the message is taken back]", DIM)
            return True
        self.conversation.add(message, reply)
        self.last = output
        note(styled(self._statistics(output), DIM, sys.stderr))
        self._explain(completion, reply)
        return stopped

    def _no_room(self, count: int) -> str:
        context, capacity = self.llm.engine.config["context_length"], self.llm.engine.kv_capacity
        place = f"the model's context holds {context}" if count > context else f"the KV cache holds {capacity}"
        ways = ["shorten the message"]
        if self.conversation.turns:
            ways.insert(0, "forget the conversation with /clear")
        if count <= context:
            ways.append(self._with_more_room(count))
        advice = f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]
        return f"Not sent: the conversation would have {count} tokens, {place}.\n{advice[0].upper()}{advice[1:]}."

    def _with_more_room(self, count: int) -> str:
        wanted = count + (self.params.max_tokens or REPLY_TOKENS)
        return f"start again with --kv-tokens {min(wanted, self.llm.engine.config['context_length'])}"

    def _statistics(self, output: RequestOutput) -> str:
        completion, timings = output.outputs[0], output.timings
        count = len(completion.token_ids)
        parts = [tokens(count)]
        if count > 1:
            parts.append(rate(timings.decode_tokens_per_s))
        parts += [first_token(timings), f"KV cache {share(self.session.tokens_kept, self.llm.engine.kv_capacity)}"]
        if completion.finish_reason == "cancelled":
            parts.insert(0, "stopped")
        elif completion.notice:
            parts.append("no room left")
        elif completion.finish_reason == "length" or completion.stop_reason is not None:
            parts.append(ending(completion))
        return f"[{', '.join(parts)}]"

    def _explain(self, completion: CompletionOutput, reply: Reply) -> None:
        """What to do about a reply that ended early."""
        if completion.notice:
            context, capacity = self.llm.engine.config["context_length"], self.llm.engine.kv_capacity
            if context <= capacity:
                say(f"[the model's context of {context} tokens is full: /clear forgets the conversation]", DIM)
            else:
                say(f"[the KV cache of {capacity} tokens is full: /clear, or {self._with_more_room(capacity)}]", DIM)
        elif completion.finish_reason == "length" and reply.thoughts and not reply.answer:
            say("[the limit came before the answer: raise it with -n, or start with --no-think]", DIM)


class ReplyView:
    """Shows a reply to a prompt as it comes: on a terminal thoughts too, dim or between their tags; elsewhere the answer alone."""

    def __init__(self, prompt: str):
        self._splitter = ReplySplitter(prompt)
        self._length = 0
        self._in_thoughts = False

    def write(self, text: str) -> None:
        self._length += len(text)
        self._show(self._splitter.push(text))

    def end(self, whole: str) -> None:
        """Show the rest of the reply, which is `whole`, and end the line."""
        self.write(whole[self._length:])
        self._show(self._splitter.flush())
        if self._in_thoughts:
            self._close_thoughts()
        else:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, piece: Reply) -> None:
        out = sys.stdout
        if piece.thoughts and out.isatty():
            if not self._in_thoughts and not color_wanted():
                out.write(THINK + "\n")
            self._in_thoughts = True
            out.write(styled(shown(piece.thoughts, out), DIM, out))
        if piece.answer:
            if self._in_thoughts:
                self._close_thoughts()
                out.write("\n")
            out.write(shown(piece.answer, out))
        out.flush()

    def _close_thoughts(self) -> None:
        self._in_thoughts = False
        sys.stdout.write("\n" if color_wanted() else f"\n{END_THINK}\n")


def _consume(stream: Stream, view: ReplyView) -> None:
    """Run the stream to its end, or to Ctrl-C, and show the reply."""
    try:
        with reading(stream):
            piece = next(stream, None)
        while piece is not None:
            view.write(piece.text)
            piece = next(stream, None)
    except KeyboardInterrupt:
        stream.close()


def _welcome(llm: LLM) -> str:
    name = llm.file.metadata.get("general.name") or os.path.basename(llm.model)
    about = f"{name}, context {llm.engine.config['context_length']} tokens"
    if llm.engine.kv_capacity < llm.engine.config["context_length"]:
        about += f", KV cache {llm.engine.kv_capacity}"
    hint = "\nThis demo model writes children's stories. Try: Tell me a story about a fox." if llm.model == DEFAULT_MODEL else ""
    return f"{printable(about)}. /help shows what you can do.{hint}\n"
