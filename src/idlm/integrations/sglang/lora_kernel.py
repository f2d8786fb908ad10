"""The gated LoRA of one fused projection on a GPU: one kernel, over mask rows only.

In a small model most of a forward is the time between kernels: the four that plain PyTorch needs
(gather, two products, scatter) for each projection would double it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, OUTPUTS, INPUTS = 16, 32, 256


@triton.jit
def _add_update(  # type: ignore[no-untyped-def]
    y_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    rows_ptr,
    part_ptr,
    num_rows,
    x_stride,
    y_stride,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Of one tile of outputs, all in the module ``part``: ``y[rows] += (x[rows] A^T) B^T``."""
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_M = row_M < num_rows
    at_M = tl.load(rows_ptr + row_M, mask=real_M, other=0)
    first = tl.program_id(1) * OUTPUTS
    out_O = first + tl.arange(0, OUTPUTS)
    rank_Z = tl.arange(0, PADDED_RANK)
    real_Z = rank_Z < RANK
    a_row_Z = tl.load(part_ptr + tl.program_id(1)) * RANK + rank_Z
    down_MZ = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
    for start in range(0, inputs, INPUTS):
        in_I = start + tl.arange(0, INPUTS)
        real_I = in_I < inputs
        x_MI = tl.load(
            x_ptr + at_M[:, None] * x_stride + in_I[None, :],
            mask=real_M[:, None] & real_I[None, :],
            other=0.0,
        )
        a_IZ = tl.load(
            a_ptr + a_row_Z[None, :] * inputs + in_I[:, None],
            mask=real_Z[None, :] & real_I[:, None],
            other=0.0,
        )
        down_MZ += tl.dot(x_MI, a_IZ, input_precision="ieee")
    b_ZO = tl.load(
        b_ptr + out_O[None, :] * RANK + rank_Z[:, None],
        mask=real_Z[:, None] & (out_O < outputs)[None, :],
        other=0.0,
    )
    update_MO = tl.dot(down_MZ.to(b_ZO.dtype), b_ZO, input_precision="ieee")
    y_MO = y_ptr + at_M[:, None] * y_stride + out_O[None, :]
    real_MO = real_M[:, None] & (out_O < outputs)[None, :]
    tl.store(y_MO, tl.load(y_MO, mask=real_MO, other=0.0) + update_MO, mask=real_MO)


class LoraKernel:
    """A LoRA laid out for the kernel.

    Args:
        A_ZI: down-projections of the modules, one under the other.
        B: up-projections ``[out, rank]`` of the modules, with their scale.
    """

    def __init__(self, A_ZI: torch.Tensor, B: list[torch.Tensor]) -> None:
        self.rank = B[0].shape[1]
        self.A_ZI = A_ZI.contiguous()
        self.B_OZ = torch.cat(B).contiguous()
        if any(part.shape[0] % OUTPUTS for part in B):
            raise ValueError(f"a module's outputs are no multiple of {OUTPUTS}")
        # Which module each tile of outputs is of.
        self.part = torch.cat(
            [
                torch.full((part.shape[0] // OUTPUTS,), index, dtype=torch.int32)
                for index, part in enumerate(B)
            ]
        ).to(A_ZI.device)

    @staticmethod
    def takes(B: list[torch.Tensor]) -> bool:
        """Whether the modules' outputs divide into tiles."""
        return all(part.shape[0] % OUTPUTS == 0 for part in B)

    def add_to(self, y_FO: torch.Tensor, x_FI: torch.Tensor, rows_F: torch.Tensor) -> None:
        """Add the update to the rows ``rows`` (int64, each once) of ``y``, in place."""
        outputs, inputs = len(self.B_OZ), self.A_ZI.shape[1]
        grid = (triton.cdiv(len(rows_F), ROWS), outputs // OUTPUTS)
        _add_update[grid](
            y_FO,
            x_FI,
            self.A_ZI,
            self.B_OZ,
            rows_F,
            self.part,
            len(rows_F),
            x_FI.stride(0),
            y_FO.stride(0),
            inputs=inputs,
            outputs=outputs,
            RANK=self.rank,
            PADDED_RANK=max(16, triton.next_power_of_2(self.rank)),
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            INPUTS=INPUTS,
        )
