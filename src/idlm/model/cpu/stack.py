"""All decoder layers of a forward pass as one call of the CPU kernels.

What is computed is defined by `Layer.forward`; here it is only handed over. The one difference:
sums that meet in one output (a projection, its bias, the LoRA and the residual stream) are rounded
once, not after each step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from idlm.model.attention import PagedAttention
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cpu.kernels import Addresses, Pages, address

if TYPE_CHECKING:
    from idlm.model.adapter import Adapter, LoraLinear
    from idlm.model.decoder import Decoder, Layer, Linear, RMSNorm


def takes(x_BRH: torch.Tensor, attention: PagedAttention, adapter: Adapter | None) -> bool:
    """Whether `run` can stand in for the layers: on the CPU, with a frozen adapter or none."""
    return (
        cpu_kernels.usable(x_BRH)
        and attention.k_LNKTD.dtype is x_BRH.dtype
        and attention.kept_BR is None
        and (adapter is None or adapter.frozen)
    )


def run(
    decoder: Decoder,
    x_BRH: torch.Tensor,
    cos_BR1D: torch.Tensor,
    sin_BR1D: torch.Tensor,
    attention: PagedAttention,
    num_masks: int,
    adapter: Adapter | None,
) -> torch.Tensor:
    """All layers and the final norm: ``x`` is overwritten, the cache gets the rows' keys.

    Returns:
        ``hidden_BRH``.
    Raises:
        ValueError: the rows do not fit into their blocks, or a tensor is not dense or of the dtype
            of ``x``.
    """
    config = decoder.config
    B, R, H = x_BRH.shape
    k_LNKTD, v_LNKTD = attention.k_LNKTD, attention.v_LNKTD
    if k_LNKTD.stride() != v_LNKTD.stride():
        raise ValueError("Keys and values need the same strides.")
    # Variables, not temporaries: an address alone keeps nothing alive.
    x_BRH, cos, sin = x_BRH.contiguous(), cos_BR1D.contiguous(), sin_BR1D.contiguous()
    start_B, positions_BR = attention.start_B.contiguous(), attention.positions_BR.contiguous()
    visible_BRR = attention.visible_BRR.contiguous()
    cpu_kernels.run(
        cpu_kernels.Stack(
            half=x_BRH.dtype is torch.bfloat16,
            threads=torch.get_num_threads(),
            batch=B,
            rows=R,
            masks=num_masks,
            layers=config.num_layers,
            hidden=H,
            inner=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            layer=_layers(decoder, x_BRH.dtype),
            update=None if adapter is None else _updates(adapter, x_BRH.dtype),
            norm=address(decoder.norm.weight, x_BRH.dtype),
            x=x_BRH.data_ptr(),
            cosine=cos.data_ptr(),
            sine=sin.data_ptr(),
            k=k_LNKTD.data_ptr(),
            v=v_LNKTD.data_ptr(),
            kv_layer=k_LNKTD.stride(0),
            pages=Pages.of(k_LNKTD[0], attention.table_BP),
            window=attention.window or 0,
            start=start_B.data_ptr(),
            positions=positions_BR.data_ptr(),
            visible=visible_BRR.data_ptr(),
        )
    )
    return x_BRH


# By module, not in an attribute of it: addresses must not be copied or saved with a module.
_of_decoder: WeakKeyDictionary[nn.Module, Addresses[cpu_kernels.Layer]] = WeakKeyDictionary()
_of_adapter: WeakKeyDictionary[nn.Module, Addresses[cpu_kernels.LayerUpdate]] = WeakKeyDictionary()


def _layers(decoder: Decoder, dtype: torch.dtype) -> ctypes.Array[cpu_kernels.Layer]:
    known = _of_decoder.get(decoder)
    if known is None or not known.hold(dtype):
        entries = [_layer(layer, dtype) for layer in decoder.layers]  # type: ignore[arg-type]
        array = (cpu_kernels.Layer * len(entries))(*entries)
        known = _of_decoder[decoder] = Addresses(array, dtype, decoder.layers.parameters())
    return known.entries


def _layer(layer: Layer, dtype: torch.dtype) -> cpu_kernels.Layer:
    def norm(module: RMSNorm | None) -> int | None:
        return None if module is None else address(module.weight, dtype)

    def projection(module: Linear) -> cpu_kernels.Projection:
        bias = None if module.bias is None else address(module.bias, dtype)
        return cpu_kernels.Projection(address(module.weight, dtype), bias)

    return cpu_kernels.Layer(
        norm(layer.attn_norm),
        norm(layer.mlp_norm),
        norm(layer.q_norm),
        norm(layer.k_norm),
        projection(layer.qkv),
        projection(layer.o),
        projection(layer.gate_up),
        projection(layer.down),
    )


def _updates(adapter: Adapter, dtype: torch.dtype) -> ctypes.Array[cpu_kernels.LayerUpdate]:
    known = _of_adapter.get(adapter)
    if known is None or not known.hold(dtype):
        ups: list[torch.Tensor] = []

        def low_rank(lora: LoraLinear) -> cpu_kernels.LowRank:
            ups.append(torch.cat([B.detach() for B in lora.B]) * lora.scale)
            return cpu_kernels.LowRank(address(lora.A, dtype), address(ups[-1], dtype), lora.rank)

        entries = [
            cpu_kernels.LayerUpdate(**{k: low_rank(v) for k, v in adapter.layer(index).items()})
            for index in range(len(adapter.lora))
        ]
        array = (cpu_kernels.LayerUpdate * len(entries))(*entries)
        known = _of_adapter[adapter] = Addresses(array, dtype, adapter.lora.parameters(), ups)
    return known.entries
