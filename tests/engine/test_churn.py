"""Requests that come and go at random, with inputs of graphs, say what they say alone."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from idlm import LLM, SamplingParams
from idlm.decoding.policy import Policy, plans
from idlm.engine import flights
from idlm.engine.commit import Landing, Launch
from idlm.engine.engine import Engine
from idlm.engine.request import FinishReason, Request
from tests.engine.test_graphs import UncapturedGraphs, engine_of
from tests.support.random_model import random_adapter, random_config, random_decoder
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Graphs and streams are made up.")

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 1.0, "stop_token_ids": [231, 17]},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.9, "logit_bias": {5: 1.0}},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.0, "stop": ["ab"]},
]
KINDS = [[0], [0, 1], [1, 2, 3, 4], [0, 1, 2, 3, 4, 5], list(range(len(PARAMS)))]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model, for its tokenizer."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, stride=4, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    config = random_config(320, eos_token_ids=(2,))
    return random_decoder(config, peakedness=1.5), random_adapter(config).freeze()


class Said:
    """What requests say alone, launch by launch."""

    def __init__(self, llm: LLM, model: Any) -> None:
        self._engine = engine_of(llm, model, "ar", 1, "coupled", ahead=False, max_batch=1)
        self._engine._runner._graphs = None
        self._known: dict[str, Any] = {}

    def alone(self, request: Request) -> tuple[list[int], FinishReason | None, str]:
        """Tokens, why they end, and the text."""
        given = request.prompt_token_ids, request.params
        if str(given) not in self._known:
            other = self._engine.add(*given)
            while self._engine.busy:
                self._engine.step()
            self._known[str(given)] = other.token_ids, other.finish_reason, other.text
        known: tuple[list[int], FinishReason | None, str] = self._known[str(given)]
        return known


@pytest.fixture(scope="module")
def said(llm: LLM, model: Any) -> Said:
    return Said(llm, model)


def let_prompts_land(engine: Engine, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they like, but before any cycle that waits for them."""
    chance, landed, fetch = random.choice([0.2, 0.6, 1.0]), set[int](), Landing.fetch
    join = engine._beside.join

    def fetched(landing: Landing, launch: Launch) -> None:
        landed.discard(id(landing))
        fetch(landing, launch)

    def done(landing: Landing) -> bool:
        if random.random() < chance:
            landed.add(id(landing))
        return id(landing) in landed

    def joined() -> None:
        landed.update(id(prompts.landing) for prompts in engine._flights._prompts)
        join()

    monkeypatch.setattr(Landing, "fetch", fetched)
    monkeypatch.setattr(Landing, "done", property(done))
    monkeypatch.setattr(engine._beside, "join", joined)


@pytest.mark.parametrize("seed", range(24))
def test_nobody_notices_the_others(
    llm: LLM, model: Any, said: Said, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    monkeypatch.setattr(flights, "LATE", random.choice([0.0, 1e9]))
    monkeypatch.setattr(UncapturedGraphs, "prompt_seconds", random.choice([0.5, 2.0]))
    layout, stride = random.choice([("ar", 1), ("linear", 4), ("quadratic", 3)])
    options: dict[str, Any] = {
        "policy": Policy(plans(3)) if layout != "ar" and random.random() < 0.4 else None,
        "max_batch": random.choice([1, 2, 3, 5, 8]),
        "kv_cache_tokens": random.choice([160, 256, 4096]),
        "chunk": random.choice([8, 64, 512]),
        "along": random.random() < 0.6,
    }
    engine = engine_of(llm, model, layout, stride, "coupled", **options)
    let_prompts_land(engine, random, monkeypatch)
    kinds, requests = random.choice(KINDS), list[Request]()
    for i in range(random.randrange(4, 20)):
        own = {"seed": i % 5, "max_tokens": random.randrange(1, 30)} | PARAMS[random.choice(kinds)]
        longest = random.choice([30, 30, min(options["kv_cache_tokens"] // 2, 200)])
        prompt = [9 + random.randrange(3)] * random.randrange(1, longest)
        requests.append(engine.add(prompt, SamplingParams(**own), random.choice([0, 0, 1])))
        for _ in range(random.choice([0, 0, 1, 2, 5, 12])):
            if engine.busy:
                engine.step()
        if random.random() < 0.1:
            engine.abort(random.choice(requests))
    while engine.busy:
        engine.step()
    assert engine.stats.kv_tokens == engine.stats.failed_forwards == 0
    for request in requests:
        tokens, reason, text = said.alone(request)
        if request.finish_reason is FinishReason.ABORT:
            assert request.token_ids == tokens[: len(request.token_ids)]
        else:
            assert (request.token_ids, request.finish_reason, request.text) == (
                tokens,
                reason,
                text,
            )
