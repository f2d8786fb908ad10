"""Logits to a distribution, against what transformers and plain arithmetic say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from idlm.decoding import sampling as sampling_module
from idlm.decoding.params import SamplingParams
from idlm.decoding.random import Stream, exponential, uniform
from idlm.decoding.sampling import Sampling, adjusted_logits, distribution
from idlm.errors import InvalidRequestError
from idlm.model.cuda import head as cuda_head

V = 40
NO_DRAFTS = torch.zeros(1, 1, 0, dtype=torch.int64)


def batch(
    *params: SamplingParams, prompt: Sequence[int] = (1,), output: Sequence[int] = ()
) -> Sampling:
    n = len(params)
    return Sampling.of(params, [0] * n, [prompt] * n, [output] * n, V, torch.device("cpu"))


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, rows, V, generator=torch.Generator().manual_seed(seed)) * 2


@given(
    st.integers(0, 10_000),
    st.floats(0.2, 3),
    st.integers(0, 50),
    st.floats(0.05, 1.0),
    st.floats(0, 0.9),
    st.floats(0.5, 2.0),
)
@settings(max_examples=200, deadline=None)
def test_distribution_is_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float
) -> None:
    logits = random_logits(seed=seed)
    prompt, output = [3, 4, 4], [7, 9]
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
    )
    ours = distribution(logits, batch(params, prompt=prompt, output=output), NO_DRAFTS)[0, 0]
    steps = LogitsProcessorList()
    steps.append(RepetitionPenaltyLogitsProcessor(repetition))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(min(top_k, V)))
    steps.append(TopPLogitsWarper(top_p))
    steps.append(MinPLogitsWarper(min_p))
    theirs = steps(torch.tensor([prompt + output]), logits[:, 0].clone()).softmax(-1)[0]
    # A token on the very edge of top-p may fall on either side of it by rounding.
    edge = (ours > 0) != (theirs > 0)
    assert edge.sum() <= 1
    if not edge.any():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@given(
    st.integers(0, 10_000),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 3, 12, V, 90]), st.sampled_from([0.05, 0.5, 0.97, 1.0])),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_truncation_is_that_of_the_whole_order(
    seed: int, limits: list[tuple[int, float]], by_kernel: bool
) -> None:
    """However few of the likeliest are looked at first, and whatever the others ask for."""
    kernel = pytest.importorskip("triton") and by_kernel
    sampling = batch(*(SamplingParams(top_k=k, top_p=p) for k, p in limits))
    logits = torch.cat([random_logits(rows=2, seed=seed + row) for row in range(len(limits))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "FIRST_RANKS", 2)
        patch.setattr(cuda_head, "usable", lambda device: kernel)
        ours = distribution(logits, sampling, NO_DRAFTS.expand(len(limits), 2, 0))
    for row, (top_k, top_p) in enumerate(limits):
        for probs, found in zip(logits[row].softmax(-1), ours[row], strict=True):
            ordered = probs.sort(descending=True).values[: top_k or V]
            share = ordered / ordered.sum()
            before = share.double().cumsum(-1) - share
            clear = (before - top_p).abs().min() > 1e-5 or top_p == 1
            kept = ordered[before < top_p] if top_p < 1 else ordered
            expected = torch.where(probs >= kept[-1], probs, 0.0)
            if clear:  # else it may fall on either side by rounding
                torch.testing.assert_close(found, expected / expected.sum())


def test_greedy_is_one_hot_and_other_rows_are_not_touched() -> None:
    sampling = batch(SamplingParams(temperature=0), SamplingParams(temperature=0.5))
    logits = random_logits().expand(2, 1, V)
    probs = distribution(logits, sampling, NO_DRAFTS.expand(2, 1, 0))
    assert probs[0, 0].argmax() == logits[0, 0].argmax() and probs[0, 0].max() == 1
    torch.testing.assert_close(probs[1, 0], (logits[1, 0] / 0.5).softmax(-1))


def test_penalties_count_output_and_the_drafts_before_the_row() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    logits = random_logits(rows=3)
    drafts = torch.tensor([[[-1, -1], [5, -1], [5, 7]]])
    adjusted = adjusted_logits(logits, batch(params, prompt=[9], output=[5, 6]), drafts)
    change = logits - adjusted
    expected = torch.zeros(3, V)
    expected[:, 6] = 0.75
    expected[:, 5] = torch.tensor([0.75, 1.0, 1.0])
    expected[2, 7] = 0.75
    torch.testing.assert_close(change[0], expected, rtol=0, atol=1e-6)


def test_repetition_penalty_counts_the_prompt_too() -> None:
    logits = random_logits()
    adjusted = adjusted_logits(
        logits, batch(SamplingParams(repetition_penalty=2.0), prompt=[9], output=[5]), NO_DRAFTS
    )
    for token in range(V):
        value = float(logits[0, 0, token])
        halved = value / 2 if value > 0 else value * 2
        wanted = halved if token in (5, 9) else value
        assert float(adjusted[0, 0, token]) == pytest.approx(wanted)


@given(st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_candidates_get_the_logits_that_the_whole_vocabulary_would(seed: int) -> None:
    """`adjusted_logits` of chosen ids equals the whole vocabulary's at those ids."""
    params = SamplingParams(
        repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=-0.2, logit_bias={2: 3.0}
    )
    sampling = batch(params, prompt=[1, 2], output=[3, 3, 8])
    logits = random_logits(rows=1, seed=seed)
    drafts = torch.tensor([[[3, 11]]])
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:12][None, None]
    whole = adjusted_logits(logits, sampling, drafts)
    some = adjusted_logits(logits.gather(2, ids), sampling, drafts, ids)
    torch.testing.assert_close(some, whole.gather(2, ids))


