"""The Jinja environment that chat templates run in: what `transformers` gives them, in a sandbox.

A template comes with a model file and is as trusted as its author. It cannot reach Python's internals, change what
it is given, read files or the environment, and one `range` has at most 100,000 items. Its time and its memory are not
bounded: loops inside loops and text that doubles are legal Jinja. Render templates of strangers in a process with
limits of its own.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Refusal(TemplateError):
    """The template called `raise_exception`."""


def compile_template(source: str, *, undefined: type[Undefined] = Undefined) -> Template:
    """The template of `source`; raises what jinja2 raises for a text that is no template. `undefined`: what a missing variable is."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=undefined, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_PlainNamespace)
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its body is rendered, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PlainNamespace(Namespace):
    """A namespace without attributes that Python gives a meaning to."""

    def __init__(*args: Any, **attributes: Any) -> None:  # no name for self: a template may have an attribute of that name
        self, *initial = args
        values = dict(*initial, **attributes)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template has no attribute that begins with _, such as {name!r}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON as models saw it in training; Jinja's own filter writes < > & ' as escapes, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
