"""Chunks, shared prefixes, preemption, priorities and faults: nobody's text changes by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm import LLM, SamplingParams
from idlm.decoding.cycle import Method
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans
from idlm.engine.engine import Engine
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache
from idlm.engine.request import FinishReason, Phase, Request
from idlm.errors import InvalidRequestError, ResourceError
from tests.support.random_model import random_adapter, random_config, random_decoder
from tests.support.tiny import tiny_model

LAYOUTS = [("ar", 1), ("linear", 4), ("quadratic", 3)]
RULES = ["rejection", "coupled"]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model, for its tokenizer; context 512."""
    return LLM(
        tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7), stride=4, dtype="float32"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    config = random_config(320, eos_token_ids=(2,))
    return random_decoder(config, peakedness=1.5), random_adapter(config)


def engine_of(
    llm: LLM,
    model: Any,
    layout: str,
    stride: int,
    rule: str,
    *,
    kv_cache_tokens: int = 4096,
    max_batch: int = 4,
    chunk: int = 512,
    ahead: bool = False,
    policy: Policy | None = None,
) -> Engine:
    decoder, adapter = model
    rows, cpu = Layout.named(layout, stride), torch.device("cpu")
    method = Method(decoder, adapter if rows.num_masks else None, rows, rule)
    cache = KVCache(decoder.config, cpu, torch.float32, kv_cache_tokens, wanted=0)
    return Engine(
        method,
        llm.tokenizer,
        cache=cache,
        device=cpu,
        max_batch=max_batch,
        chunk=chunk,
        ahead=ahead,
        policy=policy,
    )


def run(engine: Engine, steps: int = 3000) -> None:
    while engine.busy:
        steps -= 1
        assert steps, "the engine does not get on"
        engine.step()


def params_of(index: int, tokens: int) -> SamplingParams:
    return SamplingParams(
        seed=index, max_tokens=tokens, ignore_eos=True, **PARAMS[index % len(PARAMS)]
    )


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    request = engine.add(prompt, params)
    run(engine)
    return request.token_ids


def assert_empty(engine: Engine) -> None:
    assert engine.stats.kv_tokens == 0 and not engine.busy
    assert engine._pool.available == engine._pool.num_blocks - 1


def assert_no_shared_write(requests: list[Request]) -> None:
    """Others may hold blocks of committed tokens only; all other blocks have one holder."""
    for request in requests:
        lease = request.lease
        assert lease.shareable * BLOCK_TOKENS <= request.cached or not lease.ids
        own = set(lease.ids[lease.shareable :])
        assert not any(own & set(other.lease.ids) for other in requests if other is not request)


