"""Tokens per forward from the acceptance at every anchor."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm.training.acceptance import walk


def stepped(accepted: list[list[int]], anchors: list[int]) -> float:
    """Decoding, forward by forward, where acceptance is certain."""
    forwards, at = 0, 0
    while at < len(anchors):
        forwards += 1
        for verdict in [*accepted[at], 0]:
            at += 1
            if at == len(anchors) or anchors[at] != anchors[at - 1] + 1 or not verdict:
                break
    return len(anchors) / forwards


@given(st.integers(1, 7), st.integers(1, 60), st.floats(0.1, 0.95), st.integers(0, 1000))
def test_certain_acceptance_is_stepped_through(M: int, A: int, rate: float, seed: int) -> None:
    draw = random.Random(seed)
    accepted = [[int(draw.random() < rate) for _ in range(M)] for _ in range(A)]
    anchors = [0]
    while len(anchors) < A:
        anchors.append(anchors[-1] + (1 if draw.random() < 0.9 else 5))
    tpf = walk(
        torch.tensor([accepted], dtype=torch.float64),
        torch.tensor([anchors]),
        torch.ones(1, A, dtype=torch.bool),
    )
    assert tpf == pytest.approx(stepped(accepted, anchors))


def test_constant_chance_gives_the_mean_of_the_geometric_chain() -> None:
    accepted = torch.full((2, 4000, 3), 0.7, dtype=torch.float64)
    anchors = torch.arange(4000).repeat(2, 1)
    tpf = walk(accepted, anchors, torch.ones(2, 4000, dtype=torch.bool))
    assert tpf == pytest.approx(1 + 0.7 + 0.49 + 0.343, rel=2e-3)


def test_unused_anchors_do_not_count() -> None:
    used = torch.tensor([[True, True, True, False]])
    accepted = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]], dtype=torch.float64)
    assert walk(accepted, torch.tensor([[4, 5, 6, 0]]), used) == pytest.approx(3 / 2)
