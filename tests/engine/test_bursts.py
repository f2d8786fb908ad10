"""Several forwards launched in one go: the same texts and counts as one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from idlm import LLM, SamplingParams
from idlm.decoding.cycle import Method
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans
from idlm.engine import engine as engine_module
from idlm.engine.batch import Batch
from idlm.engine.commit import Commit
from idlm.engine.engine import BURST, Engine
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request
from tests.support.bursts import as_if_captured
from tests.support.random_model import random_adapter, random_config, random_decoder
from tests.support.tiny import tiny_model

LAYOUTS = [("ar", 1), ("linear", 4), ("quadratic", 3)]
KINDS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.9}]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model, for its tokenizer."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, stride=4, dtype="float32")


@pytest.fixture(scope="module")
def model() -> Any:
    config = random_config(320, eos_token_ids=(2,))
    return random_decoder(config, peakedness=1.5), random_adapter(config)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were launched, one for each forward."""
    sizes: list[int] = []
    launch = Batch.launch

    def launched(batch: Batch, method: Method) -> Commit:
        commit = launch(batch, method)
        sizes.append(len(batch.requests))
        return commit

    monkeypatch.setattr(Batch, "launch", launched)
    return sizes


def engine_of(llm: LLM, model: Any, layout: str, stride: int, rule: str, **options: Any) -> Engine:
    decoder, adapter = model
    rows, cpu = Layout.named(layout, stride), torch.device("cpu")
    method = Method(decoder, adapter if rows.num_masks else None, rows, rule)
    tokens = options.pop("kv_cache_tokens", 4096)
    cache = KVCache(decoder.config, cpu, torch.float32, tokens, wanted=0)
    options = {"max_batch": 4, "ahead": True} | options
    return as_if_captured(Engine(method, llm.tokenizer, cache=cache, device=cpu, **options))


def params_of(index: int, tokens: int, **others: Any) -> SamplingParams:
    own = {"ignore_eos": True} | KINDS[index % len(KINDS)] | others
    return SamplingParams(seed=index, max_tokens=tokens, **own)


def run(engine: Engine) -> int:
    """Steps until nobody is left, who have given back all they held."""
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < 3000, "the engine does not get on"
    assert engine.stats.kv_tokens == 0
    assert engine._pool.available == engine._pool.num_blocks - 1
    return steps


def begun(engine: Engine, requests: list[Request]) -> None:
    while not all(request.token_ids for request in requests):
        engine.step()


def told(request: Request) -> Any:
    """All that there is to know of a request that has ended."""
    stats = request.stats
    assert stats.tokens == len(request.token_ids) == len(request.sources)
    return (
        request.token_ids,
        request.text,
        request.finish_reason,
        request.sources,
        stats.outcomes,
        stats.rows,
        pytest.approx(stats.overlap, rel=1e-4),
    )


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
def test_texts_and_counts_are_those_without_bursts(
    llm: LLM,
    model: Any,
    layout: str,
    stride: int,
    rule: str,
    launches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [([9 + i] * (3 + 5 * i), params_of(i, 60 + 11 * i)) for i in range(4)]
    results, steps = [], []
    for most in (BURST, 1):
        monkeypatch.setattr(engine_module, "BURST", most)
        engine = engine_of(llm, model, layout, stride, rule)
        requests = [engine.add(*case) for case in cases]
        launches.clear()
        steps.append(run(engine))
        assert (len(launches) > steps[-1]) == (most > 1)
        results.append([told(request) for request in requests])
    assert results[0] == results[1]


def test_a_request_that_ends_inside_a_burst_keeps_nothing_of_the_rest(
    llm: LLM, model: Any, launches: list[int]
) -> None:
    whole = engine_of(llm, model, "ar", 1, "coupled")
    first = whole.add([5, 6], params_of(1, 60))
    run(whole)
    for end in range(20, 20 + 2 * BURST):
        token = first.token_ids[end]
        end = first.token_ids.index(token)
        engine = engine_of(llm, model, "ar", 1, "coupled")
        stopped = engine.add([5, 6], params_of(1, 60, stop_token_ids=[token]))
        other = engine.add([5, 6], params_of(1, 60))
        begun(engine, [stopped, other])
        launches.clear()
        while not stopped.finished:
            engine.step()
        assert len(launches) <= end + 2 * BURST
        assert stopped.token_ids == first.token_ids[: end + 1]
        assert stopped.stats.forwards == end + 1 == len(stopped.sources)
        assert stopped.stats.rows == end + 1
        run(engine)
        assert other.token_ids == first.token_ids


@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
def test_no_forward_is_launched_for_nobody_where_the_limit_is_near(
    llm: LLM, model: Any, layout: str, stride: int, launches: list[int]
) -> None:
    engine = engine_of(llm, model, layout, stride, "coupled")
    request = engine.add([5, 6], params_of(0, 45))
    run(engine)
    assert len(launches) <= request.stats.forwards  # one of those is the prompt's: one is too many


def test_who_arrives_waits_for_one_burst(llm: LLM, model: Any, launches: list[int]) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "rejection")
    first = engine.add([5, 6], params_of(0, 200))
    begun(engine, [first])
    engine.step()
    launches.clear()
    engine.step()
    assert len(launches) == BURST
    second = engine.add([7, 8, 9], params_of(1, 30))
    engine.step()
    assert len(launches) == BURST + 1 and second.started > 0
    engine.step()
    engine.step()
    assert second.token_ids and launches[BURST + 1 : BURST + 3] == [2] * 2
    run(engine)
    lonely = engine_of(llm, model, "quadratic", 3, "rejection")
    alone = lonely.add([7, 8, 9], params_of(1, 30))
    run(lonely)
    assert second.token_ids == alone.token_ids


