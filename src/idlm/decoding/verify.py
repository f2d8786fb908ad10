"""Which drafts stand, and the token after them: two rules, both exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from idlm.decoding.random import Stream, uniform
from idlm.decoding.sampling import Sampling, distribution, greedy_choice, sample
from idlm.errors import InvalidRequestError
from idlm.model.cuda import head as cuda_head

RULES = ("rejection", "coupled")


@dataclass
class Drafts:
    """Proposed tokens of ``B`` requests and the distribution each was sampled from.

    Where all requests are greedy, the token itself is its only candidate (K = 1).

    Attributes:
        tokens_BM: ``d_1 .. d_M``, int64.
        ids_BMK: the candidates of each place, int64.
        probs_BMK: ``q`` over the candidates, fp32; 0 elsewhere.
        count_B: how many of the ``M`` places hold a draft, from the first; int64.
    """

    tokens_BM: torch.Tensor
    ids_BMK: torch.Tensor
    probs_BMK: torch.Tensor
    count_B: torch.Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> Drafts:
        """No places at all: the first forward of a request, and autoregression."""
        empty_B0 = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return cls(
            empty_B0,
            empty_B0[..., None],
            torch.zeros(batch, 0, 1, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @classmethod
    def certain(cls, tokens_BM: torch.Tensor, count_B: torch.Tensor) -> Drafts:
        """The likeliest tokens, of greedy requests."""
        ids_BM1 = tokens_BM[..., None]
        return cls(tokens_BM, ids_BM1, torch.ones_like(ids_BM1, dtype=torch.float32), count_B)

    @classmethod
    def cat(cls, parts: Sequence[Drafts]) -> Drafts:
        """The requests of all ``parts``, in order, with as many places as any of them has."""
        places = max(d.tokens_BM.shape[1] for d in parts)
        candidates = max(d.ids_BMK.shape[2] for d in parts)
        parts = [d.resized(places, candidates) for d in parts]
        return cls(
            torch.cat([d.tokens_BM for d in parts]),
            torch.cat([d.ids_BMK for d in parts]),
            torch.cat([d.probs_BMK for d in parts]),
            torch.cat([d.count_B for d in parts]),
        )

    def resized(self, places: int, candidates: int | None = None) -> Drafts:
        """Cut or filled up to so many places (and filled up to so many candidates).

        A draft that is cut off was never there: what is left is a shorter block. Of greedy
        requests, candidates may be cut down to 1.
        """
        tokens_BM, ids_BMK, probs_BMK = self.tokens_BM, self.ids_BMK, self.probs_BMK
        count_B, (_, M, K) = self.count_B, ids_BMK.shape
        if places < M:
            tokens_BM, ids_BMK = tokens_BM[:, :places], ids_BMK[:, :places]
            probs_BMK, count_B = probs_BMK[:, :places], count_B.clamp(max=places)
        if candidates == 1 < K:
            ids_BMK, probs_BMK = tokens_BM[..., None], torch.ones_like(probs_BMK[..., :1])
        more = (0, max(0, (candidates or K) - K), 0, max(0, places - M))
        if any(more):
            tokens_BM = F.pad(tokens_BM, more[2:])
            ids_BMK, probs_BMK = F.pad(ids_BMK, more), F.pad(probs_BMK, more)
        return Drafts(tokens_BM, ids_BMK, probs_BMK, count_B)

    def part(self, first: int, end: int) -> Drafts:
        """Views of the requests from ``first`` up to ``end``."""
        return Drafts(
            self.tokens_BM[first:end],
            self.ids_BMK[first:end],
            self.probs_BMK[first:end],
            self.count_B[first:end],
        )

    def select(self, rows: torch.Tensor) -> Drafts:
        """The requests at ``rows`` (int64)."""
        return Drafts(
            self.tokens_BM[rows], self.ids_BMK[rows], self.probs_BMK[rows], self.count_B[rows]
        )


@dataclass
class Verdict:
    """What a forward commits.

    Attributes:
        accepted_B: leading drafts that stand, int64.
        next_B: the token after them, int64: a correction if a draft was rejected.
        overlap_BM: ``sum_x min(p, q)`` of each place, fp32: the chance that a draft from ``q``
            stands (introspective acceptance rate, arXiv 2604.11035); 0 or 1 when all is greedy.
    """

    accepted_B: torch.Tensor
    next_B: torch.Tensor
    overlap_BM: torch.Tensor


def check_rule(rule: str) -> str:
    """``rule`` if it is one of `RULES`.

    Raises:
        InvalidRequestError: it is not.
    """
    if rule not in RULES:
        raise InvalidRequestError(f"verification must be one of {', '.join(RULES)}, not {rule!r}.")
    return rule


def verify(
    rule: str,
    logits_BNV: torch.Tensor,
    drafts: Drafts,
    position_B: torch.Tensor,
    sampling: Sampling,
) -> Verdict:
    """Test the drafts against the model's own distributions.

    Args:
        logits_BNV: rows of pending and ``d_1 .. d_{N-1}``; row ``i`` predicts ``d_{i+1}``.
        position_B: position of the first draft, int64: what its random draws are keyed by.
    """
    if sampling.plain and cuda_head.usable(logits_BNV.device):
        given = drafts.tokens_BM, drafts.ids_BMK, drafts.probs_BMK, drafts.count_B
        draw = sampling.draw(position_B, Stream.TOKEN)
        accept = None if rule == "coupled" else int(Stream.ACCEPT)
        return Verdict(*cuda_head.verdict(logits_BNV, given, draw, accept))
    before_BNM = _drafts_before(drafts.tokens_BM)
    if sampling.all_greedy:
        targets_BN = greedy_choice(logits_BNV, sampling, before_BNM)
        matches_BM = targets_BN[:, :-1] == drafts.tokens_BM
        return _matched(targets_BN, drafts, matches_BM.float())
    p_BNV = distribution(logits_BNV, sampling, before_BNM)
    overlap_BM = torch.minimum(p_BNV[:, :-1].gather(2, drafts.ids_BMK), drafts.probs_BMK).sum(-1)
    if rule == "coupled":
        place_BN = _places(position_B, p_BNV.shape[1])
        targets_BN = sample(p_BNV, sampling.seed_B, place_BN, Stream.TOKEN)
        return _matched(targets_BN, drafts, overlap_BM)
    return _rejection(p_BNV, drafts, position_B, sampling, overlap_BM)


def _matched(targets_BN: torch.Tensor, drafts: Drafts, overlap_BM: torch.Tensor) -> Verdict:
    """Coupled rule: a draft stands iff it is the very token that the model would have chosen."""
    accepted_B = _leading(targets_BN[:, :-1] == drafts.tokens_BM, drafts.count_B)
    next_B = targets_BN.gather(1, accepted_B[:, None]).squeeze(1)
    return Verdict(accepted_B, next_B, overlap_BM)


def _rejection(
    p_BNV: torch.Tensor,
    drafts: Drafts,
    position_B: torch.Tensor,
    sampling: Sampling,
    overlap_BM: torch.Tensor,
) -> Verdict:
    """Rejection rule: accept with probability min(1, p/q), else sample from max(p - q, 0).

    Speculative sampling, arXiv 2211.17192, theorem 1.
    """
    place_BM = _places(position_B, drafts.tokens_BM.shape[1])
    if cuda_head.usable(p_BNV.device):
        u_BM = cuda_head.uniform(sampling.seed_B, place_BM, int(Stream.ACCEPT))
    else:
        u_BM = uniform(sampling.seed_B[:, None], place_BM, Stream.ACCEPT)
    p_draft_BM = p_BNV[:, :-1].gather(2, drafts.tokens_BM[..., None]).squeeze(2)
    sampled_BMK = drafts.ids_BMK == drafts.tokens_BM[..., None]
    q_draft_BM = (drafts.probs_BMK * sampled_BMK).sum(-1)
    accepted_B = _leading(u_BM * q_draft_BM < p_draft_BM, drafts.count_B)
    batch_B = torch.arange(len(accepted_B), device=p_BNV.device)
    target_BV = p_BNV[batch_B, accepted_B]
    rejected_B = accepted_B < drafts.count_B
    if drafts.tokens_BM.shape[1] > 0:
        at_B = accepted_B.clamp(max=drafts.tokens_BM.shape[1] - 1)
        q_BK = drafts.probs_BMK[batch_B, at_B] * rejected_B[:, None]
        residual_BV = target_BV.scatter_add(1, drafts.ids_BMK[batch_B, at_B], -q_BK).clamp(min=0)
        # p = q up to rounding: nothing is left over, and a rejection had no chance to begin with.
        empty_B1 = residual_BV.sum(-1, keepdim=True) <= 0
        target_BV = torch.where(empty_B1, target_BV, residual_BV)
    place_B1 = (position_B + accepted_B)[:, None]
    next_B1 = sample(target_BV[:, None], sampling.seed_B, place_B1, Stream.TOKEN)
    return Verdict(accepted_B, next_B1[:, 0], overlap_BM)


def _places(position_B: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, count]``: the positions from ``position`` on."""
    return position_B[:, None] + torch.arange(count, device=position_B.device)


def _leading(stands_BM: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """Number of leading places, of the first ``count``, that stand."""
    place_M = torch.arange(stands_BM.shape[1], device=count_B.device)
    return (stands_BM & (place_M < count_B[:, None])).long().cumprod(dim=1).sum(dim=1)


def _drafts_before(tokens_BM: torch.Tensor) -> torch.Tensor:
    """``[B, M + 1, M]``: row ``i`` holds ``d_1 .. d_i`` and -1 in the other places."""
    M = tokens_BM.shape[1]
    before_NM = torch.ones(M + 1, M, dtype=torch.bool, device=tokens_BM.device).tril(-1)
    return torch.where(before_NM, tokens_BM[:, None], -1)
