"""Chat templates: goldens made by transformers, what is refused at the door, and what templates cannot do."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from chat_cases import CONVERSATIONS, DEMO, GOLDEN, SPECIAL_TOKENS, TOOLS, assistant, golden_cases, own_templates, user
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_model

from ferrum.chat_template import ChatTemplate
from ferrum.errors import ChatTemplateError, FerrumError, UnsupportedModelError
from ferrum.gguf_file import GGUFFile
from ferrum.tokenizer import Tokenizer

HELLO = [user("Hello")]
TEMPLATES = own_templates()


def render(source, messages=HELLO, **options):
    return ChatTemplate(source).render(messages, **options)


def failure(source, messages=HELLO, **options) -> ChatTemplateError:
    with pytest.raises(ChatTemplateError) as caught:
        render(source, messages, **options)
    return caught.value


# rendering

@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name):
    template = ChatTemplate(TEMPLATES[name], **SPECIAL_TOKENS)
    rows = json.loads(GOLDEN.read_text(encoding="utf-8"))
    cases = list(golden_cases())
    assert [row[:2] for row in rows] == [[*case[:2]] for case in cases]
    for (_, conversation, expected), (of, _, options) in zip(rows, cases):
        if of != name:
            continue
        if expected is None:
            with pytest.raises(ValueError):
                template.render(CONVERSATIONS[conversation], **options)
        else:
            assert template.render(CONVERSATIONS[conversation], **options) == expected, (conversation, options)


def test_the_demo_model_and_the_tiny_models_have_templates(tmp_path):
    for path in (DEMO, write_tiny_model(tmp_path / "tiny.gguf", seed=1)):
        tokenizer = Tokenizer.from_gguf(GGUFFile.open(path))
        template = ChatTemplate.from_tokenizer(tokenizer)
        text = template.render(CONVERSATIONS["turns"])
        assert text.startswith("<|im_start|>user\nOne?<|im_end|>\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
        assert template.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_a_file_without_a_template_says_what_to_do():
    for source in (None, " \n"):
        tokenizer = SimpleNamespace(chat_template=source, bos_id=None, eos_id=None, pad_id=None)
        with pytest.raises(UnsupportedModelError, match="no chat template.*pass the template's text"):
            ChatTemplate.from_tokenizer(tokenizer)


@given(st.text())
def test_what_users_write_is_text_and_not_template(text):
    messages = [user(text), assistant(text), user(text)]
    expected = "".join(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n" for message in messages)
    assert ChatTemplate(TEMPLATES["demo"]).render(messages, add_generation_prompt=False) == expected


def test_a_special_token_that_a_model_has_not_is_undefined():
    source = "{{ bos_token is defined }} {{ eos_token }} {{ pad_token is defined }}"
    assert ChatTemplate(source, eos_token="<e>", pad_token=None, bos_token="").render(HELLO) == "False <e> False"
    assert ChatTemplate(source, eos_token="<e>").render(HELLO, eos_token="<other>") == "False <other> False"


def test_tools_and_documents_that_are_not_given_are_none():
    assert render("{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }}") == "True True False"
    assert render("{{ tools }} {{ enable_thinking }}", tools=(), enable_thinking=False) == "[] False"


def test_fields_that_are_none_are_undefined():
    assert render("{{ messages[0].tool_calls is defined }}", [assistant("A", tool_calls=None)]) == "False"


def test_the_next_turn_is_opened_unless_the_final_message_is_continued():
    template = ChatTemplate(TEMPLATES["demo"])
    messages = [user("Count"), assistant("1, 2, ")]
    assert template.render(messages).endswith("1, 2, <|im_end|>\n<|im_start|>assistant\n")
    assert template.render(messages, add_generation_prompt=False).endswith("1, 2, <|im_end|>\n")
    assert template.render(messages, continue_final_message=True).endswith("<|im_start|>assistant\n1, 2, ")
    with pytest.raises(ValueError, match="Set one of them"):
        template.render(messages, add_generation_prompt=True, continue_final_message=True)


def test_a_message_that_the_template_strips_is_continued_where_its_text_ends():
    source = "{% for message in messages %}[{{ message.content | trim }}]{% endfor %}"
    assert render(source, [user("a "), assistant(" b\n")], continue_final_message=True) == "[a][b"


def test_reasoning_is_continued_under_the_name_that_the_template_reads():
    source = "{{ messages[-1].thinking }}</think>{{ messages[-1].content }}"
    messages = [user("?"), assistant("", reasoning="Let me ")]
    assert render(source, messages, continue_final_message="reasoning_content") == "Let me "


def test_what_cannot_be_continued_is_refused():
    with pytest.raises(ValueError, match="'reasoning_content' of the final message"):
        render(TEMPLATES["thinking"], continue_final_message="reasoning_content")
    with pytest.raises(ValueError, match="does not read"):
        render("{{ messages[0].role }}", continue_final_message=True)
    with pytest.raises(ValueError, match="no part of the final message is text"):
        render("{{ messages[0].content }}", [{"role": "user", "content": [{"type": "image"}]}], continue_final_message=True)
    for changes in ("", "| upper", "| replace('o', '0')", "[1:4]"):
        source = "{{ messages[0].content" + changes + " }}" if changes else "no content"
        with pytest.raises(ChatTemplateError, match="leaves out or changes"):
            render(source, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="more than once"):
        render("{{ messages[0].content }}, {{ messages[0].content }}", continue_final_message=True)
    with pytest.raises(ValueError, match="'tags' of the final message"):
        render("{{ messages[0].tags }}", [user("a") | {"tags": 1}], continue_final_message="tags")
    with pytest.raises(ValueError, match="no part"):
        render("{{ messages[0].tags }}", [user("a") | {"tags": ["b"]}], continue_final_message="tags")


def test_many_threads_render_with_one_template():
    template = ChatTemplate(TEMPLATES["thinking"])
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda index: template.render([user(str(index))], add_generation_prompt=False), range(64)))
    assert texts == [f"[user]\n{index}[/user]\n" for index in range(64)]


def test_arguments_are_as_before():
    messages, tools = copy.deepcopy((CONVERSATIONS["parallel_calls"], TOOLS))
    ChatTemplate(TEMPLATES["thinking"]).render(messages, tools=tools)
    ChatTemplate(TEMPLATES["thinking"]).render(messages, continue_final_message=True)
    assert (messages, tools) == (CONVERSATIONS["parallel_calls"], TOOLS)


# what is refused at the door

CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize("messages, message", [
    ("Hello", r"messages is of type str: expected a list such as"),
    (None, "messages is None"),
    ({"role": "user", "content": "Hello"}, "messages is of type dict"),
    ([], "messages is empty"),
    (["Hello"], r"messages\[0\] is of type str.*model_dump"),
    ([user("a"), {"content": "b"}], r"messages\[1\]\['role'\] is None"),
    ([{"role": 1, "content": "b"}], r"\['role'\] is of type int"),
    ([{"role": "user"}], "role 'user' has no content"),
    ([{"role": "tool", "content": None}], "role 'tool' has no content"),
    ([user(5)], r"\['content'\] is of type int"),
    ([user(b"bytes")], r"\['content'\] is of type bytes"),
    ([user(["Hello"])], r"\['content'\]\[0\] is of type str: expected a part"),
    ([user([{"text": "Hello"}])], r"\['content'\]\[0\] is of type dict: expected a part"),
    ([user([{"type": "text"}])], r"\['text'\] is None"),
    ([user([{"type": "image", "image": object()}])], r"\['content'\]\[0\]\['image'\] is of type object: expected what JSON"),
    ([assistant(None, tool_calls={"name": "now"})], r"\['tool_calls'\] is of type dict"),
    ([assistant(None, tool_calls=["now"])], r"\['tool_calls'\] is of type list"),
    ([{"role": "user", "content": "a", 1: 2}], "a key that is of type int"),
    ([user("a") | {"x": CYCLE}], "more than 100 levels"),
])
def test_messages_that_are_none_are_refused(messages, message):
    with pytest.raises((TypeError, ValueError), match=message):
        render("{{ messages }}", messages)


def weather(place: str) -> str:
    return place


@pytest.mark.parametrize("options, message", [
    (dict(tools=[weather]), r"tools\[0\] is a function: expected its description, .*JSON schema"),
    (dict(tools=TOOLS[0]), "tools is of type dict: expected a list"),
    (dict(tools=["weather"]), r"tools\[0\] is of type str"),
    (dict(tools=[{"name": {1, 2}}]), r"tools\[0\]\['name'\] is of type set"),
    (dict(documents="text"), "documents is of type str"),
    (dict(documents=["text"]), r"documents\[0\] is of type str"),
    (dict(enable_thinking=object()), r"variables\['enable_thinking'\] is of type object"),
])
def test_other_arguments_that_are_no_json_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        render("{{ messages }}", **options)


def test_templates_that_are_no_text_are_refused():
    for source, error in ((None, TypeError), (b"{{ x }}", TypeError), ("", ValueError), (" \n", ValueError)):
        with pytest.raises(error, match="expected the text of a Jinja template"):
            ChatTemplate(source)
    with pytest.raises(TypeError, match="boss_token is no special token"):
        ChatTemplate("x", boss_token="<s>")
    with pytest.raises(TypeError, match="bos_token is of type int"):
        ChatTemplate("x", bos_token=1)


# templates that fail

def test_a_refusal_carries_the_template_s_words_and_line():
    error = failure("\n{% if messages[0].role == 'user' %}\n{{ raise_exception('Users first, please.') }}\n{% endif %}")
    assert (error.reason, error.line) == ("Users first, please.", 3)
    assert isinstance(error, FerrumError) and isinstance(error, ValueError)
    assert str(error).startswith("the chat template refuses these messages at its line 3: Users first, please. Change")
    assert (pickle.loads(pickle.dumps(error)).line, error.__cause__ is None) == (3, False)


@pytest.mark.parametrize("source, line, reason", [
    ("\n{{ messages[0].name.first }}", 2, "has no attribute 'name'"),
    ("{% macro add(a) %}\n{{ a + 1 }}\n{% endmacro %}\n\n{{ add('x') }}", 2, "TypeError: can only concatenate"),
    ("\n\n{{ 1 / 0 }}", 3, "ZeroDivisionError"),
    ("{{ missing | tojson }}", 1, "not JSON serializable"),
    ("\n{{ range(100001) }}", 2, "Range too big"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", 1, "RecursionError"),
    ("{{ raise_exception(messages) }}", 1, "Hello"),
])
def test_a_failure_names_its_line(source, line, reason):
    error = failure(source)
    assert (error.line, reason in error.reason, reason in str(error)) == (line, True, True), error
    assert len(str(failure("{{ raise_exception('x' * 100000) }}"))) < 1000


@pytest.mark.parametrize("source, line", [
    ("\n{% if %}", 2), ("{{ 'a' | no_such_filter }}", 1), ("\n\n{% unknown %}", 3), ("{% generation %}", 1), ("{% break %}", None),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", None), ("{{ " + "+".join("1" * 20000) + " }}", None),
])
def test_a_text_that_is_no_template_is_refused_when_it_is_first_used(source, line):
    template = ChatTemplate(source)
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match="cannot be read") as caught:
            template.render(HELLO)
        assert caught.value.line == line


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{{ messages | map(attribute='__class__') | first | attr('mro') }}",
    "{% set space = namespace() %}{% set space.__class__ = 1 %}",
    "{{ namespace(_hidden=1) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{% extends 'base' %}",
])
def test_a_template_reaches_nothing_but_what_it_is_given(source):
    try:
        text = render(source)
    except ChatTemplateError:
        return
    assert not text.strip(), text  # an attribute that the sandbox hides is undefined, which is empty text


def test_methods_of_what_it_is_given_are_not_the_template_s_to_call():
    class Text(str):
        def delete(self):
            raise AssertionError("called")

    class Record(dict):
        delete = Text.delete

    message = Record(role=Text("user"), content=Text("Hello"))
    assert render("{{ messages[0].delete is defined or messages[0].content.delete is defined }} {{ x + 1 }}", [message],
                  x=type("Count", (int,), {})(2)) == "False 3"


def test_rendering_prints_nothing_and_reads_no_environment(monkeypatch, capfd):
    class Closed:
        def __getattr__(self, name):
            raise AssertionError(f"the environment is read: {name}")

        __getitem__ = __contains__ = __iter__ = __getattr__

    template = ChatTemplate(TEMPLATES["thinking"])
    monkeypatch.setattr(os, "environ", Closed())
    text = template.render(CONVERSATIONS["parallel_calls"], tools=TOOLS)
    monkeypatch.undo()
    assert text and capfd.readouterr() == ("", "")


def test_namespaces_have_attributes_of_any_other_name():
    assert render("{% set n = namespace({'a': 1}, self=2) %}{% set n.b = 3 %}{{ n.a }}{{ n.self }}{{ n.b }}") == "123"


def test_the_module_loads_neither_numpy_nor_jinja2():
    code = "import sys, ferrum.chat_template, ferrum; ferrum.ChatTemplate('x')\n" \
           "assert not {'numpy', 'jinja2', 'json', 'tokenizers', 'ferrum_native'} & set(sys.modules)\n" \
           "assert ferrum.ChatTemplate('x').render([{'role': 'user', 'content': ''}]) == 'x'\n" \
           "assert not {'numpy', 'tokenizers', 'ferrum_native'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
