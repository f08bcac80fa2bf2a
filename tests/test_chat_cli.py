"""The command `chat` as its users meet it: in a pipe, and at a terminal with its keys."""

import errno
import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import termios
import time

import pytest
import tiny_models
from test_cli import assert_short_error, command, environment, ferrum

from ferrum import LLM, SamplingParams
from ferrum.conversation import split_reply

ASK, AGAIN = "Tell me a story about a fox.", "What did the fox learn?"
GREEDY = ["--temperature", "0", "-n", "30", "--threads", "1"]
PROMPT = "(^|\n)>"
ENDLESS = ["--ignore-eos", "--temperature", "1000", "-n", "1500", "--seed", "1", "--threads", "1"]


def chat(lines, *arguments, **changes):
    """(exit code, stdout, stderr) with the lines in a pipe."""
    return ferrum("chat", *arguments, stdin="".join(f"{line}\n" for line in lines).encode(), **changes)


@pytest.fixture(scope="module")
def replies():
    """What GREEDY gives for ASK, then for AGAIN."""
    messages, texts = [], []
    with LLM(threads=1, kv_tokens=256) as llm:
        for question in (ASK, AGAIN):
            messages.append({"role": "user", "content": question})
            (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=30))
            texts.append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": texts[-1]})
    return texts


class Terminal:
    """A chat whose terminal we are: `keys` types, `wait` reads until a text is shown."""

    def __init__(self, *arguments, **changes):
        self._ours, theirs = pty.openpty()
        changes = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **changes}
        self.process = subprocess.Popen(
            command("chat", *arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**changes),
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.raw = ""
        self._seen = 0

    @property
    def shown(self):
        """All output without escape sequences."""
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", self.raw).replace("\r\n", "\n").replace("\r", "")

    def keys(self, text):
        os.write(self._ours, text.encode())

    def wait(self, pattern):
        """The match of what is shown after the match before."""
        deadline = time.monotonic() + 10
        while not (found := re.compile(pattern).search(self.shown, self._seen)):
            assert time.monotonic() < deadline and self._read(), f"{pattern!r} is not in {self.shown[self._seen:]!r}"
        self._seen = found.end()
        return found

    def ask(self, text, until=r"\[\d+ tokens.*\]\n"):
        self.wait(PROMPT)
        self.keys(text + "\r")
        return self.wait(until)

    def leave(self):
        """The exit code, once the program has ended."""
        while self._read():
            pass
        return self.process.wait(timeout=20)

    def _read(self):
        if not select.select([self._ours], [], [], 10)[0]:
            return False
        try:
            data = os.read(self._ours, 4096)
        except OSError as error:  # Linux says so where the other side is closed
            assert error.errno == errno.EIO
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self._ours)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def open_terminal(*arguments, **changes):
        opened.append(Terminal(*arguments, XDG_STATE_HOME=str(tmp_path / "state"), **changes))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.__exit__()


def test_each_line_of_a_pipe_is_answered_knowing_those_before(replies):
    code, out, err = chat([ASK, "", AGAIN], *GREEDY)
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies))
    assert len(err.splitlines()) == 2
    assert re.fullmatch(r"\[30 tokens, [\d.]+/s, first token [\d.]+ m?s, KV cache 2%, limit of 30 tokens \(-n\)\]", err.splitlines()[0])


def test_the_second_turn_reads_only_what_is_new():
    code, _, err = chat([ASK, AGAIN, "/stats"], *GREEDY)
    assert code == 0
    prompt, reused, read = map(int, re.search(r"last prompt +(\d+) tokens: (\d+) reused from the KV cache, (\d+) read at", err).groups())
    assert prompt == reused + read and reused == 16 + 29  # the first prompt and its reply but for the last token
    assert re.search(r"messages +4\ncontext +\d+ of 2048 tokens \(\d%\)\nKV cache +\d+ of 2048 tokens \(\d%\)\n", err)


