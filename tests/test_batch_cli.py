"""`python -m ferrum batch` as its users meet it."""

import json
import os
import pty
import re
import select
import subprocess

import pytest
from batch_cases import batch, command, environment, files_of, read_rows, rows_of_all_kinds, start, write_rows
from test_cli import assert_short_error

import ferrum.batch
from ferrum import SamplingParams


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("cli") / "in.jsonl", rows_of_all_kinds(36))


def test_a_job_tells_its_beginning_and_its_end_and_nothing_between(rows, tmp_path):
    code, err, out = batch(rows, "-o", tmp_path / "out.jsonl", "-n", "6", "--temperature", "0")
    assert (code, out) == (0, "")
    first, last, hint = err.splitlines()
    assert re.fullmatch(r"\[36 rows; 64 rows at once, KV cache of [\d,]+ tokens\]", first)
    assert re.fullmatch(rf"\[36 rows, 6 errors; [\d,]+ tokens in, [\d,]+ out, [\d.]+ s, [\d.]+/s; results in {tmp_path / 'out.jsonl'}\]", last)
    assert hint.endswith("--resume --retry-errors]")
    expected = list(ferrum.batch.run(rows, params=SamplingParams(temperature=0, max_tokens=6, seed=1), threads=1))
    found = read_rows(tmp_path / "out.jsonl")
    greedy = [i for i, row in enumerate(expected) if "seed" not in row and "outputs" not in row]
    assert len(greedy) > 24 and all(found[i] == expected[i] for i in greedy)


def test_every_flag_of_a_row_reaches_it(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"name": "Tom"}, {"messages": [{"role": "user", "content": "Hi"}], "name": "x"}])
    (tmp_path / "t.jinja").write_text("Tell me about {{ name }}.\n")
    flags = ["--template", tmp_path / "t.jinja", "--chat", "--system", "Be kind.", "--no-think", "-n", "5", "--temperature", "0", "--stop", "zz"]
    code, err, _ = batch(path, "-o", tmp_path / "out.jsonl", *flags)
    assert code == 0, err
    expected = list(ferrum.batch.run(path, params=SamplingParams(temperature=0, max_tokens=5, stop=["zz"]), template="Tell me about {{ name }}.\n", chat=True,
                                     system="Be kind.", template_options={"enable_thinking": False}, threads=1))
    assert read_rows(tmp_path / "out.jsonl") == expected
    code, err, _ = batch(path, "-o", tmp_path / "field.jsonl", "--prompt-field", "name", "--limit", "1", "-n", "3")
    assert code == 0 and len(read_rows(tmp_path / "field.jsonl")) == 1
    code, err, _ = batch(path, "-o", tmp_path / "openai.jsonl", "--prompt-field", "name", "--format", "openai", "-n", "3", "--concurrency", "2")
    assert code == 0 and "2 rows at once" in err
    assert read_rows(tmp_path / "openai.jsonl")[0]["response"]["body"]["object"] == "text_completion"


@pytest.mark.parametrize("arguments,message", [
    ([], "The input is missing"),
    (["IN"], "The output is missing"),
    (["IN", "-o", "-"], "-o - is no file"),
    (["IN", "-o", "OUT", "--system", "x"], "--system goes with --chat"),
    (["IN", "-o", "OUT", "--no-think"], "--no-think goes with --chat"),
    (["IN", "-o", "OUT", "--retry-errors"], "--retry-errors goes with --resume"),
    (["IN", "-o", "OUT", "--prompt-field", "a", "--template", "b"], "give one of them"),
    (["IN", "-o", "OUT", "--template", "none.jinja"], "--template none.jinja cannot be read"),
    (["IN", "-o", "OUT", "--limit", "-1"], "'-1' is no whole number of rows"),
    (["IN", "-o", "OUT", "--concurrency", "many"], "'many' is no whole number"),
    (["IN", "-o", "OUT", "--concurrency", "0"], "concurrency is 0"),
    (["IN", "-o", "OUT", "--format", "xml"], "invalid choice: 'xml'"),
    (["IN", "-o", "OUT", "--max-seqs", "4"], "there is no flag --max-seqs"),
    (["IN", "-o", "OUT", "--temperature", "x"], "temperature"),
    (["-", "--dry-run"], "--dry-run reads a file"),
])
def test_wrong_usage_is_told_in_a_line_or_two(rows, tmp_path, arguments, message):
    given = [str({"IN": rows, "OUT": tmp_path / "out.jsonl"}.get(each, each)) for each in arguments]
    done = subprocess.run(command("batch", *given), capture_output=True, env=environment(), timeout=60)
    assert done.returncode == 2 and message.lower() in done.stderr.decode().lower(), done.stderr
    assert_short_error(done.stderr.decode())
    assert files_of(tmp_path / "out.jsonl") == [] and not (tmp_path / "out.jsonl").exists()


