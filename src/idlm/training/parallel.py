"""The processes of one training run, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from idlm.model.decoder import Decoder


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

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row; a process that is alone forms a group of one."""
        if not dist.is_initialized():
            dist.init_process_group(
                _backend(device), store=dist.HashStore(), rank=self.rank, world_size=self.world
            )
        return init_device_mesh(device.type, (self.world,))


ALONE = Parallel()


@contextmanager
def torchrun(device: torch.device) -> Iterator[Parallel]:
    """Join the processes that torchrun started; alone if it did not start this one."""
    parallel = ALONE
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(_backend(device))
        parallel = Parallel(dist.get_rank(), dist.get_world_size())
    try:
        yield parallel
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def local_rank() -> int:
    """Number of this process on its host: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def shard(decoder: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread the weights, gradients and optimizer state of ``decoder`` over the mesh (FSDP2).

    Every layer is gathered in ``dtype`` when it runs; embedding, last norm and output layer with
    the first forward of a step, and they stay until its backward pass is over, since the loss uses
    them too. Gradients are added up in fp32, not averaged: the loss is already a share of that of
    the whole batch.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*decoder.layers, decoder):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def _backend(device: torch.device) -> str:
    # CPU tensors carry what the host decides, without waiting for the device.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
