"""The choice of plans: it finds the best one, and stays with it."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans

CHANCES = (0.85, 0.8, 0.75, 0.7, 0.7, 0.65, 0.65)


def seconds(plan: Layout, requests: int, row_cost: float) -> float:
    """Rows cost nothing until they are many: memory-bound, then compute-bound."""
    return max(1e-3, plan.num_rows * requests * row_cost)


def outcome(drafted: int, accepted: int) -> tuple[list[int], list[int]]:
    """By place, whether a draft was tested with all before it standing, and whether it stood."""
    return [1] * min(accepted + 1, drafted), [1] * accepted + [0] * (accepted < drafted)


def drive(
    policy: Policy,
    requests: int,
    row_cost: float,
    forwards: int,
    chances: tuple[float, ...],
    seed: int,
) -> tuple[Counter[Layout], float]:
    """Plans chosen in the last half of ``forwards``, and tokens per second there."""
    random, chosen = Random(seed), Counter[Layout]()
    tokens = elapsed = 0.0
    warm = False
    for n in range(forwards):
        plan = policy.choose(requests)
        cost = seconds(plan, requests, row_cost) * random.uniform(0.98, 1.02)
        policy.took(requests, plan, cost)
        drafted = plan.block_size if warm or plan.name == "quadratic" else 0
        accepted = 0
        while accepted < drafted and random.random() < chances[accepted]:
            accepted += 1
        policy.saw(*outcome(drafted, accepted))
        warm = plan.name == "linear" and accepted == drafted
        if n >= forwards // 2:
            chosen[plan] += 1
            tokens, elapsed = tokens + 1 + accepted, elapsed + cost
    return chosen, tokens / elapsed


@pytest.mark.parametrize(("requests", "row_cost"), [(1, 1e-6), (32, 1e-6), (64, 4e-6), (256, 1e-5)])
@pytest.mark.parametrize("chances", [CHANCES, (0.3,) * 7, (0.97,) * 7])
def test_no_fixed_plan_is_much_better(
    requests: int, row_cost: float, chances: tuple[float, ...]
) -> None:
    chosen, rate = drive(Policy(plans(7)), requests, row_cost, 4000, chances, 1)
    assert max(chosen.values()) > 1900  # it stays
    for plan in plans(7):
        _, alone = drive(Policy([plan]), requests, row_cost, 4000, chances, 2)
        assert rate > 0.88 * alone, plan


def test_autoregression_where_compute_is_the_limit() -> None:
    chosen, _ = drive(Policy(plans(7)), 256, 1e-4, 400, (0.2,) * 7, 1)
    assert set(chosen) == {Layout.named("ar", 1)}


def test_it_follows_a_change_of_the_texts() -> None:
    policy = Policy(plans(7))
    before, _ = drive(policy, 16, 1e-5, 3000, (0.97,) * 7, 1)
    after, _ = drive(policy, 16, 1e-5, 12000, (0.02,) * 7, 2)
    assert max(before, key=before.__getitem__).stride > max(after, key=after.__getitem__).stride


def test_what_cannot_be_better_is_not_tried() -> None:
    policy = Policy(plans(7))
    drive(policy, 256, 1e-4, 300, CHANCES, 1)
    assert "quadratic:8" not in policy.chosen


def test_many_rows_are_not_tried_where_a_few_have_cost_much() -> None:
    policy = Policy(plans(7))
    drive(policy, 32, 1e-3, 200, CHANCES, 3)
    assert policy.chosen["quadratic:8"] == policy.chosen["quadratic:4"] == 0
    assert policy.chosen["ar:1"] > 150


@pytest.mark.parametrize(("ar", "base", "row"), [(0.74, 0.89, 0.003), (0.94, 1.15, 0.037)])
def test_dear_first_masks_do_not_speak_for_the_next(ar: float, base: float, row: float) -> None:
    """As measured on an H200: the sampler head costs much, 16 rows hardly more than 3."""
    policy = Policy(plans(7))
    cost = {p: 1e-3 * (ar if p.name == "ar" else base + row * p.num_rows) for p in plans(7)}
    for _ in range(400):
        plan = policy.choose(32)
        policy.took(32, plan, cost[plan])
        M = plan.block_size
        policy.saw(*outcome(M, M if policy.chosen.total() % 3 else 0))
    rates = {plan: policy.tokens(plan) / cost[plan] for plan in plans(7)}
    assert rates[policy.choose(32)] > 0.95 * max(rates.values())


def test_plans_have_no_more_masks_than_were_trained() -> None:
    assert {plan.stride for plan in plans(3)} == {1, 2, 3, 4}
    assert plans(0) == (Layout.named("ar", 1),)


def test_what_is_a_little_slower_than_no_drafts_is_left() -> None:
    ar, two = Layout.named("ar", 1), Layout.named("quadratic", 2)
    policy = Policy([ar, two])
    cost = {ar: 1.0, two: 1.7}
    for chance, expected in ((0.9, two), (0.65, ar)):
        random = Random(1)
        for _ in range(6000):
            plan = policy.choose(8)
            policy.took(8, plan, cost[plan])
            policy.saw([1], [int(random.random() < chance)])
        assert policy.current(8) is expected
