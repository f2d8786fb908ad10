"""What a rank of a tensor-parallel server holds of the adapter, and what all ranks agree on."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.linear import RowParallelLinear

from idlm.errors import UnsupportedModelError
from idlm.model.adapter import LoraLinear


def share_of(lora: LoraLinear, module: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The rank's ``A`` ``[Z, I]`` and, for each module, ``B`` ``[O, rank]`` with its scale.

    A projection that is cut by outputs needs all of ``A`` and its rows of ``B``; one that is cut
    by inputs needs its columns of ``A`` and all of ``B``, and its update is a partial sum, as what
    the projection itself computes.

    Args:
        module: the host's fused projection that the LoRA belongs to.

    Raises:
        UnsupportedModelError: the host changed the shape of the projection.
    """
    rank, ranks = module.tp_rank, module.tp_size
    B = [part * lora.scale for part in lora.B]
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        _check(module, size * ranks, lora.A.shape[1], "inputs")
        _check(module, module.output_size, len(B[0]), "outputs")
        return lora.A[:, rank * size : (rank + 1) * size], B
    _check(module, module.input_size, lora.A.shape[1], "inputs")
    # Where there are more ranks than heads of keys and values, several ranks hold the same head.
    copies = getattr(module, "num_kv_head_replicas", 1)
    parts = []
    for index, (part, size) in enumerate(zip(B, module.output_partition_sizes, strict=True)):
        same = copies if index else 1
        _check(module, size * ranks // same, len(part), "outputs")
        parts.append(part[rank // same * size :][:size])
    return lora.A, parts


def _check(module: Any, host: int, adapter: int, kind: str) -> None:
    if host != adapter:
        raise UnsupportedModelError(
            f"The server runs a {type(module).__name__} with {host} {kind}, the adapter is for "
            f"{adapter}: padded models cannot have one."
        )


def of_first_rank(*decisions_B: torch.Tensor) -> list[torch.Tensor]:
    """The first rank's values of ``decisions`` (int64, ``[B, ...]``, below 2^24), on all ranks.

    All ranks come to the same, up to rounding that is not the same on all devices; but ranks that
    went different ways would wait for each other forever.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return list(decisions_B)
    columns = [d.flatten(1) if d.dim() > 1 else d[:, None] for d in decisions_B]
    # A sum in fp32, which is exact here: the reduction that is in all of the host's CUDA graphs.
    sent = torch.cat(columns, dim=1).float()
    if group.rank_in_group != 0:
        sent = torch.zeros_like(sent)
    agreed = group.all_reduce(sent).long().split([c.shape[1] for c in columns], dim=1)
    return [a.reshape(d.shape) for a, d in zip(agreed, decisions_B, strict=True)]
