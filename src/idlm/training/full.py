"""The full objective: all weights learn to predict the data, from clean rows and from masks.

One pass over ``[x_0 | masks]``: every row, clean or mask, is trained by the shifted cross-entropy
on the data's tokens, ``L_mask + s * L_clean`` (arXiv 2604.11035, section 3). The masked copy of
the paper is cut into the blocks at the batch's anchors; a block holds every shorter one, since
its masks do not see later ones.
"""

from __future__ import annotations

import re

import torch

from idlm.errors import InvalidRequestError
from idlm.model.config import ModelConfig
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.attention import JointAttention
from idlm.training.compilation import compile_layers
from idlm.training.config import ConvertConfig
from idlm.training.cross_entropy import cross_entropy
from idlm.training.data import Batch
from idlm.training.divergence import divergence
from idlm.training.objective import Blocks, Outcome

# Names that model makers give to special tokens kept for others' use.
SPARE_TOKEN = re.compile("reserved|unused", re.IGNORECASE)


class FullObjective:
    """One pass of a decoder whose masks are the embedding of ``decoder.config.mask_token_id``.

    In training, acceptance is that of the data's own tokens; without gradients it is measured
    against the distributions of the clean rows, as decoding does.

    Args:
        dtype: that the decoder computes in.
    """

    terms: tuple[str, ...] = ("mask", "clean")

    def __init__(self, decoder: Decoder, config: ConvertConfig, dtype: torch.dtype) -> None:
        self.decoder, self.config, self.dtype = decoder, config, dtype
        self.block_size = config.block_size
        decoder.requires_grad_(True)
        if next(decoder.parameters()).is_cuda:
            compile_layers(decoder)

    def weights(self, batch: Batch) -> torch.Tensor:
        """Sums of the weights of mask rows and of clean rows, ``[2]`` fp32."""
        weights_BAM = self._mask_weights(Blocks(batch, self.block_size).valid_BAM)
        return torch.stack((weights_BAM.sum(), _clean_weights(batch).sum()))

    def factors(self, means: torch.Tensor) -> torch.Tensor:
        """1 and ``s``: fixed, or the ratio of the means, so that both halves count the same."""
        mask, clean = means
        if self.config.clean_weight is None:
            return torch.stack((torch.ones_like(mask), mask / clean.clamp(min=1e-9)))
        return means.new_tensor([1.0, self.config.clean_weight])

    def __call__(self, batch: Batch) -> Outcome:
        T, blocks = batch.tokens_BT.shape[1], Blocks(batch, self.block_size)
        attention = JointAttention(
            batch.documents_BT, batch.anchors_BA, blocks.starts_BA, self.block_size, self.dtype
        )
        hidden_BRH = self.decoder(
            batch.tokens_BT,
            torch.cat((batch.positions_BT, blocks.positions_BP), dim=1),
            attention,
            num_masks=blocks.positions_BP.shape[1],
        )
        clean_BTH, masks_BPH = hidden_BRH[:, :T], hidden_BRH[:, T:]
        weight_VH, valid_BAM = self.decoder.output_weight, blocks.valid_BAM
        mask = cross_entropy(
            masks_BPH.flatten(0, 1),
            weight_VH,
            batch.tokens_BT.gather(1, (blocks.rows_BP + 1).clamp(max=T - 1)).flatten(),
            self._mask_weights(valid_BAM).flatten(),
        )
        clean = cross_entropy(
            clean_BTH.flatten(0, 1),
            weight_VH,
            batch.tokens_BT.roll(-1, 1).flatten(),
            _clean_weights(batch).flatten(),
        )
        agree_N, overlap_N = mask.agree_N, mask.chance_N
        if not torch.is_grad_enabled():
            rows_B1 = torch.arange(len(blocks.rows_BP), device=blocks.rows_BP.device)[:, None]
            teacher_BPH = clean_BTH[rows_B1, blocks.rows_BP]
            measured = divergence(masks_BPH.flatten(0, 1), teacher_BPH.flatten(0, 1), weight_VH)
            agree_N, overlap_N = measured.agree_N, measured.overlap_N
        shape = valid_BAM.shape
        losses = torch.stack((mask.loss, clean.loss))
        return Outcome(losses, overlap_N.view(shape), agree_N.view(shape), valid_BAM)

    def _mask_weights(self, valid_BAM: torch.Tensor) -> torch.Tensor:
        places_M = torch.arange(self.block_size, device=valid_BAM.device, dtype=torch.float32)
        return valid_BAM * self.config.place_decay**places_M


def _clean_weights(batch: Batch) -> torch.Tensor:
    """1 for the rows whose next token belongs to an answer, fp32 ``[B, T]``."""
    next_BT = batch.answers_BT.roll(-1, 1)
    next_BT[:, -1] = False
    return next_BT.float()


def mask_token(config: ModelConfig, tokenizer: Tokenizer, name: str | None) -> int:
    """The id whose embedding becomes that of the mask rows.

    Args:
        name: a token that the user gives up; None: the model's mask token if it has one, else an
            id that the tokenizer does not use or that is named as a spare one.

    Raises:
        InvalidRequestError: there is no such token.
    """
    if name is not None:
        token_id = tokenizer.backend.token_to_id(name)
        if token_id is None:
            raise InvalidRequestError(
                f"The vocabulary has no token {name!r}; give another --mask-token."
            )
        return int(token_id)
    if config.mask_token_id is not None:
        return config.mask_token_id
    for token_id in range(config.vocab_size):
        text = tokenizer.backend.id_to_token(token_id)
        if text is None or (token_id in tokenizer.special_ids and SPARE_TOKEN.search(text)):
            return token_id
    raise InvalidRequestError(
        "The vocabulary has no free token that could stand for a mask; use --kind lossless, which "
        "learns an embedding of its own, or give up a token that the data never uses: "
        "--mask-token TOKEN."
    )
