"""The lossless objective: mask blocks learn the clean rows' own next-token distributions.

The teacher of mask ``j`` at anchor ``b`` is the clean row ``b + j`` of the frozen base model.
"""

from __future__ import annotations

import torch

from idlm.model.adapter import Adapter, SamplerHead
from idlm.model.decoder import Decoder
from idlm.training.attention import BlockAttention, DocumentAttention
from idlm.training.compilation import compile_layers, compiled
from idlm.training.config import ConvertConfig
from idlm.training.data import Batch
from idlm.training.divergence import divergence
from idlm.training.objective import Blocks, Outcome

# The loss without the sampler head is measured on every fourth anchor: an unbiased estimate at
# a quarter of its price.
MARGINAL_STRIDE = 4


class LosslessObjective:
    """Clean pass, mask pass, sampler head and loss of one batch.

    The decoder's parameters are frozen. On CUDA its layers are compiled in place, once for all.
    """

    terms: tuple[str, ...] = ("divergence",)

    def __init__(self, decoder: Decoder, adapter: Adapter, config: ConvertConfig) -> None:
        self.decoder, self.adapter, self.config = decoder, adapter, config
        self.block_size = config.block_size
        self.dtype = decoder.embed.weight.dtype
        decoder.requires_grad_(False)
        if decoder.embed.weight.is_cuda:
            compile_layers(decoder)

    def weights(self, batch: Batch) -> torch.Tensor:
        """The sum of the places' weights, ``[1]`` fp32."""
        valid_BAM = Blocks(batch, self.block_size).valid_BAM
        return (valid_BAM * self._decay(valid_BAM.device)).sum().view(1)

    def factors(self, means: torch.Tensor) -> torch.Tensor:
        """The one term counts as it is."""
        return torch.ones_like(means)

    def __call__(self, batch: Batch) -> Outcome:
        c, m = self.config, self.block_size
        blocks = Blocks(batch, m)
        hidden_BTH, documents = self._clean(batch)
        h_NMH = self._masks(batch, blocks, documents).unflatten(1, (-1, m)).flatten(0, 1)
        # Row b + j of the clean pass teaches mask j, and token b + j is what its head is told.
        rows_B1 = torch.arange(len(blocks.rows_BP), device=blocks.rows_BP.device)[:, None]
        teacher_PH = hidden_BTH[rows_B1, blocks.rows_BP].flatten(0, 1)
        tokens_BP = batch.tokens_BT.gather(1, blocks.rows_BP)
        tokens_NMH = self.decoder.embed(tokens_BP).view(h_NMH.shape)
        assert self.adapter.head is not None, "training always adds a head"
        states_NMH = unroll(self.adapter.head, h_NMH, tokens_NMH)
        weight_VH = self.decoder.output_weight
        chain = divergence((h_NMH + states_NMH).flatten(0, 1), teacher_PH, weight_VH, c.tv_weight)
        valid_BAM = blocks.valid_BAM
        shape = valid_BAM.shape
        weights_BAM = valid_BAM * self._decay(valid_BAM.device)
        overlap_BAM = chain.overlap_N.view(shape)
        if c.survival:
            weights_BAM = weights_BAM * _survival(overlap_BAM)
        if c.visits:
            weights_BAM = weights_BAM * _visits(overlap_BAM, valid_BAM, batch)[..., None]
        loss = (chain.loss_N.view(shape) * weights_BAM).sum()
        if c.marginal_weight and torch.is_grad_enabled():
            every = (slice(None), slice(None, None, MARGINAL_STRIDE))
            marginal = divergence(
                h_NMH.unflatten(0, shape[:2])[every].flatten(0, 2),
                teacher_PH.unflatten(0, shape)[every].flatten(0, 2),
                weight_VH,
                c.tv_weight,
            )
            scale = c.marginal_weight * MARGINAL_STRIDE
            loss = loss + scale * (marginal.loss_N * weights_BAM[every].flatten()).sum()
        return Outcome(loss.view(1), overlap_BAM, chain.agree_N.view(shape), valid_BAM)

    @torch.no_grad()
    def _clean(self, batch: Batch) -> tuple[torch.Tensor, DocumentAttention]:
        attention = DocumentAttention(batch.documents_BT, self.dtype)
        return self.decoder(batch.tokens_BT, batch.positions_BT, attention), attention

    def _masks(self, batch: Batch, blocks: Blocks, documents: DocumentAttention) -> torch.Tensor:
        """Hidden states of all mask rows, ``[B, A * M, H]``, block after block."""
        attention = BlockAttention(documents, batch.anchors_BA, blocks.starts_BA, self.block_size)
        hidden_BPH: torch.Tensor = self.decoder(
            batch.tokens_BT[:, :0],
            blocks.positions_BP,
            attention,
            num_masks=blocks.positions_BP.shape[1],
            adapter=self.adapter,
        )
        return hidden_BPH

    def _decay(self, device: torch.device) -> torch.Tensor:
        places_M = torch.arange(self.block_size, device=device, dtype=torch.float32)
        return self.config.place_decay**places_M


