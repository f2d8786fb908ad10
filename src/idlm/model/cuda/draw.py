"""How tokens are drawn: what the kernels that sample are told of the requests."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """How ``B`` requests draw from a distribution.

    Attributes:
        seed_B, position_B: int64; the draw is a function of these and the stream.
        stream: `decoding.random.Stream`.
        temperature_B: fp32.
        greedy_B: bool; who takes the likeliest.
    """

    seed_B: torch.Tensor
    position_B: torch.Tensor
    stream: int
    temperature_B: torch.Tensor
    greedy_B: torch.Tensor
