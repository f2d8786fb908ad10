"""Placeholder until the CPU kernels land: their author replaces this whole file.

Contract with the callers (model/decoder.py, model/attention.py, model/adapter.py):
`usable(x)` is True when the compiled library is there, x is on the CPU, bf16 or fp32, and no
gradient is being recorded (torch.is_grad_enabled() is False). It must be cheap and traceable by
torch.compile on CUDA: test `x.device.type == "cpu"` first.
`linear(x, weight, bias=None, out=None, accumulate=False)`, `attention(q_BRQD, k_BKSD, v_BKSD,
start_B, visible_BRR, positions_BR, *, scale, window)`: see the calls.
"""

from __future__ import annotations

import torch


def usable(x: torch.Tensor) -> bool:
    return False


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    raise NotImplementedError


def attention(
    q_BRQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    start_B: torch.Tensor,
    visible_BRR: torch.Tensor,
    positions_BR: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    raise NotImplementedError
