"""Triton kernel of a projection in a decoder layer: all that happens between two of its inputs.

One launch computes ``y = f(x) W^T`` for all rows and ``+ (f(x) A^T) B^T`` for the mask rows, which
come last; ``f`` is nothing or the RMS norm before the projection. On the way out, the residual
stream is added, or the two halves of a gated MLP become one.

The first programs make ``z = f(x) A^T`` of the mask rows, once; the others make a tile of the base
product each, and those that hold mask rows wait at their very end for ``z``, which has long been
there. So clean rows pay nothing, and there is neither a second launch nor a second pass over ``y``.
"""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

# The matrix units want 16 rows at least.
MIN_ROWS = 16
SHARED_BYTES = 65_536  # of a program; every GPU in question has more


@dataclass(frozen=True)
class LowRank:
    """The update of a fused projection, for inference.

    Attributes:
        A_ZI: ``rank`` rows for each module, one module after the other.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module.
    """

    A_ZI: torch.Tensor
    B_OZ: torch.Tensor
    modules: tuple[int, ...]


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows, outputs and inputs of a program's step; warps and stages."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def tile_of(
    rows: int, outputs: int, inputs: int, modules: tuple[int, ...], itemsize: int = 2
) -> Tile:
    """The tile for a product of so many rows, outputs and inputs.

    All outputs of a tile belong to one module.
    """
    height = min(64, max(MIN_ROWS, triton.next_power_of_2(rows)))
    width = 64 if outputs >= 8192 or height > 32 else 32
    if height == MIN_ROWS and outputs < 2048:
        width = 16
    if len(modules) > 1:
        width = min(width, gcd(*modules) & -gcd(*modules))
    # Some programs have to fit beside each other, and few rows need long steps.
    step = 64 if height == 64 or itemsize > 2 or inputs % 128 else 128
    stages = min(8, triton.cdiv(inputs, step), SHARED_BYTES // ((height + width) * step * itemsize))
    return Tile(height, width, step, 4, max(2, stages))


def _zero(device: torch.device) -> torch.Tensor:
    return torch.full((1,), 0, dtype=torch.int32, device=device)


# What nobody uses.
_nothing = cache(_zero)


def project(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    low_rank: LowRank | None = None,
    first_mask: int = 0,
    ready_1: torch.Tensor | None = None,
    norm_I: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    addend_NO: torch.Tensor | None = None,
    residual_NO: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``f(x) @ weight.T + bias``, with the update on the rows from ``first_mask``.

    Args:
        x_NI: dense; of one dtype with all else.
        ready_1: one int32 that is 0 and is used up; None: a new one.
        norm_I: weight of the RMS norm of ``x``; None: none.
        addend_NO: added to the outputs; rows may lie apart.
        gated: the outputs are gate and up; the result is ``silu(gate) * up``, ``[N, O / 2]``.
        residual_NO: added to the result and overwritten by it.
    Returns:
        ``[N, O]``; sums are made in fp32 and rounded once.
    """
    N, (O, I) = len(x_NI), weight_OI.shape  # noqa: E741
    y_NO = residual_NO
    if y_NO is None:
        y_NO = torch.empty((N, O // 2 if gated else O), dtype=x_NI.dtype, device=x_NI.device)
    modules = low_rank.modules if low_rank and not gated else (O,)
    tile = tile or tile_of(N, O, I, modules, x_NI.itemsize)
    masks = N - first_mask if low_rank else 0
    row_tiles, makers, z_MZ = triton.cdiv(N, tile.rows), 0, y_NO
    if low_rank and masks:
        Z = len(low_rank.A_ZI)
        makers = triton.cdiv(masks, tile.rows) * triton.cdiv(Z, tile.outputs)
        z_MZ = torch.empty((masks, Z), dtype=x_NI.dtype, device=x_NI.device)
    if ready_1 is None:
        ready_1 = _nothing(x_NI.device) if makers == 0 else _zero(x_NI.device)
    rank = low_rank.B_OZ.shape[1] if low_rank else 1
    # Where the second and third module begin; one that is not there begins behind the end.
    second = modules[0] if len(modules) > 1 else O
    third = second + modules[1] if len(modules) > 2 else O
    _project[(makers + row_tiles * triton.cdiv(O, tile.outputs),)](
        x_NI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        low_rank.A_ZI if low_rank else weight_OI,
        low_rank.B_OZ if low_rank else weight_OI,
        weight_OI if norm_I is None else norm_I,
        y_NO,
        z_MZ,
        ready_1,
        y_NO if addend_NO is None else addend_NO,
        0 if addend_NO is None else addend_NO.stride(0),
        N,
        first_mask,
        makers,
        eps,
        SECOND=second,
        THIRD=third,
        BIAS=bias_O is not None,
        ADD=addend_NO is not None,
        UPDATE=makers > 0,
        NORM=norm_I is not None,
        GATED=gated,
        RESIDUAL=residual_NO is not None,
        I=I,
        O=O,
        RANK=rank,
        Z=z_MZ.shape[1],
        RANKS=max(16, triton.next_power_of_2(rank)),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_NO


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    norm_ptr,
    rows,
    outputs,
    eps,
    NORM: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``f(x) weight^T`` of these rows and outputs, fp32."""
    x_rows_ptr = x_ptr + rows[:, None].to(tl.int64) * I
    weight_rows_ptr = weight_ptr + outputs[None, :].to(tl.int64) * I
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, I, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        if I % INPUTS == 0:
            x = tl.load(x_rows_ptr + inputs[None, :])
            weight = tl.load(weight_rows_ptr + inputs[:, None])
        else:
            x = tl.load(x_rows_ptr + inputs[None, :], mask=(inputs < I)[None, :], other=0.0)
            weight = tl.load(
                weight_rows_ptr + inputs[:, None], mask=(inputs < I)[:, None], other=0.0
            )
        if NORM:
            wide = x.to(tl.float32)
            scale = tl.load(norm_ptr + inputs, mask=inputs < I, other=0.0).to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * scale[None, :]).to(x_ptr.dtype.element_ty)
        y = tl.dot(x, weight, y, input_precision="ieee")
    if NORM:
        # What all inputs of a row are divided by can wait until they are summed up.
        y = y * (1.0 / tl.sqrt(squares / I + eps))[:, None]
    return y


@triton.jit(do_not_specialize=["addend_stride", "N", "first_mask", "makers"])
def _project(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    norm_ptr,
    y_ptr,
    z_ptr,
    ready_ptr,
    addend_ptr,
    addend_stride,
    N,
    first_mask,
    makers,
    eps,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    RANK: tl.constexpr,
    Z: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A tile of ``z``, then a tile of ``y``."""
    program = tl.program_id(0)
    # A row or output that is not there stands for the last one; what it gives is not stored.
    if program < makers:
        mask_tiles = tl.cdiv(N - first_mask, ROWS)
        masks = (program % mask_tiles) * ROWS + tl.arange(0, ROWS)
        ranks = (program // mask_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
        rows = tl.minimum(first_mask + masks, N - 1)
        z = _product(
            x_ptr,
            A_ptr,
            norm_ptr,
            rows,
            tl.minimum(ranks, Z - 1),
            eps,
            NORM,
            I,
            ROWS,
            OUTPUTS,
            INPUTS,
        )
        there = (first_mask + masks < N)[:, None] & (ranks < Z)[None, :]
        tl.store(
            z_ptr + masks[:, None] * Z + ranks[None, :], z.to(z_ptr.dtype.element_ty), mask=there
        )
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        tl.atomic_add(ready_ptr, 1, sem="release")
    else:
        row_tiles = tl.cdiv(N, ROWS)
        first_row = ((program - makers) % row_tiles) * ROWS
        tile = (program - makers) // row_tiles
        rows = first_row + tl.arange(0, ROWS)
        if GATED:
            # A tile holds gate and up of the same outputs, one beside the other.
            pair = tl.arange(0, OUTPUTS)
            outputs = tile * (OUTPUTS // 2) + pair // 2 + (pair % 2) * (O // 2)
        else:
            outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        safe_outputs = tl.minimum(outputs, O - 1)
        y = _product(
            x_ptr,
            weight_ptr,
            norm_ptr,
            tl.minimum(rows, N - 1),
            safe_outputs,
            eps,
            NORM,
            I,
            ROWS,
            OUTPUTS,
            INPUTS,
        )
        if UPDATE:  # noqa: SIM102  # a constant: without updates the rest is not compiled
            if first_row + ROWS > first_mask:
                while tl.atomic_add(ready_ptr, 0, sem="acquire") < makers:
                    pass
                ranks = tl.arange(0, RANKS)
                masks = rows - first_mask
                masked = (masks >= 0) & (rows < N)
                z_rows_ptr = z_ptr + masks[:, None] * Z + ranks[None, :]
                real_z = masked[:, None] & (ranks < RANK)[None, :]
                B = tl.load(
                    B_ptr + safe_outputs[None, :] * RANK + ranks[:, None],
                    mask=(ranks < RANK)[:, None],
                    other=0.0,
                )
                if GATED:
                    gate = (tl.arange(0, OUTPUTS) % 2 == 0)[None, :]
                    z = tl.load(z_rows_ptr, mask=real_z, other=0.0)
                    y = tl.dot(z, tl.where(gate, B, 0.0), y, input_precision="ieee")
                    z = tl.load(z_rows_ptr + RANK, mask=real_z, other=0.0)
                    y = tl.dot(z, tl.where(gate, 0.0, B), y, input_precision="ieee")
                else:
                    module = (tile * OUTPUTS >= SECOND).to(tl.int32)
                    module += (tile * OUTPUTS >= THIRD).to(tl.int32)
                    z = tl.load(z_rows_ptr + module * RANK, mask=real_z, other=0.0)
                    y = tl.dot(z, B, y, input_precision="ieee")
        if BIAS:
            y += tl.load(bias_ptr + safe_outputs).to(tl.float32)[None, :]
        if ADD:
            addend_ptrs = addend_ptr + rows[:, None].to(tl.int64) * addend_stride
            there = (rows < N)[:, None] & (outputs < O)[None, :]
            y += tl.load(addend_ptrs + outputs[None, :], mask=there, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(y, [ROWS, OUTPUTS // 2, 2]))
            y = gate / (1.0 + tl.exp(-gate)) * up
            outputs = tile * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            width = O // 2
        else:
            width = O
        y_tile_ptr = y_ptr + rows[:, None].to(tl.int64) * width + outputs[None, :]
        written = (rows < N)[:, None] & (outputs < width)[None, :]
        if RESIDUAL:
            y += tl.load(y_tile_ptr, mask=written, other=0.0).to(tl.float32)
        tl.store(y_tile_ptr, y.to(y_ptr.dtype.element_ty), mask=written)
