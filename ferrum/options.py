"""What a user can set: how a setting is described, checked and resolved, and the options of the engine.

A setting is a dataclass field that carries a `Setting`. Command line flags, environment variables and their help
derive from it. This is the only file that reads the environment (setup.py reads the build's own variables).
"""

from __future__ import annotations

import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from ferrum.errors import OptionError

DEFAULT_MODEL = os.path.join(os.path.dirname(__file__), "data", "ferrum-storyteller-q4_k_m.gguf")

# How numbers are written: int() and float() would take 1_0, spaces, nan and other scripts' digits too.
_WRITTEN = {int: re.compile(r"[+-]?[0-9]+"), float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")}
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?([KMGT]?)(I?)B?")
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

GIVEN, ENVIRONMENT, DEFAULT = "given", "environment", "default"


@dataclass(frozen=True)
class Setting:
    """How the values of one dataclass field look: `kind` is int, float, str or bool, bounds are inclusive.

    `default_text` describes a default of None ("the CPUs this process may use"), which is then allowed.
    `sequence` marks a tuple of values, `mapping` a dict from token ids to values; both are a repeated flag (ID=X for
    the latter), but with `commas` a sequence is a single flag (1,4,8). A sequence that may not be empty is None where
    there is none. A whole number of bytes may be written with a unit ("12GiB"). `flag` is the flag where it is not that
    of the field's name, or False where the command line has none.
    """

    kind: type
    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str = ""
    sequence: bool = False
    may_be_empty: bool = True
    mapping: bool = False
    commas: bool = False
    short_flag: str = ""
    metavar: str = "N"
    flag: bool | str = True

    def expected(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) < 3 else "one of " + ", ".join(self.choices)
        if self.kind is str:
            return "text that is not empty"
        if self.kind is bool:
            return "True or False"
        if self.commas:
            return replace(self, commas=False).expected().replace("a whole number", "whole numbers", 1) + ", with commas between"
        if self.unit == "bytes":
            return f"a whole number of bytes such as 12GiB, at least {_plain(self.minimum)}"
        noun = "a whole number" if self.kind is int else "a number"
        of = f" of {self.unit}" if self.unit else ""
        if self.mapping:
            noun = f"ID=X with a token id and {noun}"
        if self.above is not None:
            return f"{noun}{of} above {self.above:g} and at most {self.maximum:g}"
        if self.maximum is not None:
            return f"{noun}{of} from {_plain(self.minimum)} to {_plain(self.maximum)}"
        return f"{noun}{of}, {_plain(self.minimum)} or more"

    def check(self, value: Any, name: str) -> Any:
        """The value in its own type; OptionError, calling the setting `name`, if it is not allowed."""
        if self.sequence:
            if value is None:
                return () if self.may_be_empty else None
            if isinstance(value, str):
                value = (value,)
            if not isinstance(value, Iterable):
                raise self._error(value, name)
            values = tuple(self._check_one(item, name) for item in value)
            if not values and not self.may_be_empty:
                raise self._error(values, name)
            return values
        if self.mapping:
            return self._check_mapping(value, name)
        if value is None and self.default_text:
            return None
        return self._check_one(value, name)

    def parse(self, text: str, name: str) -> Any:
        """`check` for a value written as text, as flags and environment variables are; one item of a sequence without `commas`,
        (id, value) for a mapping's item."""
        if self.commas:
            try:
                return tuple(self._parse_one(part, name) for part in text.split(","))
            except OptionError:
                raise self._error(text, name) from None  # shows all that was written
        if self.mapping:
            id, separator, text = text.partition("=")
            if not separator:
                raise self._error(id, name)
            return _TOKEN_ID.parse(id, f"the token id of {name}"), self._parse_one(text, name)
        return self._parse_one(text, name)

    def _parse_one(self, text: str, name: str) -> Any:
        if self.kind is bool:
            if text.lower() not in _TRUTH:
                raise self._error(text, name)
            return _TRUTH[text.lower()]
        if self.unit == "bytes":
            return self._check_one(text, name)
        if self.kind in _WRITTEN and not _WRITTEN[self.kind].fullmatch(text):
            raise self._error(text, name)
        try:
            value = self.kind(text)
        except ValueError:  # more digits than int() takes
            raise self._error(text, name) from None
        return self._check_one(value, name)

    def _check_mapping(self, value: Any, name: str) -> dict[int, Any]:
        if value is None:
            return {}
        try:
            items = dict(value).items()
        except (TypeError, ValueError):
            raise self._error(value, name) from None
        return {_TOKEN_ID.check(id, f"a token id of {name}"): self._check_one(item, name) for id, item in items}

    def _check_one(self, value: Any, name: str) -> Any:
        if self.unit == "bytes" and isinstance(value, str):
            value = self._size(value, name)
        if (self.kind is bool) is not isinstance(value, bool) or (self.kind is str) is not isinstance(value, str):
            raise self._error(value, name)
        if self.kind is bool:
            return value
        try:
            converted = operator.index(value) if self.kind is int else self.kind(value)
        except (TypeError, ValueError, OverflowError):
            raise self._error(value, name) from None
        if self.kind is str:
            allowed = value in self.choices if self.choices else bool(value)
        else:
            allowed = (
                (self.kind is int or math.isfinite(converted))  # isfinite would make a float of a huge int
                and (self.minimum is None or converted >= self.minimum)
                and (self.maximum is None or converted <= self.maximum)
                and (self.above is None or converted > self.above)
            )
        if not allowed:
            raise self._error(value, name)
        return converted

    def _size(self, text: str, name: str) -> int:
        """Bytes of "12GiB" (or 12G), "1.5 GB", "4096"; a unit without an i is of 1000s, a lone letter of 1024s."""
        written = _SIZE.fullmatch(text.strip().upper())
        if written is None:
            raise self._error(text, name)
        number, unit, binary = written.groups()
        base = 1024 if binary or not text.strip().upper().endswith("B") else 1000
        return int(float(number) * base ** " KMGT".index(unit or " ")) if len(number) < 20 else 1 << 80

    def _error(self, value: Any, name: str) -> OptionError:
        try:
            shown = repr(value)
        except ValueError:  # more digits than Python writes
            shown = "a number of thousands of digits"
        return OptionError(f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}: expected {self.expected()}.")


_TOKEN_ID = Setting(int, "a token of the vocabulary", minimum=0, maximum=(1 << 31) - 1)


def _plain(number: float | None) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def setting(default: Any, kind: type, help: str, **details: Any) -> Any:
    """A dataclass field with a Setting."""
    return field(default=default, metadata={"setting": Setting(kind, help, **details)})


def settings_of(cls: type) -> dict[str, tuple[Field, Setting]]:
    """The fields of a dataclass that are settings, by name, in order."""
    return {f.name: (f, f.metadata["setting"]) for f in fields(cls) if "setting" in f.metadata}


def check_settings(instance: Any) -> None:
    """Check and convert every setting of a frozen dataclass; for its __post_init__."""
    for name, (_, rule) in settings_of(type(instance)).items():
        object.__setattr__(instance, name, rule.check(getattr(instance, name), name))


def described(cls: type) -> type:
    """Adds what every setting of a dataclass means to its docstring, as its flags' help says it; a decorator above @dataclass."""
    lines = []
    for name, (field, rule) in settings_of(cls).items():
        default = rule.default_text or repr(field.default)
        lines.append(f"    {name}: {rule.help} ({rule.expected()}; default: {default})")
    cls.__doc__ = f"{cls.__doc__}\n    Fields:\n\n" + "\n".join(lines) + "\n    "
    return cls


def flag_name(name: str, rule: Setting) -> str:
    return rule.flag if isinstance(rule.flag, str) else "--" + name.replace("_", "-")


def variable_name(name: str) -> str:
    return "FERRUM_" + name.upper()


@described
@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs a model; None leaves the choice to the engine, which says what it chose in `Engine.options`.

    Raises OptionError that names the option, its value and what is allowed.
    """

    device: str = setting("auto", str, "where the model runs", choices=("auto", "cpu", "metal"), metavar="NAME")
    threads: int | None = setting(
        None, int, "CPU threads", unit="threads", minimum=1, maximum=1024,
        default_text="the CPUs this process may use",
    )
    kv_tokens: int | None = setting(
        None, int, "tokens that the KV cache holds: prompts and generated texts together",
        unit="tokens", minimum=1, maximum=1 << 30, default_text="the model's context or what fits, at most 8192",
    )
    memory_budget: int | None = setting(
        None, int, "most memory for weights, KV cache and scratch: the default of kv_tokens fits it, but for at least 512",
        unit="bytes", minimum=1 << 20, maximum=(1 << 63) - 1, default_text="none; the KV cache fits what is available",
        metavar="12GiB",
    )
    kv_type: str = setting("f16", str, "number type of the KV cache (q8_0 takes half the memory, on the CPU; f32 is for proof)", choices=("f16", "f32", "q8_0"), metavar="TYPE")
    activations: str = setting(
        "int8", str, "number type of activations in products with quantized weights (float32 is for proof)",
        choices=("int8", "float32"), metavar="TYPE",
    )
    max_sequences: int = setting(
        16, int, "texts that run at once", unit="sequences", minimum=1, maximum=65536
    )
    prefill_chunk: int = setting(
        512, int, "prompt tokens that one step takes", unit="tokens", minimum=1, maximum=65536
    )
    max_logit_rows: int | None = setting(
        None, int, "most rows of logits that one call returns", unit="rows", minimum=1, maximum=1 << 20,
        default_text="max_sequences, at least 16", flag=False,
    )
    profile: bool = setting(False, bool, "time every op of the engine, against its bytes and operations")
    prefix_cache: bool = setting(True, bool, "keep what was computed in free room of the KV cache, for prompts that begin alike")

    def __post_init__(self) -> None:
        check_settings(self)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Engine` and `plan`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def slow_device_note(device: str) -> str | None:
    """What to tell, once, about an effective device that is there for tests and not for use; None of any other."""
    if device != "metal" or sys.platform == "darwin":
        return None
    return "device metal runs the Metal kernels on the CPU here, thousands of times slower than a GPU: it is for tests. Use cpu."


class Resolved(NamedTuple):
    """A model path and engine options, with where each came from: "given" (flag or argument), "environment" or "default".

    `sources` has one entry per option and "model".
    """

    model: str
    options: EngineOptions
    sources: dict[str, str]


def resolve(model: str | os.PathLike | None, given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Resolved:
    """Settle every option once: what is given (None: nothing), else FERRUM_<OPTION>, else the default."""
    environ = os.environ if environ is None else environ
    known = settings_of(EngineOptions)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise TypeError(f"there is no option {name}." + (f" Did you mean {close[0]}?" if close else f" There are {', '.join(known)}."))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, (_, rule) in known.items():
        text = environ.get(variable_name(name), "")
        if given.get(name) is not None:
            values[name], sources[name] = given[name], GIVEN
        elif text:
            values[name], sources[name] = rule.parse(text, variable_name(name)), ENVIRONMENT
        else:
            sources[name] = DEFAULT
    path = environ.get("FERRUM_MODEL", "")
    if model is not None:
        path, sources["model"] = os.fspath(model), GIVEN
        if not path:
            raise OptionError("model (-m, --model) is '': expected the path of a GGUF file.")
    elif path:
        path, sources["model"] = os.path.expanduser(path), ENVIRONMENT
    else:
        path, sources["model"] = DEFAULT_MODEL, DEFAULT
    return Resolved(path, EngineOptions(**values), sources)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the CPU quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as limit:
            quota, period = limit.read().split()
        return max(1, min(cpus, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no limit reads "max"
        return cpus


def available_memory() -> int | None:
    """Bytes that this machine and container would give now; None where the system does not say."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            found.append(int(limit.read()))
    except (OSError, ValueError):  # no limit reads "max"
        pass
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def state_directory(environ: Mapping[str, str] | None = None) -> str:
    """Where ferrum keeps what it remembers from run to run, such as what was typed in a chat."""
    environ = os.environ if environ is None else environ
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Application Support/ferrum")
    base = environ.get("XDG_STATE_HOME", "")  # a relative path is to be ignored, says the XDG base directory specification
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.local/state"), "ferrum")


def cursor_moves(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a terminal can do more than write line after line."""
    environ = os.environ if environ is None else environ
    return environ.get("TERM") not in ("dumb", "unknown")


def color_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the user lets a terminal show colour (https://no-color.org)."""
    environ = os.environ if environ is None else environ
    return not environ.get("NO_COLOR") and cursor_moves(environ)