def test_bursts_send_nobody_away(llm: LLM, model: Any, launches: list[int]) -> None:
    """There is room for both, but not for all the tokens that bursts may bring."""
    engine = engine_of(llm, model, "quadratic", 3, "coupled", kv_cache_tokens=160)
    requests = [engine.add([5 + i] * 4, params_of(i, 60)) for i in range(2)]
    steps = run(engine)
    assert engine.stats.preemptions == 0
    assert len(launches) > steps
    lonely = engine_of(llm, model, "quadratic", 3, "coupled", max_batch=1)
    for i, request in enumerate(requests):
        alone = lonely.add([5 + i] * 4, params_of(i, 60))
        run(lonely)
        assert request.token_ids == alone.token_ids


@pytest.mark.parametrize(
    "others", [{"repetition_penalty": 1.2}, {"logprobs": 1}, {"regex": "[a-z ]{25}"}]
)
def test_who_needs_the_host_in_between_gets_it(
    llm: LLM, model: Any, others: dict[str, Any], launches: list[int]
) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "coupled")
    engine.add([5, 6], params_of(0, 30))
    engine.add([5, 6], params_of(0, 30, ignore_eos="regex" not in others, **others))
    while engine.busy:
        launches.clear()
        engine.step()
        assert len(launches) <= 1 or len(engine._scheduler.running) <= 1


def test_bursts_are_short_where_forwards_are_long(
    llm: LLM, model: Any, launches: list[int]
) -> None:
    for seconds, most in ((0.5e-3, BURST), (1.4e-3, 2), (5e-3, 1)):
        engine = as_if_captured(engine_of(llm, model, "ar", 1, "coupled"), seconds)
        request = engine.add([5, 6], params_of(0, 100))
        begun(engine, [request])
        engine.step()
        launches.clear()
        for _ in range(3):
            engine.step()
        assert len(launches) == 3 * most
        engine.close()


@pytest.mark.parametrize("nth", range(9, 14))
def test_a_forward_that_fails_inside_a_burst_is_made_again(
    llm: LLM, model: Any, nth: int, launches: list[int]
) -> None:
    """What came before it in the burst counts, and is not made again."""
    undisturbed = engine_of(llm, model, "linear", 4, "rejection")
    expected = [undisturbed.add([5 + i, 6], params_of(i, 60)) for i in range(3)]
    run(undisturbed)
    calls = 0

    def fail(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal calls
        calls += inputs[0].dim() == 2  # else the sampler head, after the forward
        if calls == nth and inputs[0].dim() == 2:
            calls += 1
            raise RuntimeError("once")

    engine = engine_of(llm, model, "linear", 4, "rejection")
    hook = model[0].embed.register_forward_pre_hook(fail)
    requests = [engine.add([5 + i, 6], params_of(i, 60)) for i in range(3)]
    run(engine)
    hook.remove()
    assert engine.stats.failed_forwards == 1
    for request, other in zip(requests, expected, strict=True):
        assert request.error is None
        assert request.token_ids == other.token_ids
        assert request.stats.outcomes == other.stats.outcomes


def test_a_policy_hears_of_every_forward(llm: LLM, model: Any, launches: list[int]) -> None:
    policy = Policy(plans(7))
    engine = engine_of(llm, model, "quadratic", 4, "coupled", policy=policy)
    seen = 0
    saw = policy.saw

    def counted(drafted: int, accepted: int, times: int = 1) -> None:
        nonlocal seen
        seen += times
        saw(drafted, accepted, times)

    policy.saw = counted  # type: ignore[method-assign]
    requests = [engine.add([5 + i, 6], params_of(i, 60)) for i in range(3)]
    steps = run(engine)
    assert engine.stats.forwards == sum(engine.stats.plans.values()) == len(launches) > steps
    assert seen >= sum(request.stats.forwards for request in requests)
