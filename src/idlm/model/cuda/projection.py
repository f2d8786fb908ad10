"""Triton kernel of a projection in a decoder layer: all that happens between two of its inputs.

One launch computes ``y = f(x) W^T`` for all rows and ``+ (f(x) A^T) B^T`` for the mask rows, which
come last (in memory, or in an order that is given); ``f`` is nothing or the RMS norm before the
projection. On the way out, the two halves of a gated MLP become one, or the result is added to the
residual stream.

Where the mask rows have weights of their own (``W + B A``), their tiles read those. Otherwise the
first programs make ``z = f(x) A^T`` of the mask rows, once; the others make a tile of the base
product each, and those that hold mask rows wait at their very end for ``z``. So clean rows pay
nothing, and there is neither a second launch nor a second pass over ``y``.

A norm costs nothing here: who writes the stream also writes it times the next norm's weight, and
the sums of squares of what it wrote. What is left is one factor for each row of the product.
"""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

# The matrix units want 16 rows at least.
MIN_ROWS = 16
FEW_ROWS = tl.constexpr(MIN_ROWS)
# Memory of a program that shares a multiprocessor with others, and of one that need not.
SHARED_BYTES, ALONE_BYTES = 65_536, 131_072
PROGRAMS = 132  # multiprocessors, about