def unroll(head: SamplerHead, hidden_NMH: torch.Tensor, tokens_NMH: torch.Tensor) -> torch.Tensor:
    """States ``s_1 .. s_M`` of the sampler head, fed the true tokens: ``[N, M, H]``.

    Args:
        tokens_NMH: embeddings; place ``j`` gets that of the token one place before its target.
    """
    run = compiled(_unroll) if hidden_NMH.is_cuda else _unroll
    return run(head, hidden_NMH, tokens_NMH)


def _unroll(head: SamplerHead, hidden_NMH: torch.Tensor, tokens_NMH: torch.Tensor) -> torch.Tensor:
    projected_NMW = head.project(hidden_NMH)
    state_NH = torch.zeros_like(hidden_NMH[:, 0])
    states = []
    for place in range(hidden_NMH.shape[1]):
        state_NH = head.step(projected_NMW[:, place], tokens_NMH[:, place], state_NH)
        states.append(state_NH)
    return torch.stack(states, dim=1)


def _survival(overlap_BAM: torch.Tensor) -> torch.Tensor:
    """Chance that all earlier places are accepted (no gradient); 1 at the first place."""
    earlier_BAM = torch.cat((torch.ones_like(overlap_BAM[..., :1]), overlap_BAM[..., :-1]), -1)
    return earlier_BAM.cumprod(-1)


def _visits(overlap_BAM: torch.Tensor, valid_BAM: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Chance that a forward starts at an anchor (no gradient), fp32, ``[B, A]``.

    A forward ends at the first rejected draft, and samples that token itself: so it starts at
    anchor ``a`` if the draft of token ``a + 1`` was rejected, as often as the blocks of the same
    row say, or if the block before was accepted as a whole, one time in ``block_size + 1`` at
    least. Where no block proposes that token (the first of an answer) a forward always starts.
    """
    m = overlap_BAM.shape[-1]
    places_M = torch.arange(2, m + 2, device=overlap_BAM.device)
    last = batch.tokens_BT.shape[1] - 1
    target_BP = (batch.anchors_BA[..., None] + places_M).clamp_(max=last).flatten(1)
    reached_BAM = _survival(overlap_BAM) * valid_BAM
    reached_BT, rejected_BT = (
        overlap_BAM.new_zeros(batch.tokens_BT.shape).scatter_add_(1, target_BP, values.flatten(1))
        for values in (reached_BAM, reached_BAM * (1.0 - overlap_BAM))
    )
    chance_BT = torch.where(reached_BT > 0, rejected_BT / reached_BT.clamp(min=1e-9), 1.0)
    chance_BA = chance_BT.gather(1, (batch.anchors_BA + 1).clamp_(max=last))
    return chance_BA.clamp(min=1.0 / (m + 1))
