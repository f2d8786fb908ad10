"""Log-probabilities of prompts: those of the model, whatever else the engine does meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from idlm import LLM, SamplingParams
from idlm.engine.engine import Engine
from idlm.engine.request import Request
from idlm.errors import InvalidRequestError
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """Blocks for three prompts, not for four with their answers: somebody has to leave."""
    return LLM(folder, adapter="none", dtype="float32", max_batch=4, kv_cache_tokens=176)


def assert_scored(request: Request, reference: AutoModelForCausalLM) -> None:
    prompt = request.prompt_token_ids
    with torch.no_grad():
        logprobs_CV = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(request.prompt_logprobs) == len(prompt) and request.prompt_logprobs[0] is None
    top = request.params.prompt_logprobs
    for place in range(1, len(prompt)):
        entries = request.prompt_logprobs[place]
        assert entries is not None and top is not None
        row_V = logprobs_CV[place - 1]
        best = row_V.topk(top).values.tolist()
        ours = sorted((e.logprob for e in entries.values() if e.rank <= top), reverse=True)
        assert ours == pytest.approx(best, abs=1e-4)
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(row_V[token].item(), abs=1e-4)
        assert entries[prompt[place]].rank == 1 + int((row_V > row_V[prompt[place]]).sum())


@settings(max_examples=25)
@given(
    cases=st.lists(
        st.tuples(
            st.integers(0, 40),  # tokens of a beginning that all have in common
            st.lists(st.integers(3, 319), min_size=1, max_size=12),
            st.one_of(st.none(), st.integers(0, 5)),  # log-probabilities
            st.integers(0, 30),  # answer
        ),
        min_size=1,
        max_size=5,
    ),
    chunk=st.integers(1, 60),
)
def test_prompts_are_scored_in_any_company(
    llm: LLM,
    reference: AutoModelForCausalLM,
    cases: list[tuple[int, list[int], int | None, int]],
    chunk: int,
) -> None:
    engine = llm.new_engine()
    engine.chunk = chunk
    requests = []
    for seed, (common, own, top, tokens) in enumerate(cases):
        params = SamplingParams(
            max_tokens=max(tokens, 1) if top is None else tokens,
            ignore_eos=True,
            temperature=0,
            seed=seed,
            prompt_logprobs=top,
        )
        requests.append(engine.add([5 + n % 7 for n in range(common)] + own, params))
    run(engine)
    for request in requests:
        assert len(request.token_ids) == request.params.max_tokens
        assert request.finish_reason == "length"
        if request.params.prompt_logprobs is None:
            assert request.prompt_logprobs == []
        else:
            assert_scored(request, reference)
    assert engine.stats.kv_tokens == 0


def test_who_has_to_leave_while_it_is_scored_begins_again(
    llm: LLM, reference: AutoModelForCausalLM
) -> None:
    engine = llm.new_engine()
    engine.chunk = 2
    plain = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=2)
    for first in (5, 6):
        engine.add([first] * 20, plain)
    late = [engine.add([first] * 60, scored) for first in (7, 8)]
    run(engine)
    assert engine.stats.failed_forwards == 0
    assert sum(request.preemptions for request in late) > 0
    for request in late:
        assert_scored(request, reference)


def test_scoring_takes_nothing_from_the_prefix_cache_and_gives_to_it(llm: LLM) -> None:
    engine = llm.new_engine()
    prompt = [9, 8, 7, 6] * 12
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    first, second = (engine.add(prompt, scored) for _ in range(2))
    run(engine)
    assert first.prompt_logprobs == second.prompt_logprobs
    assert second.prefix_hit_tokens == 0
    third = engine.add(prompt, SamplingParams(max_tokens=1))
    run(engine)
    assert third.prefix_hit_tokens == 32


def test_offline(llm: LLM) -> None:
    [output] = llm.generate("The dog", SamplingParams(max_tokens=2, prompt_logprobs=1))
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert llm.generate("The dog", SamplingParams(max_tokens=2))[0].prompt_logprobs is None
    [short] = llm.generate([[5]], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert short.prompt_logprobs == [None] and short.finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        SamplingParams(max_tokens=0)


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()
