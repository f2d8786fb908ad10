"""The sampler head's greedy chain over a mask block as one call of the CPU kernels.

What is computed is defined by `SamplerHead.step`; this is the loop around it for greedy requests,
which on a CPU would spend more time between its many small operations than in them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cpu.kernels import Addresses, address

if TYPE_CHECKING:
    from idlm.model.adapter import HeadBlock, SamplerHead
    from idlm.model.decoder import Decoder


def greedy_chain(
    decoder: Decoder,
    head: SamplerHead,
    hidden_BMH: torch.Tensor,
    ids_BMK: torch.Tensor,
    first_B: torch.Tensor,
) -> torch.Tensor:
    """The tokens ``[B, M]`` that the head finds likeliest, one place after the other.

    Args:
        hidden_BMH: final hidden states of the mask block, such that `cpu_kernels.usable`.
        ids_BMK: the candidates of each place, int64.
        first_B: the token before the first place, int64.
    Raises:
        ValueError: a token is not in the vocabulary, or a tensor is not dense or of the dtype of
            ``hidden``.
    """
    B, M, H = hidden_BMH.shape
    dtype = hidden_BMH.dtype
    # Variables, not temporaries: an address alone keeps nothing alive.
    hidden_BMH, ids_BMK, first_B = (t.contiguous() for t in (hidden_BMH, ids_BMK, first_B))
    tokens_BM = torch.empty(B, M, dtype=torch.int64)
    blocks = _blocks(head)
    cpu_kernels.run_chain(
        cpu_kernels.Chain(
            half=dtype is torch.bfloat16,
            threads=torch.get_num_threads(),
            batch=B,
            places=M,
            depth=len(blocks),
            hidden=H,
            width=blocks[0].out.in_features,
            vocabulary=len(decoder.output_weight),
            candidates=ids_BMK.shape[2],
            eps=decoder.config.rms_norm_eps,
            block=_addresses(head, dtype),
            from_hidden=address(head.from_hidden.weight, dtype),
            hidden_bias=address(head.from_hidden.bias, dtype),
            token_norm=address(head.token_norm.weight, dtype),
            from_token=address(head.from_token.weight, dtype),
            embedding=address(decoder.embed.weight, dtype),
            output=address(decoder.output_weight, dtype),
            h=hidden_BMH.data_ptr(),
            first=first_B.data_ptr(),
            ids=ids_BMK.data_ptr(),
            tokens=tokens_BM.data_ptr(),
        )
    )
    return tokens_BM


_of_head: WeakKeyDictionary[nn.Module, Addresses[cpu_kernels.HeadBlock]] = WeakKeyDictionary()


def _blocks(head: SamplerHead) -> list[HeadBlock]:
    return list(head.blocks)  # type: ignore[arg-type]


def _addresses(head: SamplerHead, dtype: torch.dtype) -> ctypes.Array[cpu_kernels.HeadBlock]:
    known = _of_head.get(head)
    if known is None or not known.hold(dtype):
        entries = [
            cpu_kernels.HeadBlock(
                address(block.state_norm.weight, dtype),
                address(block.from_state.weight, dtype),
                address(block.out.weight, dtype),
            )
            for block in _blocks(head)
        ]
        array = (cpu_kernels.HeadBlock * len(entries))(*entries)
        known = _of_head[head] = Addresses(array, dtype, head.blocks.parameters())
    return known.entries
