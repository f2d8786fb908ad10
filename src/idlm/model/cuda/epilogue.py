"""What follows a library's product in a decoder layer on CUDA: one launch up to the next product.

The library computes ``y = x W^T`` for all rows, `product`. What is left is small: the low-rank
update of the mask rows, the bias, the rest of the RMS norm that ``x`` is on its way into
(`stream`), and what the outputs are for: `gate`, `rotate` or `add`. All is summed up in fp32.
"""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.overlap import overlap, wait
from idlm.model.cuda.projection_kernel import shrink_of, squares_of
from idlm.model.cuda.rotation import Heads
from idlm.model.cuda.stream import Stream

LEAST = 16  # outputs and ranks that the matrix units want
# Ranks at a time, by bytes of an element: without matrix units, every product is an instruction.
STEP_RANKS = {2: 128, 4: 32}
# Rows and outputs of a program; one that makes pairs (gate and up, halves of a head) has both.
PAIR_ROWS, PAIRS, PAIR_WARPS = 64, 64, 8
ADD_ROWS, ADDED, ADD_WARPS = 16, 128, 4


@dataclass(frozen=True)
class Product:
    """The product of a projection and what is to be added to it.

    Attributes:
        y_NO: base product; rows may lie apart.
        bias_O: None: there is none.
        z_MZ: ``x A^T`` of the mask rows, which come last; rows may lie apart. None: no update.
        B_OZ: `LowRank`'s; None: no update.
    """

    y_NO: torch.Tensor
    bias_O: torch.Tensor | None
    z_MZ: torch.Tensor | None
    B_OZ: torch.Tensor | None

    @property
    def terms(self) -> tuple[torch.Tensor | int, ...]:
        """What every kernel is told first."""
        y_NO, N = self.y_NO, len(self.y_NO)
        base = y_NO, y_NO.stride(0)
        bias_O = y_NO if self.bias_O is None else self.bias_O
        if self.z_MZ is None or self.B_OZ is None:
            return *base, y_NO, 0, y_NO, bias_O, N, N
        update = self.z_MZ, self.z_MZ.stride(0), self.B_OZ
        return *base, *update, bias_O, N, N - len(self.z_MZ)

    @property
    def kind(self) -> dict[str, Any]:
        """Constants of every kernel."""
        rank = 0 if self.B_OZ is None else self.B_OZ.shape[1]
        step = min(max(LEAST, triton.next_power_of_2(rank)), STEP_RANKS[self.y_NO.itemsize])
        return {"BIAS": self.bias_O is not None, "RANK": rank, "STEP": step}


