"""Cycles that update their own inputs: the same tokens as the same cycles with inputs of their own.

On a GPU they are captured graphs; elsewhere, a replay runs the cycle again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from idlm import LLM, SamplingParams
from idlm.decoding.cycle import Method, Outcome
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans
from idlm.decoding.propose import num_candidates
from idlm.engine.commit import Launch
from idlm.engine.engine import GATHER, GATHER_STEPS, Engine
from idlm.engine.graphs import CaptureError, Graphs, go_on
from idlm.engine.inputs import Inputs
from idlm.engine.kv_cache import KVCache
from idlm.engine.texts import Texts
from tests.support.random_model import random_adapter, random_config, random_decoder
from tests.support.tiny import tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.9, "min_p": 0.05, "logit_bias": {5: 1.0}},
    {"temperature": 0, "logprobs": 2},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model, for its tokenizer; context 512."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, stride=4, dtype="float32", device=DEVICE.type)


@pytest.fixture(scope="module")
def model() -> Any:
    config = random_config(320, eos_token_ids=(2,))
    decoder = random_decoder(config, peakedness=1.5).to(DEVICE)
    return decoder, random_adapter(config).to(DEVICE).freeze()


class Again:
    """In place of a graph: what it would do, done again."""

    def __init__(
        self, run: Callable[[], Outcome], inputs: Sequence[Inputs | Texts], stride: int, rows: int
    ) -> None:
        self.graph, self._run, self._inputs, self.seconds = self, run, inputs, 1.0
        self.rows, self._stride = rows, stride
        requests = sum(own.size for own in inputs)
        self.packed_BX = torch.zeros(requests, 2 * stride + 1, dtype=torch.int64, device=DEVICE)

    def replay(self) -> None:
        outcome = self._run()
        # Without drafts, a cycle on the CPU has no places for them.
        given, N = outcome.tokens_BN.shape[1], self._stride
        self.packed_BX[:, :given] = outcome.packed_BX[:, :given]
        self.packed_BX[:, N : N + given + 1] = outcome.packed_BX[:, given:]
        go_on(self._inputs, outcome.state)

    def landed(self, launch: Launch) -> Launch:
        return launch


class UncapturedGraphs(Graphs):
    prompt_seconds = 2.0  # that all prompts are said to take; cycles take one

    def decode(self, method: Method, *inputs: Any) -> Launch:
        self._layout = method.layout
        return super().decode(method, *inputs)

    def decode_with(self, method: Method, *inputs: Any) -> tuple[Launch, Launch]:
        self._layout = method.layout
        return super().decode_with(method, *inputs)

    def prefill(self, method: Method, *inputs: Any) -> Launch:
        self._layout = Layout.named("ar", 1)
        return super().prefill(method, *inputs)

    def _captured(self, run: Callable[[], Outcome], *inputs: Inputs | Texts) -> Any:
        again = Again(run, inputs, self._layout.stride, self._layout.num_rows)
        if isinstance(inputs[0], Texts):
            again.seconds = self.prompt_seconds
        return again


def engine_of(llm: LLM, model: Any, layout: str, stride: int, rule: str, **options: Any) -> Engine:
    decoder, adapter = model
    rows = Layout.named(layout, stride)
    method = Method(decoder, adapter if rows.num_masks else None, rows, rule)
    tokens = options.pop("kv_cache_tokens", 8192)
    cache = KVCache(decoder.config, DEVICE, torch.float32, tokens, wanted=0)
    along = options.pop("along", False)
    options = {"max_batch": 16, "ahead": True} | options
    engine = Engine(method, llm.tokenizer, cache=cache, device=DEVICE, **options)
    if DEVICE.type == "cpu":
        V = decoder.config.vocab_size
        sizes = 80, rows.block_size, num_candidates(DEVICE, V), V
        engine._runner._graphs = UncapturedGraphs(cache, DEVICE, *sizes)
    engine._runner.along = along  # which is not for small models
    return engine


def run(engine: Engine, kinds: list[dict[str, Any]], count: int) -> list[list[int]]:
    requests = []
    for i in range(count):
        params = SamplingParams(seed=i, max_tokens=8 + 7 * i % 24, **kinds[i % len(kinds)])
        requests.append(engine.add([9 + i] * (3 + 5 * i % 37), params))
        for _ in range(i % 3):
            engine.step()
    for _ in range(3000):
        if not engine.busy:
            break
        engine.step()
    assert not engine.busy and engine.stats.kv_tokens == 0
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.token_ids for request in requests]


@pytest.mark.parametrize("kinds", [PARAMS[:1], PARAMS[:5], PARAMS])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize(("layout", "stride"), [("ar", 1), ("linear", 4), ("quadratic", 4)])
def test_tokens_are_those_of_single_launches(
    llm: LLM, model: Any, layout: str, stride: int, rule: str, kinds: list[dict[str, Any]]
) -> None:
    captured = engine_of(llm, model, layout, stride, rule)
    plain = engine_of(llm, model, layout, stride, rule, ahead=False)
    plain._runner._graphs = None
    assert run(captured, kinds, 7) == run(plain, kinds, 7)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="There, all that is tried can be captured.")
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("captured", [1, 2, 3, 6])
def test_what_cannot_be_captured_goes_on_launch_by_launch(
    llm: LLM, model: Any, captured: int, along: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of prompts or cycles fail, of the first requests or of later ones and plans."""
    cases = [
        ([9 + i] * (3 + 9 * i), SamplingParams(seed=i, max_tokens=25, temperature=i % 2))
        for i in range(8)
    ]
    plain = engine_of(llm, model, "quadratic", 4, "coupled", ahead=False, max_batch=1)
    plain._runner._graphs = None
    expected = run_in_turn(plain, cases, 1000)
    capture, calls = UncapturedGraphs._captured, 0

    def captured_or_not(graphs: UncapturedGraphs, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > captured:
            raise CaptureError("none left")
        return capture(graphs, *given)

    monkeypatch.setattr(UncapturedGraphs, "_captured", captured_or_not)
    policy = Policy(plans(3))
    options = {"max_batch": 4, "policy": policy, "along": along}
    engine = engine_of(llm, model, "quadratic", 4, "coupled", **options)
    assert run_in_turn(engine, cases, 1) == expected
    assert engine._runner._graphs is None


def test_who_takes_a_row_has_parameters_of_its_own(llm: LLM, model: Any) -> None:
    """Also those that it does not ask for, but the one before it did."""
    params: list[dict[str, Any]] = [
        {},
        {"top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.4},
        {"temperature": 0},
    ]
    cases = [
        ([9 + i] * 4, SamplingParams(seed=i, max_tokens=8 + 5 * i % 7, **params[i % 5]))
        for i in range(24)
    ]
    alone = engine_of(llm, model, "linear", 3, "coupled", ahead=False, max_batch=1)
    alone._runner._graphs = None
    expected = run_in_turn(alone, cases, 1000)
    engine = engine_of(llm, model, "linear", 3, "coupled", max_batch=7)
    assert run_in_turn(engine, cases, 1) == expected


def test_who_comes_when_another_has_ended_takes_its_row(
    llm: LLM, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is arranged anew, though there was nobody in between."""
    engine = engine_of(llm, model, "quadratic", 4, "coupled", max_batch=1)
    graphs: Any = engine._runner._graphs
    arranged, seat = 0, graphs.seat

    def seated(*given: Any) -> Any:
        nonlocal arranged
        arranged += 1
        return seat(*given)

    monkeypatch.setattr(graphs, "seat", seated)
    alone = engine_of(llm, model, "quadratic", 4, "coupled", ahead=False, max_batch=1)
    alone._runner._graphs = None
    cases = [
        ([9 + i] * (3 + i), SamplingParams(seed=i, max_tokens=9 + i % 4 * 5)) for i in range(6)
    ]
    expected = run_in_turn(alone, cases, 1000)
    assert run_in_turn(engine, cases, 1000) == expected and arranged == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="There, prompts take as long as they take.")
@pytest.mark.parametrize("kinds", [PARAMS[:1], PARAMS[:3]])
def test_prompts_that_take_less_than_a_cycle_are_not_waited_for(
    llm: LLM, model: Any, kinds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their requests join a cycle earlier than others, before the host has their first token."""
    tokens, steps = [], []
    for seconds in (2.0, 0.5):
        monkeypatch.setattr(UncapturedGraphs, "prompt_seconds", seconds)
        engine = engine_of(llm, model, "quadratic", 4, "coupled")
        first = engine.add([7] * 5, SamplingParams(seed=0, max_tokens=90, **kinds[0]))
        for _ in range(4):
            engine.step()
        others = [
            engine.add([5 + i] * 4, SamplingParams(seed=i, max_tokens=20, **params))
            for i, params in enumerate(kinds * 2)
        ]
        steps.append(0)
        while others[-1] not in engine._batch.requests:
            engine.step()
            steps[-1] += 1
        while engine.busy:
            engine.step()
        tokens.append([request.token_ids for request in (first, *others)])
    assert tokens[0] == tokens[1] and steps[1] == steps[0] - 1


@pytest.mark.parametrize("lengths", [[3], [16, 17, 33], [128], [60, 60, 60], [9] * 11])
@pytest.mark.parametrize(("layout", "stride"), [("ar", 1), ("linear", 3), ("quadratic", 4)])
def test_cycles_take_prompts_along(
    llm: LLM,
    model: Any,
    layout: str,
    stride: int,
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as there is room for in one cycle; who comes decodes in the next."""
    cases = [
        ([5 + i] * (n - 1) + [40 + i], SamplingParams(seed=i, max_tokens=20, temperature=0.8))
        for i, n in enumerate([5, *lengths])
    ]
    alone = engine_of(llm, model, layout, stride, "coupled", ahead=False, max_batch=1)
    alone._runner._graphs = None
    expected = run_in_turn(alone, cases, 1000)
    monkeypatch.setattr("idlm.engine.engine.GATHER_STEPS", 0)
    engine = engine_of(llm, model, layout, stride, "coupled", along=True)
    requests = [engine.add(*cases[0])]
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(engine._runner, "prefill", None)
    requests += [engine.add(*case) for case in cases[1:]]
    rows, cycles = [-(-n // 16) for n in lengths], 1
    while len(engine._batch.requests) < len(requests):
        engine.step()
        cycles += 1
    assert cycles == 2 + -(-sum(rows) // 8)
    while engine.busy:
        engine.step()
    assert [request.token_ids for request in requests] == expected
    assert engine.stats.kv_tokens == 0


def test_a_cycle_that_takes_prompts_along_is_in_order_with_prompts_beside(
    llm: LLM, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins when all prompts are over, which may share blocks; others begin after it."""
    engine = engine_of(llm, model, "quadratic", 4, "coupled", chunk=256, along=True)
    events: list[str] = []

    def note(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def noted(*given: Any) -> Any:
            events.append(name)
            return before(*given)

        monkeypatch.setattr(owner, name, noted)

    for name in ("join", "mark", "prompts"):
        note(engine._beside, name)
    note(engine._runner._graphs, "decode_with")
    long, short = 140, 20
    engine.add([3] * short, SamplingParams(max_tokens=60))
    for step, coming in enumerate(([], [long], [short], [], [short, long], [short], [long, short])):
        for length in coming:
            engine.add([5 + step] * length, SamplingParams(max_tokens=20))
        engine.step()
    while engine.busy:
        engine.step()
    along = [i for i, name in enumerate(events) if name == "decode_with"]
    assert along and "prompts" in events[along[0] :]
    for i in along:
        before, after = events[:i], events[i + 1 :]
        assert before[::-1].index("join") < [*before[::-1], "prompts"].index("prompts")
        assert after.index("mark") < [*after, "prompts"].index("prompts")


def test_warm_up_captures_what_greedy_requests_need(llm: LLM, model: Any) -> None:
    """Also the cycles that take prompts along."""
    engine = engine_of(llm, model, "quadratic", 4, "coupled", max_batch=7, along=True)
    engine.warm_up()
    graphs: Any = engine._runner._graphs
    captured = set(graphs._graphs)
    for steps in (0, 1, 2, 5):
        cases = [
            ([9 + i] * (3 + 5 * i % 37), SamplingParams(temperature=0, max_tokens=8 + 7 * i % 24))
            for i in range(12)
        ]
        run_in_turn(engine, cases, steps)
    assert set(graphs._graphs) == captured


@pytest.mark.parametrize("kinds", [PARAMS[:3], PARAMS])
def test_a_slow_host_launches_two_ahead(
    llm: LLM, model: Any, kinds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine_of(llm, model, "quadratic", 4, "coupled", ahead=False)
    plain._runner._graphs = None
    expected = run(plain, kinds, 12)
    monkeypatch.setattr("idlm.engine.flights.LATE", 0.0)
    engine = engine_of(llm, model, "quadratic", 4, "coupled")
    unread = watch_cycles(engine)
    assert run(engine, kinds, 12) == expected
    assert max(unread) == 2


@pytest.mark.parametrize(("layout", "stride"), [("linear", 4), ("quadratic", 4)])
def test_coupled_tokens_are_those_of_autoregression(
    llm: LLM, model: Any, layout: str, stride: int
) -> None:
    kinds = [PARAMS[0], PARAMS[1], PARAMS[2]]
    strided = run(engine_of(llm, model, layout, stride, "coupled"), kinds, 12)
    assert strided == run(engine_of(llm, model, "ar", 1, "coupled"), kinds, 12)


PENALISED: list[dict[str, Any]] = [
    {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 1.0},
    {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0},
    {"temperature": 0.7, "repetition_penalty": 1.3, "top_p": 0.9},
]


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize(("layout", "stride"), [("ar", 1), ("linear", 4), ("quadratic", 3)])
def test_what_penalties_count_stays_on_the_device(
    llm: LLM, model: Any, layout: str, stride: int, rule: str
) -> None:
    """Requests join, leave and come back at different times; forwards are launched ahead."""
    cases = [
        ([9 + i] * (3 + 2 * i), SamplingParams(seed=i, max_tokens=20 + 7 * i % 30, **params))
        for i, params in enumerate(PENALISED * 2)
    ]
    alone = engine_of(llm, model, layout, stride, rule, ahead=False, max_batch=1)
    alone._runner._graphs = None
    expected = run_in_turn(alone, cases, 1000)
    for tokens in (8192, 128):  # enough for all, and so few that some have to leave
        engine = engine_of(llm, model, layout, stride, rule, max_batch=5, kv_cache_tokens=tokens)
        unread = watch_cycles(engine)
        assert run_in_turn(engine, cases, 4) == expected
        assert sum(map(bool, unread)) > 0.7 * len(unread)
        assert (engine.stats.preemptions > 0) == (tokens == 128)


def watch_cycles(engine: Engine) -> list[int]:
    """For each cycle to come, how many others are not read when it is launched."""
    unread: list[int] = []
    graphs: Any = engine._runner._graphs
    decode = graphs.decode

    def decoded(*inputs: Any) -> Any:
        unread.append(len(engine._flights._cycles))
        return decode(*inputs)

    graphs.decode = decoded
    return unread


def run_in_turn(engine: Engine, cases: list[Any], steps: int) -> list[list[int]]:
    """What requests say of which the next one comes after so many steps, or when nobody is left."""
    requests = []
    for case in cases:
        requests.append(engine.add(*case))
        for _ in range(steps):
            if engine.busy:
                engine.step()
    while engine.busy:
        engine.step()
    return [request.token_ids for request in requests]


def test_rows_of_requests_that_have_ended_do_no_harm(llm: LLM, model: Any) -> None:
    expected: list[list[int]] = []
    for plain in (True, False):
        engine = engine_of(llm, model, "quadratic", 2, "coupled", max_batch=24, ahead=not plain)
        if plain:
            engine._runner._graphs = None
        requests = [
            engine.add([9 + i] * (3 + i % 5), SamplingParams(seed=i, max_tokens=10 + 3 * i))
            for i in range(24)
        ]
        kept = 0
        while engine.busy:
            engine.step()
            kept += sum(request.finished for request in engine._batch.requests)
        assert engine.stats.kv_tokens == 0
        tokens = [request.token_ids for request in requests]
        if plain:
            expected = tokens
        else:
            assert kept > 0 and tokens == expected


def test_a_few_prompts_wait_for_each_other(llm: LLM, model: Any) -> None:
    engine = engine_of(llm, model, "ar", 1, "coupled", max_batch=64)
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    first = [engine.add([9 + i] * 4, params) for i in range(40)]
    while not all(request.token_ids for request in first):
        engine.step()
    late = engine.add([8] * 4, params)
    engine.step()
    assert late.started == 0  # it would take a forward of its own
    for i in range(40 // GATHER - 1):
        engine.add([7 - i] * 4, params)
    engine.step()
    assert late.started > 0
    alone = engine.add([4] * 4, params)
    for _ in range(GATHER_STEPS + 1):
        engine.step()
    assert alone.started > 0  # but not for long


@pytest.mark.skipif(DEVICE.type == "cuda", reason="A captured graph does not fail in the middle.")
@pytest.mark.parametrize("dims", [2, 1])
def test_after_a_forward_that_failed_each_goes_on_from_its_own_state(
    llm: LLM, model: Any, dims: int
) -> None:
    """What fails is a forward's rows, or its sampler head, after it has counted its tokens."""
    cases = [
        ([9 + i] * 5, SamplingParams(seed=i, max_tokens=25, ignore_eos=True, **params))
        for i, params in enumerate(PENALISED * 2)
    ]
    alone = engine_of(llm, model, "quadratic", 3, "coupled", ahead=False, max_batch=1)
    alone._runner._graphs = None
    expected = run_in_turn(alone, cases, 1000)
    engine, calls = engine_of(llm, model, "quadratic", 3, "coupled"), 0

    def fail(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal calls
        calls += inputs[0].dim() == dims
        if calls == 22:
            calls += 1
            raise RuntimeError("once")

    hook = model[0].embed.register_forward_pre_hook(fail)
    assert run_in_turn(engine, cases, 0) == expected
    hook.remove()
    assert engine.stats.failed_forwards == 1


def test_plans_are_tried_though_every_cycle_takes_prompts_along(llm: LLM, model: Any) -> None:
    policy = Policy(plans(3))
    engine = engine_of(llm, model, "quadratic", 4, "coupled", policy=policy, along=True)
    steady = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    engine.add([3] * 5, steady)
    for _ in range(3):
        engine.step()
    for i in range(40):  # one more comes in every step, and says little
        engine.add([5 + i] * 7, SamplingParams(temperature=0, max_tokens=1))
        engine.step()
    assert len(engine.stats.plans) > 2


def test_prompts_whose_cycle_failed_run_by_themselves(llm: LLM, model: Any) -> None:
    cases = [
        ([9 + i] * (5 + 7 * i), SamplingParams(seed=i, max_tokens=25, temperature=0.9))
        for i in range(8)
    ]
    alone = engine_of(llm, model, "linear", 4, "coupled", ahead=False, max_batch=1)
    alone._runner._graphs = None
    expected = run_in_turn(alone, cases, 1000)
    engine = engine_of(llm, model, "linear", 4, "coupled", along=True)
    graphs: Any = engine._runner._graphs
    decode_with, calls = graphs.decode_with, 0

    def fail(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("once")
        return decode_with(*given)

    graphs.decode_with = fail
    assert run_in_turn(engine, cases, 2) == expected
    assert calls > 2 and engine.stats.failed_forwards == 1


@pytest.mark.gpu
def test_the_host_does_not_wait_in_between(llm: LLM, model: Any) -> None:
    """A launch of a batch that stays the same waits for nothing."""
    engine = engine_of(llm, model, "quadratic", 4, "coupled")
    for i in range(4):
        engine.add([9 + i] * 5, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    for _ in range(12):
        engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for _ in range(3):
                engine._batch.launch(engine.method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
