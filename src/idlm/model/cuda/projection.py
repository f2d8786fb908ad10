"""Triton kernel of a projection in a decoder layer: all that happens between two of its inputs.

One launch computes ``y = f(x) W^T`` for all rows and ``+ (f(x) A^T) B^T`` for the mask rows, which
come last (in memory, or in an order that is given); ``f`` is nothing or the RMS norm before the
projection. On the way out, the two halves of a gated MLP become one, heads are rotated and go where
they belong, or the result is added to the residual stream.

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
from triton.tools.tensor_descriptor import TensorDescriptor

from idlm.model.cuda.overlap import fetch, overlap, wait
from idlm.model.cuda.paged_attention import Rows

# The matrix units want 16 rows at least.
MIN_ROWS = 16
FEW_ROWS = tl.constexpr(MIN_ROWS)
# Memory of a program that shares a multiprocessor with others, and of one that need not.
SHARED_BYTES, BOXES_BYTES, ALONE_BYTES = 65_536, 98_304, 131_072
PROGRAMS = 132  # multiprocessors, about
ENOUGH = 100  # programs that keep most of them busy
# Weights that are brought into the L2 cache ahead; more of them would not stay there.
FETCHED = 1 << 22
LINE = tl.constexpr(128)  # bytes of it that come at a time
BOX_ROWS = 64  # tiles of so many rows are fetched as boxes; fewer gain nothing from it


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
    elif rows * outputs < 1 << 22:
        height, warps = 64, 4
        tiles = triton.cdiv(rows, height)
        widths = (128, 64) if itemsize == 2 else (64,)
        width = next((w for w in widths if tiles * triton.cdiv(outputs, w) >= ENOUGH), 32)
    else:
        height, width, warps = 128, 128, 8
    if len(modules) > 1:
        width = min(width, gcd(*modules) & -gcd(*modules))
    alone = triton.cdiv(rows, height) * triton.cdiv(outputs, width) <= PROGRAMS
    step = 128 if itemsize == 2 and (heavy if few else (height, width) == (64, 32)) else 64
    if height >= BOX_ROWS:
        shared, most = BOXES_BYTES if height == BOX_ROWS else _memory(), 6
    else:
        # One program on a multiprocessor may have more of its memory than those that share one.
        shared = _memory() if alone else SHARED_BYTES
        most = (3 if heavy and not alone and width > 16 else 8) if few else 6
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


@cache
def _has_boxes() -> bool:
    """Whether there is a copy engine for them; interpreted, they are tried out."""
    return triton.knobs.runtime.interpret or torch.cuda.get_device_capability() >= (9, 0)


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


@dataclass(frozen=True)
class Heads:
    """Where the heads of queries, keys and values go, which are the outputs of a projection.

    Attributes:
        cos_ND, sin_ND: as `paged_attention.rotate_and_append` takes them.
        k_NKTD, v_NKTD: the cache; it gets the keys, rotated, and the values.
        rows: of the forward.
    """

    cos_ND: torch.Tensor
    sin_ND: torch.Tensor
    k_NKTD: torch.Tensor
    v_NKTD: torch.Tensor
    rows: Rows


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
        **overlap(),
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
        low_rank,
        first_mask,
        ready_1,
        y_NO,
        gated,
        addend_NO,
        order_N,
        None,
        tile,
        heads,
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
    heads: Heads | None = None,
) -> None:
    """Write ``y``; with ``onward`` and the weight of its norm, add to it and go on."""
    x_NI = x.scaled_NH if isinstance(x, Stream) else x
    N, (O, I) = len(x_NI), weight_OI.shape  # noqa: E741
    modules = low_rank.modules if low_rank and not gated else (O,)
    D = heads.k_NKTD.shape[3] if heads else 0
    if heads:  # no tile has two heads
        modules = (*modules, D)
    tile = tile or tile_of(N, O, I, modules, x_NI.itemsize)
    if heads:
        modules = modules[:-1]
    masks = N - first_mask if low_rank else 0
    boxed = tile.rows >= BOX_ROWS and x_NI.itemsize == 2 and I % 8 == 0 and order_N is None
    boxed = boxed and _has_boxes()
    box_outputs = tile.outputs // 2 if (gated or heads) and boxed else tile.outputs
    row_tiles, makers, z_MZ, merged_OI = triton.cdiv(N, tile.rows), 0, y_NO, None
    if low_rank and masks and low_rank.merged_OI is not None:
        merged_OI = low_rank.merged_OI
        row_tiles = triton.cdiv(first_mask, tile.rows) + triton.cdiv(masks, tile.rows)
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
        x_box,
        weight_box,
        mask_box,
        *_places_of(heads, y_NO),
        BOXED=boxed,
        HEADS=heads is not None,
        Q=O // D - 2 * heads.k_NKTD.shape[1] if heads else 0,
        K=heads.k_NKTD.shape[1] if heads else 0,
        D=max(D, 2),
        T=heads.k_NKTD.shape[2] if heads else 1,
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
        LINES=triton.next_power_of_2(triton.cdiv(I * x_NI.itemsize, LINE.value))
        if O * I < FETCHED
        else 0,
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


def _places_of(heads: Heads | None, nothing: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """What the kernel is told of the heads."""
    if heads is None:
        return (nothing,) * 6 + (0,) * 7
    rows, k_NKTD = heads.rows, heads.k_NKTD
    return (
        heads.cos_ND,
        heads.sin_ND,
        k_NKTD,
        heads.v_NKTD,
        rows.table_BP,
        rows.start_B,
        rows.requests,
        rows.clean,
        rows.masks,
        *k_NKTD.stride()[:3],
        rows.table_BP.stride(0),
    )


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


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rows,
    there,
    outputs,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``x weight^T`` of these rows and outputs, fp32."""
    # Where most of a tile may not be there, that is not read: every program would fetch the same
    # few bytes over and over.
    sparse: tl.constexpr = ROWS <= FEW_ROWS
    there = there[:, None]
    x_rows_ptr = x_ptr + rows[:, None] * I
    weight_rows_ptr = weight_ptr + outputs[None, :].to(tl.int64) * I
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
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
    return y


