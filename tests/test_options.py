"""Options: resolved flag, then environment, then default; errors name the place and what is allowed."""

import os
from dataclasses import FrozenInstanceError, dataclass

import pytest

from ferrum.errors import OptionError
from ferrum.options import (
    DEFAULT_MODEL, EngineOptions, color_wanted, cursor_moves, resolve, setting, settings_of, state_directory, variable_name,
)
from ferrum.sampling import SamplingParams


def test_given_values_come_before_environment_before_defaults():
    environ = {"FERRUM_KV_TOKENS": "4096", "FERRUM_KV_TYPE": "f32", "FERRUM_THREADS": ""}
    model, options, sources = resolve(None, {"kv_tokens": 64, "device": None}, environ)
    assert (options.kv_tokens, options.kv_type, options.threads) == (64, "f32", None)
    assert (sources["kv_tokens"], sources["kv_type"], sources["threads"]) == ("given", "environment", "default")
    assert (model, sources["model"]) == (DEFAULT_MODEL, "default")


def test_model_comes_from_argument_then_environment():
    environ = {"FERRUM_MODEL": os.path.join("~", "a.gguf")}
    assert resolve("b.gguf", {}, environ).model == "b.gguf"
    resolved = resolve(None, {}, environ)
    assert (resolved.model, resolved.sources["model"]) == (os.path.expanduser("~/a.gguf"), "environment")


def test_every_option_can_be_set_by_its_environment_variable():
    for name, (field, rule) in settings_of(EngineOptions).items():
        text = rule.choices[-1] if rule.choices else "01"[not field.default] if rule.kind is bool else "7777777" if rule.unit == "bytes" else "7"
        options = resolve(None, {}, {variable_name(name): text}).options
        assert getattr(options, name) == (text == "1" if rule.kind is bool else rule.kind(text)) != field.default


@pytest.mark.parametrize("text, nbytes", [
    ("4194304", 1 << 22), ("12GiB", 12 << 30), ("1.5 GiB", 3 << 29), ("12G", 12 << 30), ("500MB", 500_000_000), ("8192k", 1 << 23), (".5gib", 1 << 29), (1 << 22, 1 << 22),
])
def test_sizes_are_bytes_or_a_number_with_its_unit(text, nbytes):
    assert EngineOptions(memory_budget=text).memory_budget == nbytes
    assert resolve(None, {}, {"FERRUM_MEMORY_BUDGET": str(text)}).options.memory_budget == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "12XB", "1e9", "0", "0.1", "24", "1023k", "12 G i B", "9" * 30, True, 1.5])
def test_sizes_of_another_form_are_refused(text):
    with pytest.raises(OptionError, match="^memory_budget is .*: expected a whole number of bytes such as 12GiB, at least 1048576"):
        EngineOptions(memory_budget=text)


@pytest.mark.parametrize("text, value", [("1", True), ("TRUE", True), ("off", False), ("no", False)])
def test_truth_values_have_the_usual_words(text, value):
    assert resolve(None, {}, {"FERRUM_PROFILE": text}).options.profile is value
    with pytest.raises(OptionError, match="^profile is .*: expected True or False"):
        EngineOptions(profile=text)


@pytest.mark.parametrize("name, text", [
    ("FERRUM_KV_TOKENS", "many"), ("FERRUM_KV_TOKENS", "0"), ("FERRUM_KV_TYPE", "q4"), ("FERRUM_THREADS", "1.5"),
])
def test_environment_errors_name_the_variable_the_value_and_what_is_allowed(name, text):
    with pytest.raises(OptionError) as error:
        resolve(None, {}, {name: text})
    assert str(error.value).replace("'", "").startswith(f"{name} is {text}: expected ")


