"""`ferrum bench`: what it measures, what it refuses, and that it notices wrong ids. Figures are only checked for being there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import ferrum.timed_runs
from ferrum import LLM
from ferrum.benchmark import BenchParams
from ferrum.cli import main
from ferrum.cli.profile_table import profile_lines
from ferrum.errors import FerrumError, OptionError
from ferrum.options import DEFAULT_MODEL
from ferrum.step_bytes import decode_step_bytes, distinct_experts
from ferrum.timed_runs import alone, decode, keeping, random_prompts, read_prompts

SMALL = ["--prompt-tokens", "20", "--gen-tokens", "5", "--repeat", "1", "--threads", "1"]
KEYS = ["model", "device", "threads", "load_s", "first_token_s", "peak_rss_bytes", "rss_file_bytes", "rss_file_huge_bytes", "rss_anon_bytes", "memory_bandwidth_gb_s", "product_rate_gmac_s",
        "runs", "ids_ok", "profile"]


@pytest.fixture(autouse=True)
def no_options_around(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FERRUM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=512, max_sequences=4, prefill_chunk=32, profile=True) as llm:
        yield llm


def bench(capsys, *arguments):
    """(exit code, stdout, stderr) of the command in this process."""
    code = main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_has_every_figure_and_nothing_else(capsys):
    code, out, err = bench(capsys, *SMALL, "--batch", "1,3", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    report = json.loads(out)
    assert list(report) == KEYS
    assert (report["model"], report["threads"], report["ids_ok"], report["profile"]) == (DEFAULT_MODEL, 1, True, None)
    assert report["device"].startswith("cpu")
    for name in ("load_s", "first_token_s", "memory_bandwidth_gb_s", "product_rate_gmac_s"):
        assert report[name] > 0
    if sys.platform == "linux":
        assert 0 < report["rss_anon_bytes"] < report["peak_rss_bytes"]
        assert 0 < report["rss_file_bytes"] < report["peak_rss_bytes"]
        assert 0 <= (report["rss_file_huge_bytes"] or 0) <= report["rss_file_bytes"]
    assert [(run["batch"], run["prompt_tokens"], run["gen_tokens"], run["context"]) for run in report["runs"]] == [(1, 20, 5, 20), (3, 20, 5, 20)]
    for run in report["runs"]:
        assert run["ids_ok"] and run["mismatch"] is None
        for name in ("prefill_tok_s", "decode_tok_s"):
            least, most = run[f"{name}_range"]
            assert 0 < least <= run[name] <= most
        assert run["bound_tok_s"] == pytest.approx(run["batch"] * report["memory_bandwidth_gb_s"] * 1e9 / run["step_bytes"])
        assert run["decode_gb_s"] / report["memory_bandwidth_gb_s"] == pytest.approx(run["decode_tok_s"] / run["bound_tok_s"])


def test_text_fits_80_columns_and_has_the_profile_of_each_phase(capsys):
    code, out, err = bench(capsys, *SMALL, "--context", "33", "--batch", "1,2", "--profile")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "5 decode steps from 33 tokens in the cache" in out
    assert "Every sequence generated the ids that it does alone." in out
    for line in ("prefill: 1 step, 40 tokens, ", "decode: 6 steps, 6 tokens, ", "batched decode: 6 steps, 12 tokens, ", "outside the ops "):
        assert any(shown.startswith(line) for shown in out.splitlines()), line


def test_wrong_ids_are_an_error_that_names_the_sequence(capsys, monkeypatch):
    def wrong(llm, prompt, tokens):
        ids = alone(llm, prompt, tokens)
        return [*ids[:-1], ids[-1] + 1]

    monkeypatch.setattr(ferrum.timed_runs, "alone", wrong)
    code, out, err = bench(capsys, *SMALL, "--batch", "2", "--json")
    assert code == 1
    assert json.loads(out)["ids_ok"] is False
    assert err == ("error: Batch 2: sequence 1 differs from its run alone from generated token 6 on. On the CPU both must be equal: please "
                   "report this.\n")


@pytest.mark.parametrize("arguments,message", [
    (["--batch", "0"], "--batch is '0': expected whole numbers of sequences from 1 to 65536, with commas between."),
    (["--batch", "1,,4"], "--batch is '1,,4': expected whole numbers"),
    (["--batch", ""], "--batch is '': expected whole numbers"),
    (["--prompt-tokens", "0"], "--prompt-tokens is 0: expected a whole number of tokens from 1"),
    (["--repeat", "x"], "--repeat is 'x': expected"),
    (["--prompt-tokens", "5000"], "A sequence reaches 5128 tokens, the model's context holds 2048. Lower --prompt-tokens or --gen-tokens."),
    (["--context", "2000"], "A sequence reaches 2128 tokens, the model's context holds 2048. Lower --prompt-tokens, --context or --gen-tokens."),
    (["--kv-tokens", "1000"], "kv_tokens is 1000, but the runs need 10496: 16 sequences of 640 tokens"),
    (["--max-sequences", "8"], "max_sequences is 8, but the runs need 16"),
])
def test_what_cannot_be_measured_is_refused_before_anything_runs(capsys, arguments, message):
    code, out, err = bench(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_options_of_the_environment_are_refused_too(capsys, monkeypatch):
    monkeypatch.setenv("FERRUM_MAX_LOGIT_ROWS", "4")
    code, _, err = bench(capsys, "--batch", "8")
    assert code == 2 and err.startswith("error: max_logit_rows is 4, but the runs need 8")


def test_a_context_may_be_full_at_the_end(capsys):
    code, out, err = bench(capsys, *SMALL, "--context", "2043", "--batch", "1", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ids_ok"] is True


def test_ctrl_c_ends_it_quietly():
    command = [sys.executable, "-m", "ferrum", "bench", "--batch", "16", "--repeat", "1000", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def test_help_loads_no_engine():
    code = "import sys; from ferrum.cli import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n" \
           "assert not {'numpy', 'tokenizers', 'gguf', 'ferrum_native'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stderr


def test_a_batch_size_is_measured_once():
    assert BenchParams(batch=(4, 1, 4)).batch == (4, 1)
    with pytest.raises(OptionError, match="batch is .*: expected whole numbers"):
        BenchParams(batch=())


def test_prompts_differ_from_their_first_token_and_are_plain_text(llm):
    prompts = random_prompts(llm.tokenizer, 16, 30)
    assert prompts == random_prompts(llm.tokenizer, 16, 30) != random_prompts(llm.tokenizer, 16, 30, seed=1)
    assert len({prompt[0] for prompt in prompts}) == 16
    special = {*llm.tokenizer.control_ids, *llm.tokenizer.unused_ids, *llm.tokenizer.stop_ids}
    assert special and not special & {id for prompt in prompts for id in prompt}


def test_decode_repeats_from_the_same_context_and_equals_single_runs(llm):
    prompts = random_prompts(llm.tokenizer, 3, 40)
    with keeping(llm, 3) as retained:
        first = read_prompts(llm, prompts, retained)
        texts = decode(llm, prompts, retained, 7).ids
        assert decode(llm, prompts, retained, 7).ids == texts
        assert decode(llm, prompts[:2], retained[:2], 4).ids == [ids[:5] for ids in texts[:2]]
        assert llm.engine.stats()["live_sequences"] == 3
    assert llm.engine.stats()["live_sequences"] == 0
    assert first.ids == [ids[:1] for ids in texts]
    assert texts == [alone(llm, prompt, 8) for prompt in prompts]


def test_only_steps_of_the_full_batch_are_timed(llm):
    prompts = random_prompts(llm.tokenizer, 2, 40)
    with keeping(llm, 2) as retained:
        read_prompts(llm, prompts[:1], retained[:1])
        with pytest.raises(FerrumError, match="A step did not decode all of 2 sequences"):
            decode(llm, prompts, retained, 4)
    assert llm.engine.stats()["live_sequences"] == 0


def test_decode_step_bytes_equal_the_engines_own_count(llm):
    prompts = random_prompts(llm.tokenizer, 1, 40)
    with keeping(llm, 1) as retained:
        read_prompts(llm, prompts, retained)
        llm.engine.reset_profile()
        decode(llm, prompts, retained, 6)
        phase = llm.profile()["phases"]["decode"]
    cache = llm.engine.kv_bytes_per_token
    counted = sum(op["bytes"] for name, op in phase["ops"].items() if name not in ("embed", "top_candidates"))  # rows, and what follows a step
    written = phase["steps"] * cache
    expected = sum(decode_step_bytes(llm.file, llm.engine.config, cache, 1, 40 + step) for step in range(7))
    assert counted - written == pytest.approx(expected, rel=1e-12)


def test_more_sequences_need_more_experts_but_never_more_than_there_are(llm):
    config = llm.engine.config
    assert distinct_experts(config, 1) == config["top_k"]
    assert distinct_experts({"num_experts": 128, "top_k": 8}, 16) == pytest.approx(82.4, abs=0.1)
    assert distinct_experts(config, 1000) == pytest.approx(config["num_experts"])
    nbytes = [decode_step_bytes(llm.file, config, 0, batch, 0) for batch in (1, 2, 1000)]
    table = llm.file.tensors["token_embd.weight"].nbytes
    weights = sum(tensor.nbytes for tensor in llm.file.tensors.values())
    assert nbytes[0] < nbytes[1] < nbytes[2] == pytest.approx(weights - (0 if config["tied_embeddings"] else table))


def test_profile_lines_tell_shares_and_rates():
    ops = {
        "head": {"calls": 2, "seconds": 0.5, "bytes": 5 * 10**9, "macs": 10**10},
        "norm": {"calls": 4, "seconds": 0.25, "bytes": 0, "macs": 0},
        "top_candidates": {"calls": 2, "seconds": 1.0, "bytes": 10**9, "macs": 0},
    }
    profile = {"phases": {"decode": {"steps": 2, "tokens": 2, "seconds": 1.0, "ops": ops}}}
    title, _, *rows = profile_lines(profile, 2e10, 8e10)
    assert title == "decode: 2 steps, 2 tokens, 2 s, 1.0 tokens/s"
    assert rows[0].split() == ["top_candidates", "2", "1000.0", "50.0%", "953.7", "MiB", "1.0", "5.0%"]
    assert rows[1].split() == ["head", "2", "500.0", "25.0%", "4.7", "GiB", "10.0", "50.0%", "20.0", "25.0%"]
    assert rows[2].split() == ["norm", "4", "250.0", "12.5%"]
    assert profile_lines(profile, 2e10, None)[3].split() == rows[1].split()[:-1]
    assert rows[3].split() == ["outside", "the", "ops", "250.0", "12.5%"]
    assert profile_lines(profile, None, None)[2].split() == rows[0].split()[:-1]
    assert profile_lines({"phases": {}}, None, None) == ["no step was profiled"]
