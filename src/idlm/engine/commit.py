"""What a forward brought, on the host, and how requests get it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from idlm.decoding.cycle import Outcome
from idlm.engine.request import Logprob, Request, Source
from idlm.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Commit:
    """An outcome and its numbers as lists, by request."""

    outcome: Outcome
    tokens: list[list[int]]
    accepted: list[int]
    drafted: list[int]
    overlap: list[list[float]]

    @classmethod
    def of(cls, outcome: Outcome) -> Commit:
        """Waits for the device."""
        return cls(
            outcome,
            outcome.tokens_BN.tolist(),
            outcome.verdict.accepted_B.tolist(),
            outcome.drafted_B.tolist(),
            outcome.verdict.overlap_BM.tolist(),
        )

    def give(self, row: int, request: Request, tokenizer: Tokenizer) -> None:
        """Give ``request`` the new tokens of ``row``, up to the one that ends it."""
        accepted, drafted = self.accepted[row], self.drafted[row]
        logprobs = self._logprobs(row, request.params.logprobs, tokenizer)
        request.stats.forward(drafted, accepted, self.overlap[row], self.outcome.rows)
        for place in range(accepted + 1):
            if place < accepted:
                source = Source.DRAFT
            else:
                source = Source.CORRECTION if accepted < drafted else Source.SAMPLED
            request.append(
                self.tokens[row][place], source, None if logprobs is None else logprobs[place]
            )
            if request.finished:
                break

    def _logprobs(
        self, row: int, top: int | None, tokenizer: Tokenizer
    ) -> list[dict[int, Logprob]] | None:
        """For each new token, its log-probability and those of the ``top`` likeliest."""
        if top is None:
            return None
        outcome, count = self.outcome, self.accepted[row] + 1
        logprobs_NV = outcome.logits_BNV[row, :count].float().log_softmax(-1)
        chosen_N1 = outcome.tokens_BN[row, :count, None]
        ranks_N1 = (logprobs_NV > logprobs_NV.gather(1, chosen_N1)).sum(-1, keepdim=True) + 1
        best_NT = logprobs_NV.topk(top, dim=-1).indices
        ids_NX = torch.cat((chosen_N1, best_NT), dim=1)
        places = torch.arange(1, top + 1, device=ids_NX.device).expand_as(best_NT)
        ranks_NX = torch.cat((ranks_N1, places), dim=1)
        rows = zip(
            ids_NX.tolist(), logprobs_NV.gather(1, ids_NX).tolist(), ranks_NX.tolist(), strict=True
        )
        # Reversed, so that the chosen token's own entry (its true rank) comes last and stays.
        return [
            {
                token: Logprob(logprob, rank, tokenizer.token_text(token))
                for token, logprob, rank in reversed(list(zip(*entry, strict=True)))
            }
            for entry in rows
        ]