def test_clear_forgets_and_system_starts_anew(replies):
    code, out, err = chat([ASK, "/clear", ASK, "/system Be kind.", "/system", "/clear", "/system", "/stats"], *GREEDY)
    assert (code, out) == (0, (replies[0] + "\n") * 2)
    notes = [line for line in err.splitlines() if not line.startswith("[")]
    assert notes[:5] == [
        "The conversation is forgotten.", "The system message is set, and the conversation starts anew.", "The system message: Be kind.",
        "The conversation is forgotten. The system message stays.", "The system message: Be kind."]
    assert notes[5:7] == ["messages     1", "context      0 of 2048 tokens (0%)"]


def test_save_writes_the_conversation_and_replaces_nothing_unasked(tmp_path, replies):
    path = tmp_path / "a talk.json"
    code, _, err = chat([ASK, f"/save {path}"], *GREEDY, "--system", "Be kind.")
    assert code == 0 and f"Saved 3 messages to {path}\n" in err
    talk = json.loads(path.read_text())
    assert [message["role"] for message in talk["messages"]] == ["system", "user", "assistant"]
    assert talk["messages"][1]["content"] == ASK
    assert talk["sampling_params"]["max_tokens"] == 30 and talk["model"].endswith(".gguf")
    code, _, err = chat([f"/save {path}"])
    assert code == 1 and f"replace it with /save {path} !" in err
    assert json.loads(path.read_text()) == talk
    code, _, err = chat([f"/save {path} !", f"/save {tmp_path / 'absent' / 'talk.json'}", "/save"])
    assert code == 1 and "No such file or directory" in err and "/save talk.json" in err
    assert json.loads(path.read_text())["messages"] == []
    assert os.listdir(tmp_path) == ["a talk.json"]


def test_an_unknown_command_names_a_close_one_and_two_slashes_send_one(tmp_path):
    code, out, err = chat(["/stat", "/zzz", "/clear now", "//stats", f"/save {tmp_path / 'talk.json'}", "/exit", ASK], *GREEDY)
    assert code == 1 and len(out.splitlines()) >= 1
    assert "error: There is no command /stat.\nDid you mean /stats? " in err
    assert "error: There is no command /zzz.\n/help lists them. " in err
    assert "/clear takes nothing after it, but 'now' was given" in err
    assert [message["content"] for message in json.loads((tmp_path / "talk.json").read_text())["messages"]][:-1] == ["/stats"]


def test_a_message_that_does_not_fit_changes_nothing(replies):
    code, out, err = chat(["fox " * 100, ASK, "fox " * 100, "fox " * 3000, "/stats"], *GREEDY, "--kv-tokens", "64")
    assert (code, out) == (1, replies[0] + "\n")
    errors = re.findall(r"error: Not sent: the conversation would have \d+ tokens, (.*)\.\n(.*)\.\n", err)
    assert [place for place, _ in errors] == ["the KV cache holds 64", "the KV cache holds 64", "the model's context holds 2048"]
    assert re.fullmatch(r"Shorten the message or start again with --kv-tokens \d+", errors[0][1])
    assert re.fullmatch(r"Forget the conversation with /clear, shorten the message or start again with --kv-tokens \d+", errors[1][1])
    assert errors[2][1] == "Forget the conversation with /clear or shorten the message"
    assert re.search(r"messages +2\n", err)


def test_a_reply_that_fills_the_cache_says_what_to_do():
    code, out, err = chat([ASK], *ENDLESS, "--kv-tokens", "64")
    assert code == 0 and out
    assert "KV cache 100%, no room left]\n[the KV cache of 64 tokens is full: /clear, or start again with --kv-tokens 1564]\n" in err


def test_a_model_without_a_chat_template_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "CHAT_TEMPLATE", "")
    code, out, err = chat([ASK], "-m", str(tiny_models.write_tiny_model(tmp_path / "base.gguf")))
    assert (code, out) == (1, "")
    assert_short_error(err)
    assert "has no chat template" in err


