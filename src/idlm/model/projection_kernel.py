"""Triton kernel of a projection in a decoder layer: all that happens between two of its inputs.

One launch computes ``y = f(x) W^T`` for all rows and ``+ (f(x) A^T) B^T`` for the mask rows; ``f``
is nothing, the RMS norm before the projection, or the SwiGLU before it, and the residual stream is
added on the way out. Every program needs ``f(x) A^T`` of its rows and makes it beside its part of
the base product, from the same tiles of ``x``: no second launch, no pass over ``y``, and A is read
from the cache on the chip.
"""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Rows, outputs and inputs of a tile; the matrix units want 16 rows at least.
MIN_ROWS, MAX_ROWS = 16, 64
INPUTS = 64
OUTPUTS = 32


@dataclass(frozen=True)
class LowRank:
    """The update of a fused projection, for inference.

    Attributes:
        A_ZI: ``rank`` rows for each module, one module after the other.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module, multiples of `OUTPUTS` but for the last.
    """

    A_ZI: torch.Tensor
    B_OZ: torch.Tensor
    modules: tuple[int, ...]


def project(
    x_BRI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    low_rank: LowRank | None = None,
    num_masks: int = 0,
    norm_I: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual_BRO: torch.Tensor | None = None,
) -> torch.Tensor:
    """``f(x) @ weight.T + bias``, with the update on the last ``num_masks`` rows of each request.

    Args:
        x_BRI: rows of each request, dense; of one dtype with all else. ``[B, R, 2 * I]``, gate
            first, with ``swiglu``.
        norm_I: weight of the RMS norm of ``x``; None: none.
        residual_BRO: added to the result and overwritten by it.
    Returns:
        ``[B, R, O]``; sums are made in fp32 and rounded once.
    """
    B, R, _ = x_BRI.shape
    O, I = weight_OI.shape  # noqa: E741
    y_BRO = residual_BRO
    if y_BRO is None:
        y_BRO = torch.empty((B, R, O), dtype=x_BRI.dtype, device=x_BRI.device)
    updates = low_rank is not None and num_masks > 0
    rank, modules = (low_rank.B_OZ.shape[1], low_rank.modules) if low_rank else (1, (O,))
    rows = min(MAX_ROWS, max(MIN_ROWS, triton.next_power_of_2(B * R)))
    # Where the second and third module begin; one that is not there begins behind the end.
    second = modules[0] if len(modules) > 1 else O
    third = second + modules[1] if len(modules) > 2 else O
    _project[(triton.cdiv(O, OUTPUTS), triton.cdiv(B * R, rows))](
        x_BRI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        low_rank.A_ZI if low_rank else weight_OI,
        low_rank.B_OZ if low_rank else weight_OI,
        weight_OI if norm_I is None else norm_I,
        y_BRO,
        B * R,
        R,
        R - num_masks,
        second,
        third,
        eps,
        BIAS=bias_O is not None,
        UPDATE=updates,
        NORM=norm_I is not None,
        SWIGLU=swiglu,
        RESIDUAL=residual_BRO is not None,
        I=I,
        O=O,
        RANK=rank,
        Z=max(16, triton.next_power_of_2(rank)),
        ROWS=rows,
        OUTPUTS=OUTPUTS,
        INPUTS=INPUTS,
    )
    return y_BRO


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    norm_ptr,
    y_ptr,
    N,
    R,
    first_mask,
    second,
    third,
    eps,
    BIAS: tl.constexpr,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    RANK: tl.constexpr,
    Z: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A tile of rows and outputs."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    ranks = tl.arange(0, Z)
    real_row, real_output, real_rank = rows < N, outputs < O, ranks < RANK
    x_rows_ptr = x_ptr + rows[:, None].to(tl.int64) * (2 * I if SWIGLU else I)
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        for first in range(0, I, INPUTS):
            inputs = first + tl.arange(0, INPUTS)
            there = real_row[:, None] & (inputs < I)[None, :]
            x = tl.load(x_rows_ptr + inputs[None, :], mask=there, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        shrink = 1.0 / tl.sqrt(squares / I + eps)
    if UPDATE:
        # All outputs of a tile belong to one module.
        module = (tl.program_id(0) * OUTPUTS >= second).to(tl.int32)
        module += (tl.program_id(0) * OUTPUTS >= third).to(tl.int32)
        z = tl.zeros([ROWS, Z], tl.float32)
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, I, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        real_input = inputs < I
        there = real_row[:, None] & real_input[None, :]
        x = tl.load(x_rows_ptr + inputs[None, :], mask=there, other=0.0)
        if NORM:
            scale = tl.load(norm_ptr + inputs, mask=real_input, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * shrink[:, None] * scale[None, :]).to(x_ptr.dtype.element_ty)
        if SWIGLU:
            up = tl.load(x_rows_ptr + I + inputs[None, :], mask=there, other=0.0).to(tl.float32)
            gate = x.to(tl.float32)
            x = (gate / (1.0 + tl.exp(-gate)) * up).to(x_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + outputs[None, :].to(tl.int64) * I + inputs[:, None],
            mask=real_output[None, :] & real_input[:, None],
            other=0.0,
        )
        y = tl.dot(x, weight, y, input_precision="ieee")
        if UPDATE:
            A = tl.load(
                A_ptr + (module * RANK + ranks[None, :]) * I + inputs[:, None],
                mask=real_rank[None, :] & real_input[:, None],
                other=0.0,
            )
            z = tl.dot(x, A, z, input_precision="ieee")
    if UPDATE:
        B = tl.load(
            B_ptr + outputs[None, :] * RANK + ranks[:, None],
            mask=real_output[None, :] & real_rank[:, None],
            other=0.0,
        )
        masked = real_row & (rows % R >= first_mask)
        z = tl.where(masked[:, None], z, 0.0).to(B.dtype)
        y = tl.dot(z, B, y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + outputs, mask=real_output, other=0.0).to(tl.float32)[None, :]
    y_tile_ptr = y_ptr + rows[:, None].to(tl.int64) * O + outputs[None, :]
    written = real_row[:, None] & real_output[None, :]
    if RESIDUAL:
        y += tl.load(y_tile_ptr, mask=written, other=0.0).to(tl.float32)
    tl.store(y_tile_ptr, y.to(y_ptr.dtype.element_ty), mask=written)
