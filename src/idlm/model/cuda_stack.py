"""All decoder layers of a forward pass as a few Triton kernels each, for decoding on CUDA.

What is computed is defined by `Layer.forward`; here it is only handed over. The one difference:
sums that meet in one output (a projection, its bias, the LoRA and the residual stream) are rounded
once, not after each step. Six launches a layer (seven where the keys are split), nothing waits for
the device, and the launches depend on shapes only, so a forward can be captured as a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from idlm.model.adapter import Adapter, LoraLinear
    from idlm.model.attention import PagedAttention
    from idlm.model.decoder import Decoder, Layer
    from idlm.model.projection_kernel import LowRank


def takes(x_BRH: torch.Tensor, attention: PagedAttention, adapter: Adapter | None) -> bool:
    """Whether `run` can stand in for the layers: on CUDA, without gradients, nothing trained."""
    return (
        x_BRH.is_cuda
        and not torch.is_grad_enabled()
        and attention.k_LNKTD.dtype is x_BRH.dtype
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
    """
    # Triton comes with torch on CUDA machines only.
    from idlm.model.paged_kernel import attend, rotate_and_append
    from idlm.model.projection_kernel import project

    eps = decoder.config.rms_norm_eps
    x_BRH, cos_BR1D, sin_BR1D = x_BRH.contiguous(), cos_BR1D.contiguous(), sin_BR1D.contiguous()
    updates = [{}] * len(decoder.layers) if adapter is None else _updates(adapter)
    layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
    for layer, update in zip(layers, updates, strict=True):
        k_NKTD, v_NKTD = attention.k_LNKTD[layer.index], attention.v_LNKTD[layer.index]
        qkv_BRW = project(
            x_BRH,
            layer.qkv.weight,
            layer.qkv.bias,
            low_rank=update.get("qkv"),
            num_masks=num_masks,
            norm_I=layer.attn_norm.weight,
            eps=eps,
        )
        q_BRQD = rotate_and_append(
            qkv_BRW,
            cos_BR1D,
            sin_BR1D,
            k_NKTD,
            v_NKTD,
            attention.table_BP,
            attention.start_B,
            None if layer.q_norm is None else layer.q_norm.weight,
            None if layer.k_norm is None else layer.k_norm.weight,
            eps,
        )
        attended_BRQD = attend(
            q_BRQD,
            k_NKTD,
            v_NKTD,
            attention.table_BP,
            attention.start_B,
            attention.positions_BR,
            attention.visible_BRR,
            attention.window,
        )
        project(
            attended_BRQD.flatten(2),
            layer.o.weight,
            layer.o.bias,
            low_rank=update.get("o"),
            num_masks=num_masks,
            residual_BRO=x_BRH,
        )
        gate_up_BRI = project(
            x_BRH,
            layer.gate_up.weight,
            layer.gate_up.bias,
            low_rank=update.get("gate_up"),
            num_masks=num_masks,
            norm_I=layer.mlp_norm.weight,
            eps=eps,
        )
        project(
            gate_up_BRI,
            layer.down.weight,
            layer.down.bias,
            low_rank=update.get("down"),
            num_masks=num_masks,
            swiglu=True,
            residual_BRO=x_BRH,
        )
    return F.rms_norm(x_BRH, decoder.norm.weight.shape, decoder.norm.weight, eps)


# By module, not in an attribute of it: what is derived must not be copied or saved with a module.
_of_adapter: WeakKeyDictionary[nn.Module, list[dict[str, LowRank]]] = WeakKeyDictionary()


def _updates(adapter: Adapter) -> list[dict[str, LowRank]]:
    """The updates of each layer by fused projection; made once, since a frozen adapter stays."""
    from idlm.model.projection_kernel import LowRank

    def low_rank(lora: LoraLinear) -> LowRank:
        scaled_OZ = torch.cat([B.detach() for B in lora.B]) * lora.scale
        return LowRank(lora.A.detach(), scaled_OZ, tuple(len(B) for B in lora.B))

    if adapter not in _of_adapter:
        _of_adapter[adapter] = [
            {name: low_rank(lora) for name, lora in adapter.layer(index).items()}
            for index in range(len(adapter.lora))
        ]
    return _of_adapter[adapter]
