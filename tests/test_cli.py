"""The command line as its users meet it: a process with streams, signals and exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from array import array

import pytest

from ferrum import LLM, SamplingParams
from ferrum.options import DEFAULT_MODEL

PROMPT = "Once upon a time"
LONG = ["-n", "1800", "--temperature", "1000", "--seed", "1", "--threads", "1"]  # too random to end by itself
GREEDY = ["--temperature", "0", "-n", "16", "--threads", "1"]


def command(*arguments):
    return [sys.executable, "-m", "ferrum", *arguments]


def environment(**changes):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "LC_", "LANG"))}
    return environ | {"NO_COLOR": "1", **changes}


def ferrum(*arguments, stdin=b"", **changes):
    """(exit code, stdout, stderr) of a run."""
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, env=environment(**changes), timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def greedy():
    """What GREEDY gives for PROMPT."""
    with LLM(threads=1, kv_tokens=64) as llm, llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=16)) as stream:
        list(stream)
        return stream.completion


def assert_short_error(err):
    lines = err.splitlines()
    assert 1 <= len(lines) <= 3, err
    assert lines[0].startswith("error: "), err


def test_text_goes_to_stdout_and_one_line_of_statistics_to_stderr(greedy):
    code, out, err = ferrum("generate", PROMPT, *GREEDY)
    assert (code, out) == (0, greedy.text + "\n")
    assert err.endswith("\n[this model has a chat template: --chat makes the prompt a message to answer]\n")
    speeds = r"prefill 4 tokens [\d.]+/s, decode 15 tokens [\d.]+/s, first token [\d.]+ m?s"
    assert re.fullmatch(rf"\[{speeds}, limit of 16 tokens \(-n\)\]", err.splitlines()[0])
    assert len(err.splitlines()) == 2


def test_json_is_one_line_with_everything(greedy):
    code, out, err = ferrum("generate", PROMPT, *GREEDY, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    value = json.loads(out)
    assert list(value) == ["prompt", "index", "text", "token_ids", "finish_reason", "stop_reason", "notice", "seed", "usage", "timings"]
    assert (value["prompt"], value["text"], value["token_ids"]) == (PROMPT, greedy.text, greedy.token_ids)
    assert value["finish_reason"] == "length"
    assert value["usage"] == {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20}
    assert value["seed"] is None
    assert value["timings"]["prefill_tokens_per_s"] > 0


def test_a_seed_repeats_and_json_reports_it():
    _, first, _ = ferrum("generate", PROMPT, "-n", "12", "--json", "--temperature", "1.5")
    seed = json.loads(first)["seed"]
    _, again, _ = ferrum("generate", PROMPT, "-n", "12", "--json", "--temperature", "1.5", "--seed", str(seed))
    assert json.loads(again)["text"] == json.loads(first)["text"]


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_can_come_from_stdin_without_its_last_newline(greedy, arguments):
    code, out, _ = ferrum("generate", *arguments, *GREEDY, "--json", stdin=PROMPT.encode() + b"\n")
    assert code == 0
    assert (json.loads(out)["prompt"], json.loads(out)["text"]) == (PROMPT, greedy.text)


def test_stop_strings_end_the_text(greedy):
    stop = greedy.text[4:9]
    code, out, err = ferrum("generate", PROMPT, *GREEDY, "--stop", "never", "--stop", stop)
    assert (code, out) == (0, greedy.text[: greedy.text.index(stop)] + "\n")
    assert f"stop string {stop!r}" in err


def test_a_full_cache_is_named_in_the_statistics():
    code, out, err = ferrum("generate", PROMPT, "--kv-tokens", "16", "--temperature", "0")
    assert code == 0 and out.strip()
    assert "The KV cache of 16 tokens is full. Raise kv_tokens (--kv-tokens) to go on]" in err


def test_verbose_tells_model_options_plan_and_prompt_ids():
    code, _, err = ferrum("generate", PROMPT, "-n", "1", "--verbose", FERRUM_KV_TOKENS="64")
    assert code == 0
    for text in ("loaded in", "option kv_tokens = 64 (environment)", "plan kv_bytes", "prompt token ids: [", "seed "):
        assert text in err


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_text_is_utf8_in_the_c_locale(locale):
    prompt = "Zoë — 你好"
    code, out, err = ferrum("generate", prompt, *GREEDY, "--json", **locale)
    assert code == 0, err
    assert json.loads(out)["prompt"] == prompt
    for seed in range(1, 40):  # until the model writes a character that is not ASCII
        code, out, err = ferrum("generate", "日本", "-n", "30", "--temperature", "3", "--seed", str(seed), **locale)
        assert code == 0, err
        if any(ord(character) > 127 for character in out):
            return
    pytest.fail("no seed gave text that is not ASCII")


def test_ctrl_c_keeps_the_text_and_exits_130():
    process = subprocess.Popen(command("generate", PROMPT, *LONG),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.endswith(b"\n") and len(first + out) > 8
    assert len(err.splitlines()) == 2 and b", Ctrl-C]" in err


def test_a_broken_pipe_is_quiet():
    process = subprocess.Popen(command("generate", PROMPT, *LONG),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.read(4)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command("generate", PROMPT, *GREEDY), stdout=full, stderr=subprocess.PIPE, env=environment())
    assert done.returncode == 1
    assert_short_error(done.stderr.decode())


def on_a_terminal(*arguments, **changes):
    """(exit code, what a terminal shows) with stdin, stdout and stderr on it."""
    ours, theirs = pty.openpty()
    changes = {"TERM": "xterm", "NO_COLOR": ""} | changes
    process = subprocess.Popen(command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**changes))
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def test_a_terminal_shows_the_prompt_first(greedy):
    code, shown = on_a_terminal("generate", PROMPT, *GREEDY)
    assert code == 0
    assert shown.startswith(f"\033[1m{PROMPT}\033[0m{greedy.text}\n\033[2m[prefill ")
    _, plain = on_a_terminal("generate", PROMPT, *GREEDY, NO_COLOR="1")
    assert plain.startswith(f"{PROMPT}{greedy.text}\n[prefill ")


def test_control_characters_of_a_text_do_not_steer_a_terminal():
    with LLM(threads=1, kv_tokens=64) as llm:
        (escape,), newline = llm.tokenize("\x1b"), llm.tokenize("\n")[0]
    only = ["--allowed-token-id", str(escape), "--allowed-token-id", str(newline), "--threads", "1", "-n", "12", "--seed", "1", "--temperature", "9"]
    code, exact, _ = ferrum("generate", PROMPT, *only)
    assert code == 0 and set(exact) == {"\x1b", "\n"}
    code, shown = on_a_terminal("generate", PROMPT + "\x9b2J", *only, NO_COLOR="1")
    assert code == 0 and "\x1b" not in shown and "\x9b" not in shown
    assert shown.startswith(PROMPT + r"\x9b2J") and r"\x1b" in shown
    code, shown = on_a_terminal("generate", PROMPT, *only, "--num-samples", "2", NO_COLOR="1")
    assert code == 0 and "\x1b" not in shown and shown.count(r"\x1b") > 2


def test_no_prompt_on_a_terminal_is_explained_with_an_example():
    code, shown = on_a_terminal("generate")
    assert code == 2
    assert_short_error(shown)
    assert 'generate "Once upon a time"' in shown


@pytest.mark.parametrize("arguments, named", [
    (["generate", PROMPT, "--top-p", "2"], "--top-p is 2.0: expected a number above 0 and at most 1"),
    (["generate", PROMPT, "-n", "many"], "-n (--max-tokens) is 'many': expected a whole number of tokens"),
    (["generate", PROMPT, "--kv-type", "q4"], "--kv-type is 'q4': expected one of f16, f32, q8_0"),
    (["generate", PROMPT, "--stop", ""], "--stop is ''"),
    (["generate", PROMPT, "--temprature", "1"], "There is no flag --temprature. Did you mean --temperature?"),
    (["generate", PROMPT, "--temp", "1"], "There is no flag --temp. Did you mean --temperature?"),
    (["generate", PROMPT, "-c", "64"], "There is no flag -c. Did you mean --kv-tokens?"),
    (["generate", PROMPT, "--repeat-penalty=2"], "Did you mean --repetition-penalty?"),
    (["generate", PROMPT, "--seed"], "--seed"),
    (["generate", "Once", "upon"], "quotes"),
    (["generate", PROMPT, "--json=1"], "--json takes no value, but '1' was given"),
    (["generate", PROMPT, "-n", "1_0"], "-n (--max-tokens) is '1_0'"),
    (["generate", PROMPT, "--seed", "1" + "0" * 400], "--seed is 1000"),
    (["generate", PROMPT, "-m", ""], "-m, --model"),
    (["inspect", "foo"], "Inspect takes no text, but 'foo' was given: name a model file with -m"),
    (["generate", ""], "prompt is empty"),
    (["generate"], "prompt on stdin is empty"),
    (["generat", PROMPT], "Did you mean generate?"),
    (["Once upon a time"], "generate"),
    (["inspect", "--kv-tokens", "0"], "--kv-tokens is 0"),
    ([], "usage: "),
])
def test_wrong_usage_exits_2_and_says_what_is_expected(arguments, named):
    code, out, err = ferrum(*arguments)
    assert (code, out) == (2, "")
    assert named in err
    if arguments:
        assert_short_error(err)


def test_a_wrong_environment_variable_is_named():
    code, _, err = ferrum("generate", PROMPT, FERRUM_THREADS="all")
    assert code == 2
    assert_short_error(err)
    assert "FERRUM_THREADS is 'all'" in err


def test_text_that_is_not_utf8_is_refused():
    for arguments, stdin in ((["generate", b"caf\xe9"], b""), (["generate", "-"], b"caf\xe9")):
        done = subprocess.run([*command(), *arguments], input=stdin, capture_output=True, env=environment(LC_ALL="C.UTF-8"))
        assert done.returncode == 2
        assert_short_error(done.stderr.decode())
        assert b"not UTF-8" in done.stderr


@pytest.mark.parametrize("name", ["generate", "inspect"])
def test_a_bad_model_file_is_a_short_error(tmp_path, name):
    text = tmp_path / "notes.gguf"
    text.write_text("These are notes, not a model.")
    with open(DEFAULT_MODEL, "rb") as model:
        (tmp_path / "half.gguf").write_bytes(model.read(1 << 20))
    for path in (text, tmp_path / "half.gguf", tmp_path / "absent.gguf", tmp_path):
        code, out, err = ferrum(name, *([PROMPT] if name == "generate" else []), "-m", str(path))
        assert (code, out) == (1, "")
        assert_short_error(err)
        assert str(path) in err


def test_a_prompt_that_does_not_fit_is_refused_with_the_flag_to_raise():
    code, out, err = ferrum("generate", PROMPT * 20, "--kv-tokens", "16")
    assert (code, out) == (1, "")
    assert_short_error(err)
    assert "--kv-tokens" in err


def test_help_fits_80_columns_and_names_every_flag():
    code, out, _ = ferrum("generate", "--help", COLUMNS="200")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for flag in ("-m", "-n", "--temperature", "--top-k", "--top-p", "--min-p", "--seed", "--stop", "--threads", "--kv-tokens",
                 "--kv-type", "--activations", "--device", "--json", "--verbose"):
        assert f"  {flag}" in out
    assert "  -m, --model MODEL.gguf  GGUF file" in out
    assert "141" in out
    for arguments in (["--help"], ["inspect", "--help"]):
        code, out, _ = ferrum(*arguments)
        assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_version_is_the_package_version():
    import ferrum as package

    assert ferrum("--version") == (0, f"ferrum {package.__version__}\n", "")


def test_inspect_json_adds_up():
    code, out, err = ferrum("inspect", "--json", "--kv-tokens", "64", FERRUM_KV_TYPE="f32")
    assert (code, err, out.count("\n")) == (0, "", 1)
    report = json.loads(out)
    assert report["architecture"] == "qwen3moe" and report["reason"] is None
    assert report["options"]["kv_tokens"] == {"value": 64, "source": "flag"}
    assert report["options"]["kv_type"] == {"value": "f32", "source": "FERRUM_KV_TYPE"}
    assert report["options"]["device"]["source"] == "default"
    plan = report["plan"]
    assert plan["kv_bytes"] == 64 * plan["kv_bytes_per_token"]
    assert plan["total_bytes"] == sum(plan[part] for part in ("weights_bytes", "weights_extra_bytes", "kv_bytes", "scratch_bytes"))
    assert sum(row["bytes"] for row in report["tensor_types"]) <= report["file_bytes"] == os.path.getsize(DEFAULT_MODEL)
    assert report["vocabulary"]["size"] == report["config"]["vocab_size"]
    assert report["chat_template"]


def test_inspect_shows_its_sections():
    code, out, _ = ferrum("inspect")
    assert code == 0
    for text in ("qwen3moe", "Q4_K", "tensors", "vocabulary", "<|im_end|>", "chat template", "memory plan", "KV cache", "(default)"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 80


def test_control_characters_of_a_file_are_shown_escaped(tmp_path):
    path = tmp_path / "steering.gguf"
    write_unsupported(path, architecture="red\x1b[31m\rfox", name="two\nlines\x9b2J\x7f", template="\x1b]0;title\x07")
    code, out, err = ferrum("inspect", "-m", str(path))
    assert code == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + err)
    assert r"two\nlines\x9b2J\x7f" in out and r"\x1b]0;title\x07" in out and r"red\x1b[31m\rfox" in err
    assert_short_error(err)
    _, out, _ = ferrum("inspect", "--json", "-m", str(path))
    assert json.loads(out)["name"] == "two\nlines\x9b2J\x7f"


def test_inspect_json_has_null_for_numbers_that_json_has_not(tmp_path):
    path = tmp_path / "nan.gguf"
    write_unsupported(path, rope_theta=float("nan"))
    _, out, _ = ferrum("inspect", "--json", "-m", str(path))
    assert json.loads(out, parse_constant=pytest.fail)["config"]["rope.freq_base"] is None


def test_inspect_lists_the_types_of_a_model_that_cannot_run(tmp_path):
    path = tmp_path / "unsupported.gguf"
    write_unsupported(path)
    code, out, err = ferrum("inspect", "-m", str(path))
    assert code == 1
    assert "Q2_K" in out and "84 B" in out
    assert_short_error(err)
    code, out, _ = ferrum("inspect", "--json", "-m", str(path))
    report = json.loads(out)
    assert code == 1 and report["plan"] is None and report["reason"]
    assert [row["type"] for row in report["tensor_types"]] == ["Q2_K", "F32"]
    assert report["config"]["block_count"] == 1


def write_unsupported(path, architecture="qwen3moe", name="", template="", rope_theta=1e6):
    """A file of a sound form with a quant type, and a vocabulary, that ferrum does not run."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_chat_template(template)
    writer.add_rope_freq_base(rope_theta)
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.scores", array("f", [0.0, 1.0]).tolist())
    writer.add_tensor("output_norm.weight", np.zeros(4, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((1, 84), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_import_ferrum_loads_nothing_heavy():
    code = """if True:
        import sys
        before = set(sys.modules)
        import ferrum
        assert ferrum.__version__ and "LLM" in dir(ferrum)
        heavy = {"numpy", "tokenizers", "argparse", "typing", "logging", "json", "asyncio", "gguf", "jinja2", "ferrum_native"}
        print(sorted(heavy & (set(sys.modules) - before)))
        from ferrum import *
        assert LLM and SamplingParams and GGUFFile and Tokenizer and Engine and KVPoolExhausted
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_help_loads_neither_numpy_nor_tokenizers():
    code = "import sys; from ferrum.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass\n" \
           "assert not {'numpy', 'tokenizers', 'gguf', 'ferrum_native'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import ferrum as package

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        package.Nothing
