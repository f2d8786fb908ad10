"""The next drafts, from the hidden states of a mask block."""

from __future__ import annotations

import torch

from idlm.decoding.random import Stream
from idlm.decoding.sampling import Sampling, distribution, greedy_choice, sample
from idlm.decoding.verify import Drafts
from idlm.model.adapter import Adapter
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cpu.head import greedy_chain
from idlm.model.cuda import head as cuda_head
from idlm.model.decoder import Decoder

CANDIDATES = 1024
# Candidates of all requests together, over the vocabulary's tokens, from which on the output layer
# on their rows is less work on CUDA than the candidates one by one.
WHOLE = 1.0
# A logit further below the highest makes no candidate: the sampler head hardly ever lifts it above.
MARGIN = 10.0


def propose(
    decoder: Decoder,
    adapter: Adapter | None,
    hidden_BMH: torch.Tensor,
    logits_BMV: torch.Tensor | None,
    first_B: torch.Tensor,
    position_B: torch.Tensor,
    count_B: torch.Tensor,
    sampling: Sampling,
    *,
    coupled: bool,
) -> Drafts:
    """Sample the drafts of ``M`` places one after the other.

    Place ``j`` is drawn from the model's output layer on ``h_j + s_j`` (`SamplerHead`; ``h_j``
    alone without a head), over the `likeliest` tokens of ``h_j`` alone, so that the
    head rescores a few tokens instead of the whole vocabulary. ``q`` is that restricted
    distribution, so verification stays exact. Greedy requests draft the likeliest.

    Args:
        hidden_BMH: final hidden states of the mask block.
        logits_BMV: the output layer on them; None where `from_whole_vocabulary`.
        first_B: the token that this forward sampled, which stands before the first draft.
        position_B: its position; the drafts are for those that follow.
        count_B: how many of the drafts will count, int64.
        coupled: draw with the noise that verification will use (the coupled rule).
    """
    head = None if adapter is None else adapter.head
    if logits_BMV is None:
        assert head is not None
        tokens_BM = cuda_head.whole_chain(decoder, head, hidden_BMH, first_B)
        return Drafts.certain(tokens_BM, count_B)
    num_ids = num_candidates(logits_BMV.device, logits_BMV.shape[-1])
    ids_BMK, near_BM = likeliest(logits_BMV, num_ids)
    stream = Stream.TOKEN if coupled else Stream.DRAFT
    if head is not None and sampling.plain:
        # Ranks that share out the vocabulary (inside SGLang) score each place together.
        whole = len(decoder.output_weight) >= logits_BMV.shape[-1]
        if sampling.all_greedy and whole and cpu_kernels.usable(hidden_BMH):
            some_BMK = _only(ids_BMK, near_BM)
            tokens_BM = greedy_chain(decoder, head, hidden_BMH, some_BMK, first_B)
            return Drafts.certain(tokens_BM, count_B)
        if cuda_head.takes_chain(decoder, hidden_BMH, logits_BMV.shape[-1]):
            draw = sampling.draw(position_B, stream)
            tokens_BM, probs_BMK = cuda_head.chain(
                decoder, head, hidden_BMH, ids_BMK, near_BM, first_B, draw
            )
            if probs_BMK is None:
                return Drafts.certain(tokens_BM, count_B)
            return Drafts(tokens_BM, ids_BMK, probs_BMK, count_B)
    if head is not None:
        projected_BMW = head.project(hidden_BMH)
        state_BH = torch.zeros_like(hidden_BMH[:, 0])
    far_BMK = torch.arange(num_ids, device=near_BM.device) >= near_BM[..., None]
    previous_B = first_B
    tokens: list[torch.Tensor] = []
    probs: list[torch.Tensor] = []
    for j in range(hidden_BMH.shape[1]):
        ids_B1K = ids_BMK[:, j : j + 1]
        if head is None:
            logits_B1K = logits_BMV[:, j : j + 1].gather(2, ids_B1K)
        else:
            state_BH = head.step(projected_BMW[:, j], decoder.embed(previous_B), state_BH)
            logits_B1K = decoder.logits_at(hidden_BMH[:, j] + state_BH, ids_B1K[:, 0])[:, None]
        logits_B1K = logits_B1K.masked_fill(far_BMK[:, j : j + 1], -torch.inf)
        drafts_B1E = (
            torch.stack(tokens, dim=1)[:, None] if tokens else first_B[:, None, None][..., :0]
        )
        if sampling.all_greedy:
            choice_B1 = greedy_choice(logits_B1K, sampling, drafts_B1E, ids_B1K)
        else:
            q_BK = distribution(logits_B1K, sampling, drafts_B1E, ids_B1K)[:, 0]
            place_B1 = (position_B + 1 + j)[:, None]
            choice_B1 = sample(q_BK[:, None], sampling.seed_B, place_B1, stream, ids_B1K)
            probs.append(q_BK)
        previous_B = ids_B1K[:, 0].gather(1, choice_B1).squeeze(1)
        tokens.append(previous_B)
    tokens_BM = torch.stack(tokens, dim=1)
    if sampling.all_greedy:
        return Drafts.certain(tokens_BM, count_B)
    return Drafts(tokens_BM, ids_BMK, torch.stack(probs, dim=1), count_B)


def from_whole_vocabulary(
    decoder: Decoder, adapter: Adapter | None, hidden_BRH: torch.Tensor, sampling: Sampling
) -> bool:
    """Whether `propose` scores all tokens at each place: on CUDA, for many greedy requests.

    Then it does without the logits of the masks alone, which only tell what the candidates are.
    """
    V, B = decoder.config.vocab_size, len(hidden_BRH)
    return (
        adapter is not None
        and adapter.head is not None
        and sampling.plain
        and sampling.all_greedy
        and cuda_head.takes_chain(decoder, hidden_BRH, V)
        and B * num_candidates(hidden_BRH.device, V) >= WHOLE * V
    )


def num_candidates(device: torch.device, vocab_size: int) -> int:
    """Candidates of a place; more on CUDA, where of two likely tokens one may be lost."""
    return min(2 * CANDIDATES if cuda_head.usable(device) else CANDIDATES, vocab_size)


def likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[..., k]`` of likely tokens, int64, and how many of them are candidates, ``[...]``.

    Candidates are those within `MARGIN` of the likeliest; they come first, in any order. On the
    CPU the ids are the ``k`` likeliest (fp32 logits are compared to bf16 precision only); on CUDA,
    one of them may give way to a less likely one (`best_of_groups`), the likeliest never.
    """
    if cuda_head.takes(logits, logits):
        return cuda_head.best_of_groups(logits, k, MARGIN)
    if cpu_kernels.usable(logits):
        ids = cpu_kernels.top(logits, k)
    else:
        ids = logits.topk(k, dim=-1).indices
    top = logits.gather(-1, ids).float()
    near = ~(top < top.amax(-1, keepdim=True) - MARGIN)  # of NaNs all
    ahead = near.cumsum(-1)
    count = ahead[..., -1:]
    place = torch.where(near, ahead - 1, count + torch.arange(k, device=ids.device) - ahead)
    return torch.empty_like(ids).scatter_(-1, place, ids), count.squeeze(-1)


def _only(ids_BMK: torch.Tensor, near_BM: torch.Tensor) -> torch.Tensor:
    """The candidates, filled up by the first of them."""
    most = int(near_BM.max())
    far_BMK = torch.arange(most, device=ids_BMK.device) >= near_BM[..., None]
    return torch.where(far_BMK, ids_BMK[..., :1], ids_BMK[..., :most])
