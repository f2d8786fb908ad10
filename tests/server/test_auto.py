"""A server that chooses layout and stride for every forward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from idlm import LLM, SamplingParams
from idlm.decoding.policy import plans
from tests.server.live import NAME, Live, serving, until
from tests.support.tiny import tiny_model

PROMPT = [5, 6, 8, 40]
PARAMS: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.8}


@pytest.fixture(scope="module")
def auto_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, dtype="float32", stride="auto", verification="coupled", max_batch=4)


@pytest.fixture(scope="module")
def live_auto(auto_llm: LLM) -> Iterator[Live]:
    with serving(auto_llm) as live:
        yield live


def test_a_seed_gives_the_same_text_whatever_is_chosen(live_auto: Live, auto_llm: LLM) -> None:
    prompts = [[5 + n, 6, 7] for n in range(8)]
    alone = auto_llm.with_layout("ar", 1)
    offline = [alone.generate(p, SamplingParams(seed=3, **PARAMS))[0].text for p in prompts]
    # Two at a time, then more than run at once: several sizes, and each tries its plans.
    for clients in (2, 8):
        with ThreadPoolExecutor(clients) as pool:
            answers = pool.map(lambda p: live_auto.complete(p, seed=3, **PARAMS).json(), prompts)
            assert [answer["choices"][0]["text"] for answer in answers] == offline


@pytest.mark.parametrize(
    ("fields", "layout", "stride"),
    [
        ({"stride": 1}, "ar", "1"),
        ({"stride": 3}, "quadratic", "3"),
        ({"stride": 2, "verification": "rejection"}, "quadratic", "2"),
        ({"verification": "rejection", "temperature": 0}, "auto", "auto"),
    ],
)
def test_fields_of_a_request_still_count(
    live_auto: Live, auto_llm: LLM, fields: dict[str, Any], layout: str, stride: str
) -> None:
    rule = fields.get("verification", "coupled")
    llm = auto_llm.with_layout(layout, "auto" if stride == "auto" else int(stride), rule)
    params = PARAMS | {"temperature": fields.get("temperature", 0.8), "seed": 4}
    [offline] = llm.generate([9, 8], SamplingParams(**params))
    [choice] = live_auto.complete([9, 8], **params | fields).json()["choices"]
    assert choice["text"] == offline.text
    method = f'layout="{layout}",stride="{stride}",verification="{rule}"'
    assert f"idlm_generated_tokens_total{{{method}}} 40.0" in live_auto.http.get("/metrics").text


def choices_of(live: Live, n: int, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """The ``n`` choices of a completion; pieces of streamed ones are put together."""
    response = live.complete(PROMPT, n=n, stream=stream, **fields)
    if not stream:
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices
    wholes: list[dict[str, Any]] = [{"index": i, "text": ""} for i in range(n)]
    for line in response.text.split("\n\n"):
        if not line or line == "data: [DONE]":
            continue
        [piece] = json.loads(line.removeprefix("data: "))["choices"]
        whole = wholes[piece["index"]]
        whole["text"] += piece["text"]
        whole["finish_reason"] = piece["finish_reason"]
        if piece["logprobs"] is not None:
            logprobs = whole.setdefault("logprobs", {})
            for name, values in piece["logprobs"].items():
                logprobs[name] = logprobs.get(name, []) + (values or [])
    return wholes


RULES = pytest.mark.parametrize("rule", ["coupled", "rejection"])
STREAMS = pytest.mark.parametrize("stream", [False, True])


@RULES
@STREAMS
def test_choices_echo_and_logprobs(live_auto: Live, auto_llm: LLM, rule: str, stream: bool) -> None:
    """Whatever was chosen on the way, the log-probabilities are those of the text's tokens."""
    fields = PARAMS | {"seed": 11, "verification": rule, "echo": True, "logprobs": 2}
    choices = choices_of(live_auto, 3, stream, **fields, return_details=not stream)
    alone = auto_llm.with_layout("ar", 1)
    text = auto_llm.tokenizer.decode(PROMPT)
    for i, choice in enumerate(choices):
        assert choice["index"] == i and choice["finish_reason"] == "length"
        assert choice["text"].startswith(text)
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 4 + 40
        if rule == "coupled":
            params = SamplingParams(seed=11 + i, **PARAMS)
            assert choice["text"] == text + alone.generate(PROMPT, params)[0].text
        if not stream:
            ids = PROMPT + [run["token_id"] for run in choice["details"]["runs"]]
            scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
            scores = alone.generate(ids, scoring)[0].prompt_logprobs
            assert scores is not None
            known = [
                None if score is None else pytest.approx(score[id_].logprob, abs=1e-3)
                for id_, score in zip(ids, scores, strict=True)
            ]
            assert logprobs["token_logprobs"] == known