@pytest.mark.parametrize("name, value", [
    pytest.param("kv_tokens", 10**400, id="long"), pytest.param("kv_tokens", 10**5000, id="longer"),
    ("kv_tokens", 0), ("kv_tokens", "64"), ("kv_type", "F16"), ("device", 3), ("threads", True), ("max_sequences", None),
])
def test_options_refuse_values_by_name(name, value):
    with pytest.raises(OptionError, match=f"^{name} is .*: expected "):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("text", ["1_0", " 3", "3\n", "٣", "0x1", "", "1" + "0" * 400, "1" + "0" * 5000])
def test_whole_numbers_are_written_in_plain_digits(text):
    rule = settings_of(EngineOptions)["kv_tokens"][1]
    with pytest.raises(OptionError, match="^it is .*: expected a whole number") as error:
        rule.parse(text, "it")
    assert len(str(error.value)) < 160
    assert rule.parse("+12", "it") == 12


@pytest.mark.parametrize("text", ["1_0.5", " 1", "nan", "inf", "1e999", "."])
def test_numbers_are_written_in_plain_digits(text):
    rule = settings_of(SamplingParams)["temperature"][1]
    with pytest.raises(OptionError, match="^it is .*: expected a number"):
        rule.parse(text, "it")
    assert [rule.parse(text, "it") for text in ("1", ".5", "5.", "+2.5e-1")] == [1.0, 0.5, 5.0, 0.25]


def test_an_empty_model_path_is_refused():
    with pytest.raises(OptionError, match="expected the path of a GGUF file"):
        resolve("", {}, {})


def test_options_are_frozen_values():
    assert EngineOptions() == EngineOptions()
    with pytest.raises(FrozenInstanceError):
        EngineOptions().threads = 1


def test_every_field_is_a_setting_with_help():
    for cls in (EngineOptions, SamplingParams):
        functions = ["logits_processors"]  # no flag, no text could give them
        assert list(settings_of(cls)) == [name for name in cls.__dataclass_fields__ if name not in functions]
        for name, (field, rule) in settings_of(cls).items():
            assert rule.help and rule.expected(), name
            assert field.default is not None or rule.default_text, name


def test_color_is_off_where_the_user_says_so():
    assert color_wanted({"TERM": "xterm"})
    assert not color_wanted({"TERM": "xterm", "NO_COLOR": "1"})
    assert not color_wanted({"TERM": "dumb"})


@dataclass(frozen=True)
class Sizes:
    sizes: tuple[int, ...] = setting((1, 4), int, "sizes", unit="rows", minimum=1, maximum=9, sequence=True, may_be_empty=False, commas=True)


def test_a_setting_with_commas_takes_one_flag_with_one_or_more_values():
    rule = settings_of(Sizes)["sizes"][1]
    assert rule.parse("3", "--sizes") == (3,)
    assert rule.parse("3,1,9", "--sizes") == (3, 1, 9)
    for text in ("", "1,,4", "1,", "0", "10", "a", "1, 2", "1;2"):
        with pytest.raises(OptionError) as error:
            rule.parse(text, "--sizes")
        assert str(error.value) == f"--sizes is {text!r}: expected whole numbers of rows from 1 to 9, with commas between."
    with pytest.raises(OptionError, match="expected whole numbers"):
        rule.check((), "sizes")


def test_what_is_remembered_lies_where_the_system_keeps_such_things(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    default = os.path.expanduser("~/.local/state/ferrum")
    assert state_directory({"XDG_STATE_HOME": "/state"}) == "/state/ferrum"
    assert state_directory({}) == state_directory({"XDG_STATE_HOME": "not/absolute"}) == default
    monkeypatch.setattr("sys.platform", "darwin")
    assert state_directory({"XDG_STATE_HOME": "/state"}) == os.path.expanduser("~/Library/Application Support/ferrum")


def test_a_dumb_terminal_moves_no_cursor():
    assert cursor_moves({"TERM": "xterm"}) and cursor_moves({})
    assert not cursor_moves({"TERM": "dumb"}) and not cursor_moves({"TERM": "unknown"})
