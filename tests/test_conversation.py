"""Conversation: what the next prompt holds; ReplySplitter: thoughts and answer, however a reply comes in pieces."""

import pytest
from chat_cases import own_templates
from hypothesis import example, given
from hypothesis import strategies as st

from ferrum import ChatTemplate
from ferrum.conversation import Conversation, Reply, ReplySplitter, split_reply

OPEN = "<|im_start|>assistant\n<think>\n"
PLAIN = "<|im_start|>assistant\n"


def conversation(template="demo", **details):
    return Conversation(ChatTemplate(own_templates()[template]).render, **details)


def test_a_prompt_is_the_whole_conversation_and_changes_nothing():
    talk = conversation(system="Be kind.")
    talk.add("One?", Reply("", "1 "))
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("system", "Be kind."), ("user", "One?"), ("assistant", "1 "), ("user", "Two?")))
    for _ in range(2):
        assert talk.prompt("Two?") == expected + "<|im_start|>assistant\n"
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]


def test_thoughts_are_kept_apart_and_the_template_drops_them_from_the_history():
    talk = conversation("thinking")
    talk.add("A?", Reply("First a.", "A."))
    assert talk.messages[1] == {"role": "assistant", "reasoning_content": "First a.", "content": "A."}
    assert "First a." not in talk.prompt("B?")


def test_clearing_keeps_the_system_message():
    talk = conversation(system="Be kind.")
    talk.add("One?", Reply("", "1"))
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize("prompt, text, thoughts, answer", [
    (PLAIN, "Hello\n", "", "Hello\n"),
    (PLAIN, "\n Hello", "", "\n Hello"),
    (PLAIN, "", "", ""),
    (PLAIN, "<thin", "", "<thin"),
    (PLAIN, "<think>\nFirst\n\na.\n</think>\n\nA.\n", "First\n\na.", "A.\n"),
    (PLAIN, "\n<think></think>A", "", "A"),
    (PLAIN, "<think>\n\n</think>\n\n", "", ""),
    (PLAIN, "<think>a</think>b</think>c<think>", "a", "b</think>c<think>"),
    (PLAIN, "x <think>a</think>", "", "x <think>a</think>"),
    (PLAIN, "<think>\nIt may\n</th", "It may\n</th", ""),
    (PLAIN, "<think>\nIt may\n", "It may", ""),
    (OPEN, "Hm\n</think>\n\nA", "Hm", "A"),
    (OPEN, "Hm", "Hm", ""),
    (OPEN, "<think>\nHm</think>A", "<think>\nHm", "A"),
    (PLAIN + "<think>\n\n</think>\n\n", "A </think>", "", "A </think>"),
])
def test_thoughts_and_answer(prompt, text, thoughts, answer):
    assert split_reply(prompt, text) == (thoughts, answer)


PARTS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", "\n\n", " ", "a", "b c"])


@given(st.sampled_from([PLAIN, OPEN]), st.lists(PARTS).map("".join), st.lists(st.integers(1, 9)))
@example(PLAIN, "<think>\na\n\n</think>\n\nb", [1] * 40)
def test_where_pieces_are_split_makes_no_difference(prompt, text, sizes):
    splitter = ReplySplitter(prompt)
    pieces = []
    rest = text
    for size in sizes:
        pieces.append(splitter.push(rest[:size]))
        rest = rest[size:]
    pieces += [splitter.push(rest), splitter.flush()]
    assert tuple(map("".join, zip(*pieces))) == split_reply(prompt, text)
