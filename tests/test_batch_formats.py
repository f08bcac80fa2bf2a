"""What a job reads and writes: OpenAI's format, compressed files, Parquet, pipes."""

import gzip
import io
import json
import subprocess

import pytest
from batch_cases import batch, command, environment, files_of, read_rows, rows_of_all_kinds, write_rows

import ferrum.batch
from ferrum import LLM, BatchError, SamplingParams
from ferrum.batch.sources import lines_of, open_compressed

GREEDY = SamplingParams(temperature=0, max_tokens=6)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=2048, max_sequences=4) as llm:
        yield llm


def request(url=CHAT, custom_id="a", **body):
    prompt = {"messages": MESSAGES} if url == CHAT else {"prompt": "Once upon a time"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "gpt-4o", **prompt, **body}}


def result_of(row, llm, params=GREEDY, format="openai"):
    (result,) = ferrum.batch.run([row], llm=llm, params=params, format=format)
    return result


def test_a_chat_request_gives_a_chat_completion(llm):
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=5, n=2, seed=3, stop=["z"], presence_penalty=0.5, frequency_penalty=0.25, logit_bias={14: 1.5})
    (expected,) = llm.chat(MESSAGES, params)
    result = result_of(request(temperature=0.9, top_p=0.9, max_completion_tokens=5, n=2, seed=3, stop="z", presence_penalty=0.5, frequency_penalty=0.25,
                               logit_bias={"14": 1.5}, user="me", stream=False, tools=None, response_format={"type": "text"}), llm)
    assert list(result) == ["id", "custom_id", "response", "error"] and result["custom_id"] == "a" and result["error"] is None
    assert result["response"]["status_code"] == 200
    body = result["response"]["body"]
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 0, "ferrum-storyteller-q4_k_m")
    assert [choice["message"] for choice in body["choices"]] == [
        {"role": "assistant", "content": each.text, "refusal": None} for each in expected.outputs]
    assert [choice["finish_reason"] for choice in body["choices"]] == [each.finish_reason for each in expected.outputs]
    assert body["usage"] == {"prompt_tokens": expected.usage.prompt_tokens, "completion_tokens": 10, "total_tokens": expected.usage.prompt_tokens + 10}
    assert result_of(request(n=2), llm) == result_of(request(n=2), llm), "ids derive from the row"


def test_a_completion_request_gives_a_text_completion(llm):
    (expected,) = llm.generate("Once upon a time", GREEDY)
    body = result_of(request(COMPLETIONS, max_tokens=6, best_of=1, echo=False), llm)["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": expected.outputs[0].text, "logprobs": None, "finish_reason": "length"}]


