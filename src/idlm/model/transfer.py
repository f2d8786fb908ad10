"""Small tensors on their way to the device, without waiting for what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += array.nbytes + -array.nbytes % ALIGNED
    memory = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = memory.numpy()
    for array, start in zip(arrays, starts, strict=True):
        host[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
    there = memory.to(device, non_blocking=True)
    # A view takes the host as long as a copy does: few are made.
    of_dtype = {array.dtype: there.view(_torch(array.dtype)) for array in arrays}
    tensors = []
    for array, start in zip(arrays, starts, strict=True):
        first = start // array.itemsize
        tensor = of_dtype[array.dtype][first : first + array.size]
        tensors.append(tensor if array.ndim == 1 else tensor.view(array.shape))
    return tensors


@cache
def _torch(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