def test_a_profile_covers_all_turns():
    code, _, err = chat([ASK, AGAIN], *GREEDY, "--profile")
    assert code == 0 and "attention" in err


def test_a_line_that_is_not_utf8_is_refused_by_its_number():
    code, _, err = ferrum("chat", *GREEDY, stdin=b"/help\ncaf\xe9\n")
    assert code == 2 and "error: Line 2 of stdin is not UTF-8 (byte 0xe9 at position 3)" in err


def test_ctrl_c_in_a_pipe_ends_the_program_and_keeps_what_was_written():
    process = subprocess.Popen(command("chat", *ENDLESS), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdin.write(f"{ASK}\n{AGAIN}\n".encode())
    process.stdin.flush()
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n") and err.startswith(b"[stopped, ") and err.count(b"\n") == 1


def test_a_broken_pipe_is_quiet():
    process = subprocess.Popen(command("chat", *ENDLESS), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdin.write(f"{ASK}\n".encode())
    process.stdin.close()
    process.stdout.read(4)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


def test_a_terminal_converses_and_remembers_what_was_typed(terminal, tmp_path, replies):
    screen = terminal(*GREEDY)
    screen.wait(r"/help shows what you can do\.\nThis demo model writes children's stories\. Try: ")
    for question, reply in zip((ASK, AGAIN), replies):
        screen.ask(question, until=re.escape(f"{reply}\n[30 tokens, " if question == ASK else f"{reply}\n["))
    screen.wait(PROMPT)
    screen.keys("\x04")
    assert screen.leave() == 0
    history = tmp_path / "state" / "ferrum" / "chat_history"
    assert f"+{ASK}\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = terminal(*GREEDY)
    again.wait(PROMPT)
    again.keys("\x1b[A\x1b[A\r")  # up twice
    again.wait(re.escape(replies[0]))
    again.ask("/exit", until="")
    assert again.leave() == 0


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on(terminal, tmp_path):
    screen = terminal(*ENDLESS)
    screen.ask(ASK, until="\n.*\n?.{20}")
    screen.keys("\x03")
    count = int(screen.wait(r"\^C[^\[]*\[stopped, (\d+) tokens, ")[1])
    screen.ask("/stats", until=rf"last reply +{count} tokens")
    screen.ask(f"/save {tmp_path / 'talk.json'}", until="Saved 2 messages")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"]
    screen.ask(AGAIN, until="\n.*\n?.{20}")
    screen.keys("\x03")
    screen.wait(r"\[stopped, ")
    reused = int(screen.ask("/stats", until=r"(\d+) reused")[1])
    assert reused >= 16  # the first prompt at least: random text is encoded anew in other tokens


def test_ctrl_c_at_the_prompt_clears_the_line_and_leaves_when_twice_in_a_row(terminal, tmp_path):
    screen = terminal(*GREEDY)
    screen.wait(PROMPT)
    screen.keys("\x03")
    screen.wait(r"\[Ctrl-C again leaves, and so does Ctrl-D or /exit\]")
    screen.wait(PROMPT)
    screen.keys("/nothing")
    screen.wait("/nothing")
    screen.keys("\x03")
    time.sleep(0.1)
    screen.keys("/help\r")
    screen.wait("forget the conversation")
    screen.wait(PROMPT)
    screen.keys("\x03")
    screen.wait(r"\[Ctrl-C again leaves")
    screen.wait(PROMPT)
    screen.keys("\x03")
    assert screen.leave() == 130
    assert "There is no command" not in screen.shown


@pytest.mark.parametrize("typed", ["\x1b[200~One\nTwo\x1b[201~", "One\x1b\rTwo", "One\\\rTwo"])
def test_a_message_may_have_several_lines(terminal, tmp_path, typed):
    screen = terminal(*GREEDY)
    screen.ask(typed)
    screen.ask(f"/save {tmp_path / 'talk.json'}", until="Saved 2 messages")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "One\nTwo"


def test_a_dumb_terminal_gets_plain_lines(terminal, tmp_path):
    screen = terminal(*GREEDY, TERM="dumb")
    screen.wait(PROMPT)
    screen.keys("One\\\n")
    screen.wait("  ")
    screen.keys("Two\n")
    screen.wait(r"\[\d+ tokens")
    screen.wait(PROMPT)
    screen.keys("\x03")
    screen.wait(r"\[Ctrl-C again leaves")
    screen.wait(PROMPT)
    screen.keys(f"/save {tmp_path / 'talk.json'}\n")
    screen.wait("Saved 2 messages")
    screen.wait(PROMPT)
    screen.keys("\x04")
    assert screen.leave() == 0
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "One\nTwo"
    assert "\x1b" not in screen.raw


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """(flags, text): a model that can write only three tokens, and what it writes: thoughts and an answer."""
    path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("thinking") / "tiny.gguf")
    with LLM(path, threads=1, kv_tokens=256) as llm:
        allowed = [llm.tokenize(text)[0] for text in ("<think>", "</think>", "o")]
        for seed in range(1000):
            # At this temperature every token is as likely as any other.
            params = SamplingParams(temperature=1000, seed=seed, max_tokens=4, allowed_token_ids=allowed)
            text = llm.chat([{"role": "user", "content": ASK}], params)[0].outputs[0].text
            if re.fullmatch("<think>o</think>o", text):
                break
    flags = ["-m", str(path), "--temperature", "1000", "--seed", str(seed), "-n", "4", "--threads", "1", "--kv-tokens", "256"]
    return [*flags, *(part for id in allowed for part in ("--allowed-token-id", str(id)))], text


def test_thoughts_are_dim_on_a_terminal_and_kept_apart(terminal, tmp_path, thinking):
    flags, text = thinking
    thoughts, answer = split_reply("", text)
    screen = terminal(*flags, NO_COLOR="")
    screen.ask(ASK, until=f"{thoughts}\n\n{answer}\n\\[4 tokens")
    assert f"\x1b[2m{thoughts}\x1b[0m" in screen.raw
    screen.ask(f"/save {tmp_path / 'talk.json'}", until="Saved 2 messages")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][1] == {"role": "assistant", "reasoning_content": thoughts, "content": answer}
    plain = terminal(*flags, NO_COLOR="1")
    plain.ask(ASK, until=f"<think>\n{thoughts}\n</think>\n\n{answer}\n\\[4 tokens")


def test_a_pipe_gets_the_answer_without_thoughts(thinking):
    flags, text = thinking
    assert chat([ASK], *flags)[:2] == (0, split_reply("", text).answer + "\n")
    code, out, err = chat([ASK], *flags, "-n", "2")
    assert (code, out) == (0, "\n") and "the limit came before the answer: raise it with -n, or start with --no-think" in err


def test_control_characters_of_a_reply_do_not_steer_a_terminal(terminal):
    with LLM(threads=1, kv_tokens=64) as llm:
        (escape,) = llm.tokenize("\x1b")
    only = ["--allowed-token-id", str(escape), "-n", "3", "--threads", "1"]
    assert chat([ASK], *only)[1] == "\x1b\x1b\x1b\n"
    terminal(*only).ask(ASK, until=re.escape(r"\x1b\x1b\x1b") + "\n")


def test_help_fits_80_columns_and_says_the_limit_of_a_reply():
    code, out, _ = ferrum("chat", "--help", COLUMNS="200")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "-n, --max-tokens N      most tokens to generate (default: 2048 a reply)" in out
    for absent in ("--num-samples", "--logprobs", "--json"):
        assert absent not in out
    code, _, err = ferrum("chat", "Hello")
    assert code == 2 and "chat takes no text" in err.lower()
