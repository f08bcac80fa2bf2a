"""`generate` beyond one continued text: messages, several samples, log-probabilities, the whole sampling set, budgets."""

import json
import math
import re
import signal
import subprocess
import time

import pytest
from test_cli import GREEDY, PROMPT, assert_short_error, command, environment, ferrum

from ferrum import LLM, SamplingParams

MESSAGE = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=1024) as llm:
        yield llm


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_chat_answers_the_message_through_the_template(llm):
    (expected,) = llm.chat([{"role": "user", "content": MESSAGE}], SamplingParams(temperature=0, max_tokens=16))
    code, out, err = ferrum("generate", "--chat", MESSAGE, *GREEDY)
    assert (code, out) == (0, expected.outputs[0].text + "\n")
    assert "chat template" not in err
    _, out, _ = ferrum("generate", "--chat", MESSAGE, *GREEDY, "--json")
    (value,) = lines(out)
    assert value["prompt"] == llm.render_chat([{"role": "user", "content": MESSAGE}])
    assert value["token_ids"] == expected.outputs[0].token_ids


def test_system_message_and_thinking_reach_the_template(llm):
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": MESSAGE}]
    _, out, _ = ferrum("generate", "--chat", MESSAGE, "--system", "You are brief.", "--no-think", *GREEDY, "--json")
    assert lines(out)[0]["prompt"] == llm.render_chat(messages, enable_thinking=False)


@pytest.mark.parametrize("flag", [["--system", "Be brief."], ["--no-think"]])
def test_flags_of_a_conversation_need_chat(flag):
    code, _, err = ferrum("generate", PROMPT, *flag)
    assert code == 2
    assert_short_error(err)
    assert f"{flag[0]} goes with --chat" in err


def test_samples_are_lines_of_json_or_parts_of_the_text(llm):
    (expected,) = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=12))
    arguments = ["generate", PROMPT, "--num-samples", "3", "--seed", "5", "-n", "12"]
    code, out, _ = ferrum(*arguments, "--json")
    assert code == 0
    assert [(value["index"], value["seed"], value["text"]) for value in lines(out)] == [
        (completion.index, 5 + completion.index, completion.text) for completion in expected.outputs]
    code, out, err = ferrum(*arguments)
    assert out == "".join(f"[{i + 1} of 3, seed {5 + i}]\n{completion.text}\n" for i, completion in enumerate(expected.outputs))
    assert "3 texts" in err