def test_log_probabilities_have_the_shape_of_openai(llm):
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=6, logprobs=2))
    (choice,) = result_of(request(logprobs=True, top_logprobs=2), llm)["response"]["body"]["choices"]
    places = choice["logprobs"]["content"]
    assert "".join(place["token"] for place in places) == expected.outputs[0].text
    for place, token, own in zip(places, expected.outputs[0].token_ids, expected.outputs[0].logprobs):
        assert place["logprob"] == own[token].logprob and bytes(place["bytes"]).decode() == place["token"]
        assert [each["logprob"] for each in place["top_logprobs"]] == sorted((each.logprob for each in own.values()), reverse=True)[:2]
    (choice,) = result_of(request(logprobs=True), llm)["response"]["body"]["choices"]
    assert all(place["top_logprobs"] == [] for place in choice["logprobs"]["content"])
    (choice,) = result_of(request(COMPLETIONS, logprobs=1), llm)["response"]["body"]["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6


def test_a_request_for_no_log_probabilities_gives_none(llm):
    for none in (dict(logprobs=False), dict(logprobs=False, top_logprobs=0), dict(top_logprobs=0), dict(logprobs=None, top_logprobs=None)):
        (choice,) = result_of(request(**none), llm)["response"]["body"]["choices"]
        assert choice["logprobs"] is None


@pytest.mark.parametrize("row,field,message", [
    (request(tools=[{"type": "function"}]), "tools", "has 'tools', which ferrum does not support"),
    (request(stream=True), "stream", "has 'stream'"),
    (request(response_format={"type": "json_object"}), "response_format", "has 'response_format'"),
    (request(temprature=1), "temprature", "has the field 'temprature', which ferrum does not know"),
    (request(top_logprobs=2), "top_logprobs", "logprobs is not true"),
    (request(logprobs=3), "logprobs", "true or false"),
    (request(COMPLETIONS, suffix="x"), "suffix", "has 'suffix'"),
    (request(COMPLETIONS, best_of=3), "best_of", "has 'best_of'"),
    (request("/v1/embeddings"), "url", "url is '/v1/embeddings'"),
    ({**request(), "method": "GET"}, "method", "method is 'GET'"),
    ({**request(), "body": []}, "body", "no JSON object"),
    ({**request(), "body": {}}, "messages", "body has no messages"),
    (request(temperature="x"), None, "temperature is 'x'"),
    ({"custom_id": "a", "prompt": "x", "continuations": ["y"]}, None, "no place in the OpenAI format"),
    ({"custom_id": "a", "messages": "x"}, None, 'messages is "x"'),
])
def test_a_request_that_cannot_be_honoured_is_an_error_that_names_the_field(llm, row, field, message):
    result = result_of(row, llm)
    assert result["custom_id"] == "a" and result["response"]["status_code"] == 400
    assert message in result["error"]["message"] == result["response"]["body"]["error"]["message"]
    assert result["response"]["body"]["error"]["param"] == field


def test_formats_of_rows_and_results_can_be_mixed(llm):
    ours = result_of(request(max_tokens=4), llm, format="ferrum")
    assert list(ours) == ["custom_id", "text", "token_ids", "finish_reason", "usage"]
    theirs = result_of({"custom_id": 5, "messages": MESSAGES, "params": {"max_tokens": 4}}, llm)
    assert (theirs["custom_id"], theirs["response"]["body"]["choices"][0]["message"]["content"]) == (5, ours["text"])
    assert result_of({"custom_id": 5, "prompt": "Tom"}, llm)["response"]["body"]["object"] == "text_completion"




def test_a_row_with_a_url_and_a_body_of_its_own_is_no_request(llm):
    article = {"url": "https://example.org", "body": "A fox.", "title": "Tom"}
    (titled,) = ferrum.batch.run([article], llm=llm, params=GREEDY, prompt_field="title")
    (prompted,) = ferrum.batch.run([{**article, "prompt": "Tom"}], llm=llm, params=GREEDY)
    (rendered,) = ferrum.batch.run([article], llm=llm, params=GREEDY, template="{{ title }}")
    assert titled["text"] == prompted["text"] == rendered["text"] and titled["url"] == prompted["url"] == article["url"]
    assert "expected /v1/chat/completions" in result_of(article, llm)["error"]["message"]


def test_chat_makes_answers_of_prompts_but_not_of_completion_requests(llm):
    (chat, completion) = ferrum.batch.run([{"custom_id": 1, "prompt": "Hi"}, request(COMPLETIONS)], llm=llm, params=GREEDY, format="openai", chat=True)
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert completion["response"]["body"]["choices"] == result_of(request(COMPLETIONS), llm)["response"]["body"]["choices"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, llm):
    """(input, output) of a job without compression."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_rows(folder / "in.jsonl", rows_of_all_kinds(40))
    ferrum.batch.run(path, folder / "out.jsonl", llm=llm, params=SamplingParams(max_tokens=4, seed=1))
    return path, (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_compressed_files_are_read_and_written(llm, plain, tmp_path, end):
    if end == ".zst":
        zstd_or_skip()
    path, expected = plain
    with open_compressed(str(tmp_path / f"in.jsonl{end}"), "wb") as file:
        file.write(path.read_bytes())
    for name in ("one", "two"):
        ferrum.batch.run(tmp_path / f"in.jsonl{end}", tmp_path / f"{name}.jsonl{end}", llm=llm, params=SamplingParams(max_tokens=4, seed=1))
        with open_compressed(str(tmp_path / f"{name}.jsonl{end}"), "rb") as file:
            assert file.read() == expected
    assert (tmp_path / f"one.jsonl{end}").read_bytes() == (tmp_path / f"two.jsonl{end}").read_bytes()
    (tmp_path / f"torn.jsonl{end}").write_bytes((tmp_path / f"in.jsonl{end}").read_bytes()[:-20])
    (tmp_path / f"not.jsonl{end}").write_bytes(b"plain text\n")
    for name in ("torn", "not"):
        with pytest.raises(BatchError, match="incomplete or damaged, or not what its name says"):
            ferrum.batch.run(tmp_path / f"{name}.jsonl{end}", tmp_path / "none.jsonl", llm=llm)
    assert not (tmp_path / "none.jsonl").exists() and files_of(tmp_path / "none.jsonl") == []


def zstd_or_skip():
    try:
        import compression.zstd  # noqa: F401
    except ImportError:
        pytest.importorskip("zstandard", reason='pip install "ferrum-engine[zstd]"')


def test_a_renamed_or_compressed_input_is_the_same_input(llm, plain, tmp_path):
    path, expected = plain

    def stop(progress):
        if progress.rows is not None and progress.done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ferrum.batch.run(path, tmp_path / "out.jsonl", llm=llm, params=SamplingParams(max_tokens=4, seed=1), progress=stop)
    (tmp_path / "moved.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    ferrum.batch.run(tmp_path / "moved.jsonl.gz", tmp_path / "out.jsonl", llm=llm, resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_parquet_is_read_and_written(llm, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason='pip install "ferrum-engine[parquet]"')
    import pyarrow.parquet as parquet

    rows = [{"custom_id": f"r{i}", "prompt": f"Tom {i}", "level": i, "tags": ["a"] * (i % 3), "deep": {"x": i}, "params": {"n": 1 + i % 2, "temperature": 0.0}}
            for i in range(30)]
    rows[3]["prompt"] = ""
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    write_rows(tmp_path / "in.jsonl", rows)
    for source in ("in.parquet", "in.jsonl"):
        ferrum.batch.run(tmp_path / source, tmp_path / f"{source}.out.jsonl", llm=llm, params=GREEDY)
        ferrum.batch.run(tmp_path / source, tmp_path / f"{source}.out.parquet", llm=llm, params=GREEDY)
    expected = read_rows(tmp_path / "in.jsonl.out.jsonl")
    assert read_rows(tmp_path / "in.parquet.out.jsonl") == expected
    table = parquet.read_table(tmp_path / "in.parquet.out.parquet")
    assert table.schema.names[:4] == ["custom_id", "level", "tags", "deep"]
    found = [drop_nulls(row) for row in table.to_pylist()]
    assert found == [drop_nulls(row) for row in expected]
    assert sum("error" in row for row in found) == 1
    assert (tmp_path / "in.parquet.out.parquet").read_bytes() == (tmp_path / "in.jsonl.out.parquet").read_bytes()


def drop_nulls(value):
    if isinstance(value, dict):
        return {name: drop_nulls(item) for name, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def test_columns_of_parquet_whose_rows_disagree_hold_json(llm, tmp_path):
    pytest.importorskip("pyarrow", reason='pip install "ferrum-engine[parquet]"')
    import pyarrow.parquet as parquet

    rows = [{"prompt": "Tom", "mixed": 1, "empty": {}, "none": None}, {"prompt": "Tom", "mixed": "text", "empty": {}, "none": None}]
    ferrum.batch.run(rows, tmp_path / "out.parquet", llm=llm, params=GREEDY)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [json.loads(row["mixed"]) for row in table] == [1, "text"]
    assert [json.loads(row["empty"]) for row in table] == [{}, {}]
    assert [row["none"] for row in table] == [None, None]


@pytest.mark.parametrize("name,content,message", [
    ("in.csv", b'prompt,answer\n"Tom",x\n', "none of 2 lines is a JSON object .line 1: The line is not JSON: .* Write every row as a JSON object"),
    ("in.json", b'[{"prompt": "Tom"}, {"prompt": "Tim"}]', "JSON array: write each of its elements on a line"),
    ("pretty.json", b'\n[\n {\n  "prompt": "Tom"\n }\n]\n', "line 2: .* JSON array"),
    ("in.jsonl", gzip.compress(b'{"prompt": "Tom"}\n', mtime=0), "ends in .gz"),
    ("in.txt", b"PAR1\x15\n", "ends in .parquet"),
    ("in.zst.txt", b"\x28\xb5\x2f\xfd\x04\n", "ends in .zst"),
])
def test_a_file_of_another_kind_is_refused_and_leaves_nothing(llm, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BatchError, match=message):
        ferrum.batch.run(tmp_path / name, tmp_path / "out.jsonl", llm=llm, params=GREEDY)
    assert files_of(tmp_path / "out.jsonl") == []


def test_a_damaged_parquet_file_is_refused(llm, tmp_path):
    pytest.importorskip("pyarrow", reason='pip install "ferrum-engine[parquet]"')
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BatchError, match="It is damaged, or no Parquet file"):
        ferrum.batch.run(tmp_path / "in.parquet", tmp_path / "out.jsonl", llm=llm)


@pytest.mark.parametrize("name,hidden,extra", [("in.parquet", "pyarrow", "parquet"), ("in.jsonl.zst", "zstandard", "zstd")])
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, name, hidden, extra):
    (tmp_path / name).write_bytes(b"")
    script = f"import sys; sys.modules[{hidden!r}] = sys.modules['compression.zstd'] = None\nfrom ferrum.cli import main\nsys.exit(main(sys.argv[1:]))"
    import sys
    done = subprocess.run([sys.executable, "-c", script, "batch", str(tmp_path / name), "-o", str(tmp_path / "out.jsonl")], capture_output=True, timeout=60)
    assert done.returncode == 2 and f'pip install "ferrum-engine[{extra}]"' in done.stderr.decode()


def test_rows_from_a_pipe_are_kept_until_the_job_has_finished(plain, tmp_path):
    path, expected = plain
    output = tmp_path / "out.jsonl"
    flags = ["-", "-o", output, "-n", "4", "--seed", "1"]
    done = subprocess.run(command("batch", *map(str, flags), "--max-errors", "2", "--threads", "1"), input=path.read_bytes(), capture_output=True, env=environment())
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "out.jsonl.input.jsonl").read_bytes() == path.read_bytes()
    code, err, _ = batch(*flags, "--resume")
    assert code == 0, err
    assert output.read_bytes() == expected


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n{}\n  \n{}\r\n\n{}")
    assert [(line.number, line.text) for line in lines_of(str(path))] == [(2, b"{}"), (4, b"{}"), (6, b"{}")]


def test_an_open_file_is_a_pipe_too(llm, tmp_path):
    summary = ferrum.batch.run(io.BytesIO(b'{"prompt": "Tom"}\n'), tmp_path / "out.jsonl", llm=llm, params=GREEDY)
    assert summary.rows == 1
