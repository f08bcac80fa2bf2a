"""The API as people who know other libraries use it: what may be given, what errors say, what objects show of themselves."""

import pytest

import ferrum
from ferrum import LLM, SamplingParams
from ferrum.errors import FerrumError


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=1024) as llm:
        yield llm


def test_prompts_may_be_mappings_as_vllm_takes_them(llm):
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = [output.outputs for output in llm.generate(["Once", "Tom said"], params)]
    given = [{"prompt": "Once"}, {"prompt": "unread", "prompt_token_ids": llm.tokenize("Tom said")}]
    assert [output.outputs for output in llm.generate(given, params)] == expected
    assert llm.generate(given[0], params)[0].outputs == expected[0]


def test_errors_name_the_place_of_a_prompt(llm):
    with pytest.raises(ValueError, match=r"^prompts\[1\] is empty"):
        llm.generate(["Once", ""])
    with pytest.raises(ValueError, match=r"^token id 99999 of prompts\[2\] is not in the vocabulary"):
        llm.generate(["Once", "Once", [99999]])
    with pytest.raises(FerrumError, match=r"^prompts\[1\] has \d+ tokens"):
        llm.generate(["Once", [5] * 5000])


def test_generate_tells_how_far_it_is(llm):
    told = []
    llm.generate(["Once", "Tom", "The"], SamplingParams(max_tokens=3), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_without_max_tokens_a_text_ends_by_itself_or_where_it_is_full(llm):
    (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=None, temperature=0))
    assert output.outputs[0].finish_reason == "stop" and len(output.outputs[0].token_ids) > 16
    (output,) = llm.generate("Once", SamplingParams(max_tokens=None, ignore_eos=True, temperature=1.5, seed=1))
    assert output.outputs[0].finish_reason == "length" and "is full" in output.outputs[0].notice


def test_parts_of_text_are_one_text_and_template_arguments_may_stand_together(llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]}]
    plain = [{"role": "user", "content": "Tell me\na story."}]
    assert llm.render_chat(parts) == llm.render_chat(plain)
    source = "{{ messages[0]['content'] }}{% if enable_thinking is false %} at once{% endif %}"
    assert llm.render_chat(plain, chat_template=source, chat_template_kwargs={"enable_thinking": False}) == "Tell me\na story. at once"


def test_a_closed_session_is_refused(llm):
    session = llm.session()
    session.close()
    with pytest.raises(RuntimeError, match="The session was closed"):
        session.stream("Once")


def test_a_session_takes_conversations(llm):
    messages = [{"role": "user", "content": "Tell me a story."}]
    params = SamplingParams(temperature=0, max_tokens=8)
    with llm.session() as session:
        with session.stream_chat(messages, params) as stream:
            reply = "".join(piece.text for piece in stream)
        assert reply == llm.chat(messages, params)[0].outputs[0].text
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Go on."}]
        with session.stream_chat(messages, params) as stream:
            list(stream)
        assert stream.output.num_cached_tokens > 16


def test_the_settings_describe_themselves():
    for cls in (SamplingParams, ferrum.EngineOptions):
        for name in cls.__dataclass_fields__:
            assert f"    {name}: " in cls.__doc__
    assert "draw from the K likeliest tokens only" in SamplingParams.__doc__


def test_an_llm_shows_what_it_is():
    with LLM(threads=1, kv_tokens=64) as llm:
        assert repr(llm).startswith("<LLM '") and "kv_tokens=64" in repr(llm)
        assert llm.config["context_length"] == llm.engine.config["context_length"]
    assert repr(llm).endswith(", closed>")


def test_plan_refuses_misspelt_options():
    with pytest.raises(TypeError, match="kv_token"):
        ferrum.plan(kv_token=5)
    from ferrum.options import resolve
    with pytest.raises(TypeError, match=r"there is no option kv_token\. Did you mean kv_tokens\?"):
        resolve(None, {"kv_token": 5})