@triton.jit
def _boxed(  # type: ignore[no-untyped-def]
    x_box,
    weight_box,
    first_row,
    first_output,
    APART: tl.constexpr,
    PAIRED: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``x weight^T`` of these rows and outputs, fp32; paired: and of the outputs ``APART``."""
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    other = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in tl.range(0, I, INPUTS):
        x = x_box.load([first_row, first])
        y = tl.dot(x, weight_box.load([first_output, first]).T, y)
        if PAIRED:
            other = tl.dot(x, weight_box.load([first_output + APART, first]).T, other)
    return y, other


@triton.jit(
    do_not_specialize=[
        "addend_stride",
        "N",
        "first_mask",
        "makers",
        "parts",
        "requests",
        "clean",
        "masks",
    ]
)
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
    x_box,
    weight_box,
    mask_box,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start_ptr,
    requests,
    clean,
    masks,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    table_stride,
    BOXED: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
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
    LINES: tl.constexpr,
    RANK: tl.constexpr,
    Z: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A tile of ``z`` or of ``y``."""
    program = tl.program_id(0)
    # Outputs that make one result are side by side in a tile: gate and up, or the two halves of
    # a head. A box holds one of the two.
    PAIRED: tl.constexpr = GATED or HEADS
    box_outputs: tl.constexpr = OUTPUTS // 2 if PAIRED and BOXED else OUTPUTS
    apart: tl.constexpr = D // 2 if HEADS else O // 2
    end = N
    row_tiles = tl.cdiv(N, ROWS)
    if MERGED:  # no tile has rows of both kinds
        row_tiles = tl.cdiv(first_mask, ROWS) + tl.cdiv(N - first_mask, ROWS)
    product = tl.maximum(program - makers, 0)
    first_row = (product % row_tiles) * ROWS
    tile = product // row_tiles
    box = weight_box
    if MERGED:
        clean_rows = tl.cdiv(first_mask, ROWS) * ROWS
        if first_row < clean_rows:
            end = first_mask
        else:
            first_row += first_mask - clean_rows
            weight_ptr = merged_ptr
            box = mask_box
    first_output = tile * OUTPUTS
    if GATED:
        first_output = tile * (OUTPUTS // 2)
    if HEADS:
        first_output = first_output // D * D + first_output % D // 2
    if PAIRED:
        pair = tl.arange(0, OUTPUTS)
        outputs = first_output + pair // 2 + (pair % 2) * apart
    else:
        outputs = first_output + tl.arange(0, OUTPUTS)
    # An output that is not there stands for the last one; what it gives is not stored.
    safe_outputs = tl.minimum(outputs, O - 1)
    source_outputs = safe_outputs
    if UPDATE:  # noqa: SIM102  # a constant: without updates the rest is not compiled
        if program < makers:
            mask_tiles = tl.cdiv(N - first_mask, ROWS)
            first_row = first_mask + (program % mask_tiles) * ROWS
            tile = program // mask_tiles
            first_output = tile * box_outputs
            source_outputs = tl.minimum(first_output + tl.arange(0, OUTPUTS), Z - 1)
            weight_ptr = A_ptr
            box = mask_box
    rows = first_row + tl.arange(0, ROWS)
    width = O // 2 if GATED else O
    if OVERLAP and LINES:  # noqa: SIM102
        if (first_row == 0) | (first_row == first_mask):  # the others read the same
            line: tl.constexpr = LINE // (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
            inputs = tl.minimum(tl.arange(0, LINES) * line, I - 1)
            fetch(weight_ptr + source_outputs[:, None].to(tl.int64) * I + inputs[None, :])
    wait(OVERLAP)
    # A row that is not there stands for the last one.
    there = rows < end
    place = tl.minimum(rows, end - 1).to(tl.int64)
    if ORDERED:
        place = tl.load(order_ptr + place)
    if BIAS:
        bias = tl.load(bias_ptr + safe_outputs)
    if ADD:
        addend_ptrs = addend_ptr + place[:, None] * addend_stride + outputs[None, :]
        addend = tl.load(addend_ptrs, mask=there[:, None] & (outputs < O)[None, :], other=0.0)
    if ONWARD:
        before_ptr = y_ptr + place[:, None] * O + outputs[None, :]
        before = tl.load(before_ptr, mask=there[:, None] & (outputs < O)[None, :], other=0.0)
        scale = tl.load(norm_ptr + safe_outputs)
    if HEADS:
        head = first_output // D
        lane = first_output % D + tl.arange(0, OUTPUTS // 2)
        angle = place[:, None] * D + lane[None, :]
        cos = tl.load(cos_ptr + angle, mask=there[:, None], other=0.0)
        # Sines carry the sign of the first half.
        sin = tl.load(sin_ptr + angle + D // 2, mask=there[:, None], other=0.0)
        clean_rows = requests * clean
        b = tl.where(rows < clean_rows, rows // tl.maximum(clean, 1), 0)
        b = tl.where(rows < clean_rows, b, (rows - clean_rows) // tl.maximum(masks, 1))
        r = tl.where(rows < clean_rows, rows - b * clean, clean + rows - clean_rows - b * masks)
        index = tl.load(start_ptr + b, mask=there, other=0) + r
        block = tl.load(table_ptr + b * table_stride + index // T, mask=there, other=0)
    if PARTS:
        part = tl.arange(0, PARTS)[None, :]
        squares = tl.load(
            squares_ptr + place[:, None] * parts + part,
            mask=(part < parts) & there[:, None],
            other=0.0,
        )
    if BOXED:
        y, up = _boxed(
            x_box, box, first_row, first_output, apart, PAIRED, I, ROWS, box_outputs, INPUTS
        )
    else:
        y = _product(x_ptr, weight_ptr, place, there, source_outputs, I, ROWS, OUTPUTS, INPUTS)
    if PARTS:
        mean = tl.sum(squares.to(tl.float64), 1).to(tl.float32) / I
        shrink = (1.0 / tl.sqrt(mean + eps))[:, None]
        y = y * shrink
    if UPDATE:  # noqa: SIM102
        if program < makers:
            ranks = tile * box_outputs + tl.arange(0, box_outputs)
            z_tile_ptr = z_ptr + (rows - first_mask)[:, None] * Z + ranks[None, :]
            made = there[:, None] & (ranks < Z)[None, :]
            tl.store(z_tile_ptr, y.to(z_ptr.dtype.element_ty), mask=made)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            tl.atomic_add(ready_ptr, 1, sem="release")
    if program >= makers:
        if BOXED and PAIRED:
            if PARTS:
                up = up * shrink
            sums = tl.reshape(tl.join(y, up), [ROWS, OUTPUTS])
        else:
            sums = y
        if UPDATE:  # noqa: SIM102  # a constant: without updates the rest is not compiled
            if first_row + ROWS > first_mask:
                while tl.atomic_add(ready_ptr, 0, sem="acquire") < makers:
                    pass
                ranks = tl.arange(0, RANKS)
                masked = (rows >= first_mask) & (rows < end)
                z_rows_ptr = z_ptr + (rows - first_mask)[:, None] * Z + ranks[None, :]
                real_z = masked[:, None] & (ranks < RANK)[None, :]
                B = tl.load(
                    B_ptr + safe_outputs[None, :] * RANK + ranks[:, None],
                    mask=(ranks < RANK)[:, None],
                    other=0.0,
                )
                if GATED:
                    gate = (tl.arange(0, OUTPUTS) % 2 == 0)[None, :]
                    z = tl.load(z_rows_ptr, mask=real_z, other=0.0)
                    sums = tl.dot(z, tl.where(gate, B, 0.0), sums, input_precision="ieee")
                    z = tl.load(z_rows_ptr + RANK, mask=real_z, other=0.0)
                    sums = tl.dot(z, tl.where(gate, 0.0, B), sums, input_precision="ieee")
                else:
                    module = (tile * OUTPUTS >= SECOND).to(tl.int32)
                    module += (tile * OUTPUTS >= THIRD).to(tl.int32)
                    z = tl.load(z_rows_ptr + module * RANK, mask=real_z, other=0.0)
                    sums = tl.dot(z, B, sums, input_precision="ieee")
        if BIAS:
            sums += bias.to(tl.float32)[None, :]
        if ADD:
            sums += addend.to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(sums, [ROWS, OUTPUTS // 2, 2]))
            out = gate / (1.0 + tl.exp(-gate)) * up
            columns = tile * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        elif HEADS:
            # Rounded first: so it comes out as if a launch of its own had rotated what is stored.
            sums = sums.to(y_ptr.dtype.element_ty).to(tl.float32)
            out, second = tl.split(tl.reshape(sums, [ROWS, OUTPUTS // 2, 2]))
            if head < Q + K:
                first = out
                out = first * cos.to(tl.float32) - second * sin.to(tl.float32)
                second = second * cos.to(tl.float32) + first * sin.to(tl.float32)
            columns = first_output + tl.arange(0, OUTPUTS // 2)
        else:
            out = sums
            columns = outputs
        written = there[:, None] & (columns < width)[None, :]
        cells = place[:, None] * width + columns[None, :]
        if ONWARD:
            # What follows sees the stream as it is stored.
            out = (out + before.to(tl.float32)).to(y_ptr.dtype.element_ty).to(tl.float32)
            out = tl.where(written, out, 0.0)
            part = place * tl.cdiv(O, OUTPUTS) + tile
            # Sums of squares of bf16 are exact in fp64: no tile's width shows in them.
            onward = tl.sum((out * out).to(tl.float64), 1)
            tl.store(onward_squares_ptr + part, onward, mask=there)
            scaled = (out * scale.to(tl.float32)[None, :]).to(y_ptr.dtype.element_ty)
            tl.store(scaled_ptr + cells, scaled, mask=written)
        out_ptr = y_ptr + cells
        if HEADS:
            if head >= Q:
                cache_ptr = k_cache_ptr + (head - Q) * cache_stride_h
                if head >= Q + K:
                    cache_ptr = v_cache_ptr + (head - Q - K) * cache_stride_h
                cell = block.to(tl.int64) * cache_stride_n + (index % T) * cache_stride_t
                out_ptr = cache_ptr + cell[:, None] + lane[None, :]
            tl.store(out_ptr + D // 2, second.to(y_ptr.dtype.element_ty), mask=written)
        tl.store(out_ptr, out.to(y_ptr.dtype.element_ty), mask=written)
