"""Small tensors on their way to the device, without waiting for what runs there."""

from __future__ import annotations

from typing import Any

import torch


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.tensor(values)`` on ``device``; the caller may go on before it is there."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory the copy would wait for all work that was queued before.
    return tensor.pin_memory().to(device, non_blocking=True)
