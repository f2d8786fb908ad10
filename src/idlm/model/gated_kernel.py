"""Triton kernel of a linear layer whose low-rank update applies to the last rows of each request.

One launch computes ``y = x W^T`` for all rows and ``+ scale (x A^T) B^T`` for the mask rows. Every
program needs ``x A^T`` of its rows and makes it beside its part of the base product, from the same
tiles of ``x``: no second launch, no pass over ``y``, and A is read from the cache on the chip.
"""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

# Rows, outputs and inputs of a tile; the matrix units want 16 rows at least.
MIN_ROWS, MAX_ROWS = 16, 64
INPUTS = 64
OUTPUTS = 32


def gated_linear(
    x_BRI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    A_ZI: torch.Tensor,
    B_OZ: torch.Tensor,
    modules: tuple[int, ...],
    num_masks: int,
) -> torch.Tensor:
    """``x @ weight.T + bias``, plus ``(x @ A.T) @ B.T`` on the last ``num_masks`` rows.

    Args:
        x_BRI: rows of each request, dense in the last dimension; of one dtype with all else.
        weight_OI: the modules of a fused projection, one after the other.
        A_ZI: ``rank`` rows for each module.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module, multiples of `OUTPUTS`.
        num_masks: rows at the end of each request that get the update.
    Returns:
        ``[B, R, O]``; products are summed in fp32 and rounded once.
    """
    B, R, I = x_BRI.shape  # noqa: E741
    O, rank = B_OZ.shape  # noqa: E741
    x_NI = x_BRI.reshape(B * R, I)
    y_BRO = torch.empty((B, R, O), dtype=x_BRI.dtype, device=x_BRI.device)
    rows = min(MAX_ROWS, max(MIN_ROWS, triton.next_power_of_2(B * R)))
    # Where the second and third module begin; a module that is not there begins behind the end.
    second = modules[0] if len(modules) > 1 else O
    third = second + modules[1] if len(modules) > 2 else O
    _gated_linear[(triton.cdiv(O, OUTPUTS), triton.cdiv(B * R, rows))](
        x_NI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        A_ZI,
        B_OZ,
        y_BRO,
        B * R,
        R,
        R - num_masks,
        x_NI.stride(0),
        second,
        third,
        BIAS=bias_O is not None,
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
def _gated_linear(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    y_ptr,
    N,
    R,
    first_mask,
    x_stride,
    second,
    third,
    BIAS: tl.constexpr,
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
    masked = real_row & (rows % R >= first_mask)
    # All outputs of a tile belong to one module.
    module = (tl.program_id(0) * OUTPUTS >= second).to(tl.int32)
    module += (tl.program_id(0) * OUTPUTS >= third).to(tl.int32)
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    z = tl.zeros([ROWS, Z], tl.float32)
    for first in range(0, I, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        real_input = inputs < I
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_stride + inputs[None, :],
            mask=real_row[:, None] & real_input[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + outputs[None, :] * I + inputs[:, None],
            mask=real_output[None, :] & real_input[:, None],
            other=0.0,
        )
        A = tl.load(
            A_ptr + (module * RANK + ranks[None, :]) * I + inputs[:, None],
            mask=real_rank[None, :] & real_input[:, None],
            other=0.0,
        )
        y = tl.dot(x, weight, y, input_precision="ieee")
        z = tl.dot(x, A, z, input_precision="ieee")
    B = tl.load(
        B_ptr + outputs[None, :] * RANK + ranks[:, None],
        mask=real_output[None, :] & real_rank[:, None],
        other=0.0,
    )
    z = tl.where(masked[:, None], z, 0.0).to(B.dtype)
    y = tl.dot(z, B, y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + outputs, mask=real_output, other=0.0)[None, :]
    tl.store(
        y_ptr + rows[:, None].to(tl.int64) * O + outputs[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=real_row[:, None] & real_output[None, :],
    )
