"""A projection in a decoder layer on CUDA: all that happens between two of its inputs.

One launch computes ``y = f(x) W^T`` for all rows and ``+ (f(x) A^T) B^T`` for the mask rows, which
come last (in memory, or in an order that is given); ``f`` is nothing or the RMS norm before the
projection. On the way out, the two halves of a gated MLP become one, heads are rotated and go where
they belong, or the result is added to the residual stream.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.overlap import overlap
from idlm.model.cuda.projection_kernel import LINE, project_tile
from idlm.model.cuda.rotation import Heads
from idlm.model.cuda.stream import Stream
from idlm.model.cuda.tile import BOX_ROWS, Tile, tile_of, tiles_of

# Weights that are brought into the L2 cache ahead; more of them would not stay there.
FETCHED = 1 << 22


def project(
    x: torch.Tensor | Stream,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    low_rank: LowRank | None = None,
    first_mask: int = 0,
    ready_1: torch.Tensor | None = None,
    gated: bool = False,
    addend_NO: torch.Tensor | None = None,
    order_N: torch.Tensor | None = None,
    heads: Heads | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``f(x) @ weight.T + bias``, with the update on the rows from ``first_mask``.

    Args:
        x: ``[N, I]``, dense, or a stream, whose norm is ``f``; of one dtype with all else.
        ready_1: one int32 that is 0 and is used up; None: a new one.
        addend_NO: added to the outputs; rows may lie apart.
        gated: the outputs are gate and up; the result is ``silu(gate) * up``, ``[N, O / 2]``.
        order_N: int64; the rows, those with an update last. None: they lie in that order.
        heads: the outputs are queries, keys and values; queries are rotated, and keys and values
            go into the cache instead of the result. Not together with ``order``.
    Returns:
        ``[N, O]``; sums are made in fp32 and rounded once.
    """
    rows_NI = x.scaled_NH if isinstance(x, Stream) else x
    width = len(weight_OI) // (2 if gated else 1)
    y_NO = torch.empty((len(rows_NI), width), dtype=rows_NI.dtype, device=rows_NI.device)
    _launch(
        x,
        weight_OI,
        bias_O,
        y_NO,
        low_rank=low_rank,
        first_mask=first_mask,
        ready_1=ready_1,
        gated=gated,
        addend_NO=addend_NO,
        order_N=order_N,
        heads=heads,
        tile=tile,
    )
    return y_NO


