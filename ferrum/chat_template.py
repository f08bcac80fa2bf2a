"""Messages to the text that a model was trained to read: the chat template of its file, rendered as `transformers` does.

What a template sees is a copy of plain JSON values, so nothing it does reaches the caller's objects.
`template_sandbox` says what templates are kept from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from ferrum.errors import ChatTemplateError, UnsupportedModelError

if TYPE_CHECKING:
    from jinja2 import Template

    from ferrum.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first is what templates read

_DEEPEST = 100  # levels of lists and dicts; json and Jinja recurse per level
_LONGEST_REASON = 500  # characters of a template's own words in an error
# Its last character is a space, so a template that strips the final message shows itself.
_CONTINUE_HERE = "FERRUM_CONTINUES_HERE "


class ChatTemplate:
    """One template, compiled at first use; `render` may be called from many threads.

    `special_tokens` are texts, by the names of `SPECIAL_TOKENS`; one that is "" or None is not defined in the template.
    Raises TypeError for a source that is not text or an unknown special token, ValueError for an empty source.
    """

    def __init__(self, source: str, **special_tokens: str | None):
        if not isinstance(source, str):
            raise TypeError(f"source is {_kind(source)}: expected the text of a Jinja template.")
        if not source.strip():
            raise ValueError("source is empty: expected the text of a Jinja template.")
        for name, text in special_tokens.items():
            if name not in SPECIAL_TOKENS:
                raise TypeError(f"{name} is no special token: expected one of {', '.join(SPECIAL_TOKENS)}. Pass other "
                                f"variables of the template to render.")
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{name} is {_kind(text)}: expected the text of the token, or None.")
        self.source = source
        self.special_tokens: dict[str, str] = {name: text for name, text in special_tokens.items() if text}

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a model file, with the file's special tokens; UnsupportedModelError if it has none."""
        if tokenizer.chat_template is None or not tokenizer.chat_template.strip():
            raise UnsupportedModelError(
                "the model file has no chat template (tokenizer.chat_template): it may be a base model, not made to chat. "
                "Use a file of a chat model, or pass the template's text to ChatTemplate.")
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        return cls(tokenizer.chat_template,
                   **{name: tokenizer.token_text(id) for name, id in ids.items() if id is not None})

    def render(self, messages: list[Mapping[str, Any]], *, tools: list[Mapping[str, Any]] | None = None,
               documents: list[Mapping[str, Any]] | None = None, add_generation_prompt: bool | None = None,
               continue_final_message: bool | str = False, **variables: Any) -> str:
        """The prompt of a conversation, with its special tokens written out: encode it with `add_bos=False`.

        A message is a mapping with `role` and `content`: text, a list of parts (mappings with a `type`), or for an
        assistant None. What else it holds (`tool_calls`, `reasoning_content`, ...) is the template's to read. `tools`
        and `documents` are lists of JSON objects; `variables` are the template's own, such as `enable_thinking`.

        `add_generation_prompt` opens the assistant's next turn; None does unless the final message is continued.
        `continue_final_message` leaves that message open: True at the end of its content, a name at the end of that
        field, such as "reasoning_content".

        Raises TypeError or ValueError for arguments that are none of this, ChatTemplateError (a ValueError) where the
        template refuses them or fails.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt opens a new turn, continue_final_message goes on with the last one. "
                             "Set one of them.")
        conversation = [_with_reasoning(message) for message in _checked_messages(messages)]
        given = {
            **self.special_tokens,
            **_plain(variables, "variables"),
            "messages": conversation,
            "tools": _checked_objects(tools, "tools"),
            "documents": _checked_objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        if not continue_final_message:
            return self._run(given)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        ending = self._mark_end(conversation[-1], field)
        return _cut_at_mark(self._run(given), ending)

    def _mark_end(self, message: dict[str, Any], field: str) -> str:
        """Mark where `field` of the message ends; what it held there."""
        text = message.get(field)
        if not isinstance(text, (str, list)):
            raise ValueError(f"continue_final_message asks to continue {field!r} of the final message, which has no such "
                             f"text. Add it, or set continue_final_message to the field that is open.")
        # Reasoning has several names: whichever of them the template reads is continued.
        names = [name for name in REASONING_FIELDS if message.get(name) == text] if field in REASONING_FIELDS else [field]
        if not any(name in self.source for name in names):
            raise ValueError(f"continue_final_message asks to continue {field!r}, which this chat template does not read.")
        if isinstance(text, list):
            parts = [part for part in text if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if not parts:
                raise ValueError("continue_final_message is set, but no part of the final message is text.")
            text = parts[-1]["text"]
            parts[-1]["text"] = text + _CONTINUE_HERE
        else:
            message.update(dict.fromkeys(names, text + _CONTINUE_HERE))
        return text

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateSyntaxError

        from ferrum.template_sandbox import compile_template

        try:
            return compile_template(self.source)
        except TemplateSyntaxError as error:
            _fail("cannot be read", error.message or "a syntax error", error.lineno, error)
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:  # nested or large beyond what Python compiles
            _fail("cannot be read", _named(error), None, error)

    def _run(self, given: dict[str, Any]) -> str:
        from jinja2 import TemplateError

        from ferrum.template_sandbox import Refusal

        template = self._template
        try:
            return template.render(given)
        except Refusal as error:
            _fail("refuses these messages", str(error), _line(error), error)
        except TemplateError as error:
            _fail("fails on these messages", str(error), _line(error), error)
        except Exception as error:  # an operator, method or filter of the template was given what it cannot take
            _fail("fails on these messages", _named(error), _line(error), error)


def _fail(verb: str, reason: str, line: int | None, cause: Exception) -> NoReturn:
    reason = reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "..."
    where = f" at its line {line}" if line else ""
    advice = "Pass a template that Jinja reads." if verb == "cannot be read" else \
        "Change what it objects to, or pass another template."
    error = ChatTemplateError(f"the chat template {verb}{where}: {reason.rstrip('.')}. {advice}")
    error.reason, error.line = reason, line
    raise error from cause


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _line(error: Exception) -> int | None:
    """The innermost line of the template on the way to an error; jinja2 gives its frames the template's line numbers."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _cut_at_mark(text: str, ending: str) -> str:
    """The text up to the mark that `_mark_end` has set."""
    mark = text.find(_CONTINUE_HERE.rstrip())
    if mark < 0 or ending.strip() not in text:
        raise ChatTemplateError("the chat template leaves out or changes the end of the final message, so it cannot be "
                                "continued. Do not set continue_final_message, or pass another template.")
    if text.count(_CONTINUE_HERE.rstrip()) > 1:
        raise ChatTemplateError("the chat template writes the end of the final message more than once, so it cannot be "
                                "continued. Do not set continue_final_message, or pass another template.")
    # Where the template strips what it is given, the end of the message is stripped as well.
    return text[:mark] if text.startswith(_CONTINUE_HERE, mark) else text[:mark].rstrip()


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of the messages, without the fields that are None."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages is {_kind(messages)}: expected a list such as "
                        f"[{{'role': 'user', 'content': 'Hello'}}].")
    if not messages:
        raise ValueError("messages is empty: a conversation has at least one message.")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} is {_kind(message)}: expected a mapping with role and content. An object with "
                        f"model_dump() or a dataclass becomes one by model_dump() or dataclasses.asdict().")
    # Templates ask whether a field is defined, and would take None for text.
    plain = {name: value for name, value in _plain(message, where).items() if value is not None}
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str):
        raise TypeError(f"{where}['role'] is {_kind(role)}: expected text such as 'user' or 'assistant'.")
    if content is None and role != "assistant":
        raise ValueError(f"{where} of role {role!r} has no content. Give it text; only an assistant's may be None.")
    if isinstance(content, (list, tuple)):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise TypeError(f"{where}['content'][{index}] is {_kind(part)}: expected a part such as "
                                f"{{'type': 'text', 'text': 'Hello'}}.")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise TypeError(f"{where}['content'][{index}]['text'] is {_kind(part.get('text'))}: expected text.")
        plain["content"] = list(content)
    elif content is not None and not isinstance(content, str):
        raise TypeError(f"{where}['content'] is {_kind(content)}: expected text or a list of parts.")
    calls = plain.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise TypeError(f"{where}['tool_calls'] is {_kind(calls)}: expected a list of mappings with the function's name and "
                        f"arguments.")
    return plain


def _checked_objects(objects: Any, name: str) -> list[dict[str, Any]] | None:
    """A plain copy of a list of mappings."""
    if objects is None:
        return None
    if not isinstance(objects, (list, tuple)):
        raise TypeError(f"{name} is {_kind(objects)}: expected a list of JSON objects, as dicts.")
    for index, item in enumerate(objects):
        if callable(item):
            raise TypeError(f"{name}[{index}] is a function: expected its description, {{'type': 'function', 'function': "
                            f"{{'name': ..., 'description': ..., 'parameters': a JSON schema}}}}.")
        if not isinstance(item, Mapping):
            raise TypeError(f"{name}[{index}] is {_kind(item)}: expected a JSON object, as a dict.")
    return _plain(list(objects), name)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning, under whichever name it came, where templates of any family look for it."""
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy that holds nothing but JSON's types: methods of any other object would be the template's to call."""
    if depth > _DEEPEST:
        raise ValueError(f"{where[:80]}... is nested more than {_DEEPEST} levels deep, or holds itself.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has a key that is {_kind(key)}: expected text, as in JSON.")
        return {str.__str__(key): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{where} is {_kind(value)}: expected what JSON can hold (text, numbers, lists, dicts).")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
