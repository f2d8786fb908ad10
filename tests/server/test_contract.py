"""The `openai` client against a server of the default model: every field it sends and reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from idlm import LLM, SamplingParams
from tests.server.live import NAME, Live, serving

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name three colours."},
]
PROMPT = "1, 2, 3, 4,"


@pytest.fixture(scope="module")
def live_default(default_llm: LLM) -> Iterator[Live]:
    with serving(default_llm) as live:
        yield live


@pytest.fixture(scope="module")
def client(live_default: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_default.url}/v1", api_key="any", max_retries=0)


def chat_text(llm: LLM, **params: Any) -> str:
    messages = [dict(message) for message in MESSAGES]
    return llm.chat(messages, SamplingParams(**params))[0].text  # type: ignore[arg-type]


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat_is_the_offline_text(client: openai.OpenAI, default_llm: LLM) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_completion_tokens=12
    )
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.model == NAME
    assert choice.message.role == "assistant" and choice.index == 0
    assert choice.message.content == chat_text(default_llm, temperature=0, max_tokens=12)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + answer.usage.prompt_tokens
    assert answer.usage.tokens_per_forward > 1  # type: ignore[attr-defined]


def test_an_answer_can_be_given_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=4, seed=1)
    again: list[Any] = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "More."}]
    client.chat.completions.create(model=NAME, messages=again, max_tokens=2)
    again[2] = first.choices[0].message.model_dump()  # with all its nulls
    client.chat.completions.create(model=NAME, messages=again, max_tokens=2)


def test_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=5, max_tokens=12, temperature=0.8, top_p=0.9
    )
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        seed=5,
        max_tokens=12,
        temperature=0.8,
        top_p=0.9,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant" and all(d.delta.role is None for d in deltas[1:])
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_choices_are_seeded_one_by_one(client: openai.OpenAI) -> None:
    three = client.chat.completions.create(
        model=NAME, messages=MESSAGES, n=3, seed=10, max_tokens=8, temperature=1.2
    )
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len(set(texts)) > 1
    second = client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=11, max_tokens=8, temperature=1.2
    )
    assert second.choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=NAME, messages=MESSAGES, n=3, seed=10, max_tokens=8, temperature=1.2, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stop", ["5, 6", ["never", "6"]])
def test_stop_strings(client: openai.OpenAI, stop: str | list[str]) -> None:
    whole = client.completions.create(model=NAME, prompt=PROMPT, temperature=0, max_tokens=12)
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=12, stop=stop, stream=True
    )
    chunks = list(stream)
    first = stop if isinstance(stop, str) else "6"
    text = whole.choices[0].text
    assert first in text
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(first)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = dict(
        model=NAME, messages=MESSAGES, seed=2, max_tokens=6, logprobs=True, top_logprobs=3
    )
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    entries = whole.logprobs.content
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == whole.message.content
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] + 1e-6 and math.exp(values[0]) <= 1
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        if logprobs := chunk.choices[0].logprobs:
            streamed += logprobs.content or []
    assert streamed == entries


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert logprobs.text_offset is not None and logprobs.top_logprobs is not None
    for token, value, offset, top in zip(
        logprobs.tokens,
        logprobs.token_logprobs or [],
        logprobs.text_offset,
        logprobs.top_logprobs,
        strict=True,
    ):
        assert completion.choices[0].text[offset:].startswith(token)
        assert value == max(top.values()) == top[token] and len(top) == 2
    echoed = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=6, echo=True
    )
    assert echoed.choices[0].text == PROMPT + completion.choices[0].text
    scored = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=6, echo=True, logprobs=2
    )
    assert scored.choices[0].text == echoed.choices[0].text
    both, start = scored.choices[0].logprobs, len(PROMPT)
    assert both is not None and both.text_offset is not None and both.tokens is not None
    count = len(both.tokens) - len(logprobs.tokens)
    assert both.tokens[count:] == logprobs.tokens and "".join(both.tokens[:count]) == PROMPT
    assert both.token_logprobs is not None
    assert both.token_logprobs[count:] == pytest.approx(logprobs.token_logprobs)
    assert both.text_offset[count:] == [start + offset for offset in logprobs.text_offset]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_and_no_more(
    client: openai.OpenAI, default_llm: LLM, stream: bool
) -> None:
    """As programs do that compare the likelihoods of texts: one call, nothing generated."""
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1)
    prompts = ["The café is in 東京 🗼.", "<|im_start|>user\nHi", "1"]
    arguments: dict[str, Any] = dict(
        model=NAME, prompt=prompts, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    if stream:
        chunks = client.completions.create(**arguments, stream=True)
        choices = [chunk.choices[0] for chunk in chunks]
    else:
        answer = client.completions.create(**arguments)
        choices = answer.choices
        assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert sorted(choice.index for choice in choices) == [0, 1, 2]
    for choice in choices:
        prompt, entry = prompts[choice.index], choice.logprobs
        assert choice.text == prompt and choice.finish_reason == "length" and entry is not None
        ids = default_llm.tokenizer.encode(prompt)
        assert entry.tokens == [default_llm.tokenizer.token_text(token) for token in ids]
        assert entry.token_logprobs is not None and entry.top_logprobs is not None
        assert entry.token_logprobs[0] is None and entry.top_logprobs[0] is None
        expected = default_llm.generate([ids], scoring)[0].prompt_logprobs
        assert expected is not None
        for place, token in enumerate(ids[1:], start=1):
            known = expected[place]
            assert known is not None
            assert entry.token_logprobs[place] == pytest.approx(known[token].logprob)
            [(best, value)] = entry.top_logprobs[place].items()
            assert value == pytest.approx(max(e.logprob for e in known.values()))
            assert best in {e.decoded_token for e in known.values()}
        assert entry.text_offset is not None
        ends = [*entry.text_offset[1:], len(prompt)]
        pieces = [prompt[a:b] for a, b in zip(entry.text_offset, ends, strict=True)]
        assert "".join(pieces) == prompt
        whole = [p == t for p, t in zip(pieces, entry.tokens, strict=True) if "\ufffd" not in t]
        assert all(whole)


def test_many_prompts_and_token_ids(client: openai.OpenAI, default_llm: LLM) -> None:
    prompts = [PROMPT, "The capital of France"]
    both = client.completions.create(
        model=NAME, prompt=prompts, n=2, seed=3, max_tokens=4, temperature=1
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    ids = [default_llm.tokenizer.encode(prompt) for prompt in prompts]
    same = client.completions.create(
        model=NAME, prompt=ids, n=2, seed=3, max_tokens=4, temperature=1
    )
    assert [c.text for c in same.choices] == [c.text for c in both.choices]
    one = client.completions.create(model=NAME, prompt=ids[1], seed=3, max_tokens=4, temperature=1)
    assert one.choices[0].text == both.choices[2].text
    assert both.usage is not None and both.usage.prompt_tokens == sum(map(len, ids))


def test_bias_penalties_and_our_own_fields(client: openai.OpenAI, default_llm: LLM) -> None:
    [token] = default_llm.tokenizer.encode(" red")
    biased = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=3, logit_bias={str(token): 100}
    )
    assert biased.choices[0].text == " red red red"
    fields: dict[str, Any] = {
        "temperature": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "seed": 4,
        "max_tokens": 10,
    }
    own: dict[str, Any] = {
        "top_k": 40,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    }
    answer = client.completions.create(model=NAME, prompt=PROMPT, **fields, extra_body=own)
    offline = default_llm.generate(PROMPT, SamplingParams(**fields, **own))
    assert answer.choices[0].text == offline[0].text


def test_structured_answers(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "known": {"type": "boolean"}},
        "required": ["colour", "known"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=1,
        seed=1,
        max_tokens=30,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["colour"] in ("red", "green") and value["known"] in (True, False)
    assert answer.choices[0].finish_reason == "stop" and len(value) == 2
    stream = client.completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=30,
        stream=True,
        extra_body={"guided_regex": "[0-9]{3}-[0-9]{2}"},
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", text)
    with pytest.raises(openai.BadRequestError, match="regex cannot be used"):
        client.completions.create(model=NAME, prompt=PROMPT, extra_body={"guided_regex": "(a"})


def test_stride_and_verification(client: openai.OpenAI) -> None:
    texts, speeds = set(), []
    for stride in (1, 2, 4):
        answer = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            seed=6,
            max_tokens=12,
            temperature=0.7,
            extra_body={"stride": stride, "verification": "coupled"},
        )
        texts.add(answer.choices[0].message.content)
        speeds.append(answer.usage.tokens_per_forward)  # type: ignore[union-attr]
    assert len(texts) == 1  # the coupled rule: the text of plain autoregression
    assert speeds[0] == 1 < speeds[2]


def test_details_say_how_every_token_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        extra_body={"return_details": True},
    )
    details = answer.choices[0].details  # type: ignore[attr-defined]
    assert "".join(run["text"] for run in details["runs"]) == answer.choices[0].message.content
    assert {run["source"] for run in details["runs"]} <= {"sampled", "draft", "correction"}
    assert details["tokens"] == len(details["runs"]) == 12
    assert details["forwards"] + details["accepted_by_place"][0] <= 12 + details["forwards"]
    assert all(
        a <= r
        for a, r in zip(details["accepted_by_place"], details["reached_by_place"], strict=True)
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"red": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "messages"),
    ],
)
def test_bad_fields_are_refused(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    arguments = {"model": NAME, "messages": MESSAGES} | fields
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**arguments)
    assert refusal.value.param == param and refusal.value.type == "invalid_request_error"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert refusal.value.code == "model_not_found"