prompts = st.lists(
    st.tuples(
        st.integers(0, 40),  # tokens of a beginning that all have in common
        st.lists(st.integers(3, 319), min_size=1, max_size=30),
        st.integers(1, 25),  # answer
        st.integers(-1, 1),  # priority
        st.integers(0, 12),  # steps until it arrives
        st.one_of(st.none(), st.integers(0, 12)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
@settings(max_examples=12)
@given(
    arrivals=prompts,
    kv_cache_tokens=st.integers(112, 260),
    max_batch=st.integers(1, 5),
    chunk=st.integers(1, 40),
    ahead=st.booleans(),
)
def test_nothing_that_happens_around_a_request_changes_its_tokens(
    llm: LLM,
    model: Any,
    layout: str,
    stride: int,
    rule: str,
    arrivals: list[Any],
    kv_cache_tokens: int,
    max_batch: int,
    chunk: int,
    ahead: bool,
) -> None:
    common = [5 + n % 7 for n in range(40)]
    engine = engine_of(
        llm,
        model,
        layout,
        stride,
        rule,
        kv_cache_tokens=kv_cache_tokens,
        max_batch=max_batch,
        chunk=chunk,
        ahead=ahead,
    )
    requests: dict[int, Request] = {}
    aborted: set[int] = set()
    for step in range(3000):
        for index, (prefix, own, tokens, priority, arrival, end) in enumerate(arrivals):
            if index not in requests and arrival <= step:
                prompt = common[:prefix] + own
                requests[index] = engine.add(prompt, params_of(index, tokens), priority)
            elif index in requests and end is not None and arrival + end <= step:
                aborted |= set() if requests[index].finished else {index}
                engine.abort(requests[index])
        engine.step()
        assert_no_shared_write(list(requests.values()))
        if len(requests) == len(arrivals) and not engine.busy:
            break
    else:
        pytest.fail("the engine does not get on")
    assert_empty(engine)
    lonely = engine_of(llm, model, layout, stride, rule, max_batch=1)
    for index, request in requests.items():
        expected = alone(lonely, request.prompt_token_ids, request.params)
        if index in aborted:
            assert request.finish_reason is FinishReason.ABORT
            assert request.token_ids == expected[: len(request.token_ids)]
        else:
            assert request.token_ids == expected
            assert request.text == llm.tokenizer.decode(expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "stride", "ahead"), [(*LAYOUTS[2], False), (*LAYOUTS[1], True)])
def test_a_preempted_request_goes_on_as_if_nothing_had_been(
    llm: LLM, model: Any, layout: str, stride: int, rule: str, ahead: bool
) -> None:
    """With statistics, too: the same forwards, with the same drafts."""
    small = engine_of(llm, model, layout, stride, rule, kv_cache_tokens=128, chunk=16, ahead=ahead)
    wide = engine_of(llm, model, layout, stride, rule)
    cases = [([9 + i] * 20, params_of(i, 40)) for i in range(4)]
    requests = [small.add(*case) for case in cases]
    run(small)
    assert small.stats.preemptions > 0
    assert sum(r.preemptions for r in requests) == small.stats.preemptions
    assert requests[0].preemptions == 0  # the first one gets on
    for case, request in zip(cases, requests, strict=True):
        undisturbed = wide.add(*case)
        run(wide)
        assert request.token_ids == undisturbed.token_ids
        assert request.sources == undisturbed.sources
        assert request.text == undisturbed.text
        for name in ("forwards", "drafted", "accepted", "tokens"):
            assert getattr(request.stats, name) == getattr(undisturbed.stats, name), name
        assert request.stats.overlap == pytest.approx(undisturbed.stats.overlap, rel=1e-4)
    assert_empty(small)


class Erratic(Policy):
    """Another plan for every forward, whatever it costs."""

    def choose(self, requests: int) -> Layout:
        index = sum(self.chosen.values())
        self.chosen[str(index)] += 1
        return self.plans[(index * index + index // 3) % len(self.plans)]


@pytest.mark.parametrize("ahead", [False, True])
def test_plans_that_change_all_the_time_change_no_token(llm: LLM, model: Any, ahead: bool) -> None:
    engine = engine_of(
        llm, model, "quadratic", 4, "coupled", ahead=ahead, policy=Erratic(plans(7)), chunk=16
    )
    lonely = engine_of(llm, model, "ar", 1, "coupled", max_batch=1)
    cases = [([9 + i] * (5 + 9 * i), params_of(i, 40)) for i in range(6)]
    cases.append(([5, 6], SamplingParams(temperature=0, regex="[a-z ]{30}", max_tokens=40)))
    requests = [engine.add(*case) for case in cases]
    run(engine)
    for case, request in zip(cases, requests, strict=True):
        assert request.error is None
        assert request.token_ids == alone(lonely, *case)
    assert_empty(engine)


@pytest.mark.parametrize("max_batch", [1, 6])
def test_warm_up_leaves_nothing_but_what_forwards_cost(
    llm: LLM, model: Any, max_batch: int
) -> None:
    policy = Policy(plans(7))
    engine = engine_of(
        llm, model, "quadratic", 4, "coupled", max_batch=max_batch, ahead=True, policy=policy
    )
    engine.warm_up()
    assert_empty(engine)
    assert engine.stats.plans == {}
    assert {size for size, _ in policy._seconds} >= set(range((max_batch - 1).bit_length() + 1))
    assert policy.acceptance()[0] == pytest.approx(Policy(plans(7)).acceptance()[0])


def test_shared_prefixes_are_not_computed_again(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "coupled")
    rows: list[int] = []
    hook = engine.method.decoder.embed.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[1])
    )
    prompt = list(range(3, 68))  # four blocks and one token
    first = engine.add(prompt, params_of(0, 20))
    run(engine)
    rows.clear()
    second = engine.add(prompt, params_of(0, 20))
    run(engine)
    hook.remove()
    assert (first.prefix_hit_tokens, second.prefix_hit_tokens) == (0, 64)
    assert rows[0] == 1  # the last prompt token, whose logits are wanted
    assert second.token_ids == first.token_ids
    follow_up = engine.add(prompt + first.token_ids + [4], params_of(0, 1))
    run(engine)
    assert follow_up.prefix_hit_tokens == 80  # of the answer, too
    exact = engine.add(prompt[:64], params_of(1, 5))
    run(engine)
    assert exact.prefix_hit_tokens == 48
    assert engine.stats.prefix_hit_tokens == 64 + 80 + 48


def test_a_long_prompt_does_not_stop_those_that_run(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "linear", 4, "rejection", chunk=16)
    short = engine.add([5, 6], params_of(0, 60))
    engine.step()
    long = engine.add(list(range(3, 203)), params_of(1, 5))
    while not long.token_ids:
        before = len(short.token_ids)
        engine.step()
        assert len(short.token_ids) > before
        assert short.phase is not Phase.FINISHED
    assert 13 <= short.stats.forwards <= 14


def test_short_prompts_share_a_step_up_to_the_chunk(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "linear", 4, "rejection", max_batch=8, chunk=30)
    requests = [engine.add([5 + i] * 12, params_of(i, 60)) for i in range(8)]
    for begun, cached in ((2, 6), (5, 0), (7, 6), (8, 0)):  # 30 tokens of 12 each
        engine.step()
        assert sum(bool(r.token_ids) for r in requests) == begun
        assert begun == 8 or requests[begun].cached == cached
    engine.close()


def test_a_prompt_runs_beside_the_cycles_of_others(
    llm: LLM, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "coupled", ahead=True)
    first = engine.add([7, 8, 9], params_of(0, 60))
    for _ in range(3):
        engine.step()
    assert engine._batch.requests == [first]
    joins: list[list[Request]] = []
    join = engine._beside.join

    def batch() -> list[Request]:
        return engine._batch.requests

    def noted() -> None:
        joins.append(batch())
        join()

    monkeypatch.setattr(engine._beside, "join", noted)
    second = engine.add([3, 4, 5, 6], params_of(1, 20))
    engine.step()  # launches its prompt
    assert batch() == [first] and not second.token_ids
    engine.step()  # launches one more cycle of the others before the prompt is read
    assert batch() == [first] and second.token_ids
    assert joins == []
    engine.step()
    assert batch() == [first, second] and joins == [[first]]
    run(engine)
    assert_empty(engine)
    for request, prompt in ((first, [7, 8, 9]), (second, [3, 4, 5, 6])):
        assert request.token_ids == alone(engine, prompt, request.params)


def test_hundreds_wait_and_come_in_order_of_priority_and_arrival(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "coupled", kv_cache_tokens=200, max_batch=3)
    requests = [
        engine.add([5 + i % 50, 9], params_of(i, 1 + i % 4), priority=i % 2) for i in range(200)
    ]
    assert engine.stats.waiting == 200
    run(engine)
    order = [r.id for r in sorted(requests, key=lambda r: r.started)]
    assert order == [*range(0, 200, 2), *range(1, 200, 2)]
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)
    assert_empty(engine)


def test_under_overload_everybody_ends(llm: LLM, model: Any) -> None:
    """More arrives all the time than there are blocks for; the old ones still end, in order."""
    engine = engine_of(llm, model, "linear", 4, "coupled", kv_cache_tokens=96, max_batch=8)
    requests: list[Request] = []
    for step in range(60):
        if step % 2 == 0:
            requests.append(engine.add([5 + step % 40] * 12, params_of(step, 40)))
        engine.step()
    run(engine)
    assert engine.stats.preemptions > 0
    assert all(len(r.token_ids) == 40 for r in requests)
    assert_empty(engine)


ABORTED = [(list(range(3, 33)), params_of(i, 80)) for i in range(4)]


@pytest.fixture(scope="module")
def lonely(llm: LLM, model: Any) -> list[list[int]]:
    """What each of these requests says alone."""
    engine = engine_of(llm, model, "quadratic", 3, "rejection", max_batch=1)
    return [alone(engine, *case) for case in ABORTED]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("phase", list(Phase))
def test_abort_in_every_phase(
    llm: LLM, model: Any, lonely: list[list[int]], phase: Phase, ahead: bool
) -> None:
    engine = engine_of(
        llm, model, "quadratic", 3, "rejection", kv_cache_tokens=160, chunk=8, ahead=ahead
    )
    requests = [engine.add(*case) for case in ABORTED]
    for _ in range(1000):
        victim = next((r for r in requests if r.phase is phase), None)
        if victim is not None:
            break
        engine.step()
    assert victim is not None
    count = len(victim.token_ids)
    engine.abort(victim)
    engine.abort(victim)
    assert victim.finished and len(victim.token_ids) == count
    run(engine)
    assert_empty(engine)
    for request, expected in zip(requests, lonely, strict=True):
        assert request is victim or request.token_ids == expected


POISON = 300


@pytest.fixture
def poison(model: Any) -> Iterator[None]:
    """A forward fails that has the token `POISON` anywhere in its rows."""

    def check(_: object, inputs: tuple[torch.Tensor]) -> None:
        rows = inputs[0].dim() == 2  # else the sampler head, after the forward
        if rows and (inputs[0] == POISON).any():
            raise RuntimeError("poisoned")

    hook = model[0].embed.register_forward_pre_hook(check)
    yield
    hook.remove()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize(("layout", "stride"), LAYOUTS)
def test_a_request_that_makes_forwards_fail_fails_alone(
    llm: LLM, model: Any, layout: str, stride: int, where: str, ahead: bool
) -> None:
    engine = engine_of(llm, model, layout, stride, "rejection", ahead=ahead)
    harmless = {POISON: -100.0}  # for tokens and drafts
    good = [
        engine.add([9, 11 + i], replace(params_of(i, 30), logit_bias=harmless)) for i in range(3)
    ]
    engine.step()
    if where == "prefill":
        bad = engine.add([5, POISON, 5], params_of(0, 30))
    else:  # its first token, which the next forward has to compute with those of the others
        force = {token: -100.0 for token in range(320) if token != POISON}
        bad = engine.add([5, 5], SamplingParams(logit_bias=force, ignore_eos=True, max_tokens=9))
    run(engine)
    assert bad.finish_reason is FinishReason.ERROR
    assert str(bad.error) == "poisoned"
    assert len(bad.token_ids) == (0 if where == "prefill" else 1)
    lonely = engine_of(llm, model, layout, stride, "rejection", max_batch=1)
    for request in good:
        assert request.error is None
        assert request.token_ids == alone(lonely, request.prompt_token_ids, request.params)
    assert engine.stats.failed_forwards >= 1
    assert_empty(engine)


def test_what_is_too_long_for_the_cache_is_refused(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "quadratic", 3, "rejection", kv_cache_tokens=64)
    with pytest.raises(InvalidRequestError, match=r"room for 55.*kv_cache_tokens"):
        engine.add([5] * 50, params_of(0, 6))
    with pytest.raises(InvalidRequestError, match="room for 55"):
        engine.add([5] * 55, SamplingParams(max_tokens=None))
    to_the_end = engine.add([5] * 50, SamplingParams(max_tokens=None, ignore_eos=True, seed=1))
    fitting = engine.add([5] * 50, params_of(0, 5))
    run(engine)
    assert len(to_the_end.token_ids) == len(fitting.token_ids) == 5
    assert to_the_end.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_kv_cache_tokens_must_be_a_number_of_tokens(llm: LLM, model: Any, tokens: Any) -> None:
    with pytest.raises(InvalidRequestError, match="kv_cache_tokens"):
        engine_of(llm, model, "ar", 1, "rejection", kv_cache_tokens=tokens)


def test_too_large_a_cache_is_refused_at_the_start(llm: LLM, model: Any) -> None:
    with pytest.raises(ResourceError, match="lower kv_cache_tokens"):
        engine_of(llm, model, "ar", 1, "rejection", kv_cache_tokens=10**15)


def test_by_default_the_cache_has_room_for_the_whole_batch(llm: LLM) -> None:
    engine = llm.new_engine()
    for i in range(llm.max_batch):
        engine.add([5 + i], params_of(i, 511))
    for _ in range(llm.max_batch):
        engine.step()
    assert engine.stats.running == llm.max_batch
    assert engine.kv_capacity >= llm.max_batch * (512 + llm.layout.num_rows)
    engine.close()
    assert_empty(engine)


def test_layouts_of_one_model_share_its_memory(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, mask_token_id=7)
    llm = LLM(folder, stride=4, dtype="float32", kv_cache_tokens=128)
    ar = llm.autoregressive()
    prompt, params = list(range(3, 53)), SamplingParams(temperature=0, max_tokens=9)
    expected = llm.generate(prompt, params)[0].token_ids
    assert ar.generate(prompt, params)[0].token_ids == expected
    assert ar._engine.stats.prefix_hit_tokens == 48
    stream = llm.stream(list(range(60, 125)), params)
    next(stream)
    with pytest.raises(ResourceError, match="another layout"):
        ar.generate(prompt, params)
    stream.close()  # type: ignore[attr-defined]
    assert ar.generate(prompt, params)[0].token_ids == expected


def test_auto_changes_no_token(llm: LLM, tmp_path: Path) -> None:
    auto = LLM(
        tiny_model(tmp_path, mask_token_id=7),
        dtype="float32",
        stride="auto",
        verification="coupled",
    )
    fixed = auto.with_layout("linear", 4)
    params = [SamplingParams(temperature=t, seed=3, max_tokens=60, ignore_eos=True) for t in (0, 1)]
    outputs = auto.generate([[5, 6], [9, 10, 11]], params)
    for output, expected in zip(
        outputs, fixed.generate([[5, 6], [9, 10, 11]], params), strict=True
    ):
        assert output.token_ids == expected.token_ids
    tried = auto._engine.stats.plans
    assert sum(tried.values()) >= max(len(o.token_ids) // 4 for o in outputs)
    assert "ar:1" in tried and fixed._engine.stats.plans == {}


def test_offline_outputs_name_the_error_of_a_failed_request(llm: LLM) -> None:
    def check(_: object, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0] == 319).any():
            raise RuntimeError("poisoned")

    hook = llm._method.decoder.embed.register_forward_pre_hook(check)
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={319: -100.0})
    good, bad = llm.generate([[5, 6], [5, 319]], params)
    with pytest.raises(RuntimeError, match="poisoned"):
        list(llm.stream([319], params))
    hook.remove()
    assert (good.error, good.finish_reason, len(good.token_ids)) == (None, "length", 3)
    assert (str(bad.error), bad.finish_reason, bad.token_ids) == ("poisoned", "error", [])