def test_commit_counts_only_what_was_committed() -> None:
    sampling = batch(SamplingParams(frequency_penalty=1.0), SamplingParams(), output=[4])
    sampling.commit(torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.tensor([1, 0]))
    assert sampling.counts_BV is not None
    wanted = torch.zeros(2, V)
    wanted[0, 4], wanted[0, 5], wanted[1, 4], wanted[1, 7] = 2, 1, 1, 1
    assert torch.equal(sampling.counts_BV, wanted)


def test_noise_is_exponential_and_depends_on_every_key() -> None:
    token = torch.arange(200_000)
    zero = torch.zeros(1, dtype=torch.int64)
    base = exponential(zero, zero, Stream.TOKEN, token)
    assert abs(float(base.mean()) - 1) < 0.01 and abs(float(base.var()) - 1) < 0.03
    assert float(base.min()) > 0
    for other in (
        exponential(zero + 1, zero, Stream.TOKEN, token),
        exponential(zero, zero + 1, Stream.TOKEN, token),
        exponential(zero, zero, Stream.DRAFT, token),
    ):
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(token))
    again = exponential(zero, zero, Stream.TOKEN, torch.tensor([17, 3]))
    assert again.tolist() == [float(base[17]), float(base[3])]


def test_uniform_draws_fill_the_unit_interval() -> None:
    u = uniform(torch.tensor([5]), torch.arange(100_000), Stream.ACCEPT)
    counts = torch.histc(u.float(), bins=20, min=0, max=1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 45  # chi-square, 19 degrees, p = 0.0007
    assert float(u.min()) > 0 and float(u.max()) < 1


@given(
    st.sampled_from([0, 1e-5, 5e-324, 1e6]),
    st.sampled_from([0.01, 1, 100]),
    st.sampled_from([5e-324, 0.5, 1]),
    st.sampled_from([0, 5e-324, 1]),
    st.sampled_from([-100, 5e-324, 100]),
    st.sampled_from([-2, 0, 2]),
)
def test_the_utmost_parameters_still_give_a_distribution(
    temperature: float, repetition: float, top_p: float, min_p: float, bias: float, penalty: float
) -> None:
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=repetition,
        top_p=top_p,
        min_p=min_p,
        logit_bias={5: bias, 7: bias},
        presence_penalty=penalty,
        frequency_penalty=-penalty,
    )
    logits = random_logits()
    logits[..., 3] = -torch.inf  # the mask token, which is never sampled
    logits[..., 9] = 0
    [probs_V] = distribution(logits, batch(params, prompt=[3, 9], output=[5, 9]), NO_DRAFTS)[0]
    assert (
        float(probs_V.sum()) == pytest.approx(1) and probs_V[3] == 0 and bool((probs_V >= 0).all())
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"temperature": 1e39},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e39},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {"a": 1.0}},
        {"stop": ""},
        {"stop": ["a", ""]},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
