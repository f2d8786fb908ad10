"""Small tensors on their way to the device, without waiting for what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNED = 16  # bytes: kernels are compiled for pointers to multiples of it


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.tensor(values)`` on ``device``; the caller may go on before it is there."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory the copy would wait for all work that was queued before.
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_all(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """`upload` of several arrays in one copy, which takes a GPU's host as long as that of one."""
    starts = np.cumsum([0, *(array.nbytes + -array.nbytes % ALIGNED for array in arrays)])
    memory = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = memory.numpy()
    for array, start in zip(arrays, starts[:-1], strict=True):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = memory.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts[:-1].tolist(), strict=True)
    ]