def product(
    x: torch.Tensor | Stream,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
    first_mask: int = 0,
) -> Product:
    """The library's products for ``x``, ``[N, I]`` or a stream; updated from row ``first_mask``."""
    rows_NI = x.scaled_NH if isinstance(x, Stream) else x
    O, N = len(weight_OI), len(rows_NI)  # noqa: E741
    # Before the norm, sums may be larger than numbers with five bits of exponent.
    wide = isinstance(x, Stream) and rows_NI.dtype is torch.float16

    def times(rows_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        if wide:
            return torch.mm(rows_NI, weight_OI.T, out_dtype=torch.float32)
        return torch.mm(rows_NI, weight_OI.T)

    if low_rank is None or first_mask == N:
        return Product(times(rows_NI, weight_OI), bias_O, None, None)
    if low_rank.stacked_SI is None:
        z_MZ = times(rows_NI[first_mask:], low_rank.A_ZI)
        return Product(times(rows_NI, weight_OI), bias_O, z_MZ, low_rank.B_OZ)
    y_NS = times(rows_NI, low_rank.stacked_SI)
    z_MZ = y_NS[first_mask:, O : O + len(low_rank.A_ZI)]
    return Product(y_NS[:, :O], bias_O, z_MZ, low_rank.B_OZ)


def gate(made: Product, stream: Stream) -> torch.Tensor:
    """``silu(gate) * up``, ``[N, O / 2]``, of the product of ``stream`` that is gate and up."""
    N, O = made.y_NO.shape  # noqa: E741
    inner_NI = stream.x_NH.new_empty(N, O // 2)
    _gate[(triton.cdiv(N, PAIR_ROWS), triton.cdiv(O // 2, PAIRS))](
        *made.terms,
        *_norm(stream),
        inner_NI,
        **made.kind,
        **_norm_kind(stream),
        O=O,
        ROWS=PAIR_ROWS,
        WIDTH=PAIRS,
        num_warps=PAIR_WARPS,
        **overlap(),
    )
    return inner_NI


def rotate(
    made: Product,
    stream: Stream,
    heads: Heads,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`rotation.rotate_and_append` of the product of ``stream`` that is the heads.

    Returns:
        ``[N, O]`` with the queries; keys and values are in the cache instead.
    """
    N, O = made.y_NO.shape  # noqa: E741
    K, T, D = heads.k_NKTD.shape[1:]
    qkv_NO = stream.x_NH.new_empty(N, O)
    _rotate[(triton.cdiv(N, PAIR_ROWS), O // D)](
        *made.terms,
        *_norm(stream),
        qkv_NO,
        heads.cos_ND,
        heads.sin_ND,
        heads.cells_N,
        qkv_NO if q_norm_D is None else q_norm_D,
        qkv_NO if k_norm_D is None else k_norm_D,
        eps,
        heads.k_NKTD,
        heads.v_NKTD,
        *heads.k_NKTD.stride()[:3],
        **made.kind,
        **_norm_kind(stream),
        NORM=q_norm_D is not None,
        Q=O // D - 2 * K,
        K=K,
        D=D,
        T=T,
        ROWS=PAIR_ROWS,
        HALF=max(LEAST, triton.next_power_of_2(D // 2)),
        num_warps=PAIR_WARPS,
        **overlap(),
    )
    return qkv_NO


def add(made: Product, stream: Stream, norm_H: torch.Tensor, eps: float) -> Stream:
    """``stream`` plus the product, on its way into the norm of weight ``norm``.

    The rows of ``stream`` are overwritten.
    """
    N, H = made.y_NO.shape
    tiles = triton.cdiv(H, ADDED)
    squares_NP = torch.empty((N, tiles), dtype=torch.float64, device=made.y_NO.device)
    onward = Stream(stream.x_NH, torch.empty_like(stream.x_NH), squares_NP, eps)
    _add[(triton.cdiv(N, ADD_ROWS), tiles)](
        *made.terms,
        norm_H,
        onward.x_NH,
        onward.scaled_NH,
        squares_NP,
        **made.kind,
        H=H,
        ROWS=ADD_ROWS,
        OUTPUTS=ADDED,
        num_warps=ADD_WARPS,
        **overlap(),
    )
    return onward


def _norm(stream: Stream) -> tuple[torch.Tensor | int | float, ...]:
    return stream.squares_NP, stream.squares_NP.shape[1], stream.eps


def _norm_kind(stream: Stream) -> dict[str, int]:
    parts = stream.squares_NP.shape[1]
    return {"PARTS": triton.next_power_of_2(parts), "I": stream.x_NH.shape[1]}


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    y_ptr,
    y_stride,
    z_ptr,
    z_stride,
    B_ptr,
    first_row,
    N,
    first_mask,
    outputs,
    real,
    module,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Base product and update of these rows and outputs of one module, fp32; 0 if not there."""
    rows = first_row + tl.arange(0, ROWS)
    there = (rows < N)[:, None] & real[None, :]
    y = tl.load(y_ptr + rows[:, None] * y_stride + outputs[None, :], mask=there, other=0.0)
    sums = y.to(tl.float32)
    if RANK:  # noqa: SIM102  # a constant: without an update the rest is not compiled
        if first_row + ROWS > first_mask:  # there are masks among them
            masked = (rows >= first_mask) & (rows < N)
            z_rows_ptr = z_ptr + (rows - first_mask)[:, None] * z_stride + module * RANK
            for first in tl.range(0, RANK, STEP, num_stages=1):
                ranks = first + tl.arange(0, STEP)
                B = tl.load(
                    B_ptr + outputs[None, :] * RANK + ranks[:, None],
                    mask=(ranks < RANK)[:, None] & real[None, :],
                    other=0.0,
                )
                z = tl.load(
                    z_rows_ptr + ranks[None, :],
                    mask=masked[:, None] & (ranks < RANK)[None, :],
                    other=0.0,
                )
                sums = tl.dot(z, B.to(z.dtype), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["N", "first_mask", "parts"])
def _gate(  # type: ignore[no-untyped-def]
    y_ptr,
    y_stride,
    z_ptr,
    z_stride,
    B_ptr,
    bias_ptr,
    N,
    first_mask,
    squares_ptr,
    parts,
    eps,
    inner_ptr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some rows of some outputs behind the gate."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    width: tl.constexpr = O // 2
    outputs = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = outputs < width
    wait(OVERLAP)
    squares = squares_of(squares_ptr, rows, rows < N, parts, PARTS)
    gate = _sums(
        y_ptr,
        y_stride,
        z_ptr,
        z_stride,
        B_ptr,
        first_row,
        N,
        first_mask,
        outputs,
        real,
        0,
        RANK,
        STEP,
        ROWS,
    )
    others = outputs + width
    up = _sums(
        y_ptr,
        y_stride,
        z_ptr,
        z_stride,
        B_ptr,
        first_row,
        N,
        first_mask,
        others,
        real,
        1,
        RANK,
        STEP,
        ROWS,
    )
    shrink = shrink_of(squares, eps, I)
    gate *= shrink
    up *= shrink
    if BIAS:
        gate += tl.load(bias_ptr + outputs, mask=real, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + others, mask=real, other=0.0).to(tl.float32)[None, :]
    inner = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(
        inner_ptr + rows[:, None] * width + outputs[None, :],
        inner.to(inner_ptr.dtype.element_ty),
        mask=(rows < N)[:, None] & real[None, :],
    )


@triton.jit(do_not_specialize=["N", "first_mask", "parts"])
def _rotate(  # type: ignore[no-untyped-def]
    y_ptr,
    y_stride,
    z_ptr,
    z_stride,
    B_ptr,
    bias_ptr,
    N,
    first_mask,
    squares_ptr,
    parts,
    eps,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cells_ptr,
    q_norm_ptr,
    k_norm_ptr,
    head_eps,
    k_cache_ptr,
    v_cache_ptr,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    NORM: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some rows of one head."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    there = rows < N
    head = tl.program_id(1)
    module = (head >= Q).to(tl.int32) + (head >= Q + K).to(tl.int32)
    half: tl.constexpr = D // 2
    lane = tl.arange(0, HALF)
    real = lane < half
    outputs = head * D + lane
    kind = qkv_ptr.dtype.element_ty
    wait(OVERLAP)
    squares = squares_of(squares_ptr, rows, rows < N, parts, PARTS)
    angle = rows[:, None] * D + lane[None, :]
    written = there[:, None] & real[None, :]
    # The halves of cos are equal; sin carries the sign of its first half.
    cos = tl.load(cos_ptr + angle, mask=written, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle + half, mask=written, other=0.0).to(tl.float32)
    x1 = _sums(
        y_ptr,
        y_stride,
        z_ptr,
        z_stride,
        B_ptr,
        first_row,
        N,
        first_mask,
        outputs,
        real,
        module,
        RANK,
        STEP,
        ROWS,
    )
    others = outputs + half
    x2 = _sums(
        y_ptr,
        y_stride,
        z_ptr,
        z_stride,
        B_ptr,
        first_row,
        N,
        first_mask,
        others,
        real,
        module,
        RANK,
        STEP,
        ROWS,
    )
    shrink = shrink_of(squares, eps, I)
    x1 *= shrink
    x2 *= shrink
    if BIAS:
        x1 += tl.load(bias_ptr + outputs, mask=real, other=0.0).to(tl.float32)[None, :]
        x2 += tl.load(bias_ptr + others, mask=real, other=0.0).to(tl.float32)[None, :]
    # Rounded first: so it comes out as if a launch of its own had rotated what is stored.
    x1 = x1.to(kind).to(tl.float32)
    x2 = x2.to(kind).to(tl.float32)
    if head < Q + K:
        if NORM:
            norm_ptr = q_norm_ptr
            if head >= Q:
                norm_ptr = k_norm_ptr
            head_squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
            head_shrink = (1.0 / tl.sqrt(head_squares / D + head_eps))[:, None]
            x1 *= head_shrink * tl.load(norm_ptr + lane, mask=real, other=0.0).to(tl.float32)
            x2 *= head_shrink * tl.load(norm_ptr + half + lane, mask=real, other=0.0).to(tl.float32)
        y1 = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = y1
    out_ptr = qkv_ptr + rows[:, None] * ((Q + 2 * K) * D) + outputs[None, :]
    if head >= Q:
        index = tl.load(cells_ptr + rows, mask=there, other=0)
        cell = index // T * cache_stride_n + index % T * cache_stride_t
        cache_ptr = k_cache_ptr + (head - Q) * cache_stride_h
        if head >= Q + K:
            cache_ptr = v_cache_ptr + (head - Q - K) * cache_stride_h
        out_ptr = cache_ptr + cell[:, None] + lane[None, :]
    tl.store(out_ptr, x1.to(kind), mask=written)
    tl.store(out_ptr + half, x2.to(kind), mask=written)


@triton.jit(do_not_specialize=["N", "first_mask"])
def _add(  # type: ignore[no-untyped-def]
    y_ptr,
    y_stride,
    z_ptr,
    z_stride,
    B_ptr,
    bias_ptr,
    N,
    first_mask,
    norm_ptr,
    x_ptr,
    scaled_ptr,
    squares_ptr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some rows of some outputs, added to the stream."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    real = outputs < H
    scale = tl.load(norm_ptr + outputs, mask=real, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    wait(OVERLAP)
    cells = rows[:, None] * H + outputs[None, :]
    written = (rows < N)[:, None] & real[None, :]
    before = tl.load(x_ptr + cells, mask=written, other=0.0)
    x = _sums(
        y_ptr,
        y_stride,
        z_ptr,
        z_stride,
        B_ptr,
        first_row,
        N,
        first_mask,
        outputs,
        real,
        0,
        RANK,
        STEP,
        ROWS,
    )
    if BIAS:
        x += tl.load(bias_ptr + outputs, mask=real, other=0.0).to(tl.float32)[None, :]
    # What follows sees the stream as it is stored.
    x = (x + before.to(tl.float32)).to(kind).to(tl.float32)
    tl.store(x_ptr + cells, x.to(kind), mask=written)
    tl.store(scaled_ptr + cells, (x * scale[None, :]).to(kind), mask=written)
    # Sums of squares of bf16 are exact in fp64: no tile's width shows in them.
    squares = tl.sum((x * x).to(tl.float64), 1)
    tl.store(squares_ptr + rows * tl.cdiv(H, OUTPUTS) + tile, squares, mask=rows < N)
