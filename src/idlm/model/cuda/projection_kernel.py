"""Triton kernel of a projection in a decoder layer: a tile of what `projection` launches.

Where the mask rows have weights of their own (``W + B A``), their tiles read those. Otherwise the
first programs make ``z = f(x) A^T`` of the mask rows, once; the others make a tile of the base
product each, and those that hold mask rows wait at their very end for ``z``. So clean rows pay
nothing, and there is neither a second launch nor a second pass over ``y``.
"""

# No deferred annotations here: Triton reads them.
import triton
import triton.language as tl

from idlm.model.cuda.overlap import fetch, wait
from idlm.model.cuda.tile import MIN_ROWS

FEW_ROWS = tl.constexpr(MIN_ROWS)
LINE = tl.constexpr(128)  # bytes of the L2 cache that come at a time
EARLY_PARTS = tl.constexpr(64)  # of sums of squares of a row, which are loaded before the product


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


@triton.jit
def squares_of(squares_ptr, rows, there, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of squares of all parts of these rows."""
    part = tl.arange(0, PARTS)[None, :]
    mask = (part < parts) & there[:, None]
    return tl.load(squares_ptr + rows[:, None] * parts + part, mask=mask, other=0.0)


@triton.jit
def shrink_of(squares, eps, I: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: E741
    """What the norm multiplies these rows by."""
    mean = tl.sum(squares.to(tl.float64), 1).to(tl.float32) / I
    return (1.0 / tl.sqrt(mean + eps))[:, None]


@triton.jit(
    do_not_specialize=[
        "addend_stride",
        "N",
        "first_mask",
        "makers",
        "parts",
    ]
)
def project_tile(  # type: ignore[no-untyped-def]
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
    cells_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
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
        index = tl.load(cells_ptr + place)
    if PARTS and PARTS <= EARLY_PARTS:
        squares = squares_of(squares_ptr, place, there, parts, PARTS)
    if BOXED:
        y, up = _boxed(
            x_box, box, first_row, first_output, apart, PAIRED, I, ROWS, box_outputs, INPUTS
        )
    else:
        y = _product(x_ptr, weight_ptr, place, there, source_outputs, I, ROWS, OUTPUTS, INPUTS)
    if PARTS:
        if PARTS > EARLY_PARTS:  # would take the registers that the product wants
            squares = squares_of(squares_ptr, place, there, parts, PARTS)
        shrink = shrink_of(squares, eps, I)
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
                cell = index // T * cache_stride_n + index % T * cache_stride_t
                out_ptr = cache_ptr + cell[:, None] + lane[None, :]
            tl.store(out_ptr + D // 2, second.to(y_ptr.dtype.element_ty), mask=written)
        tl.store(out_ptr, out.to(y_ptr.dtype.element_ty), mask=written)
