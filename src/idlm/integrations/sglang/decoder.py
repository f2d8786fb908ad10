"""The host's embedding and output layer, as `idlm.decoding.propose` uses a decoder's."""

from __future__ import annotations

from typing import Any, cast

import torch
from sglang.srt.distributed import get_tp_group
from torch import nn

from idlm.model.config import ModelConfig
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import head as cuda_head
from idlm.model.decoder import Decoder


class HostDecoder:
    """The ends of the host's model; what is between them is the host's own to run."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self.config = config
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        head: Any = model.lm_head
        self.output_weight: torch.Tensor = head.weight
        # The tokens whose rows of the output layer this rank holds.
        self._first = head.shard_indices.org_vocab_start_index
        self._end = head.shard_indices.org_vocab_end_index
        self._ranks = get_tp_group()

    def logits_at(self, hidden_BH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
        """``[B, K]``, fp32, not rounded: the logits of the tokens ``ids`` of each row alone."""
        if self._ranks.world_size == 1:
            return self._score(hidden_BH, ids_BK)
        mine_BK = (ids_BK >= self._first) & (ids_BK < self._end)
        scores_BK = self._score(hidden_BH, torch.where(mine_BK, ids_BK - self._first, 0))
        summed: torch.Tensor = self._ranks.all_reduce(torch.where(mine_BK, scores_BK, 0.0))
        return summed

    def _score(self, hidden_BH: torch.Tensor, rows_BK: torch.Tensor) -> torch.Tensor:
        if cpu_kernels.usable(hidden_BH):
            return cpu_kernels.score(hidden_BH, self.output_weight, rows_BK)
        if cuda_head.takes(hidden_BH, self.output_weight):
            return cuda_head.score(hidden_BH, self.output_weight, rows_BK)
        return (self.output_weight[rows_BK].float() * hidden_BH[:, None].float()).sum(-1)

    def as_decoder(self) -> Decoder:
        """Itself: it has all of a decoder that proposals need."""
        return cast(Decoder, self)
