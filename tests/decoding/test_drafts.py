"""What a draft was drawn from is kept when the batch that it is in changes."""

from __future__ import annotations

import pytest
import torch

from idlm.decoding.params import SamplingParams
from idlm.decoding.propose import propose
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts, Verdict, verify
from idlm.integrations.sglang.slots import Slots
from tests.support.random_model import random_adapter, random_config, random_decoder

V, M = 61, 3
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=0.9)


def sampling_of(*params: SamplingParams) -> Sampling:
    B = len(params)
    return Sampling.of(params, range(B), [[]] * B, [[]] * B, V, torch.device("cpu"))


def proposed(*params: SamplingParams) -> Drafts:
    config = random_config(V)
    decoder, adapter = random_decoder(config), random_adapter(config)
    B = len(params)
    hidden_BMH = torch.randn(B, M, config.hidden_size)
    return propose(
        decoder,
        adapter,
        hidden_BMH,
        decoder.logits(hidden_BMH),
        torch.arange(B),
        torch.full((B,), 8),
        torch.full((B,), M),
        sampling_of(*params),
        coupled=False,
    )


def verdict_of(drafts: Drafts, logits_BNV: torch.Tensor, *params: SamplingParams) -> Verdict:
    position_B = torch.full((len(params),), 9)
    return verify("rejection", logits_BNV, drafts, position_B, sampling_of(*params))


def logits_after(drafts: Drafts) -> torch.Tensor:
    """Of a model that agrees with the first drafts more often than chance has it."""
    B = len(drafts.tokens_BM)
    logits_BNV = torch.randn(B, M + 1, V)
    logits_BNV[:, :M].scatter_add_(2, drafts.tokens_BM[..., None], torch.full((B, M, 1), 2.5))
    return logits_BNV


def assert_same(a: Verdict, b: Verdict, rows: slice) -> None:
    assert torch.equal(a.accepted_B[rows], b.accepted_B[rows])
    assert torch.equal(a.next_B[rows], b.next_B[rows])


def test_greedy_drafts_have_one_candidate() -> None:
    drafts = proposed(GREEDY, GREEDY)
    assert torch.equal(drafts.ids_BMK, drafts.tokens_BM[..., None])
    assert bool((drafts.probs_BMK == 1).all())


def test_a_greedy_request_joins_a_sampled_batch_and_leaves_it() -> None:
    greedy, sampled = proposed(GREEDY, GREEDY), proposed(SAMPLED)
    together = Drafts.cat([greedy, sampled])
    logits_BNV = logits_after(together)
    mixed = verdict_of(together, logits_BNV, GREEDY, GREEDY, SAMPLED)
    alone = verdict_of(greedy, logits_BNV[:2], GREEDY, GREEDY)
    assert_same(mixed, alone, slice(2))
    # Its chance to stand is 0 or 1, whatever has been filled up.
    assert torch.equal(mixed.overlap_BM[:2], alone.overlap_BM)
    left = together.select(torch.arange(2)).resized(M, 1)
    assert_same(verdict_of(left, logits_BNV[:2], GREEDY, GREEDY), alone, slice(2))
    assert torch.equal(left.ids_BMK, greedy.ids_BMK)
    assert torch.equal(left.probs_BMK, greedy.probs_BMK)


@pytest.mark.parametrize("places", [1, 3, 5])
def test_a_sampled_request_keeps_its_distribution(places: int) -> None:
    sampled = proposed(SAMPLED)
    filled = sampled.resized(places, V + 10)
    kept = min(places, M)
    q_1MV = torch.zeros(1, kept, V).scatter_add_(
        2, filled.ids_BMK[:, :kept], filled.probs_BMK[:, :kept]
    )
    expected_1MV = torch.zeros(1, M, V).scatter_(2, sampled.ids_BMK, sampled.probs_BMK)
    assert torch.equal(q_1MV, expected_1MV[:, :kept])
    assert filled.count_B.tolist() == [kept]


def test_slots_of_a_server_keep_it_too() -> None:
    slots = Slots(6, M, V, torch.device("cpu"))
    at = torch.tensor([4, 2])
    tokens_BN, accepted_B = torch.zeros(2, M + 1, dtype=torch.int64), torch.tensor([0, 1])
    sampled, greedy = proposed(SAMPLED, SAMPLED), proposed(GREEDY, GREEDY)
    slots.store(at, tokens_BN, accepted_B, sampled, False)
    stored = slots.drafts(at, False)
    assert torch.equal(stored.probs_BMK, sampled.probs_BMK)
    assert torch.equal(stored.ids_BMK, sampled.ids_BMK)
    # A greedy draft in place of a sampled one: nothing of that is left.
    slots.store(at[:1], tokens_BN[:1], accepted_B[:1], greedy.select(torch.tensor([0])), True)
    mixed = slots.drafts(at, False)
    assert mixed.probs_BMK[0].sum(-1).tolist() == [1.0] * M
    assert torch.equal(mixed.ids_BMK[0, :, 0], greedy.tokens_BM[0])
    assert torch.equal(mixed.probs_BMK[0, :, 0], torch.ones(M))
    assert torch.equal(mixed.probs_BMK[1], sampled.probs_BMK[1])
    assert torch.equal(slots.drafts(at[:1], True).ids_BMK, greedy.ids_BMK[:1])
