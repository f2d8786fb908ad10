"""The residual stream between two projections, on its way into a norm.

A norm costs nothing there: who writes the stream also writes it times the next norm's weight, and
the sums of squares of what it wrote. What is left is one factor for each row of the product.
"""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait


@dataclass(frozen=True)
class Stream:
    """Rows of the residual stream on their way into the RMS norm that comes next.

    Attributes:
        x_NH: the rows.
        scaled_NH: the rows times the norm's weight.
        squares_NP: sums of squares of the rows' parts, fp64: the rest of the norm.
        eps: the norm's.
    """

    x_NH: torch.Tensor
    scaled_NH: torch.Tensor
    squares_NP: torch.Tensor
    eps: float

    def normed(self) -> torch.Tensor:
        """``[N, H]``: the rows behind the norm."""
        N, H = self.x_NH.shape
        out_NH = torch.empty_like(self.x_NH)
        P = self.squares_NP.shape[1]
        _divide[(N,)](
            self.scaled_NH,
            self.squares_NP,
            out_NH,
            P,
            self.eps,
            H=H,
            WIDTH=triton.next_power_of_2(H),
            PARTS=triton.next_power_of_2(P),
            **overlap(),
        )
        return out_NH


def begin(x_NH: torch.Tensor, norm_H: torch.Tensor, eps: float) -> Stream:
    """A stream of its own that is ``x``, dense, and goes into the norm of weight ``norm``."""
    N, H = x_NH.shape
    own_NH, scaled_NH = torch.empty_like(x_NH), torch.empty_like(x_NH)
    squares_N1 = torch.empty((N, 1), dtype=torch.float64, device=x_NH.device)
    _begin[(N,)](
        x_NH,
        norm_H,
        own_NH,
        scaled_NH,
        squares_N1,
        H=H,
        WIDTH=triton.next_power_of_2(H),
        **overlap(),
    )
    return Stream(own_NH, scaled_NH, squares_N1, eps)


@triton.jit
def _begin(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    own_ptr,
    scaled_ptr,
    squares_ptr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row of a stream."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    wait(OVERLAP)
    x = tl.load(x_ptr + row * H + lane, mask=lane < H, other=0.0)
    scale = tl.load(norm_ptr + lane, mask=lane < H, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    tl.store(own_ptr + row * H + lane, x, mask=lane < H)
    tl.store(
        scaled_ptr + row * H + lane, (wide * scale).to(scaled_ptr.dtype.element_ty), mask=lane < H
    )
    tl.store(squares_ptr + row, tl.sum((wide * wide).to(tl.float64), 0))


@triton.jit(do_not_specialize=["parts"])
def _divide(  # type: ignore[no-untyped-def]
    scaled_ptr,
    squares_ptr,
    out_ptr,
    parts,
    eps,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row behind its norm."""
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    lane, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    squares = tl.load(squares_ptr + row * parts + part, mask=part < parts, other=0.0)
    mean = tl.sum(squares.to(tl.float64), 0).to(tl.float32) / H
    scaled = tl.load(scaled_ptr + row * H + lane, mask=lane < H, other=0.0).to(tl.float32)
    out = scaled * (1.0 / tl.sqrt(mean + eps))
    tl.store(out_ptr + row * H + lane, out.to(out_ptr.dtype.element_ty), mask=lane < H)
