"""The sampler head and the choice of tokens on CUDA, in few launches.

What the head computes is defined by `SamplerHead.step` and `Decoder.logits_at`; here norms, sums
and gates happen on the way into and out of the products. What is chosen is defined in `decoding`.
There may be no Triton here: kernels are imported where they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from idlm.model.cuda.draw import Draw
from idlm.model.cuda.stack import usable

if TYPE_CHECKING:
    from idlm.model.adapter import HeadBlock, SamplerHead
    from idlm.model.cuda.stream import Stream
    from idlm.model.decoder import Decoder


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `step` and `score` can work with them: on CUDA, of one dtype, no compiler at work."""
    if torch.compiler.is_compiling():  # under it, drafts came out wrong
        return False
    return usable(x.device) and x.dtype is weight.dtype and not torch.is_autocast_enabled()


def step(
    head: SamplerHead, projected_BW: torch.Tensor, token_BH: torch.Tensor, state_BH: torch.Tensor
) -> torch.Tensor:
    """`SamplerHead.step`."""
    from idlm.model.cuda.stream import begin

    token = begin(token_BH, head.token_norm.weight, head.token_norm.eps or 0.0)
    norm = _blocks(head)[0].state_norm
    return _step(head, projected_BW, token, begin(state_BH, norm.weight, norm.eps or 0.0)).x_NH


def _step(
    head: SamplerHead, projected_BW: torch.Tensor, token: torch.Tensor | Stream, state: Stream
) -> Stream:
    """The state before the next place; a ``token`` that is no stream has been normed."""
    from idlm.model.cuda.projection import add, project

    given_BW = project(token, head.from_token.weight, addend_NO=projected_BW)
    blocks = _blocks(head)
    norms = [block.state_norm for block in blocks]
    following = [*norms[1:], norms[0]]
    parts = given_BW.chunk(len(blocks), -1)
    for block, part_BW, norm in zip(blocks, parts, following, strict=True):
        inner_BW = project(state, block.from_state.weight, addend_NO=part_BW, gated=True)
        state = add(state, inner_BW, block.out.weight, norm_H=norm.weight, eps=norm.eps or 0.0)
    return state


def _blocks(head: SamplerHead) -> list[HeadBlock]:
    return list(head.blocks)  # type: ignore[arg-type]


