"""A server that chooses layout and stride for every forward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from idlm import LLM, SamplingParams
from idlm.decoding.policy import plans
from tests.server.live import NAME, Live, serving
from tests.support.tiny import tiny_model

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