def interrupted_samples(delay):
    """The lines of three texts whose run got Ctrl-C some seconds after its start."""
    process = subprocess.Popen(command("generate", PROMPT, "--num-samples", "3", "-n", "1800", "--ignore-eos", "--json", "--threads", "1", "--verbose"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    while b": seed " not in process.stderr.readline():
        pass
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    return lines(out.decode())


def test_ctrl_c_keeps_several_texts_as_far_as_they_came():
    for delay in (0.2, 0.5, 1.0, 2.0):  # a busy machine may not have come to the first token
        texts = interrupted_samples(delay)
        assert [text["finish_reason"] for text in texts] == ["cancelled"] * 3
        if all(text["text"] for text in texts):
            return
    pytest.fail("no text was begun within two seconds")


def test_usage_of_a_line_is_that_of_its_text():
    _, out, _ = ferrum("generate", PROMPT, "--num-samples", "2", "--seed", "5", "-n", "12", "--json")
    for value in lines(out):
        assert value["usage"] == {"prompt_tokens": 4, "completion_tokens": len(value["token_ids"]), "total_tokens": 4 + len(value["token_ids"])}


def test_logprobs_show_in_json(llm):
    (expected,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1))
    code, out, _ = ferrum("generate", PROMPT, "--temperature", "0", "-n", "3", "--logprobs", "2", "--prompt-logprobs", "1", "--json")
    (value,) = lines(out)
    assert code == 0
    assert value["cumulative_logprob"] == pytest.approx(expected.outputs[0].cumulative_logprob)
    for shown, places in ((value["logprobs"], expected.outputs[0].logprobs), (value["prompt_logprobs"][1:], expected.prompt_logprobs[1:])):
        assert [{int(id) for id in place} for place in shown] == [set(place) for place in places]
        assert all(entry["logprob"] <= 0 and entry["rank"] >= 1 and entry["decoded_token"] for place in shown for entry in place.values())
    assert value["prompt_logprobs"][0] is None
    code, _, err = ferrum("generate", PROMPT, "--logprobs", "2")
    assert code == 2 and "Add --json" in err


def test_every_sampling_flag_reaches_the_text(llm):
    tokens = llm.tokenize(" the a happy sad")
    params = SamplingParams(
        seed=1, max_tokens=30, min_tokens=2, temperature=1.2, top_k=50, top_p=0.95, min_p=0.01, typical_p=0.98, repetition_penalty=1.1,
        presence_penalty=0.3, frequency_penalty=0.2, logit_bias={tokens[0]: 2.0, tokens[1]: -1.5}, banned_token_ids=[tokens[2]],
        stop_token_ids=[tokens[3]], ignore_eos=True)
    flags = ["--seed", "1", "-n", "30", "--min-tokens", "2", "--temperature", "1.2", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01",
             "--typical-p", "0.98", "--repetition-penalty", "1.1", "--presence-penalty", "0.3", "--frequency-penalty", "0.2",
             "--logit-bias", f"{tokens[0]}=2", "--logit-bias", f"{tokens[1]}=-1.5", "--banned-token-id", str(tokens[2]),
             "--stop-token-id", str(tokens[3]), "--ignore-eos"]
    (expected,) = llm.generate(PROMPT, params)
    code, out, _ = ferrum("generate", PROMPT, *flags, "--json")
    assert code == 0
    assert lines(out)[0]["token_ids"] == expected.outputs[0].token_ids
    code, out, _ = ferrum("generate", PROMPT, "--allowed-token-id", str(tokens[0]), "-n", "4", "--json")
    assert lines(out)[0]["token_ids"] == [tokens[0]] * 4


@pytest.mark.parametrize("arguments, named", [
    (["--logit-bias", "5"], "--logit-bias is '5': expected ID=X with a token id and a number from -1e+09 to 1e+09"),
    (["--logit-bias", "x=1"], "the token id of --logit-bias is 'x': expected a whole number"),
    (["--logit-bias", "999999=1"], "token id 999999 of logit_bias is not in the vocabulary"),
    (["--min-tokens", "9", "-n", "3"], "min_tokens is 9, more than max_tokens 3"),
    (["--memory-budget", "lots"], "--memory-budget is 'lots': expected a whole number of bytes such as 12GiB,"),
    (["--num-samples", "0"], "--num-samples is 0"),
    (["--max-sequences", "0"], "--max-sequences is 0"),
])
def test_wrong_values_of_the_new_flags_are_named(arguments, named):
    code, out, err = ferrum("generate", PROMPT, *arguments)
    assert code in (1, 2) and out == ""
    assert_short_error(err)
    assert named in err


def test_a_memory_budget_fits_the_kv_cache_or_is_refused_with_the_figures():
    code, out, _ = ferrum("inspect", "--memory-budget", "27MiB", "--json")
    report = json.loads(out)
    assert code == 0 and report["plan"]["total_bytes"] <= 27 << 20
    assert 512 <= report["options"]["kv_tokens"]["value"] < report["config"]["context_length"]
    assert report["options"]["memory_budget"] == {"value": 27 << 20, "source": "flag"}
    for command in (["generate", PROMPT], ["inspect"]):
        code, _, err = ferrum(*command, FERRUM_MEMORY_BUDGET="20MiB")
        assert code == 1
        assert_short_error(err)
        assert re.search(r"the engine would take 2\d\.\d MiB, but memory_budget is 20.0 MiB", err)
    assert math.isclose(report["plan"]["kv_bytes"], report["plan"]["kv_bytes_per_token"] * report["options"]["kv_tokens"]["value"])


def test_profile_shows_every_op_of_prefill_and_decode():
    code, out, err = ferrum("generate", PROMPT, *GREEDY, "--profile")
    assert code == 0 and out.strip()
    prefill, decode = err.index("prefill: 1 step, 4 tokens"), err.index("decode: 15 steps, 15 tokens")
    for table in (err[prefill:decode], err[decode:]):
        for op in ("qkv", "attention", "route", "experts_gate_up", "experts_down", "head", "outside the ops"):
            assert f"\n{op} " in table
    assert max(map(len, err[prefill:].splitlines())) <= 80
