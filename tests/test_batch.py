"""Batch jobs from Python: rows, results, keys, resuming, and what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from batch_cases import files_of, journal_of, manifest_of, read_rows, rows_of_all_kinds, write_rows
from tiny_models import TinyConfig, write_tiny_model

import ferrum
import ferrum.batch
from ferrum import LLM, BatchError, DeviceError, EngineClosed, GGUFFile, OptionError, OutOfMemory, SamplingParams
from ferrum.batch.model import Model
from ferrum.batch.schedule import grouped
from ferrum_native._native import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=8)
SMALL = dict(threads=1, kv_tokens=2048, concurrency=4)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=2048, max_sequences=4) as llm:
        yield llm


def run(rows, llm, params=GREEDY, **options):
    return list(ferrum.batch.run(rows, llm=llm, params=params, **options))


def error_of(row, llm, **options):
    (result,) = run([row], llm, **options)
    return result["error"]


def test_a_prompt_becomes_what_generate_gives(llm):
    (expected,) = llm.generate("Once upon a time", GREEDY)
    (result,) = run([{"custom_id": "a", "prompt": "Once upon a time"}], llm)
    text = expected.outputs[0]
    assert result == {"custom_id": "a", "text": text.text, "token_ids": text.token_ids, "finish_reason": "length",
                      "usage": {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}}


def test_token_ids_messages_and_params_of_a_row_reach_the_engine(llm):
    messages = [{"role": "user", "content": "Tell me a story."}]
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=5, logit_bias={14: 2.0}, stop=["z"])
    rows = [
        {"prompt": [14, 409, 294]},
        {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": "Tom", "params": {"temperature": 0.9, "seed": 3, "max_tokens": 5, "logit_bias": {"14": 2.0}, "stop": "z"}},
    ]
    expected = [*llm.generate([[14, 409, 294]], GREEDY), *llm.chat(messages, GREEDY, enable_thinking=False), *llm.generate("Tom", params)]
    results = run(rows, llm)
    assert [result["token_ids"] for result in results] == [each.outputs[0].token_ids for each in expected]
    assert results[2]["seed"] == 3


def test_arrays_are_token_ids_and_bytes_are_text(llm):
    rows = [{"prompt": np.array([14, 409, 294]), "custom_id": np.int64(3), "share": np.float32(0.5), "parts": np.array([1.0, np.nan])}, {"prompt": b"Tom"}]
    same = [{"prompt": [14, 409, 294], "custom_id": 3, "share": 0.5, "parts": [1.0, None]}, {"prompt": "Tom"}]
    assert run(rows, llm) == run(same, llm)


def test_continuations_are_scored_and_samples_are_a_list(llm):
    expected = llm.score("Tom went to the", [" park.", [14, 409]])
    scores, samples = run([{"prompt": "Tom went to the", "continuations": [" park.", [14, 409]]},
                           {"prompt": "Tom", "params": {"n": 3, "temperature": 1, "seed": 5}}], llm)
    assert [(each.get("continuation"), each["token_ids"], each["logprob"], each["is_greedy"]) for each in scores["scores"]] == [
        (each.continuation, each.token_ids, each.logprob, each.is_greedy) for each in expected]
    assert scores["usage"]["prompt_tokens"] == 4 + len(expected[0].token_ids) + 2
    assert "text" not in samples
    (output,) = llm.generate("Tom", replace(GREEDY, n=3, temperature=1, seed=5))
    assert [(each["text"], each["seed"]) for each in samples["outputs"]] == [(each.text, each.seed) for each in output.outputs]


def test_log_probabilities_are_there_where_asked_for(llm):
    (result,) = run([{"prompt": "Tom went", "params": {"logprobs": 2, "prompt_logprobs": 0}}], llm)
    assert len(result["logprobs"]) == 8 and all(len(place) >= 2 for place in result["logprobs"])
    assert result["prompt_logprobs"][0] is None and len(result["prompt_logprobs"]) == result["usage"]["prompt_tokens"]
    assert result["logprobs"][0][str(result["token_ids"][0])]["rank"] == 1


def test_other_fields_are_passed_on_and_never_take_the_place_of_a_result(llm):
    row = {"custom_id": 7, "prompt": "Tom", "level": {"deep": [1, None, "Zoë \ud800"]}, "text": "mine", "error": None, "input_text": "too"}
    (result,) = run([row], llm)
    assert list(result)[:5] == ["custom_id", "level", "input_text", "input_error", "input_input_text"]
    assert (result["level"], result["input_text"], result["input_error"], result["input_input_text"]) == (row["level"], "mine", None, "too")
    assert result["text"] and "error" not in result and "prompt" not in result


@pytest.mark.parametrize("row,kind,message", [
    ({"promt": "x"}, "InvalidRow", r"There is no prompt and there are no messages \(did you mean 'promt'\?\)"),
    ({"prompt": None}, "InvalidRow", "There is no prompt and there are no messages.$"),
    ({"prompt": "x", "messages": []}, "InvalidRow", "give one of them"),
    ({"prompt": ""}, "InvalidRow", "The prompt is empty"),
    ({"prompt": 5}, "InvalidRow", "The prompt is a number"),
    ({"prompt": ["a"]}, "InvalidRow", "token id 'a'"),
    ({"prompt": [99999]}, "InvalidRow", "not in the vocabulary"),
    ({"messages": []}, "InvalidRow", r"messages is \[\]: expected a list of objects"),
    ({"messages": "Hi"}, "InvalidRow", 'messages is "Hi": expected a list'),
    ({"messages": [{"role": "user"}]}, "InvalidRow", "has no content"),
    ({"prompt": "x", "params": {"temprature": 1}}, "InvalidRow", r"no field 'temprature' \(did you mean 'temperature'\?\)"),
    ({"prompt": "x", "params": {"temperature": "hot"}}, "OptionError", "temperature is 'hot'"),
    ({"prompt": "x", "params": [1]}, "InvalidRow", "params is a list"),
    ({"prompt": "x", "continuations": []}, "InvalidRow", "continuations is"),
    ({"prompt": "x", "continuations": [""]}, "InvalidRow", "nothing to score"),
    ({"prompt": "x", "continuations": ["a"], "params": {"seed": 1}}, "InvalidRow", "do not go together"),
    ({"prompt": "x", "custom_id": ""}, "InvalidRow", "custom_id is"),
    ({"prompt": "x", "custom_id": True}, "InvalidRow", "custom_id is true"),
    ({"prompt": "fox " * 9000}, "ContextFull", "context holds 2048"),
])
def test_a_bad_row_becomes_an_error_row_and_the_others_run(llm, row, kind, message):
    before, result, after = run([{"prompt": "Tom"}, row, {"prompt": "Tom"}], llm)
    assert result["error"]["type"] == kind
    assert re.search(message, result["error"]["message"]), result
    assert before["text"] == after["text"] != ""


def test_a_line_that_is_no_row_becomes_an_error_row(llm, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Tom"}\r\n\n  \n{"prompt"\n\xff\xfe\n[1]\n"text"\n{"prompt": "x", "a": NaN}\n' + \
                     b"[" * 100000 + b"\n" + b'{"prompt": "Tom"}')
    results = run(path, llm)
    assert len(results) == 8 and results[0]["text"] == results[-1]["text"]
    messages = [result["error"]["message"] for result in results[1:-1]]
    for message, expected in zip(messages, ["not JSON", "not UTF-8", "not a JSON object, but a list", "but text", "NaN is no JSON", "not JSON"]):
        assert expected in message


def test_a_line_longer_than_memory_should_hold_is_an_error_row(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("ferrum.batch.sources.LONGEST_LINE", 64)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "' + b"x" * 300 + b'"}\n{"prompt": "Tom"}\n')
    first, second = run(path, llm)
    assert "longer than" in first["error"]["message"] and second["text"]


def test_a_line_of_a_single_nul_is_not_taken_for_one_that_is_too_long(llm, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\0\n" + b'{"prompt": "Tom"}\n')
    results = run(path, llm)
    assert "not JSON" in results[0]["error"]["message"] and "text" in results[1]


def test_a_text_that_the_kv_cache_cut_short_is_an_error_row_that_says_so():
    with LLM(threads=1, kv_tokens=32) as llm:
        cut, fits = run([{"prompt": "Once upon a time", "params": {"max_tokens": 100, "ignore_eos": True}}, {"prompt": "Tom"}], llm)
    assert cut["error"]["type"] == "KVPoolExhausted" and "--kv-tokens" in cut["error"]["message"]
    assert fits["text"]


def test_results_come_in_order_or_as_rows_end(llm):
    rows = [{"custom_id": i, "prompt": f"Tom {i}", "params": {"max_tokens": 40 if i == 0 else 2, "ignore_eos": True}} for i in range(12)]
    assert [result["custom_id"] for result in run(rows, llm)] == list(range(12))
    as_ended = [result["custom_id"] for result in run(rows, llm, in_order=False)]
    assert sorted(as_ended) == list(range(12)) and as_ended[0] != 0


def test_rows_are_taken_from_an_endless_iterable_as_there_is_room(llm):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield {"prompt": f"Tom {taken}"}

    results = ferrum.batch.run(endless(), llm=llm, params=GREEDY)
    assert [next(results)["text"] != "" for _ in range(3)] == [True] * 3
    results.close()
    assert taken < 2000
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0


def test_seeds_come_from_key_and_job_and_not_from_what_runs_beside(llm):
    params = SamplingParams(max_tokens=8, seed=4)
    rows = [{"custom_id": "a", "prompt": "Tom"}, {"prompt": "Tom"}, {"prompt": "Tom"}, {"custom_id": "b", "prompt": "Tom", "params": {"seed": 9}}]
    first = run(rows, llm, params)
    assert run(rows[::-1], llm, params)[-1] == first[0]
    assert run([rows[1]], llm, params)[0] == first[1]
    assert len({result["seed"] for result in first}) == 4 and first[3]["seed"] == 9
    assert first[1]["custom_id"] != first[2]["custom_id"]
    assert run(rows, llm, replace(params, seed=5))[0]["seed"] != first[0]["seed"]
    assert all(result["seed"] < 1 << 53 for result in first)
    (text,) = llm.generate("Tom", replace(params, seed=first[0]["seed"]))
    assert text.outputs[0].text == first[0]["text"]


def test_keys_tell_rows_params_and_models_apart(llm):
    def ids(params):
        return [result["custom_id"] for result in run([{"prompt": "Tom"}, {"prompt": "Tom"}, {"prompt": "Tim"}], llm, params)]

    assert len({*ids(GREEDY), *ids(replace(GREEDY, max_tokens=7))}) == 6
    assert ids(GREEDY) == ids(GREEDY)


def test_a_template_makes_prompts_or_messages_of_fields(llm):
    template = "{{ name }} has {% for pet in pets %}a {{ pet }}{% if not loop.last %} and {% endif %}{% endfor %}"
    rows = [{"name": "Tom", "pets": ["fox", "cow"], "prompt": "ignored"}, {"name": "Tom"}, {"name": "Tom", "pets": 5}]
    (plain,) = llm.generate("Tom has a fox and a cow", GREEDY)
    first, missing, wrong = run(rows, llm, template=template)
    assert first["text"] == plain.outputs[0].text and first["name"] == "Tom" and first["prompt"] == "ignored"
    assert "'pets' is undefined" in missing["error"]["message"] and "fails on this row" in wrong["error"]["message"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tom has a fox and a cow"}]
    (chat,) = llm.chat(messages, GREEDY)
    assert run(rows[:1], llm, template=template, chat=True, system="Be brief.")[0]["text"] == chat.outputs[0].text


def test_a_template_cannot_leave_its_sandbox(llm):
    assert "fails on this row" in error_of({"a": "x"}, llm, template="{{ a.__class__.__mro__ }}")["message"]


def test_a_field_can_hold_the_prompt_or_a_conversation(llm):
    (expected,) = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
    rows = [{"question": "Hi", "prompt": "no"}, {"question": [{"role": "user", "content": "Hi"}]}, {"answer": 1}]
    asked, conversation, missing = run(rows, llm, prompt_field="question", chat=True)
    assert asked["text"] == conversation["text"] == expected.outputs[0].text
    assert asked["prompt"] == "no" and "question" not in asked
    assert "There is no field 'question'" in missing["error"]["message"]


def test_what_cannot_be_is_refused_before_anything_runs(llm, tmp_path):
    for options, message in [
        (dict(prompt_field="a", template="b"), "give one of them"), (dict(system="x"), "goes with chat"), (dict(format="xml"), "format is 'xml'"),
        (dict(limit=-1), "limit is -1"), (dict(retry_errors=True), "goes with resume"), (dict(resume=True), "goes with output"),
        (dict(concurrency=4), "the llm's own"), (dict(template="{% if %}"), "cannot be read at its line 1"),
    ]:
        with pytest.raises(OptionError, match=message):
            run([{"prompt": "x"}], llm, **options)
    with pytest.raises(OptionError, match="concurrency is 0"):
        list(ferrum.batch.run([{"prompt": "x"}], concurrency=0))
    with pytest.raises(TypeError, match="row 1 is str"):
        run(["text"], llm)
    with pytest.raises(BatchError, match="cannot be read"):
        run(tmp_path / "none.jsonl", llm)
    with pytest.raises(BatchError, match="does not exist"):
        ferrum.batch.run([], tmp_path / "no" / "out.jsonl", llm=llm)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(BatchError, match="is a device or a pipe"):
            ferrum.batch.run([], path, llm=llm)


def test_a_repeated_id_is_refused_with_both_lines(llm, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", "prompt": "x"}, "", {"custom_id": 1, "prompt": "x"}, {"custom_id": "a", "prompt": "y"}, {"custom_id": 1, "prompt": "y"}])
    with pytest.raises(BatchError, match=r"'a' \(lines 1 and 4\), 1 \(lines 3 and 5\)"):
        ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm)
    assert files_of(tmp_path / "out.jsonl") == []
    with pytest.raises(BatchError, match=r"'a' is there twice \(rows 1 and 4\)"):
        run(path, llm)


def test_a_job_leaves_its_output_and_what_it_was(llm, tmp_path):
    path, output = write_rows(tmp_path / "in.jsonl", [{"prompt": f"Tom {i}"} for i in range(20)]), tmp_path / "out.jsonl"
    seen = []
    summary = ferrum.batch.run(path, output, llm=llm, params=GREEDY, progress=lambda progress: seen.append((progress.rows, progress.done)))
    assert (summary.rows, summary.errors, summary.rows_before, summary.completion_tokens) == (20, 0, 0, 160)
    assert seen[-1] == (20, 20)
    assert read_rows(output) == run(path, llm)
    assert files_of(output) == [".manifest.json"]
    manifest = manifest_of(output)
    assert manifest["model"]["fingerprint"] == GGUFFile.open(llm.model).fingerprint()
    assert (manifest["params"]["temperature"], manifest["options"]["device"], manifest["input"]["rows"]) == (0.0, "cpu", 20)


def test_an_existing_output_is_never_overwritten(llm, tmp_path):
    path, output = write_rows(tmp_path / "in.jsonl", [{"prompt": "Tom"}]), tmp_path / "out.jsonl"
    output.write_text("mine")
    for resume in (False, True):
        with pytest.raises(BatchError, match="It is not overwritten"):
            ferrum.batch.run(path, output, llm=llm, resume=resume)
    assert output.read_text() == "mine"
    output.unlink()
    ferrum.batch.run(path, output, llm=llm, params=GREEDY)
    with pytest.raises(BatchError, match="a job that has finished. It is not overwritten"):
        ferrum.batch.run(path, output, llm=llm)
    with pytest.raises(BatchError, match="both the input and the output"):
        ferrum.batch.run(output, output, llm=llm, resume=True)


def test_resuming_a_finished_job_does_nothing(llm, tmp_path):
    path, output = write_rows(tmp_path / "in.jsonl", [{"prompt": "Tom"}]), tmp_path / "out.jsonl"
    ferrum.batch.run(path, output, llm=llm, params=GREEDY, resume=True)
    before = os.stat(output)
    summary = ferrum.batch.run(path, output, llm=llm, params=GREEDY, resume=True)
    assert (summary.rows, summary.rows_before, summary.prompt_tokens) == (1, 1, 0)
    assert os.stat(output).st_mtime_ns == before.st_mtime_ns


def stopped(path, output, llm, rows, **options):
    """A job that was left after some rows."""

    def stop(progress):
        if progress.rows is not None and progress.done >= rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ferrum.batch.run(path, output, llm=llm, progress=stop, **options)


def test_resuming_takes_what_is_not_given_from_the_manifest(llm, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", rows_of_all_kinds(60))
    options = dict(params=SamplingParams(max_tokens=6, temperature=0.9), template_options={"enable_thinking": False}, chat=True, system="Be kind.")
    stopped(path, tmp_path / "out.jsonl", llm, 20, **options)
    seed = manifest_of(tmp_path / "out.jsonl")["seed"]
    summary = ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm, resume=True)
    assert summary.rows_before >= 20
    ferrum.batch.run(path, tmp_path / "whole.jsonl", llm=llm, **{**options, "params": replace(options["params"], seed=seed)})
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_resuming_another_job_is_refused_with_every_difference(llm, tmp_path):
    rows = [{"prompt": f"Tom {i}"} for i in range(30)]
    path, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    stopped(path, output, llm, 5, params={"temperature": 0.5, "seed": 1, "max_tokens": 4})
    other = write_rows(tmp_path / "other.jsonl", rows[1:])
    with pytest.raises(BatchError) as refused:
        ferrum.batch.run(other, output, resume=True, params={"temperature": 0.6, "seed": 2, "max_tokens": 4}, kv_type="f32", format="openai", threads=1)
    lines = [line.strip().removesuffix(".") for line in str(refused.value).splitlines()[1:-1]]
    assert lines[:4] == ['options.kv_type: the manifest has "f16", given is "f32"', 'format: the manifest has "ferrum", given is "openai"',
                         "params.temperature: the manifest has 0.5, given is 0.6", "seed: the manifest has 1, given is 2"]
    assert lines[4] == "input.rows: the manifest has 30, given is 29" and lines[5].startswith("input.sha256: ") and len(lines) == 6
    model = write_tiny_model(tmp_path / "tiny.gguf", config=TinyConfig(layers=1, experts=4))
    with pytest.raises(BatchError, match="model.fingerprint: the manifest has"):
        ferrum.batch.run(path, output, resume=True, model=model)
    assert ferrum.batch.run(path, output, llm=llm, resume=True).rows == 30


def test_a_limited_job_can_be_gone_on_with(llm, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", rows_of_all_kinds(40))
    params = dict(max_tokens=4, seed=1)
    assert ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm, params=params, limit=10).rows == 10
    assert len(read_rows(tmp_path / "out.jsonl")) == 10
    assert len(run(path, llm, params, limit=10)) == 10
    with pytest.raises(BatchError, match="input.rows: the manifest has 10, given is 5"):
        ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm, resume=True, limit=5)
    summary = ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm, resume=True)
    assert (summary.rows, summary.rows_before) == (40, 10)
    ferrum.batch.run(path, tmp_path / "whole.jsonl", llm=llm, params=params)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_error_rows_can_be_run_anew(tmp_path):
    rows = [{"prompt": "Tom"}, {"prompt": "fox " * 60}, "{", {"prompt": "Tim"}]
    path, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    options = dict(params={"max_tokens": 4, "seed": 1}, threads=1)
    assert ferrum.batch.run(path, output, kv_tokens=32, **options).errors == 2
    assert ".journal" in files_of(output)
    assert ferrum.batch.run(path, output, kv_tokens=512, resume=True, **options).errors == 2
    summary = ferrum.batch.run(path, output, kv_tokens=512, resume=True, retry_errors=True, **options)
    assert (summary.rows_before, summary.errors) == (2, 1)
    ferrum.batch.run(path, tmp_path / "whole.jsonl", kv_tokens=512, **options)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_too_many_error_rows_stop_the_job_and_keep_everything(llm, tmp_path):
    path, output = write_rows(tmp_path / "in.jsonl", rows_of_all_kinds(90)), tmp_path / "out.jsonl"
    with pytest.raises(BatchError, match="4 rows are error rows, more than max_errors 3 allows"):
        ferrum.batch.run(path, output, llm=llm, params=GREEDY, max_errors=3)
    done = len(open(journal_of(output)).readlines())
    assert done >= 4
    with pytest.raises(BatchError, match="more than max_errors 3"):
        ferrum.batch.run(path, output, llm=llm, params=GREEDY, max_errors=3, resume=True)
    assert ferrum.batch.run(path, output, llm=llm, resume=True, max_errors=15).rows_before == done
    with pytest.raises(BatchError, match="more than max_errors 0"):
        run([{"nothing": 1}], llm, max_errors=0)


def test_rows_of_python_are_kept_and_must_come_again(llm, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [{"custom_id": i, "prompt": f"Tom {i}"} for i in range(20)]
    stopped(iter(rows), output, llm, 5, params=GREEDY)
    assert files_of(output) == [".input.jsonl", ".journal", ".manifest.json"]
    with pytest.raises(BatchError, match="input.sha256"):
        ferrum.batch.run(rows[::-1], output, llm=llm, resume=True)
    ferrum.batch.run(iter(rows), output, llm=llm, resume=True)
    assert [result["custom_id"] for result in read_rows(output)] == list(range(20))
    assert files_of(output) == [".manifest.json"]


def test_an_empty_input_has_an_empty_output(llm, tmp_path):
    assert ferrum.batch.run([], tmp_path / "out.jsonl", llm=llm).rows == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_rows_that_begin_alike_run_together_and_none_is_lost():
    rows = [[1, 2, i % 3, i] for i in range(200)] + [None, [9]]
    order = list(grouped(iter(rows), lambda row: row, window=64))
    assert sorted(order, key=str) == sorted(rows, key=str)
    groups = [row[2] for row in order if row and len(row) == 4]
    changes = sum(a != b for a, b in zip(groups, groups[1:]))
    assert changes <= 3 * 4  # of 199 in the order given: three groups in each of the windows of 16, 64, 64 and 56


def test_a_window_is_bounded_by_its_tokens():
    read = 0

    def rows():
        nonlocal read
        for _ in range(100):
            read += 1
            yield [0] * 1000

    order = grouped(rows(), lambda row: row, window_tokens=4000)
    next(order)
    assert read <= 8


def test_as_many_rows_run_at_once_as_was_said_or_as_the_memory_holds():
    def sequences(concurrency=None, **options):
        with Model(None, None, options, concurrency).loaded({}) as llm:
            return llm.options["max_sequences"], llm.options["kv_tokens"]

    assert sequences(concurrency=5, kv_tokens=112) == (5, 112)
    assert sequences() == sequences("auto")
    assert sequences()[0] == 64 and sequences()[1] >= 2048
    assert sequences(max_sequences=7)[0] == 7 and sequences("auto", max_sequences=7)[0] == 64
    few = next(sequences(memory_budget=f"{mib}MiB") for mib in range(18, 40) if _plan_fits(f"{mib}MiB"))
    assert few[0] in (16, 32)
    with pytest.raises(OptionError, match="they are the same"):
        sequences(5, max_sequences=6)


def _plan_fits(budget):
    try:
        return bool(ferrum.plan(memory_budget=budget))
    except OutOfMemory:
        return False


class _Devices:
    """Tiny models whose weights are NaN for one token, or for all."""

    def __init__(self, folder):
        self.sound = write_tiny_model(folder / "sound.gguf", config=TinyConfig(layers=1, experts=4, top_k=2))
        file = GGUFFile.open(self.sound)
        self.one_token = self._broken(folder / "one.gguf", file.tensors["token_embd.weight"], row=77)
        self.all = self._broken(folder / "all.gguf", file.tensors["output_norm.weight"], row=0)

    def _broken(self, path, tensor, row):
        data = bytearray(open(self.sound, "rb").read())
        width = 4 * tensor.shape[-1]
        start = tensor.offset + row * width
        data[start : start + width] = b"\xff\xff\xff\x7f" * tensor.shape[-1]
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    return _Devices(tmp_path_factory.mktemp("devices"))


TINY = {"max_tokens": 3, "temperature": 0, "banned_token_ids": [77], "ignore_eos": True}


def test_a_row_that_the_device_fails_on_is_an_error_row_and_those_beside_it_are_not(devices, tmp_path):
    rows = [{"custom_id": i, "prompt": [5, 77 if i == 20 else 6, i]} for i in range(40)]
    expected = list(ferrum.batch.run(rows, model=devices.sound, params=TINY, **SMALL))
    ferrum.batch.run(rows, tmp_path / "out.jsonl", model=devices.one_token, params=TINY, **SMALL)
    results = read_rows(tmp_path / "out.jsonl")
    assert results[20]["error"]["type"] == "DeviceError" and "not finite" in results[20]["error"]["message"]
    assert [result["token_ids"] for result in results if "error" not in result] == [result["token_ids"] for i, result in enumerate(expected) if i != 20]


def test_a_device_that_fails_on_everything_stops_the_job_without_error_rows(devices, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(DeviceError):
        ferrum.batch.run([{"prompt": [5, i]} for i in range(40)], output, model=devices.all, params=TINY, **SMALL)
    assert open(journal_of(output)).read() == "" and not output.exists()


@pytest.mark.parametrize("fail_at", [0, 40, 333])
def test_a_failure_of_the_device_that_passes_costs_nothing(devices, monkeypatch, fail_at):
    rows = [{"prompt": [5, 6, i]} for i in range(20)]
    expected = list(ferrum.batch.run(rows, model=devices.sound, params=TINY, **SMALL))
    monkeypatch.setattr("ferrum.llm.Engine", partial(Engine, fail_at=fail_at))
    assert list(ferrum.batch.run(rows, model=devices.sound, params=TINY, **SMALL)) == expected


def test_a_model_that_is_closed_stops_the_job_and_it_can_be_resumed(tmp_path):
    rows, output = [{"custom_id": i, "prompt": f"Tom {i}"} for i in range(40)], tmp_path / "out.jsonl"
    with LLM(threads=1, kv_tokens=1024) as llm, pytest.raises(EngineClosed):
        ferrum.batch.run(rows, output, llm=llm, params=GREEDY, progress=lambda progress: progress.done == 9 and llm.close())
    lines = [json.loads(line) for line in open(journal_of(output))]
    assert len(lines) >= 9 and not any(line["error"] for line in lines)
    assert ferrum.batch.run(rows, output, params=GREEDY, resume=True, threads=1).errors == 0


def test_batch_is_there_without_being_imported():
    script = "import sys, ferrum; assert 'ferrum.batch' not in sys.modules; assert callable(ferrum.batch.run)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_parameters_beside_params_are_told_once_each(llm, caplog):
    rows = [{"prompt": "Tom", "temperature": 0.5, "max_tokens": 3, "topic": "x"}, {"prompt": "Ann", "temperature": 0.5}]
    results = list(ferrum.batch.run(rows, llm=llm, params=GREEDY))
    assert [result["temperature"] for result in results] == [0.5, 0.5]
    told = sorted(record.getMessage().split(",")[0] for record in caplog.records)
    assert told == ["line 1 has the field max_tokens", "line 1 has the field temperature"]
    assert all('belongs inside: "params": {' in record.getMessage() for record in caplog.records)