def test_what_stops_a_job_is_told_with_the_command_that_goes_on(rows, tmp_path):
    output = tmp_path / "my out.jsonl"
    code, err, _ = batch(rows, "-o", output, "-n", "4", "--max-errors", "2")
    assert code == 1 and "3 rows are error rows" in err
    assert f"python -m ferrum batch {rows} -o '{output}' -n 4 --max-errors 2 --threads 1 --resume" in err
    code, err, _ = batch(rows, "-o", output, "-n", "4")
    assert code == 1 and "a job that has not finished" in err and "--resume" in err
    code, err, _ = batch(rows, "-o", output, "-n", "5", "--resume")
    assert code == 1 and "\n  params.max_tokens: the manifest has 4, given is 5.\n" in err
    assert batch(rows, "-o", output, "--resume")[0] == 0
    code, err, _ = batch(rows, "-o", output, "--resume")
    assert code == 0 and "nothing to do: all 36 rows were done before, 6 errors" in err
    code, err, _ = batch(rows, "-o", output)
    assert code == 1 and "It is not overwritten" in err
    assert "Traceback" not in err


def test_an_input_without_rows_is_told_as_such(tmp_path):
    code, err, _ = batch(write_rows(tmp_path / "in.jsonl", ["", " "]), "-o", tmp_path / "out.jsonl")
    assert (code, err) == (0, f"[no rows to run; the output is empty: {tmp_path / 'out.jsonl'}]\n")


def test_quiet_tells_nothing_but_errors(rows, tmp_path):
    assert batch(rows, "-o", tmp_path / "out.jsonl", "-n", "4", "--quiet") == (0, "", "")
    code, err, _ = batch(rows, "-o", tmp_path / "out.jsonl", "--quiet")
    assert code == 1 and err.startswith("error: ")


def test_json_progress_is_lines_of_json(rows, tmp_path):
    process = start(rows, "-o", tmp_path / "out.jsonl", "-n", "60", "--ignore-eos", "--json-progress", "--concurrency", "1")
    _, err = process.communicate(timeout=120)
    lines = [json.loads(line) for line in err.decode().splitlines()]
    assert process.returncode == 0 and len(lines) >= 2
    assert lines[-1]["state"] == "finished" and (lines[-1]["rows"], lines[-1]["done"], lines[-1]["errors"]) == (36, 36, 6)
    assert lines[-1]["tokens_per_s"] > 0 and lines[-1]["seconds_left"] == 0 and lines[-1]["completion_tokens"] > 500
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    assert {line["state"] for line in lines} <= {"reading", "running", "finished"}
    code, err, _ = batch(rows, "-o", tmp_path / "out.jsonl", "--resume", "--json-progress")
    (line,) = [json.loads(line) for line in err.splitlines()]
    assert code == 0 and (line["state"], line["done"], line["done_before"], line["errors"]) == ("finished", 36, 36, 6)


def test_a_dry_run_tells_what_a_job_would_be_and_leaves_nothing(rows, tmp_path):
    code, err, out = batch(rows, "--dry-run", "-n", "6", "-o", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    assert os.listdir(tmp_path) == []
    assert "rows           36, of them 6 errors" in out
    assert "line 24: ContextFull: The prompt has at least" in out and "line 6: InvalidRow: The line is not JSON" in out
    code, err, _ = batch(rows, "-o", tmp_path / "out.jsonl", "-n", "6", "--ignore-eos", "--temperature", "0")
    tokens = re.search(r"([\d,]+) tokens in, ([\d,]+) out", err)
    assert f"tokens in      {tokens[1]}, at most" in out
    assert int(re.search(r"tokens out     at most ([\d,]+)", out)[1].replace(",", "")) >= int(tokens[2].replace(",", ""))
    assert re.search(r"memory         [\d.]+ MiB: weights 12\.\d MiB, KV cache [\d.]+ MiB for [\d,]+ tokens", out)
    write_rows(tmp_path / "twice.jsonl", [{"custom_id": 1}, {"custom_id": 1}])
    code, err, _ = batch(tmp_path / "twice.jsonl", "--dry-run")
    assert code == 1 and "custom_id twice: 1 (lines 1 and 2)" in err


def on_a_terminal(*arguments, columns=80):
    """(exit code, everything shown) of `batch` whose stderr is a terminal."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command("batch", *map(str, arguments), "--threads", "1"), stdin=theirs, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    shown = b""
    while True:
        select.select([ours], [], [])
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


@pytest.mark.parametrize("columns", [80, 40])
def test_a_bar_on_a_terminal_stays_in_its_line_and_is_gone_at_the_end(rows, tmp_path, columns):
    code, shown = on_a_terminal(rows, "-o", tmp_path / "out.jsonl", "-n", "400", "--ignore-eos", "--concurrency", "1", columns=columns)
    assert code == 0
    shown = shown.replace("\x1b[K", "")
    bars = re.findall(r"\r(\[[#.]+ [^\r]*)", shown)
    assert bars and all(len(bar.rstrip()) < columns for bar in bars), bars
    assert any(re.match(r"\[#+\.+ \d+/36 rows \d+%", bar) for bar in bars)
    assert re.search(r"\r *\r?\[36 rows, 6 errors;", shown.replace("\n", "\r"))
