"""The host's embedding and output layer, as `idlm.decoding.propose` uses a decoder's."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from idlm.model import cpu_kernels, cuda_head
from idlm.model.config import ModelConfig
from idlm.model.decoder import Decoder


class HostDecoder:
    """The ends of the host's model; what is between them is the host's own to run."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self.config = config
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.output_weight: torch.Tensor = model.lm_head.weight  # type: ignore[union-attr, assignment]

    def logits_at(self, hidden_BH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
        """``[B, K]``, fp32, not rounded: the logits of the tokens ``ids`` of each row alone."""
        if cpu_kernels.usable(hidden_BH):
            return cpu_kernels.score(hidden_BH, self.output_weight, ids_BK)
        if cuda_head.takes(hidden_BH, self.output_weight):
            return cuda_head.score(hidden_BH, self.output_weight, ids_BK)
        return (self.output_weight[ids_BK].float() * hidden_BH[:, None].float()).sum(-1)

    def as_decoder(self) -> Decoder:
        """Itself: it has all of a decoder that proposals need."""
        return cast(Decoder, self)