def logits(hidden: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """``[..., H]`` to ``[..., V]``, fp32: rounded to bf16, the best two would often be equal."""
    rows_NH = hidden.reshape(-1, hidden.shape[-1])  # in one product, wherever the rows lie
    if hidden.dtype is torch.float32:
        logits_NV = rows_NH @ weight_VH.T
    else:
        logits_NV = torch.mm(rows_NH, weight_VH.T, out_dtype=torch.float32)
    return logits_NV.unflatten(0, hidden.shape[:-1])


def score(hidden_BH: torch.Tensor, weight_VH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """``[B, K]``, fp32: the logits of the tokens ``ids`` of each row alone."""
    from idlm.model.cuda.score import score

    return score(hidden_BH, weight_VH, ids_BK)


def takes_chain(decoder: Decoder, hidden_BMH: torch.Tensor, vocab_size: int) -> bool:
    """Whether `chain` can draft with this decoder, whose vocabulary is all here."""
    ends = decoder.embed.weight, decoder.output_weight
    return not torch.is_grad_enabled() and all(
        takes(hidden_BMH, weight_VH) and len(weight_VH) >= vocab_size for weight_VH in ends
    )


def chain(
    decoder: Decoder,
    head: SamplerHead,
    hidden_BMH: torch.Tensor,
    ids_BMK: torch.Tensor,
    near_BM: torch.Tensor,
    first_B: torch.Tensor,
    draw: Draw | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens ``[B, M]`` that follow one another, and the distribution of each, ``[B, M, K]``.

    Args:
        hidden_BMH: final hidden states of the mask block.
        ids_BMK, near_BM: of each place, the candidates come first (`best_of_groups`).
        first_B: the token before the first place, int64.
        draw: by its position (that of ``first``). None: all are greedy; no distributions then.
    """
    from idlm.model.cuda.score import begin_chain, draft

    B, M, K = ids_BMK.shape
    projected_BMW = head.project(hidden_BMH)
    # What the zeros of the first state go into makes no difference to them.
    norm_H, eps = head.token_norm.weight, head.token_norm.eps or 0.0
    token_BH, state, finished_MB = begin_chain(first_B, decoder.embed.weight, norm_H, eps, M)
    tokens_BM = torch.empty_like(ids_BMK[..., 0], memory_format=torch.contiguous_format)
    probs_BMK = None
    if draw is not None:
        probs_BMK = torch.empty((B, M, K), dtype=torch.float32, device=ids_BMK.device)
    for place in range(M):
        state = _step(head, projected_BMW[:, place], token_BH, state)
        token_BH = draft(
            hidden_BMH,
            state.x_NH,
            decoder.output_weight,
            ids_BMK,
            near_BM,
            decoder.embed.weight,
            norm_H,
            eps,
            finished_MB,
            place,
            tokens_BM,
            probs_BMK,
            draw,
        )
    return tokens_BM, probs_BMK


def whole_chain(
    decoder: Decoder, head: SamplerHead, hidden_BMH: torch.Tensor, first_B: torch.Tensor
) -> torch.Tensor:
    """Tokens ``[B, M]`` that follow one another, each the likeliest of the whole vocabulary.

    Args:
        hidden_BMH, first_B: as in `chain`.
    """
    from idlm.model.cuda.score import begin_chain, draft_likeliest

    B, M, _ = hidden_BMH.shape
    projected_BMW = head.project(hidden_BMH)
    norm_H, eps = head.token_norm.weight, head.token_norm.eps or 0.0
    token_BH, state, _ = begin_chain(first_B, decoder.embed.weight, norm_H, eps, M)
    tokens_BM = torch.empty((B, M), dtype=torch.int64, device=first_B.device)
    for place in range(M):
        state = _step(head, projected_BMW[:, place], token_BH, state)
        logits_BV = logits(hidden_BMH[:, place] + state.x_NH, decoder.output_weight)
        if (mask := decoder.config.mask_token_id) is not None:
            logits_BV[:, mask] = float("-inf")
        ends = decoder.embed.weight, norm_H, eps
        token_BH = draft_likeliest(logits_BV, *ends, tokens_BM[:, place])
    return tokens_BM


def argmax(logits_BRV: torch.Tensor) -> torch.Tensor:
    """Index of the largest logit of each row (`choice.argmax`)."""
    from idlm.model.cuda.choice import argmax

    return argmax(logits_BRV)


def sample(
    probs_BRX: torch.Tensor,
    seed_B: torch.Tensor,
    position_BR: torch.Tensor,
    stream: int,
    ids_BRX: torch.Tensor | None,
) -> torch.Tensor:
    """Index of a sample from each row (`choice.sample`)."""
    from idlm.model.cuda.choice import sample

    return sample(probs_BRX, seed_B, position_BR.contiguous(), stream, ids_BRX)


def uniform(seed_B: torch.Tensor, position_BR: torch.Tensor, stream: int) -> torch.Tensor:
    """Numbers in (0, 1) (`choice.uniform`)."""
    from idlm.model.cuda.choice import uniform

    return uniform(seed_B, position_BR.contiguous(), stream)


def rank_threshold(
    probs_BRX: torch.Tensor, top_k_B: torch.Tensor | None, top_p_B: torch.Tensor | None
) -> torch.Tensor:
    """The smallest probability that top-k and top-p keep (`threshold.rank_threshold`)."""
    from idlm.model.cuda.threshold import rank_threshold

    return rank_threshold(probs_BRX, top_k_B, top_p_B)


def best_of_groups(
    logits_BRV: torch.Tensor, k: int, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[B, R, k]``: the likeliest token of each of ``k`` groups that share out the vocabulary.

    The likeliest of all is among them, and of the others those that no likelier one stands in the
    way of; a reduction finds them, where the exact ``k`` likeliest would have to be sorted out.
    Those within ``margin`` of the likeliest come first; how many they are: ``[B, R]``, int32.
    """
    from idlm.model.cuda.choice import best_of_groups

    return best_of_groups(logits_BRV, k, margin)


def verdict(
    logits_BNV: torch.Tensor,
    drafts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    draw: Draw | None,
    accept_stream: int | None,
) -> tuple[torch.Tensor, ...]:
    """Accepted drafts, the next token and the overlap (`verdict`).

    Args:
        drafts: tokens, candidates, their probabilities and how many count.
        draw: None: all are greedy.
        accept_stream: None: the coupled rule.
    """
    from idlm.model.cuda.verdict import greedy_verdict, sampled_verdict

    tokens_BM, ids_BMK, probs_BMK, count_B = drafts
    if draw is None:
        return greedy_verdict(logits_BNV, tokens_BM, count_B)
    return sampled_verdict(logits_BNV, tokens_BM, ids_BMK, probs_BMK, count_B, draw, accept_stream)


def settle(*given: Any) -> tuple[torch.Tensor, ...]:
    """What follows from a verdict (`verdict.settle`)."""
    from idlm.model.cuda.verdict import settle

    return settle(*given)


def arrange(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and visibility of the rows of a forward (`rows.arrange`)."""
    from idlm.model.cuda.rows import arrange

    return arrange(*given)