@RULES
@STREAMS
def test_stop_strings(live_auto: Live, auto_llm: LLM, rule: str, stream: bool) -> None:
    params = PARAMS | {"temperature": 0.8 if rule == "coupled" else 0, "seed": 12}
    [whole] = auto_llm.with_layout("ar", 1).generate(PROMPT, SamplingParams(**params))
    stop = whole.text[12:15]
    fields = params | {"verification": rule, "stop": ["never there", stop]}
    [choice] = choices_of(live_auto, 1, stream, **fields)
    assert choice["text"] == whole.text[: whole.text.index(stop)]
    assert choice["finish_reason"] == "stop"


@RULES
def test_clients_that_leave_harm_nobody(live_auto: Live, auto_llm: LLM, rule: str) -> None:
    params = PARAMS | {"temperature": 0.8 if rule == "coupled" else 0, "seed": 13}
    prompts = [[9 + n, 6] for n in range(4)]
    alone = auto_llm.with_layout("ar", 1)
    offline = [alone.generate(p, SamplingParams(**params))[0].text for p in prompts]
    long = params | {"max_tokens": 400, "verification": rule, "stream": True, "n": 2}

    def leave(number: int) -> None:
        body = {"prompt": [30 + number, 6], **long}
        with live_auto.http.stream("POST", "/v1/completions", json=body) as response:
            for _ in zip(range(1 + number), response.iter_lines(), strict=False):
                pass

    with ThreadPoolExecutor(7) as pool:
        leaving = [pool.submit(leave, number) for number in range(3)]
        fields = params | {"verification": rule}
        answers = list(pool.map(lambda p: live_auto.complete(p, **fields).json(), prompts))
        for future in leaving:
            future.result()
    assert [answer["choices"][0]["text"] for answer in answers] == offline
    until(live_auto.idle, 5)
    assert live_auto.server.worker.load().kv_tokens == 0
    assert live_auto.server.worker.step_failures == 0


def test_what_was_chosen_is_shown(live_auto: Live) -> None:
    live_auto.complete([5, 6, 7], seed=1, **PARAMS)
    text = live_auto.http.get("/metrics").text
    lines = re.findall(r'idlm_auto_forwards_total{layout="(\w+)",stride="(\d+)"} (\S+)', text)
    assert {(name, int(n)) for name, n, _ in lines} <= {(p.name, p.stride) for p in plans(3)}
    assert len(lines) > 1 and all(float(count) > 0 for _, _, count in lines)
    card = live_auto.http.get(f"/v1/models/{NAME}").json()
    assert (card["layout"], card["stride"], card["verification"]) == ("auto", "auto", "coupled")


def test_a_model_without_masks_has_nothing_to_choose(tmp_path: Path) -> None:
    llm = LLM(tiny_model(tmp_path), adapter="none", dtype="float32", stride="auto")
    with serving(llm) as live:
        assert live.http.get(f"/v1/models/{NAME}").json()["stride"] == 1
        assert live.complete([5, 6], max_tokens=4).status_code == 200
        assert live.complete([5, 6], max_tokens=4, stride=2).status_code == 400
