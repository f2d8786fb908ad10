"""The processes of one training run, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Parallel:
    """This process among those that train together; alone by default.

    Attributes:
        rank, world: number of this process, and how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of ``count`` items (a multiple of ``world``)."""
        each = count // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """Every tensor summed over all processes, in place, in one message."""
        if self.world > 1:
            flat = self.sum(torch.cat([t.reshape(-1) for t in tensors]))
            parts = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(
                list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]
            )

    def of_main(self, values: Sequence[float]) -> list[float]:
        """The main process's ``values``, everywhere; does not wait for an accelerator."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))


ALONE = Parallel()


@contextmanager
def torchrun(device: torch.device) -> Iterator[Parallel]:
    """Join the processes that torchrun started; alone if it did not start this one."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    # CPU tensors carry what the host decides, without waiting for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield Parallel(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """Number of this process on its host: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))
