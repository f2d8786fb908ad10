"""Log-probabilities of tokens under the base model, for those who ask for them."""

from __future__ import annotations

import torch

from idlm.engine.request import Logprob
from idlm.model.tokenizer import Tokenizer


def logprobs_of(
    logits_NV: torch.Tensor, tokens_N: torch.Tensor, top: int, tokenizer: Tokenizer
) -> list[dict[int, Logprob]]:
    """For each of N tokens (int64), its own entry and those of the ``top`` likeliest, by token id.

    Args:
        logits_NV: the model's raw logits behind them.
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen_N1 = tokens_N[:, None]
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