def add(
    stream: Stream,
    x_NI: torch.Tensor,
    weight_HI: torch.Tensor,
    bias_H: torch.Tensor | None = None,
    *,
    norm_H: torch.Tensor,
    eps: float,
    low_rank: LowRank | None = None,
    first_mask: int = 0,
    ready_1: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> Stream:
    """``stream`` plus what `project` says of ``x``, on its way into the norm of weight ``norm``.

    The rows of ``stream`` are overwritten; other arguments as there.
    """
    modules = low_rank.modules if low_rank else (len(weight_HI),)
    N, (H, I) = len(x_NI), weight_HI.shape  # noqa: E741
    tile = tile or tile_of(_parts(N, low_rank, first_mask), H, I, modules, x_NI.itemsize)
    squares_NP = torch.empty(
        (N, triton.cdiv(H, tile.outputs)), dtype=torch.float64, device=x_NI.device
    )
    onward = Stream(stream.x_NH, torch.empty_like(stream.x_NH), squares_NP, eps)
    _launch(
        x_NI,
        weight_HI,
        bias_H,
        onward.x_NH,
        low_rank=low_rank,
        first_mask=first_mask,
        ready_1=ready_1,
        onward=onward,
        norm_H=norm_H,
        tile=tile,
    )
    return onward


def _launch(
    x: torch.Tensor | Stream,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    y_NO: torch.Tensor,
    *,
    low_rank: LowRank | None,
    first_mask: int,
    ready_1: torch.Tensor | None,
    tile: Tile | None,
    gated: bool = False,
    addend_NO: torch.Tensor | None = None,
    order_N: torch.Tensor | None = None,
    heads: Heads | None = None,
    onward: Stream | None = None,
    norm_H: torch.Tensor | None = None,
) -> None:
    """Write ``y``; with ``onward``, whose rows it is, add to it and go on into ``norm``."""
    x_NI = x.scaled_NH if isinstance(x, Stream) else x
    N, (O, I) = len(x_NI), weight_OI.shape  # noqa: E741
    modules = low_rank.modules if low_rank and not gated else (O,)
    K, T, D = heads.k_NKTD.shape[1:] if heads else (0, 1, 2)
    parts = _parts(N, low_rank, first_mask)
    # No tile has two modules, or two heads.
    tile = tile or tile_of(parts, O, I, (*modules, D) if heads else modules, x_NI.itemsize)
    masks = N - first_mask if low_rank else 0
    takes_boxes = x_NI.itemsize == 2 and I % 8 == 0 and order_N is None
    boxed = tile.rows >= BOX_ROWS and takes_boxes and _has_boxes()
    box_outputs = tile.outputs // 2 if (gated or heads) and boxed else tile.outputs
    makers, z_MZ, merged_OI = 0, y_NO, None
    if low_rank and masks and low_rank.merged_OI is not None:
        merged_OI = low_rank.merged_OI
    elif low_rank and masks:
        Z = len(low_rank.A_ZI)
        makers = triton.cdiv(masks, tile.rows) * triton.cdiv(Z, box_outputs)
        z_MZ = torch.empty((masks, Z), dtype=x_NI.dtype, device=x_NI.device)
    if ready_1 is None:
        ready_1 = _nothing(x_NI.device) if makers == 0 else _zero(x_NI.device)
    x_box = weight_box = mask_box = None
    if boxed:
        x_box = TensorDescriptor.from_tensor(x_NI, [tile.rows, tile.inputs])
        weight_box = TensorDescriptor.from_tensor(weight_OI, [box_outputs, tile.inputs])
        if low_rank and masks:
            others = low_rank.A_ZI if merged_OI is None else merged_OI
            mask_box = TensorDescriptor.from_tensor(others, [box_outputs, tile.inputs])
    rank = low_rank.rank if low_rank else 1
    # Where the second and third module begin; one that is not there begins behind the end.
    second = modules[0] if len(modules) > 1 else O
    third = second + modules[1] if len(modules) > 2 else O
    squares = x.squares_NP.shape[1] if isinstance(x, Stream) else 0
    lines = triton.next_power_of_2(triton.cdiv(I * x_NI.itemsize, LINE.value))
    project_tile[(makers + tiles_of(parts, tile.rows) * triton.cdiv(O, tile.outputs),)](
        x_NI,
        x.squares_NP if isinstance(x, Stream) else x_NI,
        weight_OI,
        weight_OI if merged_OI is None else merged_OI,
        weight_OI if bias_O is None else bias_O,
        low_rank.A_ZI if low_rank else weight_OI,
        low_rank.B_OZ if low_rank else weight_OI,
        y_NO,
        z_MZ,
        ready_1,
        y_NO if addend_NO is None else addend_NO,
        0 if addend_NO is None else addend_NO.stride(0),
        ready_1 if order_N is None else order_N,
        y_NO if onward is None else onward.scaled_NH,
        y_NO if onward is None else onward.squares_NP,
        y_NO if norm_H is None else norm_H,
        N,
        first_mask,
        makers,
        squares,
        x.eps if isinstance(x, Stream) else 0.0,
        x_box,
        weight_box,
        mask_box,
        *_places_of(heads, y_NO),
        BOXED=boxed,
        HEADS=heads is not None,
        Q=O // D - 2 * K if heads else 0,
        K=K,
        D=D,
        T=T,
        SECOND=second,
        THIRD=third,
        BIAS=bias_O is not None,
        ADD=addend_NO is not None,
        ORDERED=order_N is not None,
        UPDATE=makers > 0,
        MERGED=merged_OI is not None,
        PARTS=triton.next_power_of_2(squares) if squares else 0,
        GATED=gated,
        ONWARD=onward is not None,
        I=I,
        O=O,
        LINES=lines if O * I < FETCHED else 0,
        RANK=rank,
        Z=z_MZ.shape[1],
        RANKS=max(16, triton.next_power_of_2(rank)),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap(),
    )


def _parts(N: int, low_rank: LowRank | None, first_mask: int) -> tuple[int, ...]:
    """Rows that share weights: all, or clean rows and mask rows that have merged ones."""
    if low_rank is None or low_rank.merged_OI is None:
        return (N,)
    return tuple(rows for rows in (first_mask, N - first_mask) if rows)


def _places_of(heads: Heads | None, nothing: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """What the kernel is told of the heads."""
    if heads is None:
        return (nothing,) * 5 + (0,) * 3
    k_NKTD = heads.k_NKTD
    places = heads.cos_ND, heads.sin_ND, heads.cells_N, k_NKTD, heads.v_NKTD
    return *places, *k_NKTD.stride()[:3]


@cache
def _has_boxes() -> bool:
    """Whether there is a copy engine for them; interpreted, they are tried out."""
    return triton.knobs.runtime.interpret or torch.cuda.get_device_capability() >= (9, 0)


def _zero(device: torch.device) -> torch.Tensor:
    return torch.full((1,), 0, dtype=torch.int32, device=device)


# What nobody uses.
_nothing = cache(_zero)
