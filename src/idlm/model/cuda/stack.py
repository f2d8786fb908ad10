"""All decoder layers of a forward pass as a few Triton kernels each, for decoding on CUDA.

What is computed is defined by `Layer.forward`; here it is only handed over. The one difference:
sums that meet in one output (a projection, its bias, the LoRA and the residual stream) are rounded
once, not after each step (the library's product is, too). Five launches a layer (one more where the
keys are split, one more where heads are not rotated by their projection; the library's products of
many rows are four more at least), nothing waits for the device, and the launches depend on shapes
only, so a forward can be captured as a graph.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from idlm.model.cuda.low_rank import LowRank, stack, stacked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idlm.model.adapter import Adapter, LoraLinear
    from idlm.model.attention import PagedAttention
    from idlm.model.config import ModelConfig
    from idlm.model.cuda.rows import Rows
    from idlm.model.decoder import Decoder, Layer, Linear, Part

# Up to so many rows of all requests the weights' bytes are what a product costs, and the fused
# kernel reads them as fast as it goes; above, the library's product is faster, unless the weights
# are so small that launches cost more than arithmetic. It rounds elsewhere, so with bf16 a row may
# come out otherwise than with fewer beside it. Mask rows have whole weights of their own, the
# update merged in, where the weights are small.
FUSED_ROWS = 16
SMALL_WEIGHT = 1 << 22
PROJECTIONS = ("qkv", "o", "gate_up", "down")


@torch.no_grad()
def prepare(decoder: Decoder, adapter: Adapter) -> None:
    """Lay the weights of a large model so that products of many rows need fewer launches.

    They move: nobody may have captured a forward yet. Takes the memory of a layer for a moment.

    Args:
        adapter: frozen; what is forwarded with another one takes a launch more for a projection.
    """
    device = decoder.embed.weight.device
    if not usable(device) or is_small(decoder.config):
        return
    layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
    for layer in layers:
        for name, lora in adapter.layer(layer.index).items():
            stack(getattr(layer, name).weight, lora.A)
        torch.cuda.empty_cache()  # else what was moved from stays, as nothing else fits into it


def takes(decoder: Decoder, attention: PagedAttention, adapter: Adapter | None) -> bool:
    """Whether `run` can stand in for the layers: on CUDA, without gradients, nothing trained."""
    return (
        usable(attention.start_B.device)
        and not torch.is_grad_enabled()
        and attention.k_LNKTD.dtype is decoder.embed.weight.dtype
        and (adapter is None or adapter.frozen)
    )


def run(decoder: Decoder, parts: Sequence[Part], adapter: Adapter | None) -> list[torch.Tensor]:
    """`Decoder.together`; the cache gets the rows' keys and values.

    Returns:
        Of each part ``hidden_BRH``.
    """
    # Not at the top: there may be no Triton here.
    from idlm.model.cuda.paged_attention import attend
    from idlm.model.cuda.residual import FusedResidual, LibraryResidual
    from idlm.model.cuda.rotation import Heads
    from idlm.model.cuda.rows import enter

    groups = _groups(parts)
    embedding_VH, attention = decoder.embed.weight, parts[0].attention
    flat = enter(
        [(rows, x.tokens_BC, x.attention.kept_BR) for rows, x in zip(groups, parts, strict=True)],
        embedding_VH,
        decoder.mask_embedding(adapter) if any(x.num_masks for x in parts) else embedding_VH[0],
        decoder.frequencies(embedding_VH.device),
        decoder.rope_factor,
        attention.k_LNKTD.shape[3],
    )
    layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
    small = is_small(decoder.config)
    updates = [{}] * len(layers) if adapter is None else _updates(decoder, adapter, merge=small)
    kind = FusedResidual if small or len(flat.x_NH) <= FUSED_ROWS else LibraryResidual
    # Filled by a kernel: what is set up early has to follow one.
    ready_L41 = torch.full((len(layers), 4, 1), 0, dtype=torch.int32, device=flat.x_NH.device)
    residual = kind(flat.x_NH, layers[0].attn_norm)
    for layer, update, ready in zip(layers, updates, ready_L41.unbind(), strict=True):
        k_NKTD, v_NKTD = attention.k_LNKTD[layer.index], attention.v_LNKTD[layer.index]
        low_rank = {name: (update.get(name), groups[0].first_mask) for name in PROJECTIONS}
        heads = Heads(flat.cos_ND, flat.sin_ND, flat.cells_N, k_NKTD, v_NKTD)
        qkv_NW = residual.rotated(layer, low_rank["qkv"], ready[0], heads)
        attended_NX = attend(qkv_NW, k_NKTD, v_NKTD, groups, attention.window)
        residual.add(attended_NX, layer.o, low_rank["o"], ready[1], layer.mlp_norm)
        inner_NI = residual.gated(layer.gate_up, low_rank["gate_up"], ready[2])
        last = layer is layers[-1]
        norm = decoder.norm if last else layers[layer.index + 1].attn_norm
        residual.add(inner_NI, layer.down, low_rank["down"], ready[3], norm)
    hidden_NH = residual.normed()
    return [rows.unflat(hidden_NH) for rows in groups]


def _groups(parts: Sequence[Part]) -> list[Rows]:
    """The rows of each part: flat, the clean rows of all come before all masks."""
    from idlm.model.cuda.rows import Rows

    groups: list[Rows] = []
    first_clean, first_mask = 0, sum(x.tokens_BC.numel() for x in parts)
    for part in parts:
        attention = part.attention
        rows = Rows(
            requests=len(part.tokens_BC),
            clean=part.tokens_BC.shape[1],
            masks=part.num_masks,
            table_BP=attention.table_BP,
            start_B=attention.start_B,
            positions_BR=attention.positions_BR.contiguous(),
            visible_BRR=attention.visible_BRR.contiguous(),
            first_clean=first_clean,
            first_mask=first_mask,
        )
        groups.append(rows)
        first_clean, first_mask = rows.last_clean, rows.last_mask
    return groups


def is_small(config: ModelConfig) -> bool:
    """Whether the weights are so small that mask rows have whole ones of their own."""
    return config.hidden_size * config.intermediate_size < SMALL_WEIGHT


@cache
def usable(device: torch.device) -> bool:
    """CUDA with Triton (it comes with torch there) and a GPU that knows what the kernels need."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# By modules, not in an attribute of one: what is derived must not be copied or saved with it.
_Updates = list[dict[str, LowRank]]
_updates_of: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Updates]]
_updates_of = WeakKeyDictionary()


def _updates(decoder: Decoder, adapter: Adapter, *, merge: bool) -> _Updates:
    """The updates of each layer by fused projection; made once, since a frozen adapter stays."""
    known = _updates_of.setdefault(decoder, WeakKeyDictionary())
    if adapter not in known:
        layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
        known[adapter] = [
            {
                name: _low_rank(lora, getattr(layer, name), merge=merge)
                for name, lora in adapter.layer(layer.index).items()
            }
            for layer in layers
        ]
    return known[adapter]


def _low_rank(lora: LoraLinear, base: Linear, *, merge: bool) -> LowRank:
    """The update of ``base``, merged with it if wanted."""
    B_OZ = torch.cat([B.detach() for B in lora.B]) * lora.scale
    base_OI, A_ZI = base.weight.detach(), lora.A.detach()
    low_rank = LowRank(A_ZI, B_OZ, tuple(len(B) for B in lora.B), stacked_SI=stacked(base_OI, A_ZI))
    return low_rank.merged(base_OI) if merge else low_rank