@dataclass(frozen=True)
class LowRank:
    """The update of a fused projection, for inference.

    Attributes:
        A_ZI: ``rank`` rows for each module, one module after the other.
        B_OZ: ``[O, rank]``, the modules one after the other, times the update's scale.
        modules: output width of each module.
        merged_OI: base weight and update together; None: not made.
    """

    A_ZI: torch.Tensor
    B_OZ: torch.Tensor
    modules: tuple[int, ...]
    merged_OI: torch.Tensor | None = None

    def merged(self, base_OI: torch.Tensor) -> "LowRank":
        """The same with ``merged_OI``, summed in fp32."""
        whole_OI = base_OI.to(torch.float32, copy=True)
        rank = self.B_OZ.shape[1]
        for rows_OI, A_rI, B_Or in zip(
            whole_OI.split(self.modules),
            self.A_ZI.split(rank),
            self.B_OZ.split(self.modules),
            strict=True,
        ):
            rows_OI.addmm_(B_Or.float(), A_rI.float())
        return replace(self, merged_OI=whole_OI.to(base_OI.dtype))


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
    """The tile for a product of so many rows, outputs and inputs (docs/benchmarks.md, "Tiles").

    All outputs of a tile belong to one module.
    """
    heavy = outputs * inputs >= 1 << 22  # its bytes are what it costs; else, that all wait
    few = rows <= 16 or (rows <= 32 and not heavy)
    if few:
        height, width, warps = MIN_ROWS, 32 if outputs >= (8192 if heavy else 2048) else 16, 2
    elif rows <= 32 or (rows <= 64 and outputs < 2048):
        height, width, warps = 32, 32 if heavy else 16, 4
    elif rows < 768 or outputs < 768:
        height, warps = 64, 4
        width = 64 if triton.cdiv(rows, 64) * triton.cdiv(outputs, 64) >= 96 else 32
    else:
        height, width, warps = 128, 128 if rows * outputs >= 1 << 22 else 64, 8
    if len(modules) > 1:
        width = min(width, gcd(*modules) & -gcd(*modules))
    programs = triton.cdiv(rows, height) * triton.cdiv(outputs, width)
    alone = programs <= PROGRAMS
    step = 128 if itemsize == 2 and (heavy if few else height == 64 and alone) else 64
    # One program on a multiprocessor may have more of its memory than those that share one.
    shared = _memory() if alone or height == 128 else SHARED_BYTES
    most = (3 if heavy and not alone and width > 16 else 8) if few else 6 if height == 32 else 4
    stages = min(most, triton.cdiv(inputs, step), shared // ((height + width) * step * itemsize))
    return Tile(height, width, step, warps, max(2, stages))


@cache
def _memory() -> int:
    """Bytes for the operands of a program that has a multiprocessor to itself."""
    if not torch.cuda.is_available():
        return ALONE_BYTES
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(torch.cuda.current_device())
    return min(ALONE_BYTES, int(properties["max_shared_mem"]) - 8192)


def _zero(device: torch.device) -> torch.Tensor:
    return torch.full((1,), 0, dtype=torch.int32, device=device)


# What nobody uses.
_nothing = cache(_zero)


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


def begin(x_NH: torch.Tensor, norm_H: torch.Tensor, eps: float) -> Stream:
    """A stream of its own that is ``x``, dense, and goes into the norm of weight ``norm``."""
    N, H = x_NH.shape
    own_NH, scaled_NH = torch.empty_like(x_NH), torch.empty_like(x_NH)
    squares_N1 = torch.empty((N, 1), dtype=torch.float64, device=x_NH.device)
    _begin[(N,)](x_NH, norm_H, own_NH, scaled_NH, squares_N1, H=H, WIDTH=triton.next_power_of_2(H))
    return Stream(own_NH, scaled_NH, squares_N1, eps)


def normed(stream: Stream) -> torch.Tensor:
    """``[N, H]``: the stream behind its norm."""
    N, H = stream.x_NH.shape
    out_NH = torch.empty_like(stream.x_NH)
    P = stream.squares_NP.shape[1]
    _divide[(N,)](
        stream.scaled_NH,
        stream.squares_NP,
        out_NH,
        P,
        stream.eps,
        H=H,
        WIDTH=triton.next_power_of_2(H),
        PARTS=triton.next_power_of_2(P),
    )
    return out_NH


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
    tile: Tile | None = None,
) -> torch.Tensor:
    """``f(x) @ weight.T + bias``, with the update on the rows from ``first_mask``.

    Args:
        x: ``[N, I]``, dense, or a stream, whose norm is ``f``; of one dtype with all else.
        ready_1: one int32 that is 0 and is used up; None: a new one.
        addend_NO: added to the outputs; rows may lie apart.
        gated: the outputs are gate and up; the result is ``silu(gate) * up``, ``[N, O / 2]``.
        order_N: int64; the rows, those with an update last. None: they lie in that order.
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
        low_rank,
        first_mask,
        ready_1,
        y_NO,
        gated,
        addend_NO,
        order_N,
        None,
        tile,
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
    tile = tile or tile_of(N, H, I, modules, x_NI.itemsize)
    squares_NP = torch.empty(
        (N, triton.cdiv(H, tile.outputs)), dtype=torch.float64, device=x_NI.device
    )
    onward = Stream(stream.x_NH, torch.empty_like(stream.x_NH), squares_NP, eps)
    _launch(
        x_NI,
        weight_HI,
        bias_H,
        low_rank,
        first_mask,
        ready_1,
        onward.x_NH,
        False,
        None,
        None,
        (onward, norm_H),
        tile,
    )
    return onward


def _launch(
    x: torch.Tensor | Stream,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    low_rank: LowRank | None,
    first_mask: int,
    ready_1: torch.Tensor | None,
    y_NO: torch.Tensor,
    gated: bool,
    addend_NO: torch.Tensor | None,
    order_N: torch.Tensor | None,
    onward: tuple[Stream, torch.Tensor] | None,
    tile: Tile | None,
) -> None:
    """Write ``y``; with ``onward`` and the weight of its norm, add to it and go on."""
    x_NI = x.scaled_NH if isinstance(x, Stream) else x
    N, (O, I) = len(x_NI), weight_OI.shape  # noqa: E741
    modules = low_rank.modules if low_rank and not gated else (O,)
    tile = tile or tile_of(N, O, I, modules, x_NI.itemsize)
    masks = N - first_mask if low_rank else 0
    row_tiles, makers, z_MZ, merged_OI = triton.cdiv(N, tile.rows), 0, y_NO, None
    if low_rank and masks and low_rank.merged_OI is not None:
        merged_OI = low_rank.merged_OI
        row_tiles = triton.cdiv(first_mask, tile.rows) + triton.cdiv(masks, tile.rows)
    elif low_rank and masks:
        Z = len(low_rank.A_ZI)
        makers = triton.cdiv(masks, tile.rows) * triton.cdiv(Z, tile.outputs)
        z_MZ = torch.empty((masks, Z), dtype=x_NI.dtype, device=x_NI.device)
    if ready_1 is None:
        ready_1 = _nothing(x_NI.device) if makers == 0 else _zero(x_NI.device)
    rank = low_rank.B_OZ.shape[1] if low_rank else 1
    # Where the second and third module begin; one that is not there begins behind the end.
    second = modules[0] if len(modules) > 1 else O
    third = second + modules[1] if len(modules) > 2 else O
    parts = x.squares_NP.shape[1] if isinstance(x, Stream) else 0
    _project[(makers + row_tiles * triton.cdiv(O, tile.outputs),)](
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
        y_NO if onward is None else onward[0].scaled_NH,
        y_NO if onward is None else onward[0].squares_NP,
        y_NO if onward is None else onward[1],
        N,
        first_mask,
        makers,
        parts,
        x.eps if isinstance(x, Stream) else 0.0,
        SECOND=second,
        THIRD=third,
        BIAS=bias_O is not None,
        ADD=addend_NO is not None,
        ORDERED=order_N is not None,
        UPDATE=makers > 0,
        MERGED=merged_OI is not None,
        PARTS=triton.next_power_of_2(parts) if parts else 0,
        GATED=gated,
        ONWARD=onward is not None,
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


@triton.jit
def _begin(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, own_ptr, scaled_ptr, squares_ptr, H: tl.constexpr, WIDTH: tl.constexpr
):
    """One row of a stream."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
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
):
    """One row behind its norm."""
    row = tl.program_id(0).to(tl.int64)
    lane, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    squares = tl.load(squares_ptr + row * parts + part, mask=part < parts, other=0.0)
    mean = tl.sum(squares.to(tl.float64), 0).to(tl.float32) / H
    scaled = tl.load(scaled_ptr + row * H + lane, mask=lane < H, other=0.0).to(tl.float32)
    out = scaled * (1.0 / tl.sqrt(mean + eps))
    tl.store(out_ptr + row * H + lane, out.to(out_ptr.dtype.element_ty), mask=lane < H)


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x_ptr,
    squares_ptr,
    weight_ptr,
    rows,
    end,
    outputs,
    order_ptr,
    parts,
    eps,
    ORDERED: tl.constexpr,
    PARTS: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``f(x) weight^T`` of these rows (before ``end``) and outputs, fp32."""
    # A row that is not there stands for the last one. Where that may be most of a tile, it is not
    # read at all: every program would fetch the same few bytes over and over.
    sparse: tl.constexpr = ROWS <= FEW_ROWS
    there = (rows < end)[:, None]
    if not sparse:
        rows = tl.minimum(rows, end - 1)
    if ORDERED:
        rows = tl.load(order_ptr + tl.minimum(rows, end - 1))
    x_rows_ptr = x_ptr + rows[:, None].to(tl.int64) * I
    weight_rows_ptr = weight_ptr + outputs[None, :].to(tl.int64) * I
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if PARTS:
        part = tl.arange(0, PARTS)[None, :]
        squares = tl.load(
            squares_ptr + rows[:, None].to(tl.int64) * parts + part,
            mask=(part < parts) & there if sparse else part < parts,
            other=0.0,
        )
    for first in tl.range(0, I, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        if I % INPUTS == 0:
            if sparse:
                x = tl.load(x_rows_ptr + inputs[None, :], mask=there, other=0.0)
            else:
                x = tl.load(x_rows_ptr + inputs[None, :])
            weight = tl.load(weight_rows_ptr + inputs[:, None])
        else:
            x = tl.load(x_rows_ptr + inputs[None, :], mask=there & (inputs < I)[None, :], other=0.0)
            weight = tl.load(
                weight_rows_ptr + inputs[:, None], mask=(inputs < I)[:, None], other=0.0
            )
        y = tl.dot(x, weight, y, input_precision="ieee")
    if PARTS:
        mean = tl.sum(squares.to(tl.float64), 1).to(tl.float32) / I
        y = y * (1.0 / tl.sqrt(mean + eps))[:, None]
    return y


@triton.jit(do_not_specialize=["addend_stride", "N", "first_mask", "makers", "parts"])
def _project(  # type: ignore[no-untyped-def]
    x_ptr,
    squares_ptr,
    weight_ptr,
    merged_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    y_ptr,
    z_ptr,
    ready_ptr,
    addend_ptr,
    addend_stride,
    order_ptr,
    scaled_ptr,
    onward_squares_ptr,
    norm_ptr,
    N,
    first_mask,
    makers,
    parts,
    eps,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ORDERED: tl.constexpr,
    UPDATE: tl.constexpr,
    MERGED: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    ONWARD: tl.constexpr,
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
    # An output that is not there stands for the last one; what it gives is not stored.
    if program < makers:
        mask_tiles = tl.cdiv(N - first_mask, ROWS)
        masks = (program % mask_tiles) * ROWS + tl.arange(0, ROWS)
        ranks = (program // mask_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
        rows = first_mask + masks
        z = _product(
            x_ptr,
            squares_ptr,
            A_ptr,
            rows,
            N,
            tl.minimum(ranks, Z - 1),
            order_ptr,
            parts,
            eps,
            ORDERED,
            PARTS,
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
        end = N
        if MERGED:  # no tile has rows of both kinds
            row_tiles = tl.cdiv(first_mask, ROWS) + tl.cdiv(N - first_mask, ROWS)
        first_row = ((program - makers) % row_tiles) * ROWS
        tile = (program - makers) // row_tiles
        if MERGED:
            clean_rows = tl.cdiv(first_mask, ROWS) * ROWS
            if first_row < clean_rows:
                end = first_mask
            else:
                first_row += first_mask - clean_rows
                weight_ptr = merged_ptr
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
            squares_ptr,
            weight_ptr,
            rows,
            end,
            safe_outputs,
            order_ptr,
            parts,
            eps,
            ORDERED,
            PARTS,
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
                masked = (masks >= 0) & (rows < end)
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
        real = rows < end
        place = rows.to(tl.int64)
        if ORDERED:
            place = tl.load(order_ptr + tl.minimum(rows, end - 1))
        if ADD:
            addend_ptrs = addend_ptr + place[:, None] * addend_stride + outputs[None, :]
            added = real[:, None] & (outputs < O)[None, :]
            y += tl.load(addend_ptrs, mask=added, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(y, [ROWS, OUTPUTS // 2, 2]))
            y = gate / (1.0 + tl.exp(-gate)) * up
            outputs = tile * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            width = O // 2
        else:
            width = O
        y_tile_ptr = y_ptr + place[:, None] * width + outputs[None, :]
        written = real[:, None] & (outputs < width)[None, :]
        if ONWARD:
            y += tl.load(y_tile_ptr, mask=written, other=0.0).to(tl.float32)
            # What follows sees the stream as it is stored.
            y = tl.where(written, y.to(y_ptr.dtype.element_ty).to(tl.float32), 0.0)
            part = place * tl.cdiv(O, OUTPUTS) + tile
            # Sums of squares of bf16 are exact in fp64: no tile's width shows in them.
            squares = tl.sum((y * y).to(tl.float64), 1)
            tl.store(onward_squares_ptr + part, squares, mask=real)
            scale = tl.load(norm_ptr + safe_outputs).to(tl.float32)
            scaled_tile_ptr = scaled_ptr + place[:, None] * width + outputs[None, :]
            scaled = (y * scale[None, :]).to(y_ptr.dtype.element_ty)
            tl.store(scaled_tile_ptr, scaled, mask=written)
        tl.store(y_tile_ptr, y.to(y_ptr.dtype.element_ty), mask=written)
